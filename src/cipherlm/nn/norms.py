"""RMS normalisation, and layer normalisation of what has no mean."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

import numpy as np

from cipherlm.nn import approximation, cost
from cipherlm.nn.approximation import Approximation, Float64
from cipherlm.nn.clear import ClearTensor, values_of
from cipherlm.nn.fitted import Choice, Fitted, Stage
from cipherlm.nn.module import Nonlinearity
from cipherlm.nn.ranges import Interval, Range
from cipherlm.nn.tensor import T, depth

GUARD = 0.25
"""How far above its interval, in its lengths, the inverse root stays near the function."""

DEGREES = (15, 31, 63)
"""Of the polynomial that Newton's iteration starts from."""

ROUGHEST = 0.3
"""The relative error of a start from which Newton's iteration still converges well."""


class Norm(Nonlinearity):
    """``x / sqrt(mean(x^2) + epsilon)``; remembers the mean squares.

    That is RMS normalisation (Zhang and Sennrich, 2019) without its gain, which belongs to the linear layer
    behind it. It is layer normalisation where hidden states have no mean: whatever adds to them can be given
    a mean of zero.
    """

    def __init__(self, epsilon: float) -> None:
        self.epsilon = epsilon
        self.seen = {"squares": Range(positive=True)}

    def __call__(self, x: T) -> T:
        """Return the normalised hidden states."""
        values = values_of(x)
        square = (values**2).mean(axis=-1, keepdims=True)
        self.seen["squares"].see(square)
        return cast(T, cast(ClearTensor, x).having(values / np.sqrt(square + self.epsilon)))

    def fresh(self) -> Norm:
        """See :class:`Nonlinearity`."""
        return Norm(self.epsilon)

    def fit(self, ranges: Mapping[str, Interval], keys: int) -> FittedNorm:
        """See :class:`Nonlinearity`."""
        return FittedNorm.fit(ranges["squares"], self.epsilon)


class FittedNorm(Fitted):
    """The root as a polynomial, then Newton's iteration ``y (3 - x y^2) / 2``, which squares its error.

    Mean squares are multiplied by ``gain``, so that they are of the size of one whatever the model's are.
    The iteration is on ``y / sqrt(2)``, where its cubic term has no factor: factors would add up in scales.
    """

    def __init__(self, start: Approximation, steps: int, epsilon: float, gain: float) -> None:
        self.start, self.steps, self.epsilon, self.gain = start, steps, epsilon, gain

    @classmethod
    def fit(cls, squares: Interval, epsilon: float, *, tolerance: float = 1e-4) -> FittedNorm:
        """Return the cheapest function for mean squares in an interval, of a relative error of ``tolerance``.

        A start of a higher degree saves steps. Raises ``ValueError`` for an interval that is too wide for
        the highest of :data:`DEGREES`.
        """
        low, high = squares[0] + epsilon, squares[1] + epsilon
        gain = 2 / (high * (1 + GUARD) - low)
        interval = (gain * low, gain * high)
        ways = []
        for degree in DEGREES:
            start = approximation.inverse_square_root(interval, degree, guard=GUARD)
            error = approximation.largest_error(start, _root, interval, relative=True)
            if error > ROUGHEST:
                continue
            steps = 0
            while error > tolerance:
                error = 1.5 * error**2 + 0.5 * error**3
                steps += 1
            stated = Approximation.of(start, _root, interval, tolerance, relative=True)
            ways.append(cls(stated.times(math.sqrt(0.5)), steps, epsilon, gain))
            if not steps:
                break
        if not ways:
            raise ValueError(
                f"no inverse square root of degree {degree} on mean squares from {squares[0]:.4g} to "
                f"{squares[1]:.4g}: error {error:.0%}. Calibrate on texts as they are to come (a chat model "
                "on chats); tokens whose values stand out belong in the public prefix"
            )
        return min(ways, key=lambda way: way.cost)

    @property
    def cost(self) -> float:
        """What it costs on one ciphertext, but for what is the same however it is computed."""
        return cost.of_polynomial(self.start) + self.steps * (3 + 2 * cost.REFRESH)

    def __call__(self, x: T) -> T:
        """Return the normalised hidden states, for a linear layer."""
        square = x.mean_square(self.start, self.gain) + self.gain * self.epsilon
        root = self._inverse_root(square, x)  # which may refresh x
        return (x * math.sqrt(2 * self.gain)).scaled(root)

    def _inverse_root(self, square: T, x: T) -> T:
        """Return ``1 / sqrt(2 square)``, ready for a product with ``x``."""
        x.ready(depth(self.start) + 1, square, before=self.start)
        root = square.polynomial(self.start)
        for _ in range(self.steps):
            x.ready(3, square, root)
            root = root * 1.5 - (root * root) * (square * root)
        return root

    def choices(self) -> list[Choice]:
        """See :class:`Fitted`."""

        def refined(square: Float64) -> Float64:
            return self._inverse_root(ClearTensor(square), ClearTensor(square)).values

        # Beside the Newton steps: the square, and the product with what is normalised.
        products = 2 + 2 * self.steps
        root = Stage.of("inverse root", self.start, products=products, steps=self.steps, refined=refined)
        return [Choice((root,), self.cost)]


def _root(square: Float64) -> Float64:
    root: Float64 = square**-0.5
    return root
