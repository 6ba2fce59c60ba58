"""Polynomials in the Chebyshev basis."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.polynomial import chebyshev
from numpy.typing import ArrayLike, NDArray

from . import _native
from .parameters import Parameters


@dataclass(frozen=True, eq=False)
class Chebyshev:
    """A polynomial on an interval, by its coefficients in the Chebyshev basis there.

    It can be called on clear numbers: a clear model then uses what the encrypted one
    does. ``drift`` is how many bits of precision the mapping of the interval to
    [-1, 1] may cost before it takes a level instead, see :meth:`levels`.
    """

    coefficients: NDArray[np.float64]
    interval: tuple[float, float] = (-1.0, 1.0)
    drift: float = 4.0

    def __post_init__(self) -> None:
        coefficients = np.ascontiguousarray(self.coefficients, np.float64)
        if coefficients.ndim != 1 or coefficients.size < 2:
            raise ValueError("at least two coefficients are needed")
        object.__setattr__(self, "coefficients", coefficients)

    @classmethod
    def fit(
        cls, function: Callable[[NDArray[np.float64]], ArrayLike], interval: tuple[float, float], degree: int
    ) -> Chebyshev:
        """Interpolate a function at the Chebyshev points of an interval."""
        low, high = interval

        def on_unit(x: Any) -> Any:
            return function((low + high) / 2 + (high - low) / 2 * x)

        interpolate: Any = chebyshev.chebinterpolate  # NumPy 1 has no types for it
        return cls(interpolate(on_unit, degree), interval)

    @property
    def degree(self) -> int:
        """The degree."""
        return self.coefficients.size - 1

    def __call__(self, x: ArrayLike) -> NDArray[Any]:
        """Return the polynomial's values at clear numbers."""
        low, high = self.interval
        unit = (2 * np.asarray(x) - low - high) / (high - low)
        evaluate: Any = chebyshev.chebval  # NumPy 1 has no types for it
        return np.asarray(evaluate(unit, self.coefficients))

    def levels(self, parameters: Parameters, scale: float | None = None) -> int:
        """Return how many levels an evaluation takes for a ciphertext of a scale.

        That is log2(degree + 1), rounded up, and one more where the interval is mapped
        to [-1, 1] by a product. Where ``scale`` times half the interval's length is near
        the default scale, declaring it the scale maps the interval for nothing. A ratio
        r between the two costs log2(r) bits of precision times the highest power of two
        up to the degree; that is done up to ``drift`` bits.
        """
        out = ctypes.c_int64()
        _native.call(
            "cl_polynomial_levels",
            parameters.handle,
            self.coefficients.ctypes.data,
            self.coefficients.size,
            *self.interval,
            self.drift,
            parameters.scale if scale is None else scale,
            ctypes.byref(out),
        )
        return out.value
