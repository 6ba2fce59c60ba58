"""One client and server for a small layout, made once."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from cipherlm.engine import Evaluator, Parameters, PublicKey, SecretKey
from cipherlm.schemes.ckks.arithmetic import Arithmetic, Encodings
from cipherlm.schemes.ckks.chunk import EncryptedChunk
from cipherlm.schemes.ckks.decoding import EncryptedToken
from cipherlm.schemes.ckks.encrypted import EncryptedTensor, encrypted
from cipherlm.schemes.ckks.layout import Layout
from cipherlm.schemes.ckks.refresh import MaskedRefresh

from .parties import Keys, decrypt, encrypt, evaluation_keys


@dataclass
class Parties:
    """A client and its server in one process, which meet in a masked refresh."""

    layout: Layout
    secret_key: SecretKey
    public_key: PublicKey
    arithmetic: Arithmetic

    @classmethod
    def make(cls, tokens, heads, head_dim, **more):
        parameters = Parameters.preset(14)
        layout = Layout(parameters.slots, tokens, heads, head_dim, **more)
        secret_key = SecretKey.generate(parameters)
        public_key = secret_key.public_key()
        evaluator = Evaluator(parameters, evaluation_keys(secret_key, layout))
        refresh = MaskedRefresh(evaluator, public_key, secret_key.refresh)
        encodings = Encodings(parameters, layout)
        return cls(layout, secret_key, public_key, Arithmetic(evaluator, encodings, refresh))

    def behind(self, prefix) -> Parties:
        """Return the same parties, whose keys are those of any prefix, with one of another length."""
        layout = replace(self.layout, prefix=prefix)
        encodings = Encodings(self.arithmetic.parameters, layout)
        arithmetic = Arithmetic(self.arithmetic.evaluator, encodings, self.arithmetic._refresher)
        return Parties(layout, self.secret_key, self.public_key, arithmetic)

    def encrypt(self, hidden, start=0, level=4) -> EncryptedTensor:
        ciphertexts = encrypt(self.secret_key, self.layout, hidden, start=start, level=level)
        return encrypted(self.arithmetic, ciphertexts, len(hidden), start)

    def encrypt_token(self, hidden, position, level=8) -> EncryptedToken:
        slots = self.layout.decoding.pack(hidden)
        return EncryptedToken(self.arithmetic, (self.secret_key.encrypt(slots, level),), position)

    def encrypt_heads(self, values, position=0, level=4) -> EncryptedTensor:
        """Encrypt queries, keys or values (heads, tokens, head_dim), whose first token is at a position."""
        ciphertext = self.secret_key.encrypt(self.layout.pack_heads(values), level)
        return EncryptedTensor(self.arithmetic, (ciphertext,), values.shape[1], heads=True, position=position)

    def encrypt_column(self, values, position, level) -> EncryptedToken:
        """Encrypt what all features of a token, or of each of its heads (heads,), are multiplied with."""
        decoding = self.layout.decoding
        shape = (self.layout.tokens, decoding.lower, self.layout.padded_heads, self.layout.tokens)
        padded = np.zeros(self.layout.padded_heads)
        padded[: len(values)] = values
        slots = np.broadcast_to(padded[:, None], shape).ravel()
        return EncryptedToken(self.arithmetic, (self.secret_key.encrypt(slots, level),), position)

    def encrypt_chunk(self, hidden, position, level=8) -> EncryptedChunk:
        ciphertexts = encrypt(self.secret_key, self.layout, hidden, level=level)
        return EncryptedChunk(self.arithmetic, tuple(ciphertexts), len(hidden), position=position)

    def encrypt_chunk_heads(self, values, position) -> EncryptedChunk:
        """Encrypt queries, keys or values (heads, tokens, head_dim) of a chunk behind others."""
        missing = self.layout.tokens - values.shape[1]
        padded = np.concatenate([values, np.repeat(values[:, -1:], missing, axis=1)], axis=1)
        ciphertext = self.secret_key.encrypt(self.layout.pack_heads(padded), 3)
        return EncryptedChunk(self.arithmetic, (ciphertext,), values.shape[1], heads=True, position=position)

    def encrypt_token_heads(self, values, position, *, past=False) -> EncryptedToken:
        """Encrypt one token's queries, or with ``past`` keys and ``1j`` times values: (heads, head_dim)."""
        decoding = self.layout.decoding
        order = decoding.repeated_order if past else decoding.head_order
        slots = decoding.pack_heads(values, order)
        ciphertext = self.secret_key.encrypt(slots, decoding.attention_level)
        return EncryptedToken(self.arithmetic, (ciphertext,), position, heads=True)

    def decrypt_token(self, tensor, features=None) -> np.ndarray:
        (part,) = tensor.parts
        return self.layout.decoding.unpack(self.secret_key.decrypt(part).real, features or self.layout.width)

    def decrypt_token_heads(self, ciphertext) -> np.ndarray:
        """Return one token's heads (repetitions, heads, head_dim), complex."""
        layout, order = self.layout, self.layout.decoding.head_order
        slots = self.secret_key.decrypt(ciphertext).reshape(layout.tokens, -1)
        values = np.zeros((layout.tokens, layout.heads * layout.head_dim), complex)
        values[:, order[order >= 0]] = slots[:, order >= 0]
        return values.reshape(layout.tokens, layout.heads, layout.head_dim)

    def decrypt(self, tensor, features=None) -> np.ndarray:
        return decrypt(self.secret_key, tensor, features or self.layout.width)

    def decrypt_heads(self, tensor) -> np.ndarray:
        (part,) = tensor.parts
        return self.layout.unpack_heads(self.secret_key.decrypt(part).real, tensor.tokens, tensor.start)


@pytest.fixture(scope="module")
def keys() -> Keys:
    return Keys()


@pytest.fixture(scope="session")
def small() -> Parties:
    """Three heads of ten features, so that everything has padding."""
    return Parties.make(tokens=4, heads=3, head_dim=10)


@pytest.fixture(scope="session")
def turning() -> Parties:
    """The same with rotary positions and a prefix apart."""
    return Parties.make(tokens=4, heads=3, head_dim=10, prefix=5, rotary=True)
