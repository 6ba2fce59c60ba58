"""The messages of a masked refresh.

The server masks ciphertexts (:meth:`Evaluator.mask`) and sends a request; the client
answers (:meth:`SecretKey.refresh`) with fresh ciphertexts at the wanted level; the
server takes the masks off (:meth:`Evaluator.unmask`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from . import _native
from .parameters import Parameters
from .serialization import Serializable


class Subring(NamedTuple):
    """What is known of a vector of slots: that it repeats as a whole, ``copies`` times, and that it is real.

    A refresh sends that much less of it, and adds more noise: see ``benchmarks/refreshes.py``. ``copies`` is
    a power of two. Of copies that differ a little their mean is refreshed, of complex numbers the real part.
    """

    copies: int = 1
    real: bool = False

    @property
    def rotations(self) -> int:
        """How many rotations and conjugations a server takes to have the vector whole again."""
        return self.copies.bit_length() - 1 + self.real


Held = Sequence[Subring]
"""What a ciphertext holds: one vector, or two real ones as real and imaginary part."""


class RefreshRequest(Serializable):
    """Masked ciphertexts, and the level to encrypt them at. From server to client."""

    __slots__ = ("level", "parameters", "reply_bytes", "shift", "size", "to_level")
    _frame_type: ClassVar[int] = 7

    def __init__(self, handle: int, parameters: Parameters) -> None:
        super().__init__(handle)
        self.parameters = parameters
        info = _native.integers("cl_refresh_info", handle, 5)
        self.level, self.to_level, self.shift, self.size = info[:4]
        self.reply_bytes = info[4]
        """How many bytes the ciphertexts of the reply take."""

    @classmethod
    def _adopt(cls, handle: int, parameters: Parameters) -> RefreshRequest:
        return cls(handle, parameters)

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

    __slots__ = ("subrings", "to_level")

    def __init__(self, handle: int, subrings: Sequence[Subring], to_level: int) -> None:
        super().__init__(handle)
        self.subrings, self.to_level = tuple(subrings), to_level

    @property
    def size(self) -> int:
        """How many ciphertexts come back."""
        return len(self.subrings)

    def __repr__(self) -> str:
        return f"RefreshMask({self.size} ciphertexts)"


def wrap_probability(parameters: Parameters, level: int, scale: float, bound: float) -> float:
    """Bound the probability that a refresh of one ciphertext goes wrong.

    The mask is uniform modulo Q = q[0]...q[level], so the sum wraps around where the
    mask falls within the message's size of Q/2: a coefficient is at most ``scale *
    bound`` for slots of modulus at most ``bound``, and there are ``degree`` of them.
    It is twice that for a ciphertext that holds two real vectors, which the client takes apart. This is the
    price of perfect hiding; it shows as a wrong result, never as a leak.
    """
    modulus = math.prod(parameters.q[: level + 1])
    return min(1.0, parameters.degree * scale * bound / modulus)
