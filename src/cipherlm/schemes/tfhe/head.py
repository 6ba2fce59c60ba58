"""GPT-2's causal attention in integers, shaped so that TFHE needs few and narrow table lookups.

Multiplication of two encrypted values costs lookups, addition and multiplication by a clear weight do not.
With ``a`` a query and ``b`` a key coordinate, ``2ab = (a + b)**2 - a**2 - b**2``: one lookup for each pair,
the single squares shared along rows and columns. Four identities make the rest small:

- *Scores relative to the first token.* A softmax does not change when a row loses a constant, so row ``i``
  uses ``q_i . (k_j - k_0)``: the pairs with ``j = 0`` vanish, the key's bias with them.
- *Values relative to the first token.* As probabilities sum to one,
  ``sum_j p_ij v_j = v_0 + sum_(j>0) p_ij (v_j - v_0)``.
- *A running log-sum-exp.* ``L = log(1 + sum exp(s_j))`` grows one term at a time by
  ``softplus(s_j - L)``, and ``p_j = exp(s_j - L)``: two lookups a score, stable for any range, no maximum.
- *Rows only see earlier tokens*, so just the causal triangle is computed.

Head space is rotated before quantisation: queries and keys so that both have the same covariance, spread
evenly over the coordinates, values by an orthogonal matrix that the reader of the result undoes. Rounding
then costs the same everywhere (compare QuaRot, Ashkboos et al. 2024).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cipherlm.schemes.tfhe.lookup import FULL_SCALE, Integers, Lookup

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Precision:
    """Bits of every stage, derived from the one number a user chooses."""

    n_bits: int

    @property
    def product(self) -> int:
        """Bits of the square tables, nearly all of the lookups; each bit past six doubles their time."""
        return min(self.n_bits + 2, 6) if self.n_bits < 7 else 7

    @property
    def softmax(self) -> int:
        """Bits of the exponential and softplus tables: few lookups, and the whole row depends on them."""
        return min(self.n_bits + 3, 8)

    @property
    def output(self) -> int:
        """Bits of the result, with its sign; one more is kept free for sums that overshoot."""
        return min(self.n_bits + 3, 10)


@dataclass(frozen=True)
class QuantizedHead:
    """One head's frozen parameters: integer weights, and the real values of the tables' ranges."""

    query_weight: Int64
    query_bias: Int64
    key_weight: Int64
    key_bias: Int64
    score_query_weight: Int64
    score_key_weight: Int64
    score_bias: Int64
    value_weight: Int64
    first_weight: Int64
    first_bias: Int64
    product_range: Float64
    score_range: Float64
    value_range: Float64
    first_range: Float64
    output_unit: Float64
    rotation: Float64

    def __call__(self, x: Integers, precision: Precision, lookup: Lookup) -> Integers:
        """Attend: integers (tokens, width) to integers (tokens, head_dim), in units of ``output_unit``.

        The same code runs on integer arrays and on Concrete's tracers.
        """
        first = self._first_value(x[0:1] @ self.first_weight + self.first_bias, precision, lookup)
        if x.shape[0] == 1:
            return first
        probabilities, squares = self._probabilities(self._scores(x, precision, lookup), precision, lookup)
        return np.concatenate((first, self._mix(x, first, probabilities, squares, precision, lookup)), axis=0)

    def _first_value(self, accumulator: Integers, precision: Precision, lookup: Lookup) -> Integers:
        """Bring the first token's values, which the first row returns as they are, to the output's unit."""
        levels = float(self.first_range / self.output_unit)
        return lookup(accumulator, min(precision.output - 1, 8), lambda t: t * levels)

    def _scores(self, x: Integers, precision: Precision, lookup: Lookup) -> list[Integers]:
        """Return for each key ``j > 0`` the scores (tokens - j,) of the rows from ``j`` on.

        Queries and keys are centred on their calibrated means, which halves what the tables must span; the
        products with a mean are linear in the input and cost nothing.
        """
        half_square = 0.5 * self.product_range**2 / float(self.score_range) * FULL_SCALE
        offset = np.rint(half_square).astype(np.int64)

        def square(accumulator: Integers) -> Integers:
            return lookup(accumulator, precision.product, lambda t: (t**2 - 1.0) * half_square)

        query = (x @ self.query_weight + self.query_bias)[1:]
        key = x @ self.key_weight
        key = key[1:] - key[0:1] + self.key_bias
        from_query = (x @ self.score_query_weight + self.score_bias)[1:]
        from_key = x @ self.score_key_weight
        from_key = from_key[1:] - from_key[0:1]
        query_square, minus_key_square = square(query), -offset - square(key)
        scores = []
        for j in range(query.shape[0]):
            product = square(query[j:] + key[j : j + 1]) - query_square[j:] + minus_key_square[j : j + 1]
            scores.append(np.sum(product, axis=1) + from_query[j:] + from_key[j : j + 1])
        return scores

    def _probabilities(
        self, scores: list[Integers], precision: Precision, lookup: Lookup
    ) -> tuple[list[Integers], list[Integers]]:
        """Return for each key the probabilities of its rows and half their squares.

        Probabilities are centred, ``p - 1/2``, in units in which 1 is the accumulator's full scale; half
        squares are in the output's unit.
        """
        reach = float(self.score_range)

        def grow(accumulator: Integers) -> Integers:  # softplus, less the middle of its range
            unit = FULL_SCALE / reach
            return lookup(
                accumulator,
                precision.softmax,
                lambda t: (np.log(1.0 + np.exp(t * reach)) - 0.5 * _softplus_span(reach)) * unit,
            )

        middle = round(0.5 * _softplus_span(reach) * FULL_SCALE / reach)
        total: Integers = None
        finished: list[Integers] = []
        for score in scores:
            total = grow(score) + middle if total is None else total + (grow(score - total) + middle)
            finished.append(total[0:1])
            total = total[1:]
        log_sum = finished[0] if len(finished) == 1 else np.concatenate(tuple(finished), axis=0)

        ends = np.exp(-2.0 * reach)
        square_unit = 0.5 * float(self.value_range / self.output_unit)
        square_middle = round(0.5 * (1.0 + ends**2) * square_unit)
        probabilities, squares = [], []
        for j, score in enumerate(scores):
            below = score - log_sum[j:] + FULL_SCALE  # from -2 * reach to 0, centred
            probabilities.append(
                lookup(
                    below,
                    precision.softmax,
                    lambda t: (np.exp((t - 1.0) * reach) - 0.5 * (1.0 + ends)) * FULL_SCALE,
                )
            )
            squares.append(
                lookup(
                    below,
                    precision.softmax,
                    lambda t: (np.exp((t - 1.0) * 2.0 * reach) - 0.5 * (1.0 + ends**2)) * square_unit,
                )
                + square_middle
            )
        return probabilities, squares

    def _mix(
        self,
        x: Integers,
        first: Integers,
        probabilities: list[Integers],
        squares: list[Integers],
        precision: Precision,
        lookup: Lookup,
    ) -> Integers:
        """Return ``v_0 + sum_j p_ij (v_j - v_0)`` (tokens - 1, head_dim) of the rows after the first.

        ``p v = ((p + v)**2 - v**2 - p**2) / 2`` with the values scaled to half the table's range and the
        probabilities to the other half. ``(p + v)**2`` and ``v**2`` read the same table, so that keys of
        probability zero contribute exactly nothing.
        """
        levels = 0.5 * float(self.value_range / self.output_unit)

        def square(accumulator: Integers) -> Integers:  # t + 1/2 is p + v; 5/4 is the middle of its square
            return lookup(accumulator, precision.product, lambda t: ((t + 0.5) ** 2 - 1.25) * levels)

        value = x @ self.value_weight
        value = value[1:] - value[0:1]
        value_square = square(value - FULL_SCALE // 2)
        mixed: Integers = None
        for j in reversed(range(len(probabilities))):
            rows = len(probabilities) - j
            term = square(probabilities[j].reshape((rows, 1)) + value[j : j + 1])
            term = term - value_square[j : j + 1] - squares[j].reshape((rows, 1))
            mixed = term if mixed is None else np.concatenate((term[0:1], term[1:] + mixed), axis=0)
        return mixed + first


def _softplus_span(reach: float) -> float:
    """Return ``softplus(reach) + softplus(-reach)``, twice the middle of the table."""
    return float(np.logaddexp(0.0, reach) + np.logaddexp(0.0, -reach))


@dataclass(frozen=True)
class QuantizedProjection:
    """The output projection behind all heads: ``weight`` (heads * head_dim, width) acts on their integers."""

    weight: Int64
    bias: Int64
    channel_range: Float64

    def __call__(self, heads: Integers, precision: Precision, lookup: Lookup) -> Integers:
        """Project integers (tokens, heads * head_dim) to integers (tokens, width), one lookup each.

        The sums are too wide to decrypt at a small parameter set: a lookup brings them to the output's bits.
        """
        levels = float(1 << (precision.output - 1))
        return lookup(heads @ self.weight + self.bias, min(precision.output - 1, 8), lambda t: t * levels)
