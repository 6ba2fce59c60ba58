"""A chunk of tokens on ciphertexts, behind others: what a long prompt and drafts consist of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cipherlm.engine import Ciphertext, LinearTransformation, Plaintext
from cipherlm.nn.tensor import Prefix
from cipherlm.schemes.ckks.chunk_layout import ChunkLayout
from cipherlm.schemes.ckks.ciphertext_tensor import added
from cipherlm.schemes.ckks.context import CONTEXT_LEVEL, Context, paired, rotary_masks, rotated_keys
from cipherlm.schemes.ckks.encrypted import EncryptedTensor
from cipherlm.schemes.ckks.layout import ATTENTION_LEVEL
from cipherlm.schemes.ckks.refresh import MASK_LEVEL

Float64 = NDArray[np.float64]


@dataclass(eq=False)
class EncryptedChunk(EncryptedTensor):
    """Hidden states, heads, scores or a column of tokens that follow others, the first at ``position``.

    Everything but scores and what is made of them is as in a prompt. The scores are in one ciphertext for
    each part of :class:`~cipherlm.schemes.ckks.chunk_layout.ChunkLayout`, and in more for a prefix; the
    chunk's own keys and values are one more group behind those of the
    :class:`~cipherlm.schemes.ckks.context.Context`. All pairs of queries and keys of a group are multiplied,
    and softmax is told which of them count.
    """

    @property
    def chunk(self) -> ChunkLayout:
        """The packing of scores."""
        return self.arithmetic.layout.chunk

    @property
    def _before(self) -> int:
        """How many private tokens there are before these."""
        return self.position - self.arithmetic.layout.prefix

    def with_past(self, value: EncryptedTensor, past: Any, prefix: Prefix | None) -> tuple[Context, Context]:
        """See :class:`Tensor`; ``past`` is what this or another tensor's ``with_past`` returned before."""
        context = Context.of(past, self.position, self.arithmetic)
        context.append(paired(self._one(), value), self.tokens)
        context.prefix = prefix
        return context, context

    def _finished(self, pair: Ciphertext, prefix: Prefix | None) -> Ciphertext:
        """Return keys after their rotation, less the centre of a prefix, and values as one ciphertext."""
        if self.rotation is not None:
            masks = self._rotary_masks("rotation of keys", pair.level, rotary_masks)
            half_turns = [self.arithmetic.layout.half_turn]
            pair = self._evaluator.dot(rotated_keys(self._evaluator, pair, half_turns), masks)
        if prefix is None:
            return pair
        layout = self.arithmetic.layout
        centre = -np.repeat(prefix.centre, layout.tokens, axis=1)
        shift = self.arithmetic.encodings.layer(prefix).bias(
            ("centre",), pair, lambda: layout.pack_heads(centre)
        )
        return self._evaluator.add(pair, shift)

    @property
    def keys(self) -> int:
        """See :class:`Tensor`."""
        return self.position + self.tokens

    @property
    def places(self) -> int:
        """See :class:`Tensor`."""
        return self.chunk.places(self._before)

    def scores(self, key: Context) -> EncryptedChunk:
        """See :class:`Tensor`: the real parts of the products of queries with keys and values."""
        evaluator, layout = self._evaluator, self.arithmetic.layout
        levels = 0 if self.rotation is None else 1
        query = key.ready_together(self._one(), levels, lambda pair: self._finished(pair, key.prefix))
        if self.rotation is not None:
            query = self._rotated(query)
        queries = self.arithmetic.each(
            lambda item: evaluator.rotate(item[1], item[0] * layout.distance_step) if item[0] else item[1],
            enumerate(self._turned(query, "queries", layout.tokens)),
        )

        def of_group(group: Ciphertext) -> Ciphertext:
            moved = [group, *evaluator.rotate_hoisted(group, self.chunk.steps)]
            return evaluator.inner_sum(evaluator.dot(queries, moved), *layout.blocks_of_head)

        sums = self.arithmetic.each(of_group, key.together)
        parts = [sums[i : i + self.chunk.blocks] for i in range(0, len(sums), self.chunk.blocks)]
        factor = math.sqrt(layout.head_dim)
        scores = [
            self._real(self._turned_back(part, "places", own=part is parts[-1]), factor) for part in parts
        ]
        if key.prefix_beside is not None:
            query = evaluator.drop_level(query, ATTENTION_LEVEL - 2)
            matrices = self._of_prefix(key.prefix_beside, "keys")
            scores += [row[0] for row in evaluator.transform_many([query], matrices)]
        return self._with(scores, rotation=None, copies=(1,))

    def exponents(self, factor: float, floor: float) -> EncryptedChunk:
        """See :class:`Tensor`."""
        evaluator, encodings = self._evaluator, self.arithmetic.encodings
        shifts = self.chunk.exponents(floor, self._before)

        def shifted(item: tuple[Ciphertext, Float64]) -> Ciphertext:
            part, shift = item
            scores = evaluator.set_scale(part, part.scale / factor)
            return evaluator.add(scores, encodings.encode(shift, scores.level, scores.scale))

        return self._with(self.arithmetic.each(shifted, zip(self.parts, shifts, strict=True)))

    def total(self) -> EncryptedChunk:
        """See :class:`Tensor`."""
        evaluator, layout = self._evaluator, self.arithmetic.layout
        total = self.parts[0]
        for part in self.parts[1:]:
            total = evaluator.add(total, part)
        for sums in (layout.blocks_of_head, layout.distances):
            total = evaluator.inner_sum(total, *sums)
        return self._with([total], copies=layout.copies(layout.distance_step))

    def mix(self, value: Context) -> tuple[EncryptedChunk, EncryptedChunk]:
        """See :class:`Tensor`."""
        self.ready(ATTENTION_LEVEL - MASK_LEVEL, then=0)
        evaluator, parameters = self._evaluator, self.arithmetic.parameters
        layout = self.arithmetic.layout
        groups, blocks = value.together, self.chunk.blocks
        count = self.chunk.parts(self._before)
        sums: list[Ciphertext] = []
        for index, part in enumerate(self.parts[:count]):
            some = groups[index * blocks : (index + 1) * blocks]
            products = self._weighted(part, some)
            sums = [evaluator.add(a, b) for a, b in zip(sums, products, strict=True)] if sums else products
        mixed = self._imaginary(self._turned_back(sums, "sums"))
        if value.prefix_beside is not None:
            level = ATTENTION_LEVEL - 2
            # The scale that these sums have in common with the others, once they are rescaled.
            scale = 2 * parameters.scale * parameters.q[level] / parameters.q[CONTEXT_LEVEL]
            matrices = self._of_prefix(value.prefix_beside, "values", scale)
            for part, matrix in zip(self.parts[count:], matrices, strict=True):
                product = evaluator.transform(evaluator.drop_level(part, level), matrix)
                mixed = added(evaluator, mixed, evaluator.rescale(product))
        return self._with([mixed], heads=True, copies=layout.whole_copies), self.total().real()

    def _weighted(self, part: Ciphertext, groups: Sequence[Ciphertext]) -> list[Ciphertext]:
        """Return sums of values times weights that were rotated by 0, 1, ... features."""
        evaluator, layout = self._evaluator, self.arithmetic.layout

        def spread(weights: Ciphertext) -> list[Ciphertext]:
            weights = evaluator.inner_sum(weights, *layout.blocks_of_head)
            return [weights, *evaluator.rotate_hoisted(weights, self.chunk.steps)]

        weights = self.arithmetic.each(spread, self._turned(part, "weights", len(groups)))
        return [evaluator.dot(rows, groups) for rows in zip(*weights, strict=True)]

    def _turned(self, ciphertext: Ciphertext, kind: str, count: int) -> list[Ciphertext]:
        """Return queries for keys that are rotated by 0, 1, ... features, or the weights of 0, 1, ... groups.

        Their tokens are turned to those of the keys, by all distances at once.
        """
        evaluator = self._evaluator
        ciphertext = evaluator.drop_level(ciphertext, ATTENTION_LEVEL)
        far = evaluator.rotate(ciphertext, self.arithmetic.layout.tokens)
        rows = [
            evaluator.transform_many([source], matrices[:count])
            for source, matrices in zip((ciphertext, far), self._turning(kind), strict=True)
        ]
        return [evaluator.add(a, b) for (a,), (b,) in zip(*rows, strict=True)]

    def _turning(self, kind: str) -> tuple[list[LinearTransformation], list[LinearTransformation]]:
        """Return matrices, one each for turns that stay within a group and for those that come in again."""
        chunk, encodings = self.chunk, self.arithmetic.encodings
        masks, count = (
            (chunk.query_masks, chunk.prompt.tokens)
            if kind == "queries"
            else (chunk.weight_masks, chunk.blocks)
        )

        def matrix(index: int, *, far: bool) -> LinearTransformation:
            terms = ((chunk.rotation(turn), mask) for turn, mask in masks(index) if (turn > 0) == far)
            return encodings.transformation(
                terms,
                level=ATTENTION_LEVEL,
                giant_step=chunk.prompt.slots,
                storage="int32",
            )

        return encodings.keep(
            ("turning", kind),
            lambda: (
                [matrix(index, far=False) for index in range(count)],
                [matrix(index, far=True) for index in range(count)],
            ),
        )

    def _turned_back(self, parts: Sequence[Ciphertext], kind: str, *, own: bool = False) -> Ciphertext:
        """Return scores of groups, or weighted values, with all tokens turned to those of the queries.

        Where the last group is the chunk's ``own``, tokens that come in again at the other end are later than
        their queries, which do not see them: their scores are left out, whatever they are.
        """
        near, behind = self._turned_sum(parts, kind, far=False), parts[:-1] if own else parts
        if not behind:
            return near
        far = self._turned_sum(behind, kind, far=True)
        return self._evaluator.add(near, self._evaluator.rotate(far, self.arithmetic.layout.tokens))

    def _turned_sum(self, parts: Sequence[Ciphertext], kind: str, *, far: bool) -> Ciphertext:
        """Return the sum over all turns that stay within a group, or over those that come in again."""

        def turned(item: tuple[int, list[Plaintext]]) -> Ciphertext:
            turn, masks = item
            product = self._evaluator.dot(parts, masks[: len(parts)])
            return self._evaluator.rotate(product, self.chunk.rotation(turn)) if turn else product

        turns = zip(self.chunk.turns, self._masks_back(kind), strict=True)
        return self._added(self.arithmetic.each(turned, (item for item in turns if (item[0] > 0) == far)))

    def _added(self, parts: Sequence[Ciphertext]) -> Ciphertext:
        total = parts[0]
        for part in parts[1:]:
            total = self._evaluator.add(total, part)
        return total

    def _masks_back(self, kind: str) -> list[list[Plaintext]]:
        """Return for each turn the masks of all parts."""
        chunk, encodings = self.chunk, self.arithmetic.encodings
        masks, count = (
            (chunk.place_masks, chunk.blocks) if kind == "places" else (chunk.sum_masks, chunk.prompt.tokens)
        )

        def encoded() -> list[list[Plaintext]]:
            rows = [
                [encodings.mask(mask, CONTEXT_LEVEL - 1) for _, mask in masks(index)]
                for index in range(count)
            ]
            return [list(column) for column in zip(*rows, strict=True)]

        return encodings.keep(("turning back", kind), encoded)
