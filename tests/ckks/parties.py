"""What tests do as a client, and a refresh that is no protocol."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cipherlm.engine import Ciphertext, EvaluationKeys, Held, SecretKey, Subring
from cipherlm.schemes.ckks.encrypted import EncryptedTensor
from cipherlm.schemes.ckks.layout import ATTENTION_LEVEL, Layout
from cipherlm.schemes.ckks.session import Client

Float64 = NDArray[np.float64]


def encrypt(
    secret_key: SecretKey, layout: Layout, hidden: Float64, *, start: int = 0, level: int = ATTENTION_LEVEL
) -> list[Ciphertext]:
    """Encrypt hidden states (tokens, width), the first as token ``start``: the client's side.

    The last is repeated in the slots of tokens after it. No token sees those, their values are in the same
    ranges as the others', and the server does not learn how many tokens there are.
    """
    missing = layout.tokens - start - len(hidden)
    if missing < 0:
        raise ValueError(f"{len(hidden)} tokens from token {start} on, where {layout.tokens} have room")
    padded = np.concatenate([hidden, np.repeat(hidden[-1:], missing, axis=0)])
    return [secret_key.encrypt(slots, level) for slots in layout.pack(padded, start)]


def decrypt(secret_key: SecretKey, tensor: EncryptedTensor, features: int) -> Float64:
    """Decrypt hidden states (tokens, features): the client's side."""
    slots = [secret_key.decrypt(part).real for part in tensor.parts]
    return tensor.arithmetic.layout.unpack(slots, features, tensor.tokens, tensor.start)


def evaluation_keys(secret_key: SecretKey, layout: Layout) -> EvaluationKeys:
    """Make the keys that a server needs for a layout: the client's side."""
    rotations = layout.rotations(secret_key.parameters.max_level)
    return secret_key.evaluation_keys(rotations, conjugation=True)


class InProcessRefresh:
    """Decrypts and encrypts, in one process with the secret key: for tests and measurements only."""

    def __init__(self, secret_key: SecretKey) -> None:
        self._secret_key = secret_key

    def __call__(
        self, ciphertexts: Sequence[Ciphertext], held: Sequence[Held], level: int, shift: int
    ) -> list[Ciphertext]:
        """Return ciphertexts at ``level``, one for each vector that is held."""
        fresh = []
        for ciphertext, subrings in zip(ciphertexts, held, strict=True):
            slots = self._secret_key.decrypt(ciphertext)
            parts = [slots] if not subrings[0].real else [slots.real, slots.imag][: len(subrings)]
            scale = ciphertext.scale / 2**shift
            fresh += [self._secret_key.encrypt(part, level, scale) for part in parts]
        return fresh


class Keys:
    """One secret key, and evaluation keys that serve all layouts with the same rotations."""

    def __init__(self) -> None:
        self.secret_key: SecretKey | None = None
        self.kept: dict[tuple[tuple[int, int], ...], object] = {}

    def client(self, geometry):
        keys = self
        if keys.secret_key is None:
            keys.secret_key = SecretKey.generate(geometry.parameters)

        class KeptClient(Client):
            def evaluation_keys(self):
                rotations = geometry.layout.rotations(geometry.parameters.max_level)
                about = tuple(sorted(rotations.items()))
                if about not in keys.kept:
                    keys.kept[about] = super().evaluation_keys()
                return keys.kept[about]

        return KeptClient(keys.secret_key, geometry)


BOUND = 1e-3
"""Of what slots that are to be equal differ, and of imaginary parts, in parts of the greatest slot."""


class Checking:
    """A refresher that first holds what is said of slots against them, with the secret key.

    ``found`` is what was said. No more than ``most`` repetitions go to the client.
    """

    def __init__(self, refresher, secret_key: SecretKey, most: int) -> None:
        self._refresher, self._secret_key, self._most = refresher, secret_key, most
        self.found: list[Subring] = []

    def __call__(
        self, ciphertexts: Sequence[Ciphertext], held: Sequence[Held], level: int, shift: int
    ) -> list[Ciphertext]:
        for ciphertext, subrings in zip(ciphertexts, held, strict=True):
            slots = self._secret_key.decrypt(ciphertext)
            greatest = np.abs(slots).max()
            if len(subrings) == 1 and subrings[0].real:
                assert np.abs(slots.imag).max() < BOUND * greatest
            parts = [slots] if len(subrings) == 1 else [slots.real, slots.imag]
            for part, subring in zip(parts, subrings, strict=True):
                copies = part.reshape(subring.copies, -1)
                assert np.abs(copies - copies[0]).max() < BOUND * greatest
                self.found.append(subring)
        known = [[Subring(min(self._most, copies), real) for copies, real in some] for some in held]
        return self._refresher(ciphertexts, known, level, shift)
