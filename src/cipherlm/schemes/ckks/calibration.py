"""Ranges of values, found by running a model exactly on text, and the functions that are fitted to them.

Run a model with these functions in place of fitted ones: they compute as the clear model does, and remember
what they meet. ``fit`` then freezes polynomials for these ranges with a margin.
"""

from __future__ import annotations

import math
from typing import cast

import numpy as np
from numpy.typing import NDArray

from cipherlm.schemes.ckks.approximation import Function, Interval, gelu_new
from cipherlm.schemes.ckks.functions import Activation, AnySoftmax, FittedFunctions, LayerNorm, Ranges, T
from cipherlm.schemes.ckks.simulation import SimulatedTensor, visible

Float64 = NDArray[np.float64]

MARGIN = 1.25
"""How far beyond the range that was seen approximations keep their precision, as a factor."""


class Range:
    """The smallest and the largest value that was seen."""

    def __init__(self) -> None:
        self.low, self.high = math.inf, -math.inf

    def see(self, values: Float64) -> None:
        """Take values into account."""
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))

    @property
    def around_zero(self) -> Interval:
        """The range with its margin; raises ``ValueError`` if nothing was seen."""
        self._check()
        return MARGIN * min(self.low, 0.0), MARGIN * max(self.high, 0.0)

    @property
    def above_zero(self) -> Interval:
        """The range of positive values with the square of the margin."""
        self._check()
        return self.low / MARGIN**2, self.high * MARGIN**2

    def _check(self) -> None:
        if self.high < self.low:
            raise ValueError("not calibrated: run the model on text first")


class ExactLayerNorm:
    """Layer normalisation without its mean, gain and shift; remembers the mean squares."""

    def __init__(self, epsilon: float) -> None:
        self.epsilon = epsilon
        self.squares = Range()

    def __call__(self, x: T) -> T:
        """Return the normalised hidden states."""
        values = _clear(x)
        square = (values**2).mean(axis=-1, keepdims=True)
        self.squares.see(square)
        return cast(T, SimulatedTensor(values / np.sqrt(square + self.epsilon)))

    def fit(self) -> LayerNorm:
        """Return the approximation for what was seen."""
        return LayerNorm.fit(self.squares.above_zero, self.epsilon)


class ExactActivation:
    """The function between the two layers of an MLP; remembers its inputs."""

    def __init__(self, function: Function = gelu_new) -> None:
        self.function = function
        self.inputs = Range()

    def __call__(self, x: T) -> T:
        """Return the function of every value."""
        values = _clear(x)
        self.inputs.see(values)
        return cast(T, SimulatedTensor(self.function(values)))

    def fit(self) -> Activation:
        """Return the approximation for what was seen."""
        return Activation.fit(self.inputs.around_zero, self.function)


class ExactSoftmax:
    """Softmax, applied to values; remembers the scores."""

    def __init__(self) -> None:
        self.scores = Range()

    def __call__(self, scores: T, value: T) -> T:
        """Return each query's mean of the values, weighted by the softmax of its scores."""
        values = _clear(scores)
        self.scores.see(values)
        powers = np.exp(values - values.max(axis=-1, keepdims=True)) * visible(values.shape)
        return cast(T, SimulatedTensor(powers / powers.sum(axis=-1, keepdims=True) @ _clear(value)))

    def fit(self, keys: int) -> AnySoftmax:
        """Return the approximation for what was seen, over at most ``keys`` keys."""
        return AnySoftmax(self.scores.around_zero, keys)


class ExactFunctions:
    """The functions of one block, which remember what they meet."""

    def __init__(self, epsilon: float, activation: Function = gelu_new) -> None:
        self.epsilon = epsilon
        self.ln_1, self.ln_2 = ExactLayerNorm(epsilon), ExactLayerNorm(epsilon)
        self.softmax, self.activation = ExactSoftmax(), ExactActivation(activation)

    @property
    def ranges(self) -> Ranges:
        """The ranges of what was met, with their margins."""
        return Ranges(
            self.ln_1.squares.above_zero,
            self.softmax.scores.around_zero,
            self.ln_2.squares.above_zero,
            self.activation.inputs.around_zero,
        )

    def fit(self, keys: int) -> FittedFunctions:
        """Return the approximations for what was met, with at most ``keys`` keys to a query."""
        return self.ranges.fit(self.epsilon, keys, self.activation.function)


def _clear(x: object) -> Float64:
    if not isinstance(x, SimulatedTensor):
        raise TypeError("calibration computes with clear numbers")
    return x.values
