"""Bootstrapping: a refresh without the client, for larger parameters and at a price."""

from __future__ import annotations

from typing import ClassVar

from . import _native
from .ciphertext import Ciphertext
from .parameters import Parameters
from .public import ServerKey


class BootstrappingKeys(ServerKey):
    """The evaluation keys of the bootstrapping circuit: gigabytes.

    They exist for ring degrees 2^15 and 2^16, where the ciphertext modulus leaves the
    circuit room below the security limit; ``bootstrappable`` has such parameters.
    """

    __slots__ = ()
    _frame_type: ClassVar[int] = 9

    @classmethod
    def _adopt(cls, handle: int, parameters: Parameters) -> BootstrappingKeys:
        return cls(handle, parameters)

    @property
    def nbytes(self) -> int:
        """The memory that they take."""
        return _native.integers("cl_bootstrapping_keys_bytes", self.handle, 1)[0]


class Bootstrapper:
    """Raises ciphertexts to the highest level. It holds no secret."""

    __slots__ = ("_native", "parameters")

    def __init__(self, keys: BootstrappingKeys) -> None:
        self._native = _native.Handle(_native.create("cl_bootstrapper_new", keys.handle))
        self.parameters = keys.parameters

    def bootstrap(self, ciphertext: Ciphertext) -> Ciphertext:
        """Return the ciphertext at the highest level.

        Values of modulus up to about 1 come back with some 15 bits of precision; they
        must be small against ``q[0] / scale``.
        """
        handle = _native.create("cl_bootstrap", self._native.handle, ciphertext.handle)
        return Ciphertext(handle, self.parameters)


def bootstrappable() -> Parameters:
    """Return the smallest parameters that can be bootstrapped: 2^15, four levels."""
    return Parameters(15, [40, 31, 31, 31, 31], [56, 56], 31)
