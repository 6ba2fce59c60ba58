"""Encoded and encrypted vectors."""

from __future__ import annotations

import ctypes
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _native
from .errors import InvalidArgumentError
from .parameters import Parameters
from .serialization import Serializable

MAX_PRECISION = 64


class _PlaintextInfo(NamedTuple):
    level: int
    nbytes: int
    scale: float


class _CiphertextInfo(NamedTuple):
    level: int
    degree: int
    nbytes: int
    seeded: bool
    scale: float


class Plaintext(Serializable):
    """An encoded vector, ready to be multiplied with, added to or made a ciphertext."""

    __slots__ = ("parameters",)
    _frame_type: ClassVar[int] = 5

    def __init__(self, handle: int, parameters: Parameters) -> None:
        super().__init__(handle)
        self.parameters = parameters

    @classmethod
    def _adopt(cls, handle: int, parameters: Parameters) -> Plaintext:
        return cls(handle, parameters)

    @classmethod
    def encode(
        cls, parameters: Parameters, values: ArrayLike, level: int | None = None, scale: float | None = None
    ) -> Plaintext:
        """Encode a vector of at most ``parameters.slots`` values, zeros after the last.

        The level is the highest and the scale the default one where they are not given.
        """
        array = complex_vector(parameters, values)
        handle = _native.create(
            "cl_encode",
            parameters.handle,
            array.ctypes.data,
            array.size,
            parameters.max_level if level is None else level,
            parameters.scale if scale is None else scale,
        )
        return cls(handle, parameters)

    def decode(self, precision: float | None = None) -> NDArray[Any]:
        """Return all slots: complex numbers, or real ones in the conjugate-invariant ring.

        ``precision`` rounds to that many bits after the point (0: to integers), which
        takes the noise out of a result that is to be shown to somebody else.
        """
        if precision is not None and not abs(precision) <= MAX_PRECISION:
            raise InvalidArgumentError(f"a precision of at most {MAX_PRECISION} bits, not {precision}")
        # The native side takes 0 for no rounding; 2^tiny is 1 and rounds to integers.
        bits = 0.0 if precision is None else precision or np.finfo(float).tiny
        out = np.empty(self.parameters.slots, np.complex128)
        _native.call("cl_decode", self.handle, bits, out.ctypes.data, out.size)
        return out.real.copy() if self.parameters.real else out

    @property
    def _info(self) -> _PlaintextInfo:
        info, scale = (ctypes.c_int64 * 2)(), ctypes.c_double()
        _native.call("cl_plaintext_info", self.handle, info, ctypes.byref(scale))
        return _PlaintextInfo(info[0], info[1], scale.value)

    @property
    def level(self) -> int:
        """The level that it is encoded at."""
        return self._info.level

    @property
    def scale(self) -> float:
        """The scale that it is encoded at."""
        return self._info.scale

    @property
    def greatest(self) -> float:
        """The greatest coefficient of a plaintext at level 0, as a part of half the modulus.

        A sum that was greater than half the modulus has run over, and what is left of it looks random: the
        greatest of its coefficients is near 1.
        """
        out = ctypes.c_double()
        _native.call("cl_plaintext_greatest", self.handle, ctypes.byref(out))
        return out.value

    @property
    def nbytes(self) -> int:
        """The memory that it takes."""
        return self._info.nbytes

    def __repr__(self) -> str:
        return f"Plaintext(level={self.level}, scale=2^{np.log2(self.scale):.3f})"


class Ciphertext(Serializable):
    """An encrypted vector.

    A value v in a slot is kept as ``scale * v``: the scale is part of the meaning,
    and the engine refuses to add what has another one. A level is what a rescaling
    takes; at level 0 there is none left.
    """

    __slots__ = ("parameters",)
    _frame_type: ClassVar[int] = 6

    def __init__(self, handle: int, parameters: Parameters) -> None:
        super().__init__(handle)
        self.parameters = parameters

    @classmethod
    def _adopt(cls, handle: int, parameters: Parameters) -> Ciphertext:
        return cls(handle, parameters)

    @property
    def _info(self) -> _CiphertextInfo:
        info, scale = (ctypes.c_int64 * 4)(), ctypes.c_double()
        _native.call("cl_ciphertext_info", self.handle, info, ctypes.byref(scale))
        return _CiphertextInfo(info[0], info[1], info[2], bool(info[3]), scale.value)

    @property
    def level(self) -> int:
        """How many rescalings are left."""
        return self._info.level

    @property
    def scale(self) -> float:
        """The factor between values and what is kept."""
        return self._info.scale

    @property
    def degree(self) -> int:
        """1, or 2 for a product that is not relinearised."""
        return self._info.degree

    @property
    def seeded(self) -> bool:
        """Whether half of it is a seed, so that it takes half the bytes on the wire."""
        return self._info.seeded

    @property
    def nbytes(self) -> int:
        """The memory that it takes."""
        return self._info.nbytes

    @property
    def key_fingerprint(self) -> str:
        """The name of the secret key that decrypts it."""
        return _native.key_fingerprint(self.handle)

    def round(self, first: int, second: int = 0) -> None:
        """Round the coefficients of a ciphertext at level 0, so that it takes fewer bytes on the wire.

        The first component loses ``first`` low bits and the second ``second``. The error of the first is that
        of a rounding to multiples of ``2**first``; that of the second is multiplied with the secret key,
        which makes it about ``sqrt(2/3 * degree)`` times greater, ``sqrt(4/3 * degree)`` in the real ring. A
        seeded ciphertext has no second component to round. Raises :class:`~cipherlm.engine.EngineError` at a
        level above 0.
        """
        _native.call("cl_round", self.handle, first, second)

    def copy(self) -> Ciphertext:
        """Return a copy."""
        return Ciphertext(_native.create("cl_copy", self.handle), self.parameters)

    def __repr__(self) -> str:
        info = self._info
        degree = ", degree=2" if info.degree == 2 else ""
        return f"Ciphertext(level={info.level}, scale=2^{np.log2(info.scale):.3f}{degree})"


def complex_vector(parameters: Parameters, values: ArrayLike) -> NDArray[np.complex128]:
    """Return values as the native side takes them."""
    array = np.asarray(values)
    if array.ndim > 1:
        raise ValueError(f"a vector is needed, not an array of shape {array.shape}")
    if parameters.real and np.iscomplexobj(array) and np.any(array.imag):
        raise ValueError("slots are real in the conjugate-invariant ring: no complex values")
    return np.ascontiguousarray(np.atleast_1d(array), np.complex128)
