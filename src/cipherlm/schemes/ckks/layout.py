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
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cipherlm.engine import inner_sum_rotations
from cipherlm.nn.rotary import Rotary

Float64 = NDArray[np.float64]
Integers = NDArray[np.int_]

ATTENTION_LEVEL = 4
"""Where queries, keys and values are computed: at 3 they are masked, and at 2 multiplied."""

LINEAR_LEVEL = 2
"""Where other linear layers are applied."""

MOST_COPIES = 8
"""How many parts of a matrix are applied side by side to one token, at most: each costs a rotation."""

DECODING_BABY_STEPS = 16
"""How many rotations of its input a matrix on one token takes, at most."""

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
        if self.tokens != _power_of_two(self.tokens):
            raise ValueError(f"{self.tokens} tokens side by side: it must be a power of two")
        if self.tokens > self._features_of_head:
            raise ValueError(f"{self.tokens} tokens side by side, with heads of {self.head_dim} features")
        if self.period * self.tokens > self.slots:
            raise ValueError(f"{self.period} features of {self.tokens} tokens do not fit {self.slots} slots")

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
        return max(_power_of_two(self.head_dim), _power_of_two(self.width) // self.padded_heads)

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

    def chunks(self, features: int) -> int:
        """Return how many ciphertexts hold this many features."""
        return -(-features // self.period)

    @property
    def decoding(self) -> DecodingLayout:
        """The packing of one token that follows these."""
        return DecodingLayout(self)

    @property
    def most_tokens(self) -> int:
        """How many tokens a context may have: what keeps scores in a few ciphertexts."""
        return MOST_SCORES * self.decoding.keys_per_part

    def rotations(self, max_level: int, *, decoding: bool = True) -> dict[int, int]:
        """Return the rotations that a model needs, and the highest level of each."""
        babies = self.baby_steps
        levels = self.decoding.rotations(max_level) if decoding else {}

        def need(level: int, *rotations: int) -> None:
            _need(levels, self.slots, level, *rotations)

        need(ATTENTION_LEVEL, *(step * self.tokens for step in range(1, babies)))
        need(ATTENTION_LEVEL, *(step * self.tokens for step in range(0, self.period, babies)))
        need(ATTENTION_LEVEL - 1, self.half_turn, *(-k for k in range(1, self.tokens)))
        need(ATTENTION_LEVEL - 2, *(k * self.distance_step for k in range(1, self.tokens)))
        if self.prefix:
            step, count = self.blocks_of_head
            need(ATTENTION_LEVEL - 2, *(k * step for k in range(1, count)))
            need(max_level, *inner_sum_rotations(step, count))
        need(ATTENTION_LEVEL - 3, *inner_sum_rotations(*self.blocks_of_head))
        need(max_level - 1, *inner_sum_rotations(*self.features))
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
        padded[self.place_of[:features], :heads, start : start + tokens] = values.transpose(2, 0, 1)
        return self._repeated(padded)

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
            masks = [self._at_features(partial(self._key_mask, k=k, s=s)) for s in range(self.tokens)]
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
        return self._repeated(np.repeat(values[..., None], self.tokens, axis=-1))

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

    def exponents(self, floor: float) -> list[Float64]:
        """Return what is added to scores: -log of the number of keys seen, or ``floor`` where none is.

        First that for private keys, then that for each part of the prefix.
        """
        own = self._at_features(lambda a, t: np.where(t >= a, -np.log(self.prefix + t + 1.0), floor))
        own.reshape(-1, self.padded_heads, self.tokens)[:, self.heads :] = -math.log(self.tokens)
        count = self._features_of_head
        shape = (self.prefix_parts, count, self.padded_heads, self.tokens)
        seen = (np.arange(self.prefix_parts * count) < self.prefix).reshape(*shape[:2], 1, 1)
        shift = np.where(seen, -np.log(self.prefix + np.arange(self.tokens) + 1.0), floor)
        parts = np.broadcast_to(shift, shape).copy()
        parts[:, :, self.heads :] = floor
        return [own, *(self._repeated(part) for part in parts)]

    def _at_features(self, function: Callable[[Integers, Integers], NDArray[Any]]) -> Float64:
        """Return the slots of a function of feature (modulo ``tokens``) and token, the same for all heads."""
        a = np.arange(self._features_of_head)[:, None, None] % self.tokens
        t = np.arange(self.tokens)[None, None, :]
        values = np.zeros((self._features_of_head, self.padded_heads, self.tokens))
        return self._repeated(values + function(a, t))

    def _repeated(self, values: Float64) -> Float64:
        return np.tile(values.ravel(), self.slots // values.size)


@dataclass(frozen=True)
class DecodingLayout:
    """The packing of one token behind those of a :class:`Layout`: everything that can be is there once.

    Hidden states have feature f at slot f, and repeat with the layout's period. Heads repeat with a period of
    ``slots / tokens``, and keys and values of past tokens have token t of a group in repetition t: one
    product with a query gives the terms of all the group's scores.

    Heads come by a swap of bits from where a prompt has them, which takes few rotations: there, a slot is
    (A, B, t) with as many bits for A as for the token t, and (A, B) feature j and head h, ``j * H + h``. Here
    it is (t, B, A). Feature j is thus at ``((j % L) * H + h) * tokens + j // L`` with L = ``lower``; a sum
    over features is right where j is 0. Scores of group g, of L at most in a ciphertext, are where j is g.
    """

    prompt: Layout

    @property
    def attention_level(self) -> int:
        """Where queries, keys and values are computed: rotating queries takes one more."""
        return ATTENTION_LEVEL + self.prompt.rotary

    @property
    def half_turns(self) -> tuple[int, int]:
        """The rotations that bring the second half of a head's features to the first, and back."""
        half = len(self.prompt.feature_at) // 2
        step = half // self.lower if half >= self.lower else half * self.group_step
        return step, -step

    @property
    def prefix_parts(self) -> int:
        """How many ciphertexts hold the scores of a public prefix."""
        return -(-self.prompt.prefix // self.keys_per_part)

    @property
    def prefix_step(self) -> int:
        """The giant step of the matrices of a public prefix."""
        return self.group_step << (self.lower.bit_length() // 2)

    @property
    def period(self) -> int:
        """After how many slots hidden states repeat."""
        return self.prompt.period

    @property
    def heads_period(self) -> int:
        """After how many slots heads repeat."""
        return self.prompt.slots // self.prompt.tokens

    @property
    def lower(self) -> int:
        """L, how many features of a head are in the upper bits; and groups in a ciphertext of scores."""
        return self.heads_period // (self.prompt.padded_heads * self.prompt.tokens)

    @property
    def keys_per_part(self) -> int:
        """How many keys have their scores in one ciphertext."""
        return self.lower * self.prompt.tokens

    @property
    def group_step(self) -> int:
        """The rotation from one group's scores to the next, or from a feature of a head to the next."""
        return self.prompt.padded_heads * self.prompt.tokens

    @property
    def features_of_head(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Step and count of two sums that add the features of a head."""
        return (1, self.prompt.tokens), (self.group_step, self.lower)

    @property
    def spreading(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Step and count of two sums that spread what is at feature 0 of a head over all its features."""
        return (-1, self.prompt.tokens), (-self.group_step, self.lower)

    @property
    def tokens_of_group(self) -> tuple[int, int]:
        """Step and count of a sum over the tokens of a group."""
        return self.heads_period, self.prompt.tokens

    @property
    def groups_of_part(self) -> tuple[int, int]:
        """Step and count of a sum over groups, of something that is the same for all tokens of a group."""
        return self.group_step, self.lower

    @property
    def features(self) -> tuple[int, int]:
        """Step and count of a sum over the features of hidden states."""
        return 1, self.period

    def inner_period(self, features: int) -> int:
        """Return after how many slots so many features repeat. Raises ``ValueError`` for too many."""
        period = max(self.period, _power_of_two(features))
        if period > self.prompt.slots:
            raise ValueError(f"{features} features of a token do not fit {self.prompt.slots} slots")
        return period

    def transposition(self, count: int) -> Iterator[tuple[int, Float64]]:
        """Yield rotation and mask of each term that brings keys or values of a prompt's first tokens here."""
        tokens, slots = self.prompt.tokens, self.prompt.slots
        n = np.arange(slots)
        token, feature = n // self.heads_period, n % tokens
        for distance in range(1 - tokens, tokens):
            chosen = (feature - token == distance) & (token < count)
            yield distance * (self.heads_period - 1) % slots, chosen * 1.0

    def rotations(self, max_level: int) -> dict[int, int]:
        """Return the rotations that decoding needs, and the highest level of each."""
        levels: dict[int, int] = {}
        need = partial(_need, levels, self.prompt.slots)
        inner = self.inner_period(self.prompt.inner)
        for level, inputs, outputs in (
            (self.attention_level, self.period, self.heads_period),
            (LINEAR_LEVEL, self.heads_period, self.period),
            (LINEAR_LEVEL, self.period, inner),
            (LINEAR_LEVEL, inner, self.period),
        ):
            shape = DecodingShape(self.prompt.slots, inputs, outputs)
            need(level + 1, *(copy * shape.diagonals for copy in range(shape.copies)))
            need(level, *range(min(shape.diagonals, DECODING_BABY_STEPS)))
            need(level, *range(0, shape.diagonals, DECODING_BABY_STEPS))
            need(level - 1, shape.diagonals // 2, *inner_sum_rotations(*shape.sums))
        need(ATTENTION_LEVEL - 1, *(rotation for rotation, _ in self.transposition(1)))
        need(ATTENTION_LEVEL - 1, self.group_step, *inner_sum_rotations(*self.tokens_of_group))
        for sums in (*self.features_of_head, *self.spreading):
            need(ATTENTION_LEVEL - 2, *inner_sum_rotations(*sums))
        if self.prompt.rotary:
            need(self.attention_level - 1, *self.half_turns)
        if self.prompt.prefix:
            step = self.prefix_step
            need(ATTENTION_LEVEL - 1, *range(0, step, self.group_step))
            need(ATTENTION_LEVEL - 1, *range(-self.heads_period, self.heads_period, step))
        need(max_level, *inner_sum_rotations(*self.tokens_of_group))
        need(max_level, *inner_sum_rotations(*self.groups_of_part))
        need(max_level - 1, *inner_sum_rotations(*self.features))
        return levels

    def pack(self, hidden: Float64) -> Float64:
        """Return the slots of one token's hidden states (features,)."""
        padded = np.zeros(self.inner_period(len(hidden)))
        padded[: len(hidden)] = hidden
        return np.tile(padded, self.prompt.slots // len(padded))

    def unpack(self, slots: Float64, features: int) -> Float64:
        """Return one token's hidden states (features,) from slots."""
        return slots[:features]

    @property
    def head_order(self) -> Integers:
        """The feature at each position of the heads' order, or -1 for none."""
        layout = self.prompt
        upper, head, rest = np.unravel_index(
            np.arange(self.heads_period), (self.lower, layout.padded_heads, layout.tokens)
        )
        places = np.full(self.lower * layout.tokens, -1)
        places[: len(layout.feature_at)] = layout.feature_at
        feature = places[rest * self.lower + upper]
        exists = (feature >= 0) & (head < layout.heads)
        return np.where(exists, head * layout.head_dim + feature, -1)

    def pack_heads(self, values: Float64) -> Float64:
        """Return the slots of one token's values (heads, head_dim), the same in every repetition."""
        order = self.head_order
        slots = np.where(order >= 0, values.ravel()[order], 0.0)
        return np.tile(slots, self.prompt.tokens)

    def rotary_factors(self, rotary: Rotary, position: int) -> tuple[Float64, Float64, Float64]:
        """Return what heads of a token are multiplied by, and heads after each of :attr:`half_turns`."""
        cosine, sine = rotary.factors(np.array([position]))
        first = np.arange(self.prompt.head_dim) < self.prompt.head_dim // 2
        factors = (cosine[0], np.where(first, -sine[0], 0), np.where(first, 0, sine[0]))
        packed = [self.pack_heads(np.tile(factor, (self.prompt.heads, 1))) for factor in factors]
        return packed[0], packed[1], packed[2]

    def prefix_scores(self, keys: Float64, part: int) -> Iterator[tuple[int, Float64]]:
        """Yield the diagonals of a matrix from queries to scores of clear keys (heads, tokens, head_dim).

        The scores of a key are the sums of ``tokens`` slots, from its place on.
        """
        table = self._of_places(keys, part) / math.sqrt(self.prompt.head_dim)
        group = np.arange(self.lower)
        for d in range(self.lower):
            diagonal = table[:, group, (group + d) % self.lower]
            if np.any(diagonal):
                yield d * self.group_step, diagonal.ravel()

    def prefix_values(self, values: Float64, part: int) -> Iterator[tuple[int, Float64]]:
        """Yield the diagonals of a matrix from weights of clear values (heads, tokens, head_dim) to sums.

        It takes each weight ``tokens`` times, from its place on; its results are still to be summed over the
        tokens of a group.
        """
        table = self._of_places(values, part)
        upper = np.arange(self.lower)
        for d in range(1 - self.lower, self.lower):
            exists = (upper + d >= 0) & (upper + d < self.lower)
            chosen = table[:, (upper + d) % self.lower, upper] * exists[:, None, None]
            if np.any(chosen):
                yield d * self.group_step, chosen.ravel()

    def _of_places(self, values: Float64, part: int) -> Float64:
        """Return values (tokens of a group, groups, upper part of the feature, heads, rest) of one part."""
        layout, count = self.prompt, self.keys_per_part
        features = np.zeros((count, layout.padded_heads, self.lower * layout.tokens))
        chosen = values[:, part * count : (part + 1) * count]
        features[: chosen.shape[1], : layout.heads, layout.place_of] = chosen.transpose(1, 0, 2)
        table = features.reshape(self.lower, layout.tokens, layout.padded_heads, layout.tokens, self.lower)
        return table.transpose(1, 0, 4, 2, 3)

    def token_mask(self, token: int) -> Float64:
        """Return 1 where keys and values of one token of a group are."""
        mask: Float64 = (np.arange(self.prompt.slots) // self.heads_period == token) * 1.0
        return mask

    def score_mask(self, tokens: int) -> Float64:
        """Return 1 at feature 0 of every head, for the first tokens of a group."""
        shape = (self.prompt.tokens, self.lower, self.prompt.padded_heads, self.prompt.tokens)
        mask: Float64 = np.zeros(shape)
        mask[:tokens, 0, :, 0] = 1.0
        return mask.ravel()

    @property
    def place_mask(self) -> Float64:
        """Return 1 where scores are: at feature 0 of every head, for all groups."""
        mask: Float64 = (np.arange(self.prompt.slots) % self.prompt.tokens == 0) * 1.0
        return mask

    def exponents(self, floor: float, own: int) -> list[Float64]:
        """Return what is added to scores: -log of the number of keys, ``floor`` where there is none.

        First that for each part of the prefix, then that for ``own`` private keys. Slots that hold no score
        get what makes their sum one.
        """
        parts = self.prefix_parts + -(-own // self.keys_per_part)
        tokens, heads, before = self.prompt.tokens, self.prompt.padded_heads, self.prompt.prefix
        shape = (parts, tokens, self.lower, heads, tokens)
        part, token, group = np.indices(shape[:3])
        place = (part * self.lower + group) * tokens + token
        behind = place - self.prefix_parts * self.keys_per_part
        seen = np.where(behind < 0, place < before, behind < own)
        values = np.full(shape, -math.log(parts * self.keys_per_part))
        values[..., 0] = np.where(seen, -math.log(before + own), floor)[..., None]
        return list(values.reshape(parts, -1))


@dataclass(frozen=True)
class DecodingShape:
    """How a matrix is applied to one token: inputs repeat with one period and outputs with another.

    The slots have room for several ``copies`` of the longer period M. Copy u takes care of inputs that are u
    times ``diagonals`` further on; the sum over copies, and over repetitions of the outputs within M, is the
    result (after S. Halevi and V. Shoup, "Algorithms in HElib", 2014, with the diagonals split over copies).
    """

    slots: int
    inputs: int
    outputs: int

    @property
    def longer(self) -> int:
        """M, the longer of both periods."""
        return max(self.inputs, self.outputs)

    @property
    def copies(self) -> int:
        """In how many parts the diagonals are split."""
        return min(self.slots // self.longer, MOST_COPIES, min(self.inputs, self.outputs) // 2)

    @property
    def diagonals(self) -> int:
        """How many diagonals there are."""
        return min(self.inputs, self.outputs) // self.copies

    @property
    def sums(self) -> tuple[int, int]:
        """Step and count of the sum that gives the result."""
        return self.outputs, self.longer * self.copies // self.outputs

    @property
    def copy(self) -> Integers:
        """The number of the copy at each slot."""
        return np.arange(self.slots) // self.longer % self.copies

    @property
    def input(self) -> Integers:
        """The input at each slot, once every copy has what it takes care of."""
        return (np.arange(self.slots) + self.copy * self.diagonals) % self.inputs


def _need(levels: dict[int, int], slots: int, level: int, *rotations: int) -> None:
    for rotation in rotations:
        if rotation % slots:
            levels[rotation % slots] = max(level, levels.get(rotation % slots, 0))


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()
