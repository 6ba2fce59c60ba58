"""What a tensor of hidden states can do, whatever it is made of.

Functions and model files are written against :class:`Tensor` only. A tensor of ciphertexts keeps slots,
levels and rotations to itself; one of clear numbers has none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from cipherlm.engine import Chebyshev

Float64 = NDArray[np.float64]
KeyValue = tuple[Float64, Float64]
T = TypeVar("T", bound="Tensor")


@dataclass(frozen=True, eq=False)
class Linear:
    """Clear weights of ``x @ weight + bias``: ``weight`` (inputs, outputs), ``bias`` (outputs,)."""

    weight: Float64
    bias: Float64

    def __post_init__(self) -> None:
        if self.weight.ndim != 2 or self.bias.shape != self.weight.shape[1:]:
            raise ValueError(f"weight {self.weight.shape} and bias {self.bias.shape} do not fit together")

    def after(self, gain: Float64, shift: Float64) -> Linear:
        """Return the layer with ``x * gain + shift`` before it folded in, both (inputs,)."""
        return Linear(gain[:, None] * self.weight, self.bias + shift @ self.weight)

    def centred(self) -> Linear:
        """Return the layer whose outputs have their mean taken off, which layer normalisation ignores."""
        return Linear(self.weight - self.weight.mean(axis=1, keepdims=True), self.bias - self.bias.mean())


class Tensor(ABC):
    """Hidden states (tokens, width), or queries, keys and values (heads, tokens, head_dim), or scores.

    Scores (heads, queries, keys) are of queries against keys; the last query sees all keys. One column is
    broadcast along the last axis in ``+``, ``-`` and ``*``. The values of a tensor do not change.
    """

    @abstractmethod
    def __add__(self: T, other: T | float) -> T:
        """Return the sum."""

    @abstractmethod
    def __mul__(self: T, other: T | float) -> T:
        """Return the product, value by value."""

    def __sub__(self: T, other: T | float) -> T:
        """Return the difference."""
        return self + other * -1

    @abstractmethod
    def __matmul__(self: T, linear: Linear) -> T:
        """Return ``x @ weight + bias`` of hidden states, or of heads side by side."""

    @abstractmethod
    def polynomial(self: T, polynomial: Chebyshev) -> T:
        """Return the polynomial's values."""

    @abstractmethod
    def mean_square(self: T, before: Chebyshev) -> T:
        """Return the mean square of each token's features, as one column.

        It has the scale at which the interval of ``before``, which is to be applied to it, costs no level.
        Both are refreshed here, if they do not have the levels for that and a product.
        """

    @abstractmethod
    def to_heads(self: T, linear: Linear, heads: int) -> tuple[T, T, T]:
        """Return query, key and value of a layer of (width, 3 * width) for every head."""

    @abstractmethod
    def with_past(self: T, value: T, past: tuple[Any, Any]) -> tuple[T, T]:
        """Return these keys and the values of the same tokens, with those of earlier tokens before them.

        ``past`` is what an earlier call returned, or the clear keys and values of a prefix, both (heads,
        tokens, head_dim).
        """

    @property
    @abstractmethod
    def keys(self) -> int:
        """How many keys the last query of scores sees, at most."""

    @property
    @abstractmethod
    def places(self) -> int:
        """For how many keys each query has a place in scores, whether it sees them or not."""

    @abstractmethod
    def scores(self: T, key: T) -> T:
        """Return every head's ``q.k / sqrt(head_dim)``, each query's less the mean over the keys it sees."""

    @abstractmethod
    def exponents(self: T, factor: float, floor: float) -> T:
        """Return ``factor`` times scores, less log n where a query sees n keys; ``floor`` elsewhere."""

    @abstractmethod
    def total(self: T) -> T:
        """Return each query's sum over its keys, as one column."""

    @abstractmethod
    def mix(self: T, value: T) -> tuple[T, T]:
        """Return each query's sum of the values (heads, keys, head_dim), weighted by these scores.

        With it comes the sum of its weights, as one column.
        """

    @abstractmethod
    def ready(
        self, levels: int, *others: Tensor, before: Chebyshev | None = None, last: bool = False
    ) -> None:
        """Make this tensor and others able to go through ``levels`` levels: refresh all where one is not.

        Values stay. After a refresh the last of them has the scale at which the interval of ``before``, which
        is to be applied to it next, costs no level. Where these levels are the ``last`` that they need, a
        refresh gives no more.
        """


@dataclass
class Cache:
    """Keys and values of the tokens that an attention layer has seen: those of a clear prefix at first."""

    past: tuple[Any, Any] | None = None

    def extend(self, key: T, value: T) -> tuple[T, T]:
        """Return all keys and values, with these behind them, and keep them for the next tokens."""
        if self.past is not None:
            key, value = key.with_past(value, self.past)
        self.past = key, value
        return key, value


def depth(polynomial: Chebyshev) -> int:
    """Return how many levels a polynomial takes where its interval costs none."""
    return polynomial.degree.bit_length()
