"""Where numbers lie in the slots of a ciphertext, and the rotations and masks that follow from it.

The token is innermost: feature p of token t is in slot ``p * tokens + t``. Features repeat with a period
that is a power of two, so that a rotation by whole features is cyclic. Hidden states have feature f at p = f.
Heads have feature j of head h at ``p = j * H + h``, with H the number of heads rounded up to a power of two:
a sum over a head's features, by rotations, leaves its result at each of them.

Scores have the distance between query and key in place of the feature. What token t makes of token t - a is
in slot ``((b * tokens + a) * H + h) * tokens + t`` for every b: one ciphertext for all heads and pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cipherlm.engine import inner_sum_rotations

Float64 = NDArray[np.float64]
Integers = NDArray[np.int_]

ATTENTION_LEVEL = 4
"""Where queries, keys and values are computed: at 3 they are masked, and at 2 multiplied."""

LINEAR_LEVEL = 2
"""Where other linear layers are applied."""


@dataclass(frozen=True)
class Layout:
    """The packing of a model: ``slots`` of a ciphertext, ``tokens`` side by side, ``heads`` of ``head_dim``.

    ``tokens`` is a power of two, and no more than ``head_dim`` rounded up to one. Raises ``ValueError`` where
    they do not fit.
    """

    slots: int
    tokens: int
    heads: int
    head_dim: int

    def __post_init__(self) -> None:
        if self.tokens != _power_of_two(self.tokens):
            raise ValueError(f"{self.tokens} tokens side by side: it must be a power of two")
        if self.tokens > self._features_of_head:
            raise ValueError(f"{self.tokens} tokens side by side, with heads of {self.head_dim} features")
        if self.period * self.tokens > self.slots:
            raise ValueError(f"{self.period} features of {self.tokens} tokens do not fit {self.slots} slots")

    @property
    def width(self) -> int:
        """The width of hidden states."""
        return self.heads * self.head_dim

    @property
    def padded_heads(self) -> int:
        """H, the number of heads rounded up to a power of two."""
        return _power_of_two(self.heads)

    @property
    def period(self) -> int:
        """After how many features they repeat."""
        return self.padded_heads * self._features_of_head

    @property
    def _features_of_head(self) -> int:
        return _power_of_two(self.head_dim)

    @property
    def distance_step(self) -> int:
        """The rotation from one feature of a head, or one distance of scores, to the next."""
        return self.padded_heads * self.tokens

    @property
    def baby_steps(self) -> int:
        """How many rotations of its input a matrix takes; its other rotations are of results."""
        return 1 << (self.period.bit_length() // 2)

    def chunks(self, features: int) -> int:
        """Return how many ciphertexts hold this many features."""
        return -(-features // self.period)

    def rotations(self, max_level: int) -> dict[int, int]:
        """Return the rotations that one block needs, and the highest level of each."""
        babies = self.baby_steps
        levels: dict[int, int] = {}

        def need(level: int, *rotations: int) -> None:
            for rotation in rotations:
                if rotation % self.slots:
                    levels[rotation % self.slots] = max(level, levels.get(rotation % self.slots, 0))

        need(ATTENTION_LEVEL, *(step * self.tokens for step in range(1, babies)))
        need(ATTENTION_LEVEL, *(step * self.tokens for step in range(0, self.period, babies)))
        need(ATTENTION_LEVEL - 1, self.period // 2 * self.tokens, *(-k for k in range(1, self.tokens)))
        need(ATTENTION_LEVEL - 2, *(k * self.distance_step for k in range(1, self.tokens)))
        need(ATTENTION_LEVEL - 3, *inner_sum_rotations(*self.blocks_of_head))
        need(max_level - 2, *inner_sum_rotations(*self.features))
        need(max_level, *inner_sum_rotations(*self.distances))
        return levels

    @property
    def distances(self) -> tuple[int, int]:
        """Step and count of a sum over distances."""
        return self.distance_step, self.tokens

    @property
    def blocks_of_head(self) -> tuple[int, int]:
        """Step and count of a sum over every ``tokens``-th feature of a head."""
        return self.distance_step * self.tokens, self._features_of_head // self.tokens

    @property
    def features(self) -> tuple[int, int]:
        """Step and count of a sum over features."""
        return self.tokens, self.period

    def pack(self, hidden: Float64, start: int = 0) -> list[Float64]:
        """Return the slots of hidden states (tokens, features), the first as token ``start``."""
        tokens, features = hidden.shape
        padded = np.zeros((self.chunks(features) * self.period, self.tokens))
        padded[:features, start : start + tokens] = hidden.T
        return [self._repeated(chunk) for chunk in padded.reshape(-1, self.period, self.tokens)]

    def unpack(self, slots: list[Float64], features: int, tokens: int, start: int = 0) -> Float64:
        """Return hidden states (tokens, features) from slots."""
        count = self.period * self.tokens
        rows = np.concatenate([chunk[:count].reshape(self.period, self.tokens) for chunk in slots])
        hidden: Float64 = rows[:features, start : start + tokens].T
        return hidden

    def pack_heads(self, values: Float64, start: int = 0) -> Float64:
        """Return the slots of queries, keys or values (heads, tokens, head_dim)."""
        heads, tokens, features = values.shape
        padded = np.zeros((self._features_of_head, self.padded_heads, self.tokens))
        padded[:features, :heads, start : start + tokens] = values.transpose(2, 0, 1)
        return self._repeated(padded)

    def unpack_heads(self, slots: Float64, tokens: int, start: int = 0) -> Float64:
        """Return queries, keys or values (heads, tokens, head_dim) from slots."""
        shape = (self._features_of_head, self.padded_heads, self.tokens)
        values = slots[: math.prod(shape)].reshape(shape)[: self.head_dim, : self.heads]
        chosen: Float64 = values[:, :, start : start + tokens].transpose(1, 2, 0)
        return chosen

    @property
    def head_order(self) -> Integers:
        """The feature at each position of the heads' order, or -1 for none."""
        feature, head = np.divmod(np.arange(self.period), self.padded_heads)
        exists = (feature < self.head_dim) & (head < self.heads)
        return np.where(exists, head * self.head_dim + feature, -1)

    def key_masks(self) -> Iterator[list[Float64]]:
        """Yield, for every shift k, the masks of keys that were rotated by 0, 1, ... tokens.

        With K[s] the keys rotated by s tokens, the sum over k of ``q * sum_s(mask[k][s] * K[s])``, rotated by
        k features, has at feature ``b * tokens + a`` the part of the scores at distance a that ``tokens``
        features contribute, less the mean over the keys that a query sees.
        """
        for k in range(self.tokens):
            yield [self._at_features(partial(self._key_mask, k=k, s=s)) for s in range(self.tokens)]

    def _key_mask(self, a: Integers, t: Integers, k: int, s: int) -> Float64:
        distance = (a - k) % self.tokens
        return np.where((t >= distance) & (t >= s), (distance == s) - 1.0 / (t + 1), 0.0)

    def value_masks(self) -> Iterator[list[Float64]]:
        """Yield, for every shift k, the masks of values that were rotated by 0, 1, ... tokens.

        The sum over k of weights rotated by k features, times ``sum_s(mask[k][s] * V[s])``, is the weighted
        sum of values.
        """
        for k in range(self.tokens):
            yield [self._at_features(partial(self._value_mask, k=k, s=s)) for s in range(self.tokens)]

    def _value_mask(self, a: Integers, t: Integers, k: int, s: int) -> NDArray[np.bool_]:
        chosen: NDArray[np.bool_] = ((a + k) % self.tokens == s) & (t >= s)
        return chosen

    def exponents(self, floor: float) -> Float64:
        """Return what is added to scores: -log of the number of keys seen, or ``floor`` where none is."""
        shift = self._at_features(lambda a, t: np.where(t >= a, -np.log(t + 1.0), floor))
        shift.reshape(-1, self.padded_heads, self.tokens)[:, self.heads :] = -math.log(self.tokens)
        return shift

    def _at_features(self, function: Callable[[Integers, Integers], NDArray[Any]]) -> Float64:
        """Return the slots of a function of feature (modulo ``tokens``) and token, the same for all heads."""
        a = np.arange(self._features_of_head)[:, None, None] % self.tokens
        t = np.arange(self.tokens)[None, None, :]
        values = np.zeros((self._features_of_head, self.padded_heads, self.tokens))
        return self._repeated(values + function(a, t))

    def _repeated(self, values: Float64) -> Float64:
        return np.tile(values.ravel(), self.slots // values.size)


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()
