"""Where numbers lie in the slots of a ciphertext of one token, behind those of a prompt."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cipherlm.engine import inner_sum_rotations
from cipherlm.nn.rotary import Rotary
from cipherlm.schemes.ckks.layout import (
    ATTENTION_LEVEL,
    LINEAR_LEVEL,
    Layout,
    need_rotations,
    power_of_two,
)

Float64 = NDArray[np.float64]
Integers = NDArray[np.int_]

MOST_COPIES = 8
"""How many parts of a matrix are applied side by side to one token, at most: each costs a rotation."""

DECODING_BABY_STEPS = 16
"""How many rotations of its input a matrix on one token takes, at most."""

SHIFT_LEVEL = ATTENTION_LEVEL + 2
"""Where inputs are shifted for the copies of a matrix, at most."""

DECODING_STAGES = 4, 8 * DECODING_BABY_STEPS
"""The stages of its rotations; see :class:`~cipherlm.engine.LinearTransformation`."""


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
        """Where queries, keys and values are computed: one more than in a prompt.

        There keys and values are masked once more, to the place of their token; with rotary positions, that
        rotates them too, and queries take the level to be rotated.
        """
        return ATTENTION_LEVEL + 1

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

    def parts(self, own: int) -> int:
        """Return in how many ciphertexts the scores of so many private keys are."""
        return -(-own // self.keys_per_part)

    def places(self, own: int) -> int:
        """Return how many places for keys a row of scores has."""
        return (self.prefix_parts + self.parts(own)) * self.keys_per_part

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
        period = max(self.period, power_of_two(features))
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

    def transposition_back(self) -> Iterator[tuple[int, Float64]]:
        """Yield rotation and mask of each term that brings keys or values to a prompt's packing."""
        tokens, slots = self.prompt.tokens, self.prompt.slots
        n = np.arange(slots)
        for distance in range(1 - tokens, tokens):
            chosen = n % tokens - n // self.heads_period == distance
            yield distance * (self.heads_period - 1) % slots, chosen * 1.0

    def rotations(self, max_level: int) -> dict[int, int]:
        """Return the rotations that decoding needs, and the highest level of each."""
        levels: dict[int, int] = {}
        need = partial(need_rotations, levels, self.prompt.slots)
        inner = self.inner_period(self.prompt.inner)
        fine, coarse = DECODING_STAGES
        layers = (self.heads_period, self.period), (self.period, inner), (inner, self.period)
        shapes = [
            DecodingShape(self.prompt.slots, *layer, most) for layer in layers for most in (MOST_COPIES, 1)
        ]
        attention = DecodingShape(self.prompt.slots, self.period, self.heads_period)
        for level, shape in ((self.attention_level, attention), *((LINEAR_LEVEL, shape) for shape in shapes)):
            steps = shape.diagonals if shape is attention else shape.diagonals // 2  # the others are folded
            need(SHIFT_LEVEL, *(copy * shape.diagonals for copy in range(shape.copies)))
            need(level, *range(min(steps, fine)))
            need(level, *range(0, min(steps, DECODING_BABY_STEPS), fine))
            need(level, *range(0, min(steps, coarse), DECODING_BABY_STEPS))
            need(level, *range(0, steps, coarse))
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
        places = np.full(self.lower * self.prompt.tokens, -1)
        places[: len(self.prompt.feature_at)] = self.prompt.feature_at
        return self._order(places)

    @property
    def repeated_order(self) -> Integers:
        """The same, with features as often as a prompt's packing has them: that of keys and values."""
        count = self.lower * self.prompt.tokens
        return self._order(np.tile(self.prompt.feature_at, count // len(self.prompt.feature_at)))

    def _order(self, places: Integers) -> Integers:
        layout = self.prompt
        upper, head, rest = np.unravel_index(
            np.arange(self.heads_period), (self.lower, layout.padded_heads, layout.tokens)
        )
        feature = places[rest * self.lower + upper]
        exists = (feature >= 0) & (head < layout.heads)
        return np.where(exists, head * layout.head_dim + feature, -1)

    def pack_heads(self, values: NDArray[Any], order: Integers | None = None) -> NDArray[Any]:
        """Return the slots of one token's values (heads, head_dim), the same in every repetition.

        Unless given, the order is :attr:`head_order`.
        """
        order = self.head_order if order is None else order
        slots = np.where(order >= 0, values.ravel()[order], 0.0)
        return np.tile(slots, self.prompt.tokens)

    def rotary_factors(self, rotary: Rotary, position: int) -> tuple[Float64, Float64, Float64]:
        """Return what heads of a token are multiplied by, and heads after each of :attr:`half_turns`."""
        cosine, sine = rotary.factors(np.array([position]))
        first = np.arange(self.prompt.head_dim) < self.prompt.head_dim // 2
        factors = (cosine[0], np.where(first, -sine[0], 0), np.where(first, 0, sine[0]))
        packed = [
            self.pack_heads(np.tile(factor, (self.prompt.heads, 1)), self.repeated_order)
            for factor in factors
        ]
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
        get the same: they are zero before, and so stay where the polynomials of a softmax are fitted.
        """
        parts = self.prefix_parts + self.parts(own)
        tokens, heads, before = self.prompt.tokens, self.prompt.padded_heads, self.prompt.prefix
        shape = (parts, tokens, self.lower, heads, tokens)
        part, token, group = np.indices(shape[:3])
        place = (part * self.lower + group) * tokens + token
        behind = place - self.prefix_parts * self.keys_per_part
        seen = np.where(behind < 0, place < before, behind < own)
        values = np.where(seen, -math.log(before + own), floor)[..., None, None]
        return list(np.broadcast_to(values, shape).reshape(parts, -1))


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
    most_copies: int = MOST_COPIES
    """With one, inputs need not be shifted."""

    @property
    def longer(self) -> int:
        """M, the longer of both periods."""
        return max(self.inputs, self.outputs)

    @property
    def copies(self) -> int:
        """In how many parts the diagonals are split."""
        return min(self.slots // self.longer, self.most_copies, min(self.inputs, self.outputs) // 2)

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
