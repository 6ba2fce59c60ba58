"""Polynomials in place of the functions of a transformer, with stated intervals and measured errors.

CKKS adds and multiplies; everything else is a polynomial on an interval. A degree of ``2^d - 1`` takes d
levels. Where inputs may leave the interval that calibration saw, the polynomial is also fitted, with less
weight, on a guard band on both sides: it is a little less precise inside, and outside it stays near the
function instead of growing as fast as its degree allows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.polynomial import chebyshev
from numpy.typing import ArrayLike, NDArray

from cipherlm.engine import Chebyshev

Float64 = NDArray[np.float64]
Function = Callable[[Float64], Float64]
Interval = tuple[float, float]

LAWSON_STEPS = 40
POINTS_PER_COEFFICIENT = 12
GUARD_WEIGHT = 1e-2
"""How much an error in the guard band counts, next to the same error inside."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Approximation(Chebyshev):
    """A polynomial that knows what it stands for: a function ``within`` an interval, without guard bands.

    ``tolerance`` is the error that it was chosen for, or that Newton steps behind it were, ``relative`` or
    absolute.
    """

    function: Function
    within: Interval
    tolerance: float
    relative: bool = False

    @classmethod
    def of(
        cls,
        polynomial: Chebyshev,
        function: Function,
        within: Interval,
        tolerance: float,
        *,
        relative: bool = False,
    ) -> Approximation:
        """Say what a polynomial stands for."""
        return cls(
            polynomial.coefficients,
            polynomial.interval,
            polynomial.drift,
            function=function,
            within=within,
            tolerance=tolerance,
            relative=relative,
        )

    @property
    def error(self) -> float:
        """The largest error that is found, without Newton steps: see :func:`largest_error`."""
        return largest_error(self, self.function, self.within, relative=self.relative)

    def times(self, factor: float) -> Approximation:
        """Return the polynomial for ``factor`` (positive) times the function."""
        function = self.function
        return replace(
            self,
            coefficients=self.coefficients * factor,
            function=lambda x: function(x) * factor,
            tolerance=self.tolerance if self.relative else self.tolerance * factor,
        )


def minimax(
    function: Function,
    interval: Interval,
    degree: int,
    *,
    relative: bool = False,
    guard: float | tuple[float, float] = 0.0,
) -> Chebyshev:
    """Return the polynomial of least largest error on an interval, absolute or relative.

    ``guard`` is the width of the guard bands below and above, in lengths of the interval. Lawson's iteration:
    weighted least squares, whose weights grow where the error is large (C. L. Lawson, "Contributions to the
    theory of linear least maximum approximation", 1961). Raises ``ValueError`` for an empty interval, and for
    a function that is not finite on the interval and its guard band.
    """
    low, high = _checked(interval)
    below, above = guard if isinstance(guard, tuple) else (guard, guard)
    wide = (low - below * (high - low), high + above * (high - low))
    count = POINTS_PER_COEFFICIENT * (degree + 1)
    unit = np.cos(np.pi * (np.arange(count) + 0.5) / count)
    x = (wide[0] + wide[1]) / 2 + (wide[1] - wide[0]) / 2 * unit
    y = function(x)
    if not np.all(np.isfinite(y)):
        raise ValueError(f"the function is not finite on {wide}")
    importance = np.where((x >= low) & (x <= high), 1.0, GUARD_WEIGHT)
    if relative:
        importance = importance / np.abs(y)
    basis = np.cos(np.outer(np.arccos(unit), np.arange(degree + 1))) * importance[:, None]
    target = y * importance
    weight = np.full(count, 1.0 / count)
    best, least = np.zeros(degree + 1), math.inf
    for _ in range(LAWSON_STEPS):
        root = np.sqrt(weight)
        coefficients = np.linalg.lstsq(basis * root[:, None], target * root, rcond=None)[0]
        error = np.abs(basis @ coefficients - target)
        if error.max() < least:
            best, least = coefficients, float(error.max())
        weight = weight * (error + 1e-3 * error.max())
        if not weight.sum():
            break
        weight /= weight.sum()
    return Chebyshev(best, wide)


def exponential(interval: Interval, degree: int, *, guard: float = 0.0) -> Chebyshev:
    """Return exp on an interval, of nearly the least absolute error: it interpolates at Chebyshev's nodes.

    ``guard`` is the width of the band on each side, in lengths of the interval, that is served as well.
    """
    low, high = _checked(interval)
    reach = guard * (high - low)
    return Chebyshev.fit(np.exp, (low - reach, high + reach), degree)


def inverse(interval: Interval, degree: int) -> Chebyshev:
    """Return 1/x on an interval of positive numbers, of least relative error.

    ``x p(x) = 1 - T(l(x)) / T(l(0))`` with T the Chebyshev polynomial of degree ``degree + 1`` and l the map
    of the interval to [-1, 1]: the residual polynomial of Chebyshev's semi-iteration (Golub and Varga, 1961).
    Below the interval ``x p(x)`` goes from 1 to 0 and stays between them, so that a product with p there is
    too small, never too large.
    """
    low, high = _checked(interval)
    if low <= 0:
        raise ValueError(f"1/x has no approximation on {interval}: the interval must be positive")
    order = degree + 1
    residual = chebyshev.Chebyshev([0] * order + [1], (low, high))
    return Chebyshev.fit(lambda x: (1 - residual(x) / residual(0.0)) / x, interval, degree)


def inverse_error(interval: Interval, degree: int) -> float:
    """Return the largest relative error of :func:`inverse`: 1 / T(l(0)), without computing it."""
    low, high = _checked(interval)
    return 1.0 / math.cosh((degree + 1) * math.acosh((high + low) / (high - low)))


def inverse_square_root(interval: Interval, degree: int, *, guard: float = 0.0) -> Chebyshev:
    """Return x^(-1/2) on an interval of positive numbers, of least relative error.

    The guard band is above the interval; below it the polynomial stays finite and too small.
    """
    low, high = _checked(interval)
    if low <= 0:
        raise ValueError(f"no inverse square root on {interval}: the interval must be positive")
    return minimax(lambda x: x**-0.5, (low, high * (1 + guard)), degree, relative=True)


def gelu_new(x: ArrayLike) -> Float64:
    """Return GELU as GPT-2 computes it, with tanh (Hendrycks and Gimpel, 2016)."""
    x = np.asarray(x, np.float64)
    value: Float64 = x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return value


def largest(function: Function, interval: Interval) -> float:
    """Return the largest absolute value on 20,001 points of an interval."""
    return float(np.abs(function(np.linspace(*interval, 20_001))).max())


def largest_error(
    polynomial: Callable[[Float64], Float64],
    function: Function,
    interval: Interval,
    *,
    relative: bool = False,
) -> float:
    """Measure an approximation on 20,001 points of an interval."""
    x = np.linspace(*interval, 20_001)
    y = function(x)
    error = np.abs(polynomial(x) - y)
    return float((error / np.abs(y) if relative else error).max())


def _checked(interval: Interval) -> Interval:
    low, high = interval
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"an interval from {low} to {high} is empty")
    return low, high
