"""The arithmetic of ciphertexts on clear numbers: the same polynomials, and noise as CKKS adds it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.polynomial import chebyshev
from numpy.typing import NDArray

from cipherlm.engine import Chebyshev
from cipherlm.nn.module import Linear
from cipherlm.nn.rotary import Rotary
from cipherlm.nn.tensor import Prefix, Tensor

Float64 = NDArray[np.float64]


DRIFT = 0.25
"""Measured on polynomials of degree 3 to 31: see the tests of noise."""


@dataclass(frozen=True)
class Noise:
    """Gaussian noise: ``rounding`` is its standard deviation in a slot after each product or rotation.

    A rescaling rounds both components of a ciphertext; with a ternary secret of degree N this is an error of
    variance ``(1 + 2N/3) / 12`` in every coefficient, N times as much in a slot, half of it in the real part
    (Cheon, Kim, Kim and Song, "Homomorphic encryption for arithmetic of approximate numbers", 2017). The
    division at the end of a key switch rounds likewise. ``weights`` is the relative error with which
    diagonals of matrices are kept, and ``flooding`` the standard deviation of what is added to results.
    """

    rounding: float
    weights: float = 0.0
    flooding: float = 0.0
    random: np.random.Generator = field(default_factory=np.random.default_rng, repr=False, compare=False)

    @classmethod
    def of(
        cls, degree: int, log_scale: float, seed: int | None = None, *, weights: float = 0.0, flood: int = 0
    ) -> Noise:
        """Return the noise of a ring degree and a scale of ``2^log_scale``.

        ``flood`` is the bits of uniform noise that is added to every coefficient of a result; 0 for none.
        """
        variance = degree * (1 + 2 * degree / 3) / 12 / 2
        flooding = 2.0**flood / math.sqrt(3) * math.sqrt(degree / 2) if flood else 0.0
        scale = 2.0**log_scale
        return cls(math.sqrt(variance) / scale, weights, flooding / scale, np.random.default_rng(seed))

    def __call__(self, values: Float64, size: Float64 | float = 1.0) -> Float64:
        """Return the values with noise ``size`` times as large as that of one rounding."""
        return values + self.random.normal(size=values.shape) * (self.rounding * size)

    def of_matrix(self, values: Float64, inputs: Float64, weight: Float64) -> Float64:
        """Return products (tokens, outputs) of inputs (tokens, width) and a matrix, with their noise.

        Each rotated input has the noise of its rotation, which the matrix then mixes. Diagonals are rounded.
        """
        mixed = np.sqrt(1 + (weight**2).sum(axis=0))
        kept = self.weights * math.sqrt(float((weight**2).mean())) * np.linalg.norm(inputs, axis=-1)
        size = np.sqrt(mixed**2 + (kept[..., None] / self.rounding) ** 2)
        return self(values, size)

    def of_polynomial(self, values: Float64, inputs: Float64, polynomial: Chebyshev) -> Float64:
        """Return a polynomial's values with the noise of its evaluation.

        The powers of an input are about as wrong as if it had been :data:`DRIFT` of a rounding off, with the
        interval brought to [-1, 1].
        """
        low, high = polynomial.interval
        curve: Any = chebyshev.Chebyshev(polynomial.coefficients, (low, high))
        slope = curve.deriv()
        return self(values, 1 + DRIFT * (high - low) / 2 * np.abs(slope(np.clip(inputs, low, high))))

    def of_result(self, values: Float64) -> Float64:
        """Return what a server hands out, with flooding noise."""
        return values + self.random.normal(size=values.shape) * self.flooding


@dataclass(frozen=True, eq=False)
class ClearTensor(Tensor):
    """A tensor of clear numbers. Without noise it is exact up to floating point."""

    values: Float64
    noise: Noise | None = None
    position: int = 0
    """Of the first token."""
    least_places: int = 0
    """How many places for keys a row of scores has at least, as in the packing of ciphertexts."""

    def having(self, values: Float64) -> ClearTensor:
        """Return a tensor of other values for the same tokens."""
        return replace(self, values=values)

    def _result(self, values: Float64) -> ClearTensor:
        return replace(self, values=self.noise(values) if self.noise else values)

    def __add__(self, other: ClearTensor | float) -> ClearTensor:
        return replace(self, values=self.values + _values(other))

    def __mul__(self, other: ClearTensor | float) -> ClearTensor:
        product = self.values * _values(other)
        # A product with a number only declares another scale.
        return self._result(product) if isinstance(other, ClearTensor) else replace(self, values=product)

    def __matmul__(self, linear: Linear) -> ClearTensor:
        values = self.values
        if values.ndim == 3:
            values = values.swapaxes(0, 1).reshape(values.shape[1], -1)
        products = values @ linear.weight + linear.bias
        return replace(
            self, values=self.noise.of_matrix(products, values, linear.weight) if self.noise else products
        )

    def polynomial(self, polynomial: Chebyshev) -> ClearTensor:
        """See :class:`Tensor`."""
        values = polynomial(self.values)
        if self.noise:
            values = self.noise.of_polynomial(values, self.values, polynomial)
        return replace(self, values=values)

    def mean_square(self, before: Chebyshev, gain: float = 1.0) -> ClearTensor:
        """See :class:`Tensor`."""
        return self._result(gain * (self.values**2).mean(axis=-1, keepdims=True))

    def to_heads(self, linear: Linear, heads: int) -> tuple[ClearTensor, ClearTensor, ClearTensor]:
        """See :class:`Tensor`."""
        joined = self @ linear
        tokens = joined.values.shape[0]
        query, key, value = joined.values.reshape(tokens, 3, heads, -1).transpose(1, 2, 0, 3)
        return replace(self, values=query), replace(self, values=key), replace(self, values=value)

    def rotary(self, rotary: Rotary) -> ClearTensor:
        """See :class:`Tensor`."""
        cosine, sine = rotary.factors(np.arange(self.position, self.position + self.values.shape[1]))
        return self._result(self.values * cosine + rotary.half_turn(self.values) * sine)

    def with_past(
        self, value: ClearTensor, past: tuple[ClearTensor, ClearTensor] | None, prefix: Prefix | None
    ) -> tuple[ClearTensor, ClearTensor]:
        """See :class:`Tensor`."""
        keys, values = self.values, value.values
        if prefix is not None:
            keys = keys - prefix.centre
        if past is not None:
            before = past[0].values, past[1].values
        elif prefix is not None:
            before = prefix.keys - prefix.centre, prefix.values
        else:
            return self.having(keys), value
        return (
            self.having(np.concatenate([before[0], keys], axis=1)),
            self.having(np.concatenate([before[1], values], axis=1)),
        )

    @property
    def keys(self) -> int:
        """See :class:`Tensor`."""
        return self.values.shape[-1]

    @property
    def places(self) -> int:
        """See :class:`Tensor`."""
        return max(self.values.shape[-1], self.least_places)

    def scores(self, key: ClearTensor) -> ClearTensor:
        """See :class:`Tensor`."""
        products = self.values @ key.values.swapaxes(1, 2) / math.sqrt(self.values.shape[-1])
        return self._result(products * visible(products.shape))

    def exponents(self, factor: float, floor: float) -> ClearTensor:
        """See :class:`Tensor`."""
        seen = visible(self.values.shape)
        shifted = factor * self.values - np.log(seen.sum(axis=-1, keepdims=True))
        return replace(self, values=np.where(seen, shifted, floor))

    def total(self) -> ClearTensor:
        """See :class:`Tensor`."""
        return replace(self, values=self.values.sum(axis=-1, keepdims=True))

    def mix(self, value: ClearTensor) -> tuple[ClearTensor, ClearTensor]:
        """See :class:`Tensor`."""
        return self._result(self.values @ value.values), self.total()

    @property
    def most_levels(self) -> int:
        """See :class:`Tensor`: there are no levels."""
        return 1 << 10

    def ready(
        self, levels: int, *others: Tensor, before: Chebyshev | None = None, then: int | None = None
    ) -> None:
        """See :class:`Tensor`; there is nothing to refresh."""


def visible(shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Return which of the keys each query sees, for scores (..., queries, keys): the last query sees all."""
    queries, keys = shape[-2:]
    return np.tri(queries, keys, keys - queries, dtype=bool)


def values_of(x: object) -> Float64:
    """Return the values of a clear tensor. Raises ``TypeError`` for any other."""
    if not isinstance(x, ClearTensor):
        raise TypeError("a function has no polynomial yet, and computes with clear numbers only")
    return x.values


def _values(other: Any) -> Any:
    return other.values if isinstance(other, ClearTensor) else other
