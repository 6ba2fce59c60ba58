"""Tensors of ciphertexts in the packing of a prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cipherlm.engine import (
    Chebyshev,
    Ciphertext,
    LinearTransformation,
    Plaintext,
)
from cipherlm.nn.module import Linear
from cipherlm.nn.rotary import Rotary
from cipherlm.nn.tensor import Prefix
from cipherlm.schemes.ckks.arithmetic import Arithmetic, Encodings
from cipherlm.schemes.ckks.ciphertext_tensor import CiphertextTensor
from cipherlm.schemes.ckks.layout import ATTENTION_LEVEL, LINEAR_LEVEL
from cipherlm.schemes.ckks.matrices import Matrix
from cipherlm.schemes.ckks.refresh import MASK_LEVEL

Float64 = NDArray[np.float64]

_MASKED_LEVEL = ATTENTION_LEVEL - 1
"""Where keys and values are masked before they meet queries and weights."""


@dataclass(eq=False)
class EncryptedTensor(CiphertextTensor):
    """Hidden states, heads, scores or a column of them; see :class:`~cipherlm.nn.tensor.Tensor`.

    Hidden states are in one ciphertext for each period of features, everything else is in one. A column has
    its value of a token (and a head) in every slot of that token (and head). The tokens are those from
    ``start`` on, and token 0 is at ``position`` of the text. Hidden states before ``start`` are zero, or are
    made so before they are next used: the place of a short clear prefix. The keys and values of a longer one
    are in ``prefix``, beside the ciphertexts; scores have more of these for it.

    Keys are to be rotated by ``rotation``: the masks that place them do that on the way. With keys are the
    ``values`` of the same tokens, which are refreshed with them.
    """

    tokens: int
    start: int = 0
    heads: bool = False
    position: int = 0
    prefix: Prefix | None = None
    rotation: Rotary | None = None
    values: EncryptedTensor | None = field(default=None, repr=False)

    @property
    def _features(self) -> tuple[int, int]:
        return self.arithmetic.layout.features

    def mean_square(self, before: Chebyshev, gain: float = 1.0) -> EncryptedTensor:
        """See :class:`Tensor`; clears what is before ``start``: functions of zero are not quite zero."""
        result = super().mean_square(before, gain)
        if self.start:
            masks = [self._behind(part.level) for part in self.parts]
            self.parts = tuple(map(self._evaluator.multiply, self.parts, masks))
        return result

    def _behind(self, level: int) -> Plaintext:
        """Return the mask of the tokens from ``start`` on."""
        encodings = self.arithmetic.encodings
        return encodings.keep(
            ("from", self.start, level),
            lambda: encodings.mask(self.arithmetic.layout.tokens_from(self.start), level),
        )

    def __matmul__(self, linear: Linear) -> EncryptedTensor:
        self.ready(LINEAR_LEVEL - MASK_LEVEL, then=0)
        layer = self.arithmetic.encodings.layer(linear)
        matrix = self._matrix(linear, "from heads" if self.heads else "hidden", self._rows)
        results = matrix.apply(self.arithmetic, self.parts)
        biases = (
            layer.bias((index, self.start), result, partial(self._bias, linear, index))
            for index, result in enumerate(results)
        )
        added = (self._evaluator.add(result, bias) for result, bias in zip(results, biases, strict=True))
        return self._with(added, heads=False, unit=1.0)

    def _matrix(self, linear: Linear, kind: str, rows: Callable[[Linear], Sequence[Float64]]) -> Matrix:
        """Return the encoded matrix of clear weights, from its blocks of outputs."""
        return self.arithmetic.encodings.layer(linear).matrix(
            (kind,), lambda encodings: Matrix(encodings, rows(linear), level=LINEAR_LEVEL)
        )

    def _rows(self, linear: Linear) -> list[Float64]:
        """Return the blocks of outputs of a matrix on these hidden states or heads."""
        layout = self.arithmetic.layout
        inputs, outputs = linear.weight.shape
        padded = np.zeros((layout.chunks(outputs) * layout.period, layout.chunks(inputs) * layout.period))
        if self.heads:
            order = layout.head_order
            padded[:outputs, order >= 0] = linear.weight.T[:, order[order >= 0]]
        else:
            padded[:outputs, :inputs] = linear.weight.T
        return list(padded.reshape(-1, layout.period, padded.shape[1]))

    def _bias(self, linear: Linear, index: int) -> Float64:
        layout = self.arithmetic.layout
        return layout.pack(np.tile(linear.bias, (layout.tokens - self.start, 1)), self.start)[index]

    def to_heads(
        self, linear: Linear, heads: int
    ) -> tuple[EncryptedTensor, EncryptedTensor, EncryptedTensor]:
        """See :class:`Tensor`. Raises ``ValueError`` for another number of heads than the layout's."""
        layout, layer = self.arithmetic.layout, self.arithmetic.encodings.layer(linear)
        if heads != layout.heads:
            raise ValueError(f"{heads} heads, in a layout of {layout.heads}")
        self.ready(LINEAR_LEVEL - MASK_LEVEL, then=0)
        matrix = self._matrix(linear, "to heads", self._head_rows)
        results = []
        for index, result in enumerate(matrix.apply(self.arithmetic, self.parts)):
            bias = layer.bias((index, self.start), result, partial(self._head_bias, linear, index))
            results.append(self._with([self._evaluator.add(result, bias)], heads=True, unit=1.0))
        query, key, value = results
        return query, key, value

    def _head_rows(self, linear: Linear) -> list[Float64]:
        layout = self.arithmetic.layout
        order = layout.head_order
        rows = np.zeros((3, layout.period, layout.period))
        for row, weight in zip(rows, np.split(linear.weight, 3, axis=1), strict=True):
            row[order >= 0, : layout.width] = weight.T[order[order >= 0]]
        return list(rows)

    def _head_bias(self, linear: Linear, index: int) -> Float64:
        layout = self.arithmetic.layout
        bias = linear.bias.reshape(3, layout.heads, 1, layout.head_dim)[index]
        return layout.pack_heads(np.tile(bias, (1, layout.tokens - self.start, 1)), self.start)

    def rotary(self, rotary: Rotary) -> EncryptedTensor:
        """See :class:`Tensor`: it is done where these are used."""
        return self._with(self.parts, rotation=rotary)

    @property
    def rotated(self) -> Ciphertext:
        """Queries or keys after their rotation, if there is one, which takes a level."""
        if self.rotation is None:
            return self._one()
        return self._rotated(self._evaluator.drop_level(self._one(), ATTENTION_LEVEL - 1))

    def _rotated(self, part: Ciphertext) -> Ciphertext:
        """Return queries or keys after the rotation."""
        turned = self._evaluator.rotate(part, self.arithmetic.layout.half_turn)
        return self._evaluator.dot(
            [part, turned], self._rotary_masks("rotation", part.level, lambda *factors: [*factors])
        )

    def _rotary_masks(self, kind: str, level: int, masks: Callable[..., list[Float64]]) -> list[Plaintext]:
        """Return encoded masks, made of the cosines and sines of the tokens' angles."""
        layout, encodings, rotation = self.arithmetic.layout, self.arithmetic.encodings, self.rotation
        assert rotation is not None
        return encodings.recent(
            (kind, rotation, self.position, level),
            lambda: [
                encodings.mask(mask, level) for mask in masks(*layout.rotary_factors(rotation, self.position))
            ],
        )

    def with_past(self, value: EncryptedTensor, past: Any, prefix: Prefix | None) -> tuple[Any, Any]:
        """See :class:`Tensor`. Raises ``ValueError`` unless these tokens start right after a clear prefix."""
        apart, before = self.position > 0, self.position or self.start
        if past is not None or before != (prefix.tokens if prefix else 0):
            raise ValueError(f"a prompt goes right behind a clear prefix of {before} tokens")
        if prefix is None:
            return self._with(self.parts, values=value), value
        layout, encodings = self.arithmetic.layout, self.arithmetic.encodings
        centre = -np.repeat(prefix.centre, layout.tokens, axis=1)
        if not apart:
            centre[:, : self.start] += prefix.keys
        kept = encodings.layer(prefix)
        key = self._evaluator.add(
            self._one(),
            kept.bias(("keys",), self._one(), lambda: layout.pack_heads(self._before_rotation(centre))),
        )
        tokens = self.tokens + self.start
        if apart:
            values = value._with(value.parts, prefix=prefix)
            return self._with([key], prefix=prefix, values=values), values
        shifted = self._evaluator.add(
            value._one(), kept.bias(("values",), value._one(), lambda: layout.pack_heads(prefix.values))
        )
        values = value._with([shifted], tokens=tokens, start=0)
        return self._with([key], tokens=tokens, start=0, values=values), values

    def _before_rotation(self, values: Float64) -> Float64:
        """Return what the rotation brings to values (heads, tokens, head_dim)."""
        if self.rotation is None:
            return values
        cosine, sine = self.rotation.factors(np.arange(self.position, self.position + values.shape[1]))
        back: Float64 = values * cosine - self.rotation.half_turn(values) * sine
        return back / self.rotation.factor**2

    @property
    def keys(self) -> int:
        """See :class:`Tensor`; those of repeated tokens count as well."""
        return self.arithmetic.layout.prefix + self.arithmetic.layout.tokens

    @property
    def places(self) -> int:
        """See :class:`Tensor`."""
        return self.arithmetic.layout.places

    def _shifted(self, masks: list[list[Plaintext]]) -> list[Ciphertext]:
        """Return the masked keys or values for every shift of features."""
        evaluator, layout = self._evaluator, self.arithmetic.layout
        part = evaluator.drop_level(self._one(), ATTENTION_LEVEL - 1)
        sources = [part] if self.rotation is None else [part, evaluator.rotate(part, layout.half_turn)]
        shifts = [-k for k in range(1, layout.tokens)]
        moved = [x for source in sources for x in (source, *evaluator.rotate_hoisted(source, shifts))]
        return self.arithmetic.each(lambda row: evaluator.dot(moved, row), masks)

    def _of_prefix(self, prefix: Prefix, kind: str, scale: float | None = None) -> list[LinearTransformation]:
        """Return the matrices of a prefix's clear keys or values, one for each part of its scores."""
        layout = self.arithmetic.layout

        def diagonals(part: int) -> Iterable[tuple[int, Float64]]:
            if kind == "keys":
                return layout.prefix_scores(prefix.keys - prefix.centre, part)
            return layout.prefix_values(prefix.values, part)

        def make(encodings: Encodings) -> list[LinearTransformation]:
            return [
                encodings.transformation(
                    diagonals(part),
                    level=ATTENTION_LEVEL - 2,
                    giant_step=layout.distance_step * layout.tokens,
                    scale=scale,
                )
                for part in range(layout.prefix_parts)
            ]

        return self.arithmetic.encodings.layer(prefix).matrix((kind, scale), make)

    def scores(self, key: Any) -> EncryptedTensor:
        """See :class:`Tensor`."""
        evaluator, layout = self._evaluator, self.arithmetic.layout
        others = [] if key.values is None else [key.values]
        # Beside other chunks, all that attention refreshes goes to the level of their queries.
        then = 0 if self.arithmetic.alone else ATTENTION_LEVEL + layout.rotary - _MASKED_LEVEL
        self.ready(_MASKED_LEVEL - MASK_LEVEL, key, *others, then=then)
        self.arithmetic.changed()
        query = evaluator.drop_level(self.rotated, ATTENTION_LEVEL - 2)

        def part(item: tuple[int, Ciphertext]) -> Ciphertext:
            k, masked = item
            product = evaluator.multiply(query, masked, rescale=False)
            return evaluator.rotate(product, k * layout.distance_step, out=product) if k else product

        products = self.arithmetic.each(part, enumerate(key._shifted(key._masks)))
        total = products[0]
        for product in products[1:]:
            evaluator.add(total, product, out=total)
        evaluator.rescale(total, out=total)
        total = evaluator.inner_sum(total, *layout.blocks_of_head)
        scores = [evaluator.set_scale(total, total.scale * math.sqrt(layout.head_dim))]
        copies = layout.copies(layout.blocks_of_head[0])
        if key.prefix is not None:
            matrices = self._of_prefix(key.prefix, "keys")
            scores += [row[0] for row in evaluator.transform_many([query], matrices)]
            copies += self.copies * len(matrices)
        return self._with(scores, rotation=None, copies=copies)

    @property
    def _masks(self) -> list[list[Plaintext]]:
        return self.arithmetic.encodings.key_masks(self.rotation, self.position)

    def exponents(self, factor: float, floor: float) -> EncryptedTensor:
        """See :class:`Tensor`."""
        evaluator, encodings = self._evaluator, self.arithmetic.encodings
        scores = [evaluator.set_scale(part, part.scale / factor) for part in self.parts]
        about = tuple((part.level, part.scale) for part in scores)
        shifts = encodings.keep(
            ("exponents", floor, about),
            lambda: [
                encodings.encode(shift, *where)
                for shift, where in zip(self.arithmetic.layout.exponents(floor), about, strict=True)
            ],
        )
        return self._with(evaluator.add(part, shift) for part, shift in zip(scores, shifts, strict=True))

    def total(self) -> EncryptedTensor:
        """See :class:`Tensor`."""
        evaluator, layout = self._evaluator, self.arithmetic.layout
        total, *others = self.parts
        if others:
            before = others[0]
            for other in others[1:]:
                before = evaluator.add(before, other)
            total = evaluator.add(total, evaluator.inner_sum(before, *layout.blocks_of_head))
        total = evaluator.inner_sum(total, *layout.distances)
        return self._with([total], copies=layout.copies(layout.distance_step))

    def mix(self, value: Any) -> tuple[EncryptedTensor, EncryptedTensor]:
        """See :class:`Tensor`."""
        self.ready(ATTENTION_LEVEL - 2 - MASK_LEVEL, then=0)
        evaluator, layout = self._evaluator, self.arithmetic.layout
        weights, *others = (evaluator.drop_level(part, ATTENTION_LEVEL - 2) for part in self.parts)
        steps = [k * layout.distance_step for k in range(1, layout.tokens)]
        moved = [weights, *evaluator.rotate_hoisted(weights, steps)]
        mixed = evaluator.dot(
            moved, value._shifted(self.arithmetic.encodings.value_masks(self.start)), rescale=False
        )
        if value.prefix is not None:
            # At the scale of the values, so that these sums can be added to the others.
            matrices = self._of_prefix(value.prefix, "values", mixed.scale / weights.scale)
            for part, matrix in zip(others, matrices, strict=True):
                evaluator.add(mixed, evaluator.transform(part, matrix), out=mixed)
        evaluator.rescale(mixed, out=mixed)
        return self._with([mixed], heads=True, copies=value.copies), self.total().real()


def encrypted(
    arithmetic: Arithmetic, ciphertexts: Iterable[Ciphertext], tokens: int, start: int = 0
) -> EncryptedTensor:
    """Return hidden states that a client encrypted, behind a public prefix."""
    layout, parts = arithmetic.layout, tuple(ciphertexts)
    return EncryptedTensor(
        arithmetic, parts, tokens, start, position=layout.prefix, copies=layout.whole_copies
    )
