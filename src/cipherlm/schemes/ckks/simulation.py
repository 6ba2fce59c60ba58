"""The arithmetic of ciphertexts on clear numbers: the same polynomials, and noise as CKKS adds it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cipherlm.engine import Chebyshev
from cipherlm.schemes.ckks.tensor import Linear, Tensor

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Noise:
    """Gaussian noise: ``rounding`` is its standard deviation in a slot after each product.

    A rescaling rounds both components of a ciphertext; with a ternary secret of degree N this is an error of
    variance ``(1 + 2N/3) / 12`` in every coefficient, N times as much in a slot, half of it in the real part
    (Cheon, Kim, Kim and Song, "Homomorphic encryption for arithmetic of approximate numbers", 2017).
    """

    rounding: float
    random: np.random.Generator = field(default_factory=np.random.default_rng, repr=False, compare=False)

    @classmethod
    def of(cls, degree: int, log_scale: float, seed: int | None = None) -> Noise:
        """Return the noise of a ring degree and a scale of ``2^log_scale``."""
        variance = degree * (1 + 2 * degree / 3) / 12 / 2
        return cls(math.sqrt(variance) / 2.0**log_scale, np.random.default_rng(seed))

    def __call__(self, values: Float64) -> Float64:
        """Return the values with noise."""
        return values + self.random.normal(scale=self.rounding, size=values.shape)


@dataclass(frozen=True, eq=False)
class SimulatedTensor(Tensor):
    """A tensor of clear numbers. Without noise it is exact up to floating point."""

    values: Float64
    noise: Noise | None = None

    def _result(self, values: Float64) -> SimulatedTensor:
        return replace(self, values=self.noise(values) if self.noise else values)

    def __add__(self, other: SimulatedTensor | float) -> SimulatedTensor:
        return replace(self, values=self.values + _values(other))

    def __mul__(self, other: SimulatedTensor | float) -> SimulatedTensor:
        product = self.values * _values(other)
        # A product with a number only declares another scale.
        return self._result(product) if isinstance(other, SimulatedTensor) else replace(self, values=product)

    def __matmul__(self, linear: Linear) -> SimulatedTensor:
        values = self.values
        if values.ndim == 3:
            values = values.swapaxes(0, 1).reshape(values.shape[1], -1)
        return self._result(values @ linear.weight + linear.bias)

    def polynomial(self, polynomial: Chebyshev) -> SimulatedTensor:
        """See :class:`Tensor`."""
        return self._result(polynomial(self.values))

    def mean_square(self, before: Chebyshev) -> SimulatedTensor:
        """See :class:`Tensor`."""
        return self._result((self.values**2).mean(axis=-1, keepdims=True))

    def to_heads(
        self, linear: Linear, heads: int
    ) -> tuple[SimulatedTensor, SimulatedTensor, SimulatedTensor]:
        """See :class:`Tensor`."""
        joined = self @ linear
        tokens = joined.values.shape[0]
        query, key, value = joined.values.reshape(tokens, 3, heads, -1).transpose(1, 2, 0, 3)
        return replace(self, values=query), replace(self, values=key), replace(self, values=value)

    def with_past(
        self, value: SimulatedTensor, past: tuple[Any, Any]
    ) -> tuple[SimulatedTensor, SimulatedTensor]:
        """See :class:`Tensor`."""
        key, value = (
            replace(new, values=np.concatenate([_values(old), new.values], axis=1))
            for new, old in zip((self, value), past, strict=True)
        )
        return key, value

    @property
    def keys(self) -> int:
        """See :class:`Tensor`."""
        return self.values.shape[-1]

    @property
    def places(self) -> int:
        """See :class:`Tensor`."""
        return self.values.shape[-1]

    def scores(self, key: SimulatedTensor) -> SimulatedTensor:
        """See :class:`Tensor`."""
        products = self.values @ key.values.swapaxes(1, 2) / math.sqrt(self.values.shape[-1])
        seen = visible(products.shape)
        mean = (products * seen).sum(axis=-1, keepdims=True) / seen.sum(axis=-1, keepdims=True)
        return self._result((products - mean) * seen)

    def exponents(self, factor: float, floor: float) -> SimulatedTensor:
        """See :class:`Tensor`."""
        seen = visible(self.values.shape)
        shifted = factor * self.values - np.log(seen.sum(axis=-1, keepdims=True))
        return replace(self, values=np.where(seen, shifted, floor))

    def total(self) -> SimulatedTensor:
        """See :class:`Tensor`."""
        return replace(self, values=self.values.sum(axis=-1, keepdims=True))

    def mix(self, value: SimulatedTensor) -> tuple[SimulatedTensor, SimulatedTensor]:
        """See :class:`Tensor`."""
        return self._result(self.values @ value.values), self.total()

    def ready(
        self, levels: int, *others: Tensor, before: Chebyshev | None = None, last: bool = False
    ) -> None:
        """See :class:`Tensor`; there is nothing to refresh."""


def visible(shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Return which of the keys each query sees, for scores (..., queries, keys): the last query sees all."""
    queries, keys = shape[-2:]
    return np.tri(queries, keys, keys - queries, dtype=bool)


def _values(other: Any) -> Any:
    return other.values if isinstance(other, SimulatedTensor) else other
