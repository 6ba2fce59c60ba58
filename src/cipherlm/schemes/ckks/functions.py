"""Softmax, layer normalisation and activations in the arithmetic that ciphertexts know.

They work on any :class:`~cipherlm.schemes.ckks.tensor.Tensor`. Their polynomials are fitted to ranges that
:mod:`~cipherlm.schemes.ckks.calibration` finds on text, once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from cipherlm.engine import Chebyshev
from cipherlm.schemes.ckks import approximation
from cipherlm.schemes.ckks.approximation import Function, Interval, gelu_new
from cipherlm.schemes.ckks.tensor import Tensor, depth

T = TypeVar("T", bound=Tensor)

GUARD = 0.25
"""How far outside their interval, in its lengths, activations and the inverse root stay near the function."""

ACTIVATION_DEGREES = (63, 127)
"""Of the polynomials for activations: six levels, or all seven that a refresh gives."""

CLOSE = 1e-3
"""The error, next to the largest value of an activation, with which the lower degree is enough."""

COARSEST = 0.03
"""The error, next to the largest value of an activation, above which there is no use in it."""

NEAR_ONE = 0.35
"""How far from 1 sums of softmax weights may be after a normalisation that another one follows."""

LEAST_KEYS = 8
"""Fewer keys than these are not worth a softmax of their own."""

HIDDEN = 0.01
"""How much all keys that a query does not see weigh at first, next to those that it sees."""

PRECISE = 3e-3
"""The relative error of the last inverse before Newton's iteration squares it."""


class Map(Protocol):
    """A function of hidden states."""

    def __call__(self, x: T, /) -> T: ...  # noqa: D102


class Attend(Protocol):
    """Softmax of scores, applied to values."""

    def __call__(self, scores: T, value: T, /) -> T: ...  # noqa: D102


class Functions(Protocol):
    """The functions of one block."""

    @property
    def ln_1(self) -> Map: ...  # noqa: D102
    @property
    def softmax(self) -> Attend: ...  # noqa: D102
    @property
    def ln_2(self) -> Map: ...  # noqa: D102
    @property
    def activation(self) -> Map: ...  # noqa: D102


@dataclass(frozen=True, eq=False)
class LayerNorm:
    """``x / sqrt(mean(x^2) + epsilon)`` for hidden states whose mean is zero.

    What GPT-2 adds to its hidden states can be given a mean of zero
    (:meth:`~cipherlm.schemes.ckks.tensor.Linear.centred`), and gain and shift belong to the linear layer
    behind (:meth:`~cipherlm.schemes.ckks.tensor.Linear.after`): this is what is left. The root is a
    polynomial, then Newton's iteration ``y (3 - x y^2) / 2``, which squares the relative error.
    """

    start: Chebyshev
    steps: int
    epsilon: float

    @classmethod
    def fit(
        cls, squares: Interval, epsilon: float, *, tolerance: float = 1e-5, degree: int = 15
    ) -> LayerNorm:
        """Return the function for mean squares in an interval, with a relative error below ``tolerance``.

        Raises ``ValueError`` for an interval that is too wide for a polynomial of this degree to start from.
        """
        interval = (squares[0] + epsilon, squares[1] + epsilon)
        start = approximation.inverse_square_root(interval, degree, guard=GUARD)
        error = approximation.largest_error(start, lambda x: x**-0.5, interval, relative=True)
        if error > 0.3:
            raise ValueError(f"no inverse square root of degree {degree} on {squares}: error {error:.0%}")
        steps = 0
        while error > tolerance:
            error = 1.5 * error**2 + 0.5 * error**3
            steps += 1
        return cls(start, steps, epsilon)

    def __call__(self, x: T) -> T:
        """Return the normalised hidden states."""
        square = x.mean_square(self.start) + self.epsilon
        x.ready(depth(self.start) + 1, square, before=self.start)
        root = square.polynomial(self.start)
        for _ in range(self.steps):
            x.ready(3, square, root)
            root = root * 1.5 - (root * root) * (square * root) * 0.5
        return x * root


@dataclass(frozen=True, eq=False)
class Activation:
    """The function between the two layers of an MLP, as one polynomial."""

    curve: Chebyshev

    @classmethod
    def fit(cls, inputs: Interval, function: Function = gelu_new) -> Activation:
        """Return the function for inputs in an interval.

        Smooth ones do with the least of :data:`ACTIVATION_DEGREES`; a kink, as in ReLU, takes the highest.
        Raises ``ValueError`` where the error is above :data:`COARSEST` even then, as on an interval that is
        wide next to what the function does there.
        """
        size = approximation.largest(function, inputs)
        for degree in ACTIVATION_DEGREES:
            curve = approximation.minimax(function, inputs, degree, guard=GUARD)
            error = approximation.largest_error(curve, function, inputs)
            if error <= CLOSE * size:
                break
        if error > COARSEST * size:
            raise ValueError(
                f"the activation has no polynomial of degree {degree} on inputs from {inputs[0]:.3g} to "
                f"{inputs[1]:.3g}: error {error:.2g}, values up to {size:.2g}"
            )
        return cls(curve)

    def __call__(self, x: T) -> T:
        """Return the function of every value."""
        x.ready(depth(self.curve), before=self.curve)
        return x.polynomial(self.curve)


@dataclass(frozen=True, eq=False)
class Softmax:
    """Softmax by normalise-and-square, applied to values.

    After W. Cho, G. Hanrot, T. Kim, M. Park and D. Stehlé, "Fast and accurate homomorphic softmax
    evaluation" (CCS 2024). With k squarings, ``exp(x / 2^k)`` of centred scores is normalised and squared k
    times. Only the last normalisation has to be precise, since a common factor of a row cancels there; the
    others bring sums of n weights near 1, which keeps the sums of their squares in an interval from 1/n
    (Cauchy and Schwarz) to 1 with some room. Only the first interval depends on the text. The last division
    comes after the weighted sum of values; Newton's iteration ``c (2 - s c)`` makes it precise. Factors are
    chosen such that every interval of sums has length 2, and so costs no level.
    """

    squarings: int
    floor: float
    exponential: Chebyshev
    inverses: tuple[Chebyshev, ...]
    reciprocal: Chebyshev
    steps: int

    @classmethod
    def fit(
        cls,
        scores: Interval,
        keys: int,
        places: int | None = None,
        *,
        tolerance: float = 1e-5,
        steepest: float = 3.0,
        degree: int = 15,
    ) -> Softmax:
        """Return the softmax of centred scores in an interval, over at most ``keys`` keys.

        There are as many squarings, two at least, as bring the scores' upper end below ``steepest``; a first
        mean of exponentials lies between 1 and its exponential. A row has ``places`` for keys, as many as
        there are keys by default; all that it does not see weigh at most :data:`HIDDEN` in its first sum.
        ``degree`` is that of the exponential, and ``tolerance`` the relative error of the last division.
        """
        low, high = min(scores[0], 0.0), max(scores[1], 1.0)
        squarings = max(2, math.ceil(math.log2(high / steepest)))
        factor = 0.5**squarings
        floor = -math.log(places or keys) - max(-low * factor, -math.log(HIDDEN))
        ceiling = high * factor
        sums = (1.0, math.exp(ceiling) + HIDDEN)
        gain = _unit_gain(sums)
        exponential = _times(approximation.exponential((floor, ceiling), degree, guard=0.05), gain)
        inverses = []
        for _ in range(squarings):
            sums = (gain * sums[0], gain * sums[1])
            inverse, error = _inverse(sums, NEAR_ONE)
            # Noise, and keys that are not seen, may take a little more.
            sums = ((1 - 2 * HIDDEN) * (1 - error) ** 2 / keys, 1.01 * (1 + error) ** 2)
            gain = _unit_gain(sums)
            inverses.append(_times(inverse, math.sqrt(gain)))
        reciprocal, error = _inverse((gain * sums[0], gain * sums[1]), PRECISE)
        steps = 1
        while (error := error**2) > tolerance:
            steps += 1
        return cls(squarings, floor, exponential, tuple(inverses), reciprocal, steps)

    def __call__(self, scores: T, value: T) -> T:
        """Return each query's mean of the values, weighted by the softmax of its scores."""
        weights = scores.exponents(0.5**self.squarings, self.floor)
        levels = depth(self.exponential) + depth(self.inverses[0]) + 1
        weights.ready(levels, before=self.exponential)
        weights = weights.polynomial(self.exponential)
        for inverse in self.inverses:
            weights.ready(depth(inverse) + 1)
            weights = weights * weights.total().polynomial(inverse)
            weights.ready(1)
            weights = weights * weights
        mixed, total = weights.mix(value)
        mixed.ready(depth(self.reciprocal) + 2, total, before=self.reciprocal)
        quotient = total.polynomial(self.reciprocal)
        for _ in range(1, self.steps):
            quotient = quotient * (total * quotient * -1 + 2.0)
            mixed.ready(2, total, quotient)
        return (mixed * quotient) * (total * quotient * -1 + 2.0)


@dataclass(frozen=True, eq=False)
class AnySoftmax:
    """Softmax of centred scores in an interval, over any number of keys up to ``most``.

    The fewer keys, the cheaper: :class:`Softmax` is fitted for the next power of two where it is first used.
    """

    scores: Interval
    most: int
    _fitted: dict[tuple[int, int], Softmax] = field(default_factory=dict, repr=False)

    def __call__(self, scores: T, value: T) -> T:
        """Return each query's mean of the values, weighted by the softmax of its scores.

        Raises ``ValueError`` for more keys than ``most``.
        """
        return self.of(scores.keys, scores.places)(scores, value)

    def of(self, keys: int, places: int) -> Softmax:
        """Return the softmax that serves a number of keys, in rows of so many places."""
        if keys > self.most:
            raise ValueError(f"{keys} tokens are more than the {self.most} that the model is made for")
        keys = min(self.most, max(LEAST_KEYS, 1 << (keys - 1).bit_length()))
        places = max(keys, places)
        if (keys, places) not in self._fitted:
            self._fitted[keys, places] = Softmax.fit(self.scores, keys, places)
        return self._fitted[keys, places]


@dataclass(frozen=True)
class Ranges:
    """What one block's functions meet, with a margin: all that calibration finds."""

    ln_1: Interval
    scores: Interval
    ln_2: Interval
    gelu: Interval
    """What the activation meets, whichever it is: files know it by the name of GPT-2's own."""

    def fit(self, epsilon: float, keys: int, activation: Function = gelu_new) -> FittedFunctions:
        """Return the functions for these ranges, with at most ``keys`` keys to a query."""
        return FittedFunctions(
            LayerNorm.fit(self.ln_1, epsilon),
            AnySoftmax(self.scores, keys),
            LayerNorm.fit(self.ln_2, epsilon),
            Activation.fit(self.gelu, activation),
        )


@dataclass(frozen=True, eq=False)
class FittedFunctions:
    """The functions of one block, as polynomials."""

    ln_1: LayerNorm
    softmax: AnySoftmax
    ln_2: LayerNorm
    activation: Activation


def _inverse(interval: Interval, tolerance: float) -> tuple[Chebyshev, float]:
    """Return the cheapest inverse, up to degree 31, with an error below ``tolerance``, and its error."""
    for degree in (3, 7, 15, 31):
        error = approximation.inverse_error(interval, degree)
        if error < tolerance:
            break
    return approximation.inverse(interval, degree), error


def _unit_gain(interval: Interval) -> float:
    """Return the factor that brings an interval to length 2."""
    return 2 / (interval[1] - interval[0])


def _times(polynomial: Chebyshev, factor: float) -> Chebyshev:
    return Chebyshev(polynomial.coefficients * factor, polynomial.interval)
