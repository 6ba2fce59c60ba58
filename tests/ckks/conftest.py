"""One client and server for a small layout, made once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from cipherlm.engine import Evaluator, Parameters, PublicKey, SecretKey
from cipherlm.schemes.ckks.decoding import EncryptedToken
from cipherlm.schemes.ckks.encrypted import (
    Arithmetic,
    Encodings,
    EncryptedTensor,
    decrypt,
    encrypt,
    evaluation_keys,
)
from cipherlm.schemes.ckks.layout import Layout
from cipherlm.schemes.ckks.refresh import MaskedRefresh


@dataclass
class Parties:
    """A client and its server in one process, which meet in a masked refresh."""

    layout: Layout
    secret_key: SecretKey
    public_key: PublicKey
    arithmetic: Arithmetic

    @classmethod
    def make(cls, tokens, heads, head_dim):
        parameters = Parameters.preset(14)
        layout = Layout(parameters.slots, tokens, heads, head_dim)
        secret_key = SecretKey.generate(parameters)
        public_key = secret_key.public_key()
        evaluator = Evaluator(parameters, evaluation_keys(secret_key, layout))
        refresh = MaskedRefresh(evaluator, public_key, secret_key.refresh)
        encodings = Encodings(parameters, layout)
        return cls(layout, secret_key, public_key, Arithmetic(evaluator, encodings, refresh))

    def encrypt(self, hidden, start=0, level=4) -> EncryptedTensor:
        ciphertexts = encrypt(self.secret_key, self.layout, hidden, start=start, level=level)
        return self.arithmetic.tensor(ciphertexts, len(hidden), start)

    def encrypt_token(self, hidden, position, level=8) -> EncryptedToken:
        slots = self.layout.decoding.pack(hidden)
        return EncryptedToken(self.arithmetic, (self.secret_key.encrypt(slots, level),), position)

    def decrypt_token(self, tensor, features=None) -> np.ndarray:
        (part,) = tensor.parts
        return self.layout.decoding.unpack(self.secret_key.decrypt(part).real, features or self.layout.width)

    def decrypt(self, tensor, features=None) -> np.ndarray:
        return decrypt(self.secret_key, tensor, features or self.layout.width)

    def decrypt_heads(self, tensor) -> np.ndarray:
        (part,) = tensor.parts
        return self.layout.unpack_heads(self.secret_key.decrypt(part).real, tensor.tokens, tensor.start)


@pytest.fixture(scope="session")
def small() -> Parties:
    """Three heads of ten features, so that everything has padding."""
    return Parties.make(tokens=4, heads=3, head_dim=10)
