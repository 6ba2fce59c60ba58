"""The messages of a masked refresh.

The server masks ciphertexts (:meth:`Evaluator.mask`) and sends a request; the client
answers (:meth:`SecretKey.refresh`) with fresh ciphertexts at the wanted level; the
server takes the masks off (:meth:`Evaluator.unmask`).
"""

from __future__ import annotations

import math
from typing import ClassVar

from . import _native
from .parameters import Parameters
from .serialization import Serializable

_SEED_BYTES = 32


class RefreshRequest(Serializable):
    """Masked ciphertexts, and the level to encrypt them at. From server to client."""

    __slots__ = ("level", "parameters", "shift", "size", "to_level")
    _frame_type: ClassVar[int] = 7

    def __init__(self, handle: int, parameters: Parameters) -> None:
        super().__init__(handle)
        self.parameters = parameters
        self.level, self.to_level, self.shift, self.size = _native.integers("cl_refresh_info", handle, 4)

    @classmethod
    def _adopt(cls, handle: int, parameters: Parameters) -> RefreshRequest:
        return cls(handle, parameters)

    @property
    def reply_bytes(self) -> int:
        """How many bytes the ciphertexts of the reply take: for each a seed, and residues packed to bits."""
        bits = sum(prime.bit_length() for prime in self.parameters.q[: self.to_level + 1])
        return self.size * (_SEED_BYTES + self.parameters.degree * bits // 8)

    def __repr__(self) -> str:
        return f"RefreshRequest({self.size} ciphertexts, level {self.level} to {self.to_level})"


class RefreshReply(Serializable):
    """Fresh encryptions of the masked integers. From client to server."""

    __slots__ = ("parameters", "size")
    _frame_type: ClassVar[int] = 8

    def __init__(self, handle: int, parameters: Parameters) -> None:
        super().__init__(handle)
        self.parameters = parameters
        self.size = _native.integers("cl_refresh_reply_count", handle, 1)[0]

    @classmethod
    def _adopt(cls, handle: int, parameters: Parameters) -> RefreshReply:
        return cls(handle, parameters)

    def __repr__(self) -> str:
        return f"RefreshReply({self.size} ciphertexts)"


class RefreshMask(_native.Handle):
    """What the server keeps to take the masks off. It serves once and is never written."""

    __slots__ = ("size",)

    def __init__(self, handle: int, size: int) -> None:
        super().__init__(handle)
        self.size = size

    def __repr__(self) -> str:
        return f"RefreshMask({self.size} ciphertexts)"


def wrap_probability(parameters: Parameters, level: int, scale: float, bound: float) -> float:
    """Bound the probability that a refresh of one ciphertext goes wrong.

    The mask is uniform modulo Q = q[0]...q[level], so the sum wraps around where the
    mask falls within the message's size of Q/2: a coefficient is at most ``scale *
    bound`` for slots of modulus at most ``bound``, and there are ``degree`` of them.
    This is the price of perfect hiding; it shows as a wrong result, never as a leak.
    """
    modulus = math.prod(parameters.q[: level + 1])
    return min(1.0, parameters.degree * scale * bound / modulus)
