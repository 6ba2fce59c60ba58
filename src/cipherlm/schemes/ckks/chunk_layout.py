"""Where the scores of a chunk of tokens lie against keys before them, and the masks that bring them there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cipherlm.engine import inner_sum_rotations
from cipherlm.schemes.ckks.layout import ATTENTION_LEVEL, Layout, need_rotations

Float64 = NDArray[np.float64]
Integers = NDArray[np.int_]


@dataclass(frozen=True)
class ChunkLayout:
    """The scores of a chunk of queries, packed as a prompt's, against groups of as many keys.

    Keys and values of a group lie as a prompt's do: token s of a group in slot ``p * tokens + s``. With the
    queries turned by a tokens, so that query s + a (modulo ``tokens``) meets key s, one product has the terms
    of all pairs at the cyclic distance a. What query t makes of key t - a of group g comes to slot
    ``((g * tokens + a) * H + h) * tokens + t``: the scores of :attr:`blocks` groups share a ciphertext.

    Tokens are turned cyclically by two rotations, one for those that stay within the ``tokens`` slots of a
    feature and one for those that come in again at the other end: see :attr:`turns`.
    """

    prompt: Layout

    @property
    def blocks(self) -> int:
        """How many groups have their scores in one ciphertext."""
        return self.prompt.blocks_of_head[1]

    @property
    def keys_per_part(self) -> int:
        """How many keys have their scores in one ciphertext."""
        return self.blocks * self.prompt.tokens

    @property
    def turns(self) -> list[int]:
        """The rotations that turn tokens, as :meth:`rotation` makes them."""
        tokens = self.prompt.tokens
        return [0, *range(-1, -tokens, -1), *range(tokens - 1, 0, -1)]

    def rotation(self, turn: int) -> int:
        """Return the rotation that makes a turn, for one above 0 behind a rotation by ``tokens``."""
        return turn - self.prompt.tokens if turn > 0 else turn

    @property
    def steps(self) -> list[int]:
        """The rotations by 1, 2, ... features of a head."""
        return [k * self.prompt.distance_step for k in range(1, self.prompt.tokens)]

    def groups(self, keys: int) -> int:
        """Return how many groups hold so many keys."""
        return -(-keys // self.prompt.tokens)

    def parts(self, keys: int) -> int:
        """Return in how many ciphertexts the scores of a chunk behind so many keys are."""
        return -(-(self.groups(keys) + 1) // self.blocks)

    def places(self, before: int) -> int:
        """Return how many places for keys a row of scores has behind so many private keys."""
        return (self.parts(before) + self.prompt.prefix_parts) * self.keys_per_part

    def rotations(self, max_level: int) -> dict[int, int]:
        """Return the rotations that chunks behind others need, and the highest level of each."""
        levels: dict[int, int] = {}
        need = partial(need_rotations, levels, self.prompt.slots)
        need(ATTENTION_LEVEL, self.prompt.tokens, *map(self.rotation, self.turns))
        need(ATTENTION_LEVEL - 1, *self.steps, *inner_sum_rotations(*self.prompt.blocks_of_head))
        need(max_level, *inner_sum_rotations(*self.prompt.blocks_of_head))
        if self.prompt.rotary:
            need(ATTENTION_LEVEL + 1, self.prompt.half_turn)
        return levels

    def query_masks(self, k: int) -> Iterator[tuple[int, Float64]]:
        """Yield turn and mask of each term of queries for keys that are rotated by k features.

        The products of the two, summed over k, have at feature ``b * tokens + a`` the part of the scores at
        distance a that ``tokens`` features contribute. The queries are rotated by k features after this.
        """
        for turn in self.turns:
            yield turn, self._mask(turn, lambda a, turn: (a - k - turn) % self.prompt.tokens == 0)

    def place_masks(self, block: int) -> Iterator[tuple[int, Float64]]:
        """Yield turn and mask of each term that brings a group's scores to the queries' tokens.

        The masks come first, and choose what stays in one block.
        """
        for turn in self.turns:
            chosen = self._mask(-turn, lambda a, turn: (a - turn) % self.prompt.tokens == 0)
            yield turn, chosen * self._block(block)

    def weight_masks(self, block: int) -> Iterator[tuple[int, Float64]]:
        """Yield turn and mask of each term that brings weights of one block to the keys' tokens."""
        for turn in self.turns:
            chosen = self._mask(turn, lambda a, turn: (a - turn) % self.prompt.tokens == 0)
            yield turn, chosen * self._block(block)

    def sum_masks(self, k: int) -> Iterator[tuple[int, Float64]]:
        """Yield turn and mask of each term that brings weighted values to the queries' tokens.

        The weights were rotated by k features before. The masks come first.
        """
        for turn in self.turns:
            yield turn, self._mask(-turn, lambda a, turn: (a + k - turn) % self.prompt.tokens == 0)

    def _mask(self, turn: int, chosen: Callable[[Integers, int], NDArray[np.bool_]]) -> Float64:
        """Return 1 where features are chosen, and a rotation by ``turn`` stays among a feature's tokens."""
        tokens = self.prompt.tokens

        def at(a: Integers, t: Integers) -> NDArray[Any]:
            return chosen(a, turn) & (t + turn >= 0) & (t + turn < tokens)

        return self.prompt.at_features(at)

    def _block(self, block: int) -> Float64:
        layout = self.prompt
        values = np.zeros((self.blocks, layout.tokens * layout.padded_heads * layout.tokens))
        values[block] = 1.0
        return layout.repeated(values)

    def first_tokens(self, count: int) -> Float64:
        """Return 1 where the first tokens of a group are."""
        return self.prompt.at_features(lambda a, t: (t < count) & (a >= 0))

    def exponents(self, floor: float, before: int) -> list[Float64]:
        """Return what is added to scores: -log of the number of keys seen, or ``floor`` where none is.

        First that for each part of ``before`` private keys and of the chunk itself, then that for each part
        of the prefix. Heads that do not exist get the same: their scores are zero, and so stay where the
        polynomials of a softmax are fitted.
        """
        layout = self.prompt
        count, parts, prefix_parts = self.keys_per_part, self.parts(before), layout.prefix_parts
        group, a, t = np.ogrid[: parts * self.blocks, : layout.tokens, : layout.tokens]
        key = group * layout.tokens + (t - a) % layout.tokens
        own = self.groups(before)
        seen = np.where(group < own, key < before, (group == own) & (t >= a))
        shift = -np.log(layout.prefix + before + np.arange(layout.tokens) + 1.0)
        values = np.zeros((parts * count, layout.padded_heads, layout.tokens))
        values[:] = np.where(seen, shift, floor).reshape(parts * count, 1, layout.tokens)
        shape = (prefix_parts * count, layout.padded_heads, layout.tokens)
        seen_of_prefix = (np.arange(prefix_parts * count) < layout.prefix)[:, None, None]
        of_prefix = np.broadcast_to(np.where(seen_of_prefix, shift, floor), shape)
        all_parts = np.concatenate([values, of_prefix]).reshape(parts + prefix_parts, -1)
        return [layout.repeated(part) for part in all_parts]
