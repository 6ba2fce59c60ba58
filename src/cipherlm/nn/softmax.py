"""Softmax, applied to values: exact, and by polynomials."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from cipherlm.nn import approximation, cost
from cipherlm.nn.approximation import Approximation, Float64
from cipherlm.nn.clear import ClearTensor, values_of, visible
from cipherlm.nn.fitted import Choice, Fitted, Stage
from cipherlm.nn.module import Nonlinearity
from cipherlm.nn.ranges import Interval, Range
from cipherlm.nn.tensor import T, depth

NEAR_ONE = 0.35
"""How far from 1 sums of softmax weights may be after a normalisation that another one follows."""

LEAST_KEYS = 8
"""Fewer keys than these are not worth a softmax of their own."""

HIDDEN = 0.01
"""How much all keys that a query does not see weigh at first, next to those that it sees."""

PRECISE = 3e-3
"""The relative error of the last inverse before Newton's iteration squares it."""

FLATTEST, STEEPEST = 3.0, 8.0
"""Within which power of e exponentials are brought by squarings: few of them leave a wide interval.

At the steepest, the sum of a row of low scores is still ten thousand times the noise of ring degree 2^14.
"""

LEVELS = 7
"""How many there are behind a refresh, as a rule."""

TOLERANCE = 1e-3
"""The relative error that the exponential may leave in the greatest weight of a row."""


class Softmax(Nonlinearity):
    """Softmax, applied to values; remembers the scores, and the mean of each query's."""

    def __init__(self) -> None:
        self.seen = {"scores": Range(), "means": Range()}

    def __call__(self, scores: T, value: T) -> T:
        """Return each query's mean of the values, weighted by the softmax of its scores."""
        values = values_of(scores)
        seen = visible(values.shape)
        self.seen["scores"].see(values[np.broadcast_to(seen, values.shape)])
        self.seen["means"].see((values * seen).sum(axis=-1) / seen.sum(axis=-1))
        hidden = np.where(seen, values, -np.inf)
        powers = np.exp(hidden - hidden.max(axis=-1, keepdims=True))
        mixed = powers / powers.sum(axis=-1, keepdims=True) @ values_of(value)
        return cast(T, cast(ClearTensor, scores).having(mixed))

    def fresh(self) -> Softmax:
        """See :class:`Nonlinearity`."""
        return Softmax()

    def fit(self, ranges: Mapping[str, Interval], keys: int) -> FittedSoftmax:
        """See :class:`Nonlinearity`."""
        return FittedSoftmax(ranges["scores"], ranges["means"], keys)


class FittedSoftmax(Fitted):
    """Softmax of scores in an interval, over any number of keys up to ``most``.

    The fewer keys, the cheaper: :class:`SquaringSoftmax` is fitted for the next power of two where it is
    first used.
    """

    def __init__(self, scores: Interval, means: Interval, most: int) -> None:
        self.scores, self.means, self.most = scores, means, most
        self._fitted: dict[tuple[int, int], SquaringSoftmax] = {}

    def __call__(self, scores: T, value: T) -> T:
        """Return each query's mean of the values, weighted by the softmax of its scores.

        Raises ``ValueError`` for more keys than ``most``.
        """
        return self.of(scores.keys, scores.places)(scores, value)

    def of(self, keys: int, places: int) -> SquaringSoftmax:
        """Return the softmax that serves a number of keys, in rows of so many places."""
        if keys > self.most:
            raise ValueError(f"{keys} tokens are more than the {self.most} that the model is made for")
        keys = min(self.most, max(LEAST_KEYS, 1 << (keys - 1).bit_length()))
        places = max(keys, places)
        if (keys, places) not in self._fitted:
            self._fitted[keys, places] = self._fit(keys, places)
        return self._fitted[keys, places]

    def choices(self) -> list[Choice]:
        """See :class:`Fitted`: those that were in use so far, by number of keys.

        Before the first use, those that :mod:`cipherlm.nn.clear` would use: rows have as many places as keys.
        """
        sizes = sorted(self._fitted)
        if not sizes:
            doubled = (LEAST_KEYS << n for n in itertools.count())
            below = list(itertools.takewhile(lambda keys: keys < self.most, doubled))
            sizes = [(keys, keys) for keys in (*below, self.most)]
        fitted = {size: self._fitted.get(size) or self._fit(*size) for size in sizes}
        return [Choice(softmax.stages, softmax.cost, *size) for size, softmax in fitted.items()]

    def _fit(self, keys: int, places: int) -> SquaringSoftmax:
        return SquaringSoftmax.fit(self.scores, self.means[0], keys, places)


@dataclass(frozen=True, eq=False)
class SquaringSoftmax:
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
    exponential: Approximation
    inverses: tuple[Approximation, ...]
    reciprocal: Approximation
    steps: int

    @classmethod
    def fit(
        cls,
        scores: Interval,
        least_mean: float,
        keys: int,
        places: int | None = None,
        *,
        tolerance: float = 1e-4,
    ) -> SquaringSoftmax:
        """Return the cheapest softmax of scores in an interval, over at most ``keys`` keys.

        The mean of what a query sees is ``least_mean`` or more. A first mean of exponentials thus lies
        between the exponentials of that (Jensen) and of the scores' upper end: squarings, two at least, bring
        these within a power of :data:`FLATTEST` to :data:`STEEPEST` of each other. The more there are, the
        lower are the degrees of the first polynomials. A row has ``places`` for keys, as many as there are
        keys by default; all that it does not see weigh at most :data:`HIDDEN` of its first sum.
        ``tolerance`` is the relative error of the last division.
        """
        span = max(scores[1], 1.0) - min(least_mean, 0.0)
        most, fewest = (max(2, math.ceil(math.log2(span / e))) for e in (FLATTEST, STEEPEST))
        ways = [
            cls._of(squarings, scores, least_mean, keys, places or keys, tolerance)
            for squarings in range(fewest, most + 1)
        ]
        return min(ways, key=lambda way: way.cost)

    @property
    def cost(self) -> float:
        """What it costs on one ciphertext of scores, but for what is the same however it is computed."""
        polynomials = (self.exponential, *self.inverses, self.reciprocal)
        apart = depth(self.exponential) + self._first_levels > LEVELS
        squaring = cost.SUM + 2 + cost.REFRESH
        newton = 3 + 2 * cost.REFRESH
        return (
            sum(map(cost.of_polynomial, polynomials))
            + self.squarings * squaring
            + self.steps * newton
            + apart * cost.REFRESH
        )

    @property
    def _first_levels(self) -> int:
        """The levels of the first normalisation, which may follow the exponential without a refresh."""
        return depth(self.inverses[0]) + 1

    @classmethod
    def _of(
        cls, squarings: int, scores: Interval, least_mean: float, keys: int, places: int, tolerance: float
    ) -> SquaringSoftmax:
        low, high, least = min(scores[0], 0.0), max(scores[1], 1.0), min(least_mean, 0.0)
        factor = 0.5**squarings
        floor = -math.log(places) - max(-low * factor, -math.log(HIDDEN) - least * factor)
        ceiling = high * factor
        sums = (math.exp(least * factor), math.exp(ceiling) + HIDDEN)
        gain = _unit_gain(sums)
        # What is wrong with weights is squared as often as they are.
        exponential = _exponential((floor, ceiling), TOLERANCE * factor * sums[0] / keys).times(gain)
        inverses = []
        for _ in range(squarings):
            sums = (gain * sums[0], gain * sums[1])
            inverse, error = _inverse(sums, NEAR_ONE)
            # Noise, and keys that are not seen, may take a little more.
            sums = ((1 - 2 * HIDDEN) * (1 - error) ** 2 / keys, 1.01 * (1 + error) ** 2)
            gain = _unit_gain(sums)
            inverses.append(inverse.times(math.sqrt(gain)))
        reciprocal, error = _inverse((gain * sums[0], gain * sums[1]), PRECISE)
        steps = 1
        while (error := error**2) > tolerance:
            steps += 1
        return cls(squarings, floor, exponential, tuple(inverses), reciprocal, steps)

    def __call__(self, scores: T, value: T) -> T:
        """Return each query's mean of the values, weighted by the softmax of its scores."""
        weights = scores.exponents(0.5**self.squarings, self.floor)
        most = weights.most_levels
        # Those of the exponential, of each normalisation, and of each square.
        steps = [depth(self.exponential)]
        for inverse in self.inverses:
            steps += [depth(inverse) + 1, 1]
        together = sum(steps[:2])
        levels = together if together <= most else steps[0]
        weights.ready(levels, before=self.exponential, then=_behind(levels, steps, most))
        weights = weights.polynomial(self.exponential)
        for index, inverse in enumerate(self.inverses):
            ahead = steps[2 * index + 1 :]
            total = weights.ready_total(ahead[0], _behind(ahead[0], ahead, most))
            weights = weights.squared_with(total.polynomial(inverse), _behind(1, ahead[1:], most))
        return self._quotient(*weights.mix(value))

    def _quotient(self, mixed: T, total: T) -> T:
        """Return ``mixed / total``."""
        mixed.ready(depth(self.reciprocal) + 2, total, before=self.reciprocal)
        quotient = total.polynomial(self.reciprocal)
        for _ in range(1, self.steps):
            quotient = quotient * (total * quotient * -1 + 2.0)
            mixed.ready(2, total, quotient)
        return mixed.scaled(quotient, total * quotient * -1 + 2.0)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The polynomials; each inverse with the normalisation and the squaring behind it."""

        def refined(total: Float64) -> Float64:
            return self._quotient(ClearTensor(np.ones_like(total)), ClearTensor(total)).values

        return (
            Stage.of("exponential", self.exponential),
            *(Stage.of("inverse", inverse, products=2) for inverse in self.inverses),
            Stage.of(
                "reciprocal", self.reciprocal, products=2 * self.steps, steps=self.steps, refined=refined
            ),
        )


def _behind(levels: int, steps: Sequence[int], most: int) -> int | None:
    """Return how many levels the steps that fit into ``most`` take together, beyond the first ``levels``.

    That is None where all of them fit: what comes behind them is not known.
    """
    taken = 0
    for step in steps:
        if taken + step > most:
            return taken - levels
        taken += step
    return None


def _exponential(interval: Interval, tolerance: float) -> Approximation:
    """Return the cheapest exponential, up to degree 31, with an absolute error below ``tolerance``."""
    x = np.linspace(*interval, 1001)
    for degree in (7, 15, 31):
        polynomial = approximation.exponential(interval, degree, guard=0.05)
        if np.abs(polynomial(x) - np.exp(x)).max() < tolerance:
            break
    return Approximation.of(polynomial, np.exp, interval, tolerance)


def _inverse(interval: Interval, tolerance: float) -> tuple[Approximation, float]:
    """Return the cheapest inverse, up to degree 31, with an error below ``tolerance``, and its error."""
    for degree in (3, 7, 15, 31):
        error = approximation.inverse_error(interval, degree)
        if error < tolerance:
            break
    inverse = approximation.inverse(interval, degree)
    return Approximation.of(inverse, np.reciprocal, interval, tolerance, relative=True), error


def _unit_gain(interval: Interval) -> float:
    """Return the factor that brings an interval to length 2."""
    return 2 / (interval[1] - interval[0])
