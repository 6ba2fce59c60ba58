"""Activations of an MLP, by the names that transformers has for them, and their polynomials."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np

from cipherlm.engine import Chebyshev
from cipherlm.nn import approximation, cost
from cipherlm.nn.approximation import Approximation, Function, gelu_new
from cipherlm.nn.clear import ClearTensor, values_of
from cipherlm.nn.fitted import Choice, Fitted, Stage
from cipherlm.nn.module import Float64, Nonlinearity
from cipherlm.nn.ranges import Interval, Range
from cipherlm.nn.tensor import T, depth

GUARD = 0.25
"""How far outside their interval, in its lengths, polynomials stay near the function."""

CLOSE = {31: 2e-5, 63: 3e-4, 127: 0.0}
"""The degrees of the polynomials (five levels, six, or all seven that a refresh gives), and the error next to
the largest value of an activation with which each is enough.

Activations cost the most precision. With 3e-4 for degree 31 the embedded model has the clear model's
likeliest token at 98 % of positions (``cipherlm evaluate``), and SmolLM2 with 1e-3 at 99.4 %.
"""

AS_CLOSE = 2.0
"""How many times the error of a polynomial a cheaper way may have, unless that is enough for any degree."""

STRAIGHT = 1e-12
"""How far from a line, next to its values, the odd part of a function may be to count as one."""

COARSEST = 0.03
"""The error, next to the largest value of an activation, above which there is no use in it."""


class Activation(Nonlinearity):
    """The function between the two layers of an MLP; remembers its inputs."""

    def __init__(self, function: str | Function) -> None:
        self.function = activation(function) if isinstance(function, str) else function
        self.seen = {"inputs": Range()}

    def __call__(self, x: T) -> T:
        """Return the function of every value."""
        values = values_of(x)
        self.seen["inputs"].see(values)
        return cast(T, cast(ClearTensor, x).having(self.function(values)))

    def fresh(self) -> Activation:
        """See :class:`Nonlinearity`."""
        return Activation(self.function)

    def fit(self, ranges: Mapping[str, Interval], keys: int) -> FittedActivation:
        """See :class:`Nonlinearity`."""
        return FittedActivation(fitted_curve(ranges["inputs"], self.function))


@dataclass(frozen=True, eq=False)
class Curve:
    """An activation as a polynomial."""

    polynomial: Approximation

    @property
    def before(self) -> Chebyshev:
        """A polynomial of these levels, whose interval is what maps for nothing: for :meth:`Tensor.ready`."""
        return self.polynomial

    @property
    def levels(self) -> int:
        """How many it takes."""
        return depth(self.before)

    @property
    def cost(self) -> float:
        """What it costs on one ciphertext."""
        return cost.of_polynomial(self.polynomial)

    def __call__(self, x: T) -> T:
        """Return the activation of every value of a tensor that is ready."""
        return x.polynomial(self.polynomial)

    def stage(self, products: int = 0) -> Stage:
        """Describe it, with so many products behind it."""
        return Stage.of("curve", self.polynomial, products=products)


@dataclass(frozen=True, eq=False)
class EvenCurve(Curve):
    """``slope x + p(2 (x / reach)^2 - 1)``: for GELU, SiLU and ReLU, which are x/2 and an even function.

    A square halves the degree of the polynomial, on an interval that is symmetric. The square is that of
    ``sqrt(2) x / reach``: to double it afterwards would double its rounding error.
    """

    slope: float
    reach: float

    @cached_property
    def before(self) -> Chebyshev:
        """See :class:`Curve`."""
        far = self.reach / math.sqrt(2)
        return Chebyshev(np.ones(2 * self.polynomial.degree + 2), (-far, far))

    @property
    def cost(self) -> float:
        """See :class:`Curve`."""
        return super().cost + 1

    def __call__(self, x: T) -> T:
        """See :class:`Curve`."""
        scaled = x * (math.sqrt(2) / self.reach)
        return x * self.slope + (scaled * scaled + -1.0).polynomial(self.polynomial)

    def stage(self, products: int = 0) -> Stage:
        """See :class:`Curve`."""
        return Stage.of("even part", self.polynomial, products=products + 1)


class FittedActivation(Fitted):
    """An activation as one polynomial."""

    def __init__(self, curve: Curve) -> None:
        self.curve = curve

    def choices(self) -> list[Choice]:
        """See :class:`Fitted`."""
        return [Choice((self.curve.stage(),), self.curve.cost)]

    def __call__(self, x: T) -> T:
        """Return the function of every value."""
        x.ready(self.curve.levels, before=self.curve.before)
        return self.curve(x)


class Gate(Activation):
    """An activation of one layer's outputs times those of another, as in SwiGLU (Shazeer, 2020)."""

    def __call__(self, x: T, other: T) -> T:  # type: ignore[override]
        """Return the function of every value of ``x``, times ``other``."""
        return super().__call__(x) * other

    def fresh(self) -> Gate:
        """See :class:`Nonlinearity`."""
        return Gate(self.function)

    def fit(self, ranges: Mapping[str, Interval], keys: int) -> FittedGate:  # type: ignore[override]
        """See :class:`Nonlinearity`."""
        return FittedGate(fitted_curve(ranges["inputs"], self.function))


class FittedGate(Fitted):
    """A gate whose activation is one polynomial."""

    def __init__(self, curve: Curve) -> None:
        self.curve = curve

    def choices(self) -> list[Choice]:
        """See :class:`Fitted`."""
        return [Choice((self.curve.stage(products=1),), self.curve.cost + 1)]

    def __call__(self, x: T, other: T) -> T:
        """Return the function of every value of ``x``, times ``other``."""
        levels, before = self.curve.levels, self.curve.before
        if levels < x.most_levels:
            other.ready(levels + 1, x, before=before)
            return self.curve(x) * other
        x.ready(levels, before=before)
        curve = self.curve(x)
        curve.ready(1, other, then=0)
        return curve * other


def fitted_curve(inputs: Interval, function: Function) -> Curve:
    """Return the cheapest polynomial of an activation for inputs in an interval.

    Smooth ones do with the least degree of :data:`CLOSE`; a kink, as in ReLU, takes the highest. A square and
    half of the degree, where that is about as close, are cheaper and take as many levels. Raises
    ``ValueError`` where the error is above :data:`COARSEST` even then, as on an interval that is wide next to
    what the function does there.
    """
    size = approximation.largest(function, inputs)
    for degree, close in CLOSE.items():
        tolerance = (close or COARSEST) * size
        polynomial = approximation.minimax(function, inputs, degree, guard=GUARD)
        curve = Curve(Approximation.of(polynomial, function, inputs, tolerance))
        error = curve.polynomial.error
        if error <= tolerance:
            enough = min(tolerance, max(AS_CLOSE * error, CLOSE[31] * size))
            return _even_curve(inputs, function, degree // 2, enough) or curve
    raise ValueError(
        f"the activation has no polynomial of degree {degree} on inputs from {inputs[0]:.3g} to "
        f"{inputs[1]:.3g}: error {error:.2g}, values up to {size:.2g}"
    )


def _even_curve(inputs: Interval, function: Function, degree: int, tolerance: float) -> EvenCurve | None:
    """Return the polynomial of the even part.

    None where the rest is no multiple of the input, or where the error is above ``tolerance``.
    """
    far = max(-inputs[0], inputs[1])
    reach = far + GUARD * (inputs[1] - inputs[0])
    x = np.linspace(0, reach, 1001)
    odd, even = (function(x) - function(-x)) / 2, (function(x) + function(-x)) / 2
    slope, least = float(odd[-1] / reach), STRAIGHT * np.abs(function(x)).max()
    if np.abs(odd - slope * x).max() > least or np.abs(even).max() <= least:
        return None

    def of_square(square: Float64) -> Float64:
        root = np.sqrt(np.maximum(square, 0.0))
        value: Float64 = function(root) - slope * root
        return value

    band = (0.0, (reach / far) ** 2 - 1)
    fitted = approximation.minimax(of_square, (0.0, far**2), degree, guard=band)
    polynomial = Approximation.of(
        Chebyshev(fitted.coefficients),
        lambda unit: of_square((unit + 1) / 2 * reach**2),
        (-1.0, 2 * (far / reach) ** 2 - 1),
        tolerance,
    )
    return EvenCurve(polynomial, slope, reach) if polynomial.error <= tolerance else None


def activation(name: Any) -> Function:
    """Return an activation on clear numbers, in double precision, for a polynomial to be fitted to.

    Raises ``ValueError``, with the list of those that there are, for any other.
    """
    if name not in _FUNCTIONS:
        raise ValueError(
            f"the activation {name!r} cannot be computed on ciphertexts; these can: {', '.join(ACTIVATIONS)}"
        )
    return _FUNCTIONS[name]


def _erf(x: Float64) -> Float64:
    value: Float64 = np.vectorize(math.erf, otypes=[np.float64])(x)
    return value


def _gelu(x: Float64) -> Float64:
    value: Float64 = x / 2 * (1 + _erf(x / math.sqrt(2)))
    return value


def _sigmoid(x: Float64) -> Float64:
    value: Float64 = np.exp(-np.logaddexp(0, -x))
    return value


def _softplus(x: Float64) -> Float64:
    return np.logaddexp(0, x)


def _relu6(x: Float64) -> Float64:
    return np.clip(x, 0, 6)


def _laplace(x: Float64) -> Float64:
    return (1 + _erf((x - 0.707107) / (0.282095 * math.sqrt(2)))) / 2


_FUNCTIONS: dict[str, Function] = {
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate"), gelu_new),
    **dict.fromkeys(("gelu", "gelu_python"), _gelu),
    **dict.fromkeys(("silu", "swish"), lambda x: x * _sigmoid(x)),
    "gelu_10": lambda x: np.clip(_gelu(x), -10, 10),
    "gelu_fast": lambda x: x / 2 * (1 + np.tanh(0.7978845608 * x * (1 + 0.044715 * x * x))),
    "hardswish": lambda x: x * _relu6(x + 3) / 6,
    "laplace": _laplace,
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
    "linear": lambda x: x,
    "mish": lambda x: x * np.tanh(_softplus(x)),
    "quick_gelu": lambda x: x * _sigmoid(1.702 * x),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.square(np.maximum(x, 0)),
    "relu6": _relu6,
    "sigmoid": _sigmoid,
    "sqrtsoftplus": lambda x: np.sqrt(_softplus(x)),
    "tanh": np.tanh,
}
"""All that transformers has, as far as it is one fixed function of each value."""

ACTIVATIONS = tuple(sorted(_FUNCTIONS))
"""What can be computed on ciphertexts."""
