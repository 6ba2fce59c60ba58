"""What a tensor of hidden states can do, whatever it is made of.

Functions and model files are written against :class:`Tensor` only. A tensor of ciphertexts keeps slots,
levels and rotations to itself; one of clear numbers has none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from cipherlm.engine import Chebyshev
from cipherlm.nn.module import Linear
from cipherlm.nn.rotary import Rotary

Float64 = NDArray[np.float64]
T = TypeVar("T", bound="Tensor")


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

    def scaled(self: T, *columns: T) -> T:
        """Return the product with columns, for a linear layer: nothing else takes it."""
        result = self
        for column in columns:
            result = result * column
        return result

    @abstractmethod
    def polynomial(self: T, polynomial: Chebyshev) -> T:
        """Return the polynomial's values."""

    @abstractmethod
    def mean_square(self: T, before: Chebyshev, gain: float = 1.0) -> T:
        """Return the mean square of each token's features, times ``gain``, as one column.

        The gain makes of squares something near one. The result has the scale at which the interval of
        ``before``, which is to be applied to it, costs no level. Both are refreshed here, if they do not have
        the levels for that and a product.
        """

    @abstractmethod
    def to_heads(self: T, linear: Linear, heads: int) -> tuple[T, T, T]:
        """Return query, key and value of a layer of (width, 3 * width) for every head."""

    @abstractmethod
    def rotary(self: T, rotary: Rotary) -> T:
        """Return queries or keys, rotated by the angles of their tokens' positions."""

    @abstractmethod
    def with_past(self: T, value: T, past: Any, prefix: Prefix | None) -> tuple[Any, Any]:
        """Return these keys and the values of the same tokens, with those of earlier tokens before them.

        ``past`` is what an earlier call returned, or None at the start of a text. ``prefix`` comes before all
        of them; its centre is taken off the keys. What comes back is for :meth:`scores`, for :meth:`mix` and
        for the next call.
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
    def scores(self: T, key: Any) -> T:
        """Return every head's ``q.k / sqrt(head_dim)``."""

    @abstractmethod
    def exponents(self: T, factor: float, floor: float) -> T:
        """Return ``factor`` times scores, less log n where a query sees n keys; ``floor`` elsewhere."""

    @abstractmethod
    def total(self: T) -> T:
        """Return each query's sum over its keys, as one column."""

    def squared_with(self: T, column: T, then: int | None = None) -> T:
        """Return the square of the product with a column. It is refreshed where it has no level for that.

        ``then`` is that of :meth:`ready`, for the square.
        """
        product = self * column
        product.ready(1, then=then)
        return product * product

    def ready_total(self: T, levels: int, then: int | None = None) -> T:
        """Return the total; both it and this are then able to go through ``levels`` levels.

        ``then`` is that of :meth:`ready`.
        """
        self.ready(levels, then=then)
        return self.total()

    @abstractmethod
    def mix(self: T, value: Any) -> tuple[T, T]:
        """Return each query's sum of the values (heads, keys, head_dim), weighted by these scores.

        With it comes the sum of its weights, as one column.
        """

    @property
    @abstractmethod
    def most_levels(self) -> int:
        """How many levels there are behind a refresh."""

    @abstractmethod
    def ready(
        self, levels: int, *others: Tensor, before: Chebyshev | None = None, then: int | None = None
    ) -> None:
        """Make this tensor and others able to go through ``levels`` levels: refresh those that are not.

        Values stay. If the last of them is refreshed, it gets the scale at which the interval of ``before``,
        which is to be applied to it next, costs no level. A refresh gives all the levels that there are, or
        ``levels + then`` where it is known that ``then`` more are used before the next refresh.
        """


@dataclass(frozen=True, eq=False)
class Prefix:
    """Clear keys and values (heads, tokens, head_dim) of the public tokens that a text starts with."""

    keys: Float64
    values: Float64

    @property
    def tokens(self) -> int:
        """How many tokens there are."""
        return self.keys.shape[1]

    @cached_property
    def centre(self) -> Float64:
        """The mean of the keys (heads, 1, head_dim).

        It can be taken off all keys: softmax does not see what is added to all scores of a query. Scores are
        near zero then, and their exponentials near one, without any work on ciphertexts.
        """
        centre: Float64 = self.keys.mean(axis=1, keepdims=True)
        return centre


@dataclass
class Cache:
    """Keys and values of the tokens that an attention layer has seen, behind those of a clear prefix."""

    prefix: Prefix | None = None
    past: Any = None

    def extend(self, key: T, value: T) -> tuple[Any, Any]:
        """Return all keys and values, with these behind them, and keep them for the next tokens."""
        extended: tuple[Any, Any] = key.with_past(value, self.past, self.prefix)
        self.past = extended
        return extended


def depth(polynomial: Chebyshev) -> int:
    """Return how many levels a polynomial takes where its interval costs none."""
    return polynomial.degree.bit_length()
