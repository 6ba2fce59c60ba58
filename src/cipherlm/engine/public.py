"""The keys that a server may have. None of them leads to a secret key."""

from __future__ import annotations

import json
from typing import Any, ClassVar

from numpy.typing import ArrayLike

from . import _native
from .ciphertext import Ciphertext, Plaintext
from .parameters import Parameters
from .serialization import Serializable


class ServerKey(Serializable):
    """A key that belongs to a secret key and does not lead to it."""

    __slots__ = ("parameters",)

    def __init__(self, handle: int, parameters: Parameters) -> None:
        super().__init__(handle)
        self.parameters = parameters

    @property
    def fingerprint(self) -> str:
        """The name of the secret key that it belongs to: random, not computed from it."""
        return _native.key_fingerprint(self.handle)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.fingerprint})"


class PublicKey(ServerKey):
    """A key that encrypts, and that makes fresh encryptions of zero for a refresh."""

    __slots__ = ()
    _frame_type: ClassVar[int] = 3

    @classmethod
    def _adopt(cls, handle: int, parameters: Parameters) -> PublicKey:
        return cls(handle, parameters)

    def encrypt(
        self, values: ArrayLike | Plaintext, level: int | None = None, scale: float | None = None
    ) -> Ciphertext:
        """Encrypt a vector or a plaintext."""
        plaintext = as_plaintext(self.parameters, values, level, scale)
        return Ciphertext(_native.create("cl_encrypt_public", self.handle, plaintext.handle), self.parameters)


class EvaluationKeys(ServerKey):
    """A relinearisation key and keys for rotations and conjugation, seed-compressed.

    They are expanded, to twice the memory, when an :class:`~cipherlm.engine.Evaluator`
    is made with them. On the wire they are always compressed.
    """

    __slots__ = ()
    _frame_type: ClassVar[int] = 4

    @classmethod
    def _adopt(cls, handle: int, parameters: Parameters) -> EvaluationKeys:
        return cls(handle, parameters)

    @property
    def _about(self) -> dict[str, Any]:
        about: dict[str, Any] = json.loads(_native.describe("cl_evaluation_keys_describe", self.handle))
        return about

    @property
    def nbytes(self) -> int:
        """The memory that they take now."""
        return int(self._about["nbytes"])

    @property
    def relinearization_level(self) -> int | None:
        """The highest level that products can be relinearised at, if they can at all."""
        level = int(self._about["relinearization"])
        return None if level < 0 else level

    @property
    def galois_levels(self) -> dict[int, int]:
        """The highest level of each Galois key, by its Galois element."""
        return {int(element): level for element, level in self._about["galois"].items()}

    def expand(self) -> None:
        """Expand the keys now rather than when an evaluator is made."""
        _native.call("cl_evaluation_keys_expand", self.handle)


def as_plaintext(
    parameters: Parameters, values: ArrayLike | Plaintext, level: int | None, scale: float | None
) -> Plaintext:
    """Return values as a plaintext."""
    if not isinstance(values, Plaintext):
        return Plaintext.encode(parameters, values, level, scale)
    if level is not None or scale is not None:
        raise ValueError("a plaintext has its level and its scale already")
    return values
