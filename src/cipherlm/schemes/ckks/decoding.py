"""One token on ciphertexts, behind those whose keys and values are kept: what generation consists of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cipherlm.engine import Ciphertext, LinearTransformation, Plaintext
from cipherlm.nn.module import Linear
from cipherlm.nn.rotary import Rotary
from cipherlm.nn.tensor import Prefix
from cipherlm.schemes.ckks.arithmetic import Encodings
from cipherlm.schemes.ckks.ciphertext_tensor import CiphertextTensor
from cipherlm.schemes.ckks.context import CONTEXT_LEVEL, Context, rotary_masks, rotated_keys
from cipherlm.schemes.ckks.decoding_layout import (
    MOST_COPIES,
    SHIFT_LEVEL,
    DecodingLayout,
    DecodingShape,
)
from cipherlm.schemes.ckks.layout import LINEAR_LEVEL
from cipherlm.schemes.ckks.matrices import DecodingMatrix
from cipherlm.schemes.ckks.refresh import MASK_LEVEL

Float64 = NDArray[np.float64]


MOST_SEPARATED = 4
"""Up to how many parts of a prefix and groups are masked without a refresh."""


@dataclass(frozen=True, eq=False)
class _Root:
    """Weights before they were multiplied with a column and squared: ``(parts * column)^2``."""

    parts: tuple[Ciphertext, ...]
    column: Ciphertext
    products: tuple[Ciphertext, ...]


@dataclass(eq=False)
class EncryptedToken(CiphertextTensor):
    """Hidden states, heads or scores of the token at ``position``.

    Scores are in one ciphertext for each of the layout's parts, everything else is in one. Keys are the real
    part and values the imaginary one, and so both are the same tensor; those of the tokens before are a
    :class:`~cipherlm.schemes.ckks.context.Context`. The packing is
    :class:`~cipherlm.schemes.ckks.decoding_layout.DecodingLayout`. Keys are to be rotated by ``rotation``.
    """

    position: int
    heads: bool = False
    rotation: Rotary | None = None
    factors: tuple[Ciphertext, ...] = ()
    """Columns that this is still to be multiplied with, where a linear layer takes it."""
    root: _Root | None = None
    """What weights are the square of, where they have not been refreshed since."""
    _inputs: dict[Any, Ciphertext] = field(default_factory=dict, init=False, repr=False)

    @property
    def layout(self) -> DecodingLayout:
        """The packing."""
        return self.arithmetic.layout.decoding

    @property
    def _features(self) -> tuple[int, int]:
        return self.layout.features

    def _with(self, parts: Iterable[Ciphertext], **changes: Any) -> EncryptedToken:
        """Return a tensor of other ciphertexts. What these are the square of does not hold for them."""
        assert not self.factors or "factors" in changes, "only a linear layer takes products with columns"
        return super()._with(parts, **{"root": None, **changes})

    def scaled(self, *columns: EncryptedToken) -> EncryptedToken:
        """See :class:`Tensor`: the products wait for what a linear layer makes of them."""
        factors = tuple(column._one() for column in columns)
        return self._with(self.parts, factors=factors, copies=self._common_copies(*columns))

    def __matmul__(self, linear: Linear) -> EncryptedToken:
        encoded = self.arithmetic.encodings.layer(linear)
        order = self.layout.head_order if self.heads else None
        copies = MOST_COPIES
        if self._left == LINEAR_LEVEL and not self._shifts_first(self._shape(linear)):
            copies = 1  # more diagonals, for a refresh less

        def make(encodings: Encodings) -> DecodingMatrix:
            weight = self._placed(self._placed(linear.weight, 0, order), 1)
            return DecodingMatrix(encodings, weight.T, level=LINEAR_LEVEL, most_copies=copies)

        matrix = encoded.matrix(("decoding", self.heads, copies), make)
        result = matrix.apply(self._evaluator, self._inputs_of(matrix))
        bias = encoded.bias(("decoding",), result, partial(self.layout.pack, linear.bias))
        repeat = self.arithmetic.layout.copies(matrix.shape.outputs)
        return self._with(
            [self._evaluator.add(result, bias)], heads=False, unit=1.0, factors=(), copies=repeat
        )

    def _shape(self, linear: Linear) -> DecodingShape:
        inputs, outputs = map(self.layout.inner_period, linear.weight.shape)
        return DecodingShape(
            self.layout.prompt.slots, self.layout.heads_period if self.heads else inputs, outputs
        )

    def _inputs_of(self, matrix: DecodingMatrix) -> Ciphertext:
        """Return this as the inputs of a matrix, shifted for its copies: see :meth:`DecodingMatrix.shifted`.

        The shift takes a level. Where products with columns leave too few, what they are multiplied with is
        shifted before them.
        """
        about = matrix.shape, matrix.level
        if about not in self._inputs:
            self._inputs[about] = self._shifted(matrix)
        return self._inputs[about]

    def _shifted(self, matrix: DecodingMatrix) -> Ciphertext:
        evaluator, shape, start = self._evaluator, matrix.shape, self._one()
        # After a refresh, which these cannot do without, there is a level for the shift. And before the shift
        # all copies are the same, so that the refresh takes less.
        first = self._left == matrix.level and self._shifts_first(shape)
        if first:
            start = matrix.shifted(evaluator, start, self.factors[0].level)
        product = self
        if self.factors:
            copies = (1,) if first else self.copies
            product = self._with([self._product(start)], factors=(), unit=1.0, copies=copies)
        levels = matrix.level + (not first and shape.copies > 1)
        product.ready(levels - MASK_LEVEL, then=0)
        return product._one() if first else matrix.shifted(evaluator, product._one(), matrix.level)

    def _shifts_first(self, shape: DecodingShape) -> bool:
        """Say whether there is a level for a shift before products with columns, which it does not change."""
        same = not self.heads or shape.diagonals % self.layout.group_step == 0
        return bool(self.factors) and same and self.factors[0].level < min(self.level, SHIFT_LEVEL)

    def _product(self, result: Ciphertext) -> Ciphertext:
        for factor in self.factors:
            result = self._evaluator.multiply(result, factor)
        return result

    @property
    def _left(self) -> int:
        """The level that the products with all columns have."""
        level = self.level
        for factor in self.factors:
            level = min(level, factor.level) - 1
        return level

    def _placed(self, values: NDArray[Any], axis: int, order: NDArray[np.int_] | None = None) -> NDArray[Any]:
        """Return features along an axis at their positions in a period, zero where there is none."""
        order = np.arange(values.shape[axis]) if order is None else order
        positions = np.flatnonzero(order >= 0)
        moved = np.moveaxis(values, axis, 0)
        period = max(self.layout.inner_period(len(moved)), len(order))
        result = np.zeros((period, *moved.shape[1:]), values.dtype)
        result[positions] = moved[order[positions]]
        return np.moveaxis(result, 0, axis)

    def to_heads(self, linear: Linear, heads: int) -> tuple[EncryptedToken, EncryptedToken, EncryptedToken]:
        """See :class:`Tensor`. Raises ``ValueError`` for another number of heads than the layout's."""
        evaluator, layout = self._evaluator, self.layout
        if heads != layout.prompt.heads:
            raise ValueError(f"{heads} heads, in a layout of {layout.prompt.heads}")
        encoded = self.arithmetic.encodings.layer(linear)

        def joined(which: str, values: Float64) -> NDArray[Any]:
            query, key, value = np.split(values, 3, axis=-1)
            if which == "query":
                return self._placed(query, -1, layout.head_order)
            return self._placed(key + 1j * value, -1, layout.repeated_order)

        def shift(which: str) -> NDArray[Any]:
            return np.tile(joined(which, linear.bias), layout.prompt.tokens)

        def make(which: str, encodings: Encodings) -> DecodingMatrix:
            weight = self._placed(joined(which, linear.weight), 0)
            return DecodingMatrix(encodings, weight.T, level=layout.attention_level)

        query, pair = (encoded.matrix((name,), partial(make, name)) for name in ("query", "key and value"))
        shifted = self._inputs_of(query)
        results = []
        for name, matrix in (("query", query), ("key and value", pair)):
            result = matrix.apply(evaluator, shifted)
            bias = encoded.bias((name,), result, partial(shift, name))
            parts = [evaluator.add(result, bias)]
            copies = self.arithmetic.layout.copies(matrix.shape.outputs)
            results.append(self._with(parts, heads=True, unit=1.0, factors=(), copies=copies))
        return results[0], results[1], results[1]

    def rotary(self, rotary: Rotary) -> EncryptedToken:
        """See :class:`Tensor`: it is done where these are used."""
        return self._with(self.parts, rotation=rotary)

    def with_past(self, value: EncryptedToken, past: Any, prefix: Prefix | None) -> tuple[Context, Context]:
        """See :class:`Tensor`; ``past`` is what this or :meth:`EncryptedTensor.with_past` returned before."""
        context = Context.of(past, self.position, self.arithmetic)
        encodings = self.arithmetic.encodings
        token = context.tokens % self.layout.prompt.tokens
        placed = self._of_token(token)
        if prefix is not None:
            centre = -prefix.centre[:, 0]
            packed = self.layout.pack_heads(centre, self.layout.repeated_order)
            slots = packed * self.layout.token_mask(token)
            shift = encodings.layer(prefix).bias(("decoding", token), placed, lambda: slots)
            placed = self._evaluator.add(placed, shift)
        context.add(placed)
        context.prefix = prefix
        return context, context

    def _of_token(self, token: int) -> Ciphertext:
        """Return keys, after their rotation, and values where those of a token of a group are."""
        evaluator, encodings = self._evaluator, self.arithmetic.encodings
        level = self.layout.attention_level - 1
        pair = evaluator.drop_level(self._one(), level)
        # The product gets the scale of what it is added to.
        scale = encodings.parameters.scale * encodings.parameters.q[level] / pair.scale
        mask = self.layout.token_mask(token)
        if self.rotation is None:
            encoded = encodings.keep(("token", token, scale), lambda: encodings.encode(mask, level, scale))
            return evaluator.multiply(pair, encoded)
        terms = rotated_keys(evaluator, pair, self.layout.half_turns)
        masks = rotary_masks(*self.layout.rotary_factors(self.rotation, self.position))
        return evaluator.dot(terms, [encodings.encode(mask * factor, level, scale) for factor in masks])

    @property
    def _rotated(self) -> Ciphertext:
        """Queries after their rotation, if there is one, at the level of keys."""
        if self.rotation is None:
            return self._evaluator.drop_level(self._one(), CONTEXT_LEVEL)
        query = self._evaluator.drop_level(self._one(), CONTEXT_LEVEL + 1)
        turned = self._evaluator.rotate_hoisted(query, self.layout.half_turns)
        return self._masked([query, *turned], self.layout.rotary_factors(self.rotation, self.position))

    @property
    def keys(self) -> int:
        """See :class:`Tensor`."""
        return self.position + 1

    @property
    def places(self) -> int:
        """See :class:`Tensor`."""
        return self.layout.places(self._own_keys)

    @property
    def _own_keys(self) -> int:
        """How many of the keys are not of a clear prefix."""
        return self.keys - self.layout.prompt.prefix

    def scores(self, key: Context) -> EncryptedToken:
        """See :class:`Tensor`: the real parts of the products of a query with keys and values."""
        evaluator, layout = self._evaluator, self.layout
        query = self._rotated

        def of_group(item: tuple[int, Ciphertext]) -> Ciphertext:
            index, keys = item
            product = evaluator.multiply(query, keys)
            for sums in layout.features_of_head:
                product = evaluator.inner_sum(product, *sums)
            seen = min(layout.prompt.tokens, self._own_keys - index * layout.prompt.tokens)
            return evaluator.multiply(product, self._score_mask(seen))

        masked = self.arithmetic.each(of_group, enumerate(key.apart))
        parts = [masked[i : i + layout.lower] for i in range(0, len(masked), layout.lower)]
        factor = math.sqrt(layout.prompt.head_dim)
        own = [self._real(self._gathered(part), factor) for part in parts]
        scores = [*self._prefix_scores(query, key.prefix_beside), *own]
        return self._with(scores, heads=False, rotation=None, copies=(1,))

    def _prefix_scores(self, query: Ciphertext, prefix: Prefix | None) -> list[Ciphertext]:
        if prefix is None:
            return []
        evaluator, layout = self._evaluator, self.layout
        results = []
        for (product,) in evaluator.transform_many([query], self._of_prefix(prefix, "keys", CONTEXT_LEVEL)):
            product = evaluator.inner_sum(product, *layout.features_of_head[0])
            results.append(evaluator.multiply(product, self._place_mask(CONTEXT_LEVEL - 1)))
        return results

    def _place_mask(self, level: int) -> Plaintext:
        encodings = self.arithmetic.encodings
        return encodings.keep(("places", level), lambda: encodings.mask(self.layout.place_mask, level))

    def _of_prefix(
        self, prefix: Prefix, kind: str, level: int, scale: float | None = None
    ) -> list[LinearTransformation]:
        """Return the matrices of a prefix's clear keys or values, one for each part of its scores."""
        layout = self.layout

        def diagonals(part: int) -> Iterable[tuple[int, NDArray[Any]]]:
            if kind == "keys":
                return layout.prefix_scores(prefix.keys - prefix.centre, part)
            # Values are the imaginary part of what they are added to.
            return ((step, 1j * diagonal) for step, diagonal in layout.prefix_values(prefix.values, part))

        def make(encodings: Encodings) -> list[LinearTransformation]:
            return [
                encodings.transformation(
                    diagonals(part), level=level, giant_step=layout.prefix_step, scale=scale
                )
                for part in range(layout.prefix_parts)
            ]

        return self.arithmetic.encodings.layer(prefix).matrix(("decoding", kind, scale), make)

    def _score_mask(self, tokens: int) -> Any:
        encodings = self.arithmetic.encodings
        return encodings.keep(
            ("scores", tokens), lambda: encodings.mask(self.layout.score_mask(tokens), CONTEXT_LEVEL - 1)
        )

    def _gathered(self, groups: Sequence[Ciphertext]) -> Ciphertext:
        """Return the scores of groups, each at its place."""
        placed = groups[-1]
        for group in reversed(groups[:-1]):
            placed = self._evaluator.add(self._evaluator.rotate(placed, -self.layout.group_step), group)
        return placed

    def exponents(self, factor: float, floor: float) -> EncryptedToken:
        """See :class:`Tensor`."""
        evaluator, encodings = self._evaluator, self.arithmetic.encodings
        results = []
        for part, shift in zip(self.parts, self.layout.exponents(floor, self._own_keys), strict=True):
            scores = evaluator.set_scale(part, part.scale / factor)
            results.append(evaluator.add(scores, encodings.encode(shift, scores.level, scores.scale)))
        return self._with(results)

    def total(self) -> EncryptedToken:
        """See :class:`Tensor`."""
        total = self.parts[0]
        for part in self.parts[1:]:
            total = self._evaluator.add(total, part)
        for sums in (self.layout.tokens_of_group, self.layout.groups_of_part):
            total = self._evaluator.inner_sum(total, *sums)
        return self._with([total], copies=self.arithmetic.layout.copies(self.layout.group_step))

    def squared_with(self, column: EncryptedToken, then: int | None = None) -> EncryptedToken:
        """See :class:`Tensor`."""
        product, factor = self * column, column._one()
        before = product.parts
        product.ready(1, then=then)
        kept = product.parts is before and factor.level < self.level
        root = _Root(self.parts, factor, product.parts) if kept else None
        return replace(product * product, root=root)

    def mix(self, value: Context) -> tuple[EncryptedToken, EncryptedToken]:
        """See :class:`Tensor`."""
        evaluator, layout = self._evaluator, self.layout
        kept = value.apart
        of_prefix, separate = self._separate(len(kept))

        def spread(weights: Ciphertext) -> Ciphertext:
            for sums in layout.spreading:
                weights = evaluator.inner_sum(weights, *sums)
            return weights

        weights = self.arithmetic.each(spread, separate)
        total = weights[0]
        for other in weights[1:]:
            total = evaluator.add(total, other)
        total = evaluator.inner_sum(total, *layout.tokens_of_group)
        groups = [evaluator.drop_level(group, weights[0].level) for group in kept]
        mixed = evaluator.dot(weights, groups, rescale=False)
        if value.prefix_beside is not None:
            scale = mixed.scale / weights[0].scale
            matrices = self._of_prefix(value.prefix_beside, "values", CONTEXT_LEVEL - 1, scale)
            for weight, matrix in zip(of_prefix, matrices, strict=True):
                weight = evaluator.inner_sum(weight, *layout.spreading[0])
                mixed = evaluator.add(mixed, evaluator.transform(weight, matrix))
                for sums in (layout.tokens_of_group, layout.groups_of_part):
                    weight = evaluator.inner_sum(weight, *sums)
                total = evaluator.add(total, weight)
        mixed = evaluator.inner_sum(evaluator.rescale(mixed), *layout.tokens_of_group)
        copies = self.arithmetic.layout.copies(layout.heads_period)
        weighted = self._with([self._imaginary(mixed)], heads=True, copies=copies)
        return weighted, self._with([total], heads=True, copies=copies).real()

    def _separate(self, count: int) -> tuple[list[Ciphertext], list[Ciphertext]]:
        """Return the weights of each part of a prefix, and those of groups at the place of the first.

        What is no weight is made zero by masks, which take a level. Squares that lack it come from what they
        are squares of, with the mask in the first factor: for a few that costs less than a refresh.
        """
        evaluator, layout = self._evaluator, self.layout
        first, column = layout.prefix_parts, None
        if self.level == CONTEXT_LEVEL - 1 and self.root is not None and first + count <= MOST_SEPARATED:
            column = self.root.column
            sources = [self._dropped(self.root.parts, column.level + 1), self.root.products]
        else:
            self.ready(CONTEXT_LEVEL - MASK_LEVEL, then=0)
            sources = [self._dropped(self.parts, CONTEXT_LEVEL)]

        def placed(parts: Sequence[Ciphertext]) -> list[Ciphertext]:
            result: list[Ciphertext] = []
            for index in range(count):
                part, group = divmod(index, layout.lower)
                result.append(
                    evaluator.rotate(result[-1], layout.group_step) if group else parts[first + part]
                )
            return result

        def masked(item: tuple[Ciphertext, ...], mask: Callable[[int], Plaintext]) -> Ciphertext:
            weights, *others = item
            weights = evaluator.multiply(weights, mask(weights.level))
            if column is not None:
                weights = evaluator.multiply(weights, column)
            for other in others:
                weights = evaluator.multiply(weights, other)
            return weights

        of_prefix = zip(*(parts[:first] for parts in sources), strict=True)
        own = zip(*map(placed, sources), strict=True)
        return (
            [masked(item, self._place_mask) for item in of_prefix],
            self.arithmetic.each(lambda item: masked(item, self._weight_mask), own),
        )

    def _dropped(self, parts: Iterable[Ciphertext], level: int) -> list[Ciphertext]:
        return [self._evaluator.drop_level(part, level) for part in parts]

    def _weight_mask(self, level: int) -> Plaintext:
        encodings, tokens = self.arithmetic.encodings, self.layout.prompt.tokens
        return encodings.keep(
            ("weights", level), lambda: encodings.mask(self.layout.score_mask(tokens), level)
        )
