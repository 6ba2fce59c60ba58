"""Where numbers lie in the slots of a ciphertext, and the rotations and masks that follow from it.

The token is innermost: feature p of token t is in slot ``p * tokens + t``. Features repeat with a period
that is a power of two, so that a rotation by whole features is cyclic. Hidden states have feature f at p = f.
Heads have feature j of head h at ``p = j * H + h``, with H the number of heads rounded up to a power of two:
a sum over a head's features, by rotations, leaves its result at each of them. The second half of a head's
features starts in the middle of the period, so that one rotation exchanges both halves, as RoPE does.

Scores have the distance between query and key in place of the feature. What token t makes of token t - a is
in slot ``((b * tokens + a) * H + h) * tokens + t`` for every b: one ciphertext for all heads and pairs. What
it makes of token p of a public prefix, of any length, is in slot ``(p * H + h) * tokens + t`` of others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cipherlm.engine import inner_sum_rotations
from cipherlm.nn.rotary import Rotary

if TYPE_CHECKING:
    from cipherlm.schemes.ckks.chunk_layout import ChunkLayout
    from cipherlm.schemes.ckks.decoding_layout import DecodingLayout

Float64 = NDArray[np.float64]
Integers = NDArray[np.int_]

ATTENTION_LEVEL = 4
"""Where queries, keys and values are computed: at 3 they are masked, and at 2 multiplied."""

LINEAR_LEVEL = 2
"""Where other linear layers are applied."""

MOST_REPETITIONS = 8
"""How many repetitions of its slots a refresh of a ciphertext knows of, at most: each power of two takes a
rotation, and saves half as much as the one before."""

MOST_SCORES = 16
"""In how many ciphertexts the scores of one token may be."""


@dataclass(frozen=True)
class Layout:
    """The packing of a model: ``slots`` of a ciphertext, ``tokens`` side by side, ``heads`` of ``head_dim``.

    ``width`` is that of hidden states, ``inner`` that of an MLP (0 stands for as wide as the heads are
    together, and for four times the width). ``prefix`` public tokens are kept apart from the private ones,
    and ``rotary`` says that queries and keys are rotated. ``tokens`` is a power of two, and no more than
    ``head_dim`` rounded up to one. Raises ``ValueError`` where they do not fit.
    """

    slots: int
    tokens: int
    heads: int
    head_dim: int
    width: int = 0
    inner: int = 0
    prefix: int = 0
    rotary: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "width", self.width or self.heads * self.head_dim)
        object.__setattr__(self, "inner", self.inner or 4 * self.width)
        if self.tokens != power_of_two(self.tokens):
            raise ValueError(f"{self.tokens} tokens side by side: it must be a power of two")
        if self.tokens > self._features_of_head:
            raise ValueError(f"{self.tokens} tokens side by side, with heads of {self.head_dim} features")
        if self.period * self.tokens > self.slots:
            raise ValueError(f"{self.period} features of {self.tokens} tokens do not fit {self.slots} slots")

    @property
    def padded_heads(self) -> int:
        """H, the number of heads rounded up to a power of two."""
        return power_of_two(self.heads)

    @property
    def period(self) -> int:
        """After how many features they repeat."""
        return self.padded_heads * self._features_of_head

    @property
    def _features_of_head(self) -> int:
        return max(power_of_two(self.head_dim), power_of_two(self.width) // self.padded_heads)

    @cached_property
    def feature_at(self) -> Integers:
        """The feature of a head at each place of its period, or -1 for none."""
        places = np.full(self._features_of_head, -1)
        half = self.head_dim // 2 if self.head_dim % 2 == 0 else self.head_dim
        places[:half] = np.arange(half)
        middle = len(places) // 2
        places[middle : middle + self.head_dim - half] = np.arange(half, self.head_dim)
        return places

    @cached_property
    def place_of(self) -> Integers:
        """The place of each feature of a head in its period."""
        order = self.feature_at
        places: Integers = np.flatnonzero(order >= 0)[np.argsort(order[order >= 0])]
        return places

    @property
    def half_turn(self) -> int:
        """The rotation that exchanges both halves of a head's features."""
        return self.period // 2 * self.tokens

    @property
    def prefix_parts(self) -> int:
        """How many ciphertexts hold the scores of a public prefix."""
        return -(-self.prefix // self._features_of_head)

    @property
    def distance_step(self) -> int:
        """The rotation from one feature of a head, or one distance of scores, to the next."""
        return self.padded_heads * self.tokens

    @property
    def baby_steps(self) -> int:
        """How many rotations of its input a matrix takes; its other rotations are of results."""
        return 1 << (self.period.bit_length() // 2)

    @property
    def stages(self) -> tuple[int, int]:
        """The stages of the steps of a matrix; see :class:`~cipherlm.engine.LinearTransformation`.

        Of n steps, about the root of n are of the first stage, which takes the fewest keys.
        """
        babies, giants = self.baby_steps, self.period // self.baby_steps
        return (self.tokens << (babies.bit_length() // 2), babies * self.tokens << (giants.bit_length() // 2))

    def chunks(self, features: int) -> int:
        """Return how many ciphertexts hold this many features."""
        return -(-features // self.period)

    @property
    def decoding(self) -> DecodingLayout:
        """The packing of one token that follows these."""
        from cipherlm.schemes.ckks.decoding_layout import DecodingLayout

        return DecodingLayout(self)

    @property
    def chunk(self) -> ChunkLayout:
        """The packing of a chunk behind others."""
        from cipherlm.schemes.ckks.chunk_layout import ChunkLayout

        return ChunkLayout(self)

    @property
    def most_tokens(self) -> int:
        """How many tokens a context may have: what keeps scores in a few ciphertexts."""
        return MOST_SCORES * self.decoding.keys_per_part

    def rotations(self, max_level: int, *, decoding: bool = True) -> dict[int, int]:
        """Return the rotations that a model needs, and the highest level of each.

        ``decoding`` stands for all that comes behind a first chunk.
        """
        levels: dict[int, int] = {}

        def need(level: int, *rotations: int) -> None:
            need_rotations(levels, self.slots, level, *rotations)

        for behind in (self.decoding, self.chunk) if decoding else ():
            for rotation, level in behind.rotations(max_level).items():
                need(level, rotation)

        giant, (fine, coarse) = self.baby_steps * self.tokens, self.stages
        need(LINEAR_LEVEL, *range(0, fine, self.tokens), *range(0, giant, fine))
        need(LINEAR_LEVEL, *range(0, coarse, giant), *range(0, self.period * self.tokens, coarse))
        need(ATTENTION_LEVEL - 1, self.half_turn, *(-k for k in range(1, self.tokens)))
        need(ATTENTION_LEVEL - 2, *(k * self.distance_step for k in range(1, self.tokens)))
        if self.prefix:
            step, count = self.blocks_of_head
            need(ATTENTION_LEVEL - 2, *(k * step for k in range(1, count)))
            need(max_level, *inner_sum_rotations(step, count))
        need(ATTENTION_LEVEL - 3, *inner_sum_rotations(*self.blocks_of_head))
        need(max_level - 1, *inner_sum_rotations(*self.features))
        need(max_level, *inner_sum_rotations(*self.distances))
        need(max_level, *(self.slots // 2**k for k in range(1, MOST_REPETITIONS.bit_length())))
        return levels

    def copies(self, period: int) -> tuple[int, ...]:
        """Return how often slots that repeat after so many do so, as far as a refresh makes use of it."""
        return (min(MOST_REPETITIONS, self.slots // period),)

    @property
    def whole_copies(self) -> tuple[int, ...]:
        """How often hidden states, or heads, of all tokens repeat in the slots."""
        return self.copies(self.period * self.tokens)

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
        return [self.repeated(chunk) for chunk in padded.reshape(-1, self.period, self.tokens)]

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
        padded[self.place_of[:features], :heads, start : start + tokens] = values.transpose(2, 0, 1)
        return self.repeated(padded)

    def unpack_heads(self, slots: Float64, tokens: int, start: int = 0) -> Float64:
        """Return queries, keys or values (heads, tokens, head_dim) from slots."""
        shape = (self._features_of_head, self.padded_heads, self.tokens)
        values = slots[: math.prod(shape)].reshape(shape)[self.place_of, : self.heads]
        chosen: Float64 = values[:, :, start : start + tokens].transpose(1, 2, 0)
        return chosen

    @property
    def head_order(self) -> Integers:
        """The feature at each position of the heads' order, or -1 for none."""
        place, head = np.divmod(np.arange(self.period), self.padded_heads)
        feature = self.feature_at[place]
        exists = (feature >= 0) & (head < self.heads)
        return np.where(exists, head * self.head_dim + feature, -1)

    def key_masks(self, rotary: Rotary | None = None, position: int = 0) -> Iterator[list[Float64]]:
        """Yield, for every shift k, the masks of keys that were rotated by 0, 1, ... tokens.

        With K[s] the keys rotated by s tokens, the sum over k of ``q * sum_s(mask[k][s] * K[s])``, rotated by
        k features, has at feature ``b * tokens + a`` the part of the scores at distance a that ``tokens``
        features contribute.

        With ``rotary``, for tokens from ``position`` on, as many masks follow for keys whose halves were
        exchanged: they rotate the keys on the way.
        """
        for k in range(self.tokens):
            masks = [self.at_features(partial(self._key_mask, k=k, s=s)) for s in range(self.tokens)]
            if rotary is None:
                yield masks
                continue
            earlier = (self.rotary_factors(rotary, position - s) for s in range(self.tokens))
            cosines, sines = zip(*earlier, strict=True)
            yield [
                mask * factor
                for factors in (cosines, sines)
                for mask, factor in zip(masks, factors, strict=True)
            ]

    def _key_mask(self, a: Integers, t: Integers, k: int, s: int) -> NDArray[np.bool_]:
        chosen: NDArray[np.bool_] = ((a - k) % self.tokens == s) & (t >= s)
        return chosen

    def rotary_factors(self, rotary: Rotary, position: int) -> tuple[Float64, Float64]:
        """Return what heads, and heads with their halves exchanged, are multiplied by.

        The token of the first place is at ``position``.
        """
        cosine, sine = rotary.factors(np.arange(position, position + self.tokens))
        sine[:, : self.head_dim // 2] *= -1
        packed = (np.tile(factor, (self.heads, 1, 1)) for factor in (cosine, sine))
        return self.pack_heads(next(packed)), self.pack_heads(next(packed))

    def prefix_scores(self, keys: Float64, part: int) -> Iterator[tuple[int, Float64]]:
        """Yield the diagonals of a matrix from queries to scores of clear keys (heads, tokens, head_dim)."""
        table = self._of_places(keys, part) / math.sqrt(self.head_dim)
        for d in range(self._features_of_head):
            diagonal = np.take_along_axis(table, self._shifted_places(d), axis=1)
            yield d * self.distance_step, self._over_tokens(diagonal[:, 0])

    def prefix_values(self, values: Float64, part: int) -> Iterator[tuple[int, Float64]]:
        """Yield the diagonals of a matrix from weights of clear values (heads, tokens, head_dim) to sums."""
        table = self._of_places(values, part).swapaxes(0, 1)
        for d in range(self._features_of_head):
            diagonal = np.take_along_axis(table, self._shifted_places(d), axis=1)
            yield d * self.distance_step, self._over_tokens(diagonal[:, 0])

    def _of_places(self, values: Float64, part: int) -> Float64:
        """Return values (tokens, places of features, heads) of one part, with zeros."""
        count = self._features_of_head
        chosen = values[:, part * count : (part + 1) * count]
        table = np.zeros((count, count, self.padded_heads))
        table[: chosen.shape[1], self.place_of, : self.heads] = chosen.transpose(1, 2, 0)
        return table

    def _shifted_places(self, d: int) -> Integers:
        """Return, for every output place, that of the input which a rotation by d places brings there."""
        count = self._features_of_head
        shifted: Integers = ((np.arange(count) + d) % count)[:, None, None]
        return np.broadcast_to(shifted, (count, 1, self.padded_heads))

    def _over_tokens(self, values: Float64) -> Float64:
        return self.repeated(np.repeat(values[..., None], self.tokens, axis=-1))

    def value_masks(self, start: int = 0) -> Iterator[list[Float64]]:
        """Yield, for every shift k, the masks of values that were rotated by 0, 1, ... tokens.

        The sum over k of weights rotated by k features, times ``sum_s(mask[k][s] * V[s])``, is the weighted
        sum of values; zero for the tokens before ``start``.
        """
        for k in range(self.tokens):
            yield [
                self.at_features(partial(self._value_mask, k=k, s=s, least=max(s, start)))
                for s in range(self.tokens)
            ]

    def _value_mask(self, a: Integers, t: Integers, k: int, s: int, least: int) -> NDArray[np.bool_]:
        chosen: NDArray[np.bool_] = ((a + k) % self.tokens == s) & (t >= least)
        return chosen

    def tokens_from(self, start: int) -> Float64:
        """Return 1 where the tokens from ``start`` on are."""
        return self.at_features(lambda a, t: (t >= start) & (a >= 0))

    @property
    def places(self) -> int:
        """How many places for keys a row of scores has."""
        return self.tokens + self.prefix_parts * len(self.feature_at)

    def exponents(self, floor: float) -> list[Float64]:
        """Return what is added to scores: -log of the number of keys seen, or ``floor`` where none is.

        First that for private keys, then that for each part of the prefix. Heads that do not exist get the
        same: their scores are zero, and so stay where the polynomials of a softmax are fitted.
        """
        own = self.at_features(lambda a, t: np.where(t >= a, -np.log(self.prefix + t + 1.0), floor))
        count = self._features_of_head
        shape = (self.prefix_parts, count, self.padded_heads, self.tokens)
        seen = (np.arange(self.prefix_parts * count) < self.prefix).reshape(*shape[:2], 1, 1)
        shift = np.where(seen, -np.log(self.prefix + np.arange(self.tokens) + 1.0), floor)
        parts = np.broadcast_to(shift, shape)
        return [own, *(self.repeated(part) for part in parts)]

    def at_features(self, function: Callable[[Integers, Integers], NDArray[Any]]) -> Float64:
        """Return the slots of a function of feature (modulo ``tokens``) and token, the same for all heads."""
        a = np.arange(self._features_of_head)[:, None, None] % self.tokens
        t = np.arange(self.tokens)[None, None, :]
        values = np.zeros((self._features_of_head, self.padded_heads, self.tokens))
        return self.repeated(values + function(a, t))

    def repeated(self, values: Float64) -> Float64:
        """Return slots of what is there once."""
        return np.tile(values.ravel(), self.slots // values.size)


def need_rotations(levels: dict[int, int], slots: int, level: int, *rotations: int) -> None:
    """Note in ``levels`` that these rotations are needed at a level."""
    for rotation in rotations:
        if rotation % slots:
            levels[rotation % slots] = max(level, levels.get(rotation % slots, 0))


def power_of_two(least: int) -> int:
    """Return the least power of two that is not below ``least``."""
    return 1 << (least - 1).bit_length()
