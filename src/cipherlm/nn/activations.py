"""Activations of an MLP, by the names that transformers has for them, and their polynomials."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from cipherlm.nn import approximation, cost
from cipherlm.nn.approximation import Approximation, Function, gelu_new
from cipherlm.nn.clear import ClearTensor, values_of
from cipherlm.nn.fitted import Choice, Fitted, Stage
from cipherlm.nn.module import Float64, Nonlinearity
from cipherlm.nn.ranges import Interval, Range
from cipherlm.nn.tensor import T, depth

GUARD = 0.25
"""How far outside their interval, in its lengths, polynomials stay near the function."""

CLOSE = {31: 2e-5, 63: 1e-3, 127: 0.0}
"""The degrees of the polynomials (five levels, six, or all seven that a refresh gives), and the error next to
the largest value of an activation with which each is enough.

Activations cost the most precision. With 3e-4 for degree 31 the embedded model has the clear model's
likeliest token at 98 % of positions (``cipherlm evaluate``), and SmolLM2 with 1e-3 at 99.4 %.
"""

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


class FittedActivation(Fitted):
    """An activation as one polynomial."""

    def __init__(self, curve: Approximation) -> None:
        self.curve = curve

    def choices(self) -> list[Choice]:
        """See :class:`Fitted`."""
        return [Choice((Stage.of("curve", self.curve),), cost.of_polynomial(self.curve))]

    def __call__(self, x: T) -> T:
        """Return the function of every value."""
        x.ready(depth(self.curve), before=self.curve)
        return x.polynomial(self.curve)


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

    def __init__(self, curve: Approximation) -> None:
        self.curve = curve

    def choices(self) -> list[Choice]:
        """See :class:`Fitted`."""
        return [Choice((Stage.of("curve", self.curve, products=1),), cost.of_polynomial(self.curve) + 1)]

    def __call__(self, x: T, other: T) -> T:
        """Return the function of every value of ``x``, times ``other``."""
        levels = depth(self.curve)
        if levels < x.most_levels:
            other.ready(levels + 1, x, before=self.curve)
            return x.polynomial(self.curve) * other
        x.ready(levels, before=self.curve)
        curve = x.polynomial(self.curve)
        curve.ready(1, other, last=True)
        return curve * other


def fitted_curve(inputs: Interval, function: Function) -> Approximation:
    """Return the polynomial of an activation for inputs in an interval.

    Smooth ones do with the least degree of :data:`CLOSE`; a kink, as in ReLU, takes the highest. Raises
    ``ValueError`` where the error is above :data:`COARSEST` even then, as on an interval that is wide next to
    what the function does there.
    """
    size = approximation.largest(function, inputs)
    for degree, close in CLOSE.items():
        curve = approximation.minimax(function, inputs, degree, guard=GUARD)
        error = approximation.largest_error(curve, function, inputs)
        tolerance = (close or COARSEST) * size
        if error <= tolerance:
            break
    if error > tolerance:
        raise ValueError(
            f"the activation has no polynomial of degree {degree} on inputs from {inputs[0]:.3g} to "
            f"{inputs[1]:.3g}: error {error:.2g}, values up to {size:.2g}"
        )
    return Approximation.of(curve, function, inputs, tolerance)


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
