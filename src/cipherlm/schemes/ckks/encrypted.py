"""Tensors of ciphertexts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from cipherlm.engine import (
    Chebyshev,
    Ciphertext,
    EvaluationKeys,
    Evaluator,
    Parameters,
    Plaintext,
    SecretKey,
    threads,
)
from cipherlm.engine.linear import Storage
from cipherlm.schemes.ckks.layout import ATTENTION_LEVEL, LINEAR_LEVEL, Layout
from cipherlm.schemes.ckks.matrices import Matrix
from cipherlm.schemes.ckks.refresh import MASK_LEVEL, Refresher
from cipherlm.schemes.ckks.tensor import Linear, Tensor, depth

Float64 = NDArray[np.float64]
A = TypeVar("A")
B = TypeVar("B")

SCALE_STEPS = 16
"""How large an integer, at least, a ciphertext is multiplied by to give it a scale: right to 1 in 32."""


class Arithmetic:
    """What encrypted tensors of one model share: keys, packing, refresh, and clear weights made ready.

    Weights and masks are encoded where they are first used, and kept. ``refreshes`` counts the ciphertexts
    that were refreshed, ``round_trips`` how often.
    """

    def __init__(
        self, evaluator: Evaluator, layout: Layout, refresher: Refresher, *, storage: Storage = "int32"
    ) -> None:
        self.evaluator, self.layout, self.storage = evaluator, layout, storage
        self.parameters: Parameters = evaluator.parameters
        self.refreshes = self.round_trips = 0
        self._refresher = refresher
        self._layers: WeakKeyDictionary[Linear, _Layer] = WeakKeyDictionary()
        self._exponents: dict[tuple[float, int, float], Plaintext] = {}
        self._pool = ThreadPoolExecutor(threads())

    def tensor(self, ciphertexts: Iterable[Ciphertext], tokens: int, start: int = 0) -> EncryptedTensor:
        """Return hidden states that a client encrypted: :func:`encrypt`."""
        return EncryptedTensor(self, tuple(ciphertexts), tokens, start)

    def layer(self, linear: Linear) -> _Layer:
        """Return what is kept with clear weights."""
        return self._layers.setdefault(linear, _Layer(self))

    def each(self, function: Callable[[A], B], items: Iterable[A]) -> list[B]:
        """Apply a function in threads."""
        return list(self._pool.map(function, items))

    def encode(self, slots: Float64 | NDArray[np.complex128], level: int, scale: float) -> Plaintext:
        """Encode what is to be added to ciphertexts of a level and a scale."""
        return Plaintext.encode(self.parameters, slots, level, scale)

    def exponents(self, floor: float, level: int, scale: float) -> Plaintext:
        """Return the encoded :meth:`Layout.exponents`."""
        key = (floor, level, scale)
        if key not in self._exponents:
            self._exponents[key] = self.encode(self.layout.exponents(floor), level, scale)
        return self._exponents[key]

    @cached_property
    def key_masks(self) -> list[list[Plaintext]]:
        """The encoded masks of keys."""
        return self._masks(self.layout.key_masks())

    @cached_property
    def value_masks(self) -> list[list[Plaintext]]:
        """The encoded masks of values."""
        return self._masks(self.layout.value_masks())

    def _masks(self, masks: Iterable[list[Float64]]) -> list[list[Plaintext]]:
        level = ATTENTION_LEVEL - 1
        scale = float(self.parameters.q[level])
        return [self.each(lambda mask: self.encode(mask, level, scale), row) for row in masks]

    def scale_before(self, polynomial: Chebyshev) -> float:
        """Return the scale at which a polynomial's interval costs no level."""
        low, high = polynomial.interval
        return self.parameters.scale * 2 / (high - low)

    def refresh(self, ciphertexts: Sequence[Ciphertext], scales: Sequence[float]) -> list[Ciphertext]:
        """Return real ciphertexts at the highest level and near the given scales.

        Two travel as real and imaginary part of one. Scales are changed by multiplying with an integer
        before, and a shift in between, for nothing.
        """
        evaluator = self.evaluator
        # A pair is split into twice its real and twice its imaginary part.
        copies = [1 if i == len(ciphertexts) - 1 and i % 2 == 0 else 2 for i in range(len(ciphertexts))]
        wanted = [scale / copy / c.scale for c, scale, copy in zip(ciphertexts, scales, copies, strict=True)]
        shift = max(0, math.ceil(math.log2(SCALE_STEPS / min(wanted))))
        factors = [round(2**shift * ratio) for ratio in wanted]
        # Declared scales do not matter on the way, but they must be equal to be added.
        common = self.parameters.scale * 2**shift
        scaled = [
            evaluator.set_scale(evaluator.multiply(evaluator.drop_level(c, MASK_LEVEL), factor), common)
            for c, factor in zip(ciphertexts, factors, strict=True)
        ]
        pairs = [scaled[i : i + 2] for i in range(0, len(scaled), 2)]
        sent = [
            evaluator.add(pair[0], evaluator.multiply(pair[1], 1j)) if len(pair) == 2 else pair[0]
            for pair in pairs
        ]
        self.refreshes += len(sent)
        self.round_trips += 1
        fresh: list[Ciphertext] = []
        for pair, result in zip(pairs, self._refresher(sent, self.parameters.max_level, shift), strict=True):
            fresh += evaluator.split(result) if len(pair) == 2 else [result]
        return [
            evaluator.set_scale(part, before.scale * factor / 2**shift * copy)
            for part, before, factor, copy in zip(fresh, ciphertexts, factors, copies, strict=True)
        ]


class _Layer:
    """What is kept with clear weights: matrices and encoded biases."""

    def __init__(self, arithmetic: Arithmetic) -> None:
        self._arithmetic = arithmetic
        self._kept: dict[Any, Any] = {}

    def matrix(self, kind: str, start: int, level: int, rows: Callable[[], list[Float64]]) -> Matrix:
        """Return a matrix, made on the first call from its blocks of outputs."""
        if (kind, start) not in self._kept:
            self._kept[kind, start] = Matrix(
                self._arithmetic.parameters,
                self._arithmetic.layout,
                rows(),
                start=start,
                level=level,
                storage=self._arithmetic.storage,
            )
        matrix: Matrix = self._kept[kind, start]
        return matrix

    def bias(self, key: tuple[Any, ...], like: Ciphertext, slots: Callable[[], Float64]) -> Plaintext:
        """Return an encoded bias to be added to a ciphertext, made on the first call."""
        level, scale = like.level, like.scale
        if (key, level, scale) not in self._kept:
            self._kept[key, level, scale] = self._arithmetic.encode(slots(), level, scale)
        plaintext: Plaintext = self._kept[key, level, scale]
        return plaintext


@dataclass(eq=False)
class EncryptedTensor(Tensor):
    """Hidden states, heads, scores or a column of them; see :class:`~cipherlm.schemes.ckks.tensor.Tensor`.

    Hidden states are in one ciphertext for each period of features, everything else is in one. A column has
    its value of a token (and a head) in every slot of that token (and head). The tokens are those from
    ``start`` on. Hidden states before it are zero, and stay so: the place of a clear prefix.
    """

    arithmetic: Arithmetic = field(repr=False)
    parts: tuple[Ciphertext, ...]
    tokens: int
    start: int = 0
    heads: bool = False

    @property
    def level(self) -> int:
        """The lowest level of its ciphertexts."""
        return min(part.level for part in self.parts)

    @property
    def _evaluator(self) -> Evaluator:
        return self.arithmetic.evaluator

    def _with(self, parts: Iterable[Ciphertext], **changes: Any) -> EncryptedTensor:
        return replace(self, parts=tuple(parts), **changes)

    def _one(self) -> Ciphertext:
        (part,) = self.parts
        return part

    def _paired(self, other: EncryptedTensor) -> list[tuple[Ciphertext, Ciphertext]]:
        count = max(len(self.parts), len(other.parts))
        a, b = (x.parts * (count // len(x.parts)) for x in (self, other))
        return list(zip(a, b, strict=True))

    def __add__(self, other: EncryptedTensor | float) -> EncryptedTensor:
        if not isinstance(other, EncryptedTensor):
            return self._with(self._evaluator.add(part, other) for part in self.parts)
        return self._with(self._sum(a, b) for a, b in self._paired(other))

    def _sum(self, a: Ciphertext, b: Ciphertext) -> Ciphertext:
        if abs(a.scale / b.scale - 1) > 2**-40:
            if a.level < b.level:
                a, b = b, a
            a = self._evaluator.adjust_scale(a, b.scale)
        return self._evaluator.add(a, b)

    def __mul__(self, other: EncryptedTensor | float) -> EncryptedTensor:
        evaluator = self._evaluator
        if isinstance(other, EncryptedTensor):
            return self._with(evaluator.multiply(a, b) for a, b in self._paired(other))
        if other == round(other):
            return self._with(evaluator.multiply(part, round(other)) for part in self.parts)
        sign = 1 if other > 0 else -1
        scaled = self._with(evaluator.set_scale(part, part.scale / abs(other)) for part in self.parts)
        return scaled if sign > 0 else scaled * sign

    def __matmul__(self, linear: Linear) -> EncryptedTensor:
        self.ready(LINEAR_LEVEL - MASK_LEVEL)
        layer = self.arithmetic.layer(linear)
        matrix = layer.matrix(
            "from heads" if self.heads else "hidden", self.start, LINEAR_LEVEL, lambda: self._rows(linear)
        )
        results = matrix.apply(self._evaluator, self.parts)
        biases = (
            layer.bias((index, self.start), result, partial(self._bias, linear, index))
            for index, result in enumerate(results)
        )
        added = (self._evaluator.add(result, bias) for result, bias in zip(results, biases, strict=True))
        return self._with(added, heads=False)

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

    def polynomial(self, polynomial: Chebyshev) -> EncryptedTensor:
        """See :class:`Tensor`."""
        return self._with(
            self.arithmetic.each(lambda c: self._evaluator.polynomial(c, polynomial), self.parts)
        )

    def mean_square(self, before: Chebyshev) -> EncryptedTensor:
        """See :class:`Tensor`."""
        evaluator, layout = self._evaluator, self.arithmetic.layout
        # Lower values make a lower square: the sum over the width must not outgrow the default scale.
        wanted = self.arithmetic.scale_before(before)
        lower = math.sqrt(wanted * self.arithmetic.parameters.scale / layout.width)
        scaled = [evaluator.adjust_scale(part, lower) for part in self.parts]
        total = evaluator.inner_sum(evaluator.dot(scaled, scaled), *layout.features)
        return self._with([evaluator.set_scale(total, total.scale * layout.width)])

    def to_heads(
        self, linear: Linear, heads: int
    ) -> tuple[EncryptedTensor, EncryptedTensor, EncryptedTensor]:
        """See :class:`Tensor`. Raises ``ValueError`` for another number of heads than the layout's."""
        layout, layer = self.arithmetic.layout, self.arithmetic.layer(linear)
        if heads != layout.heads:
            raise ValueError(f"{heads} heads, in a layout of {layout.heads}")
        self.ready(ATTENTION_LEVEL - MASK_LEVEL)
        matrix = layer.matrix("to heads", self.start, ATTENTION_LEVEL, lambda: self._head_rows(linear))
        results = []
        for index, result in enumerate(matrix.apply(self._evaluator, self.parts)):
            bias = layer.bias((index, self.start), result, partial(self._head_bias, linear, index))
            results.append(self._with([self._evaluator.add(result, bias)], heads=True))
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

    def after(self, prefix: Float64) -> EncryptedTensor:
        """See :class:`Tensor`. Raises ``ValueError`` unless the tokens start right after the prefix."""
        if prefix.shape[1] != self.start:
            raise ValueError(f"a prefix of {prefix.shape[1]} tokens, before token {self.start}")
        added = self._evaluator.add(self._one(), self.arithmetic.layout.pack_heads(prefix))
        return self._with([added], tokens=self.tokens + self.start, start=0)

    def _shifted(self, masks: list[list[Plaintext]]) -> list[Ciphertext]:
        """Return the masked keys or values for every shift of features."""
        evaluator = self._evaluator
        (part,) = (evaluator.drop_level(part, ATTENTION_LEVEL - 1) for part in self.parts)
        moved = [part, *evaluator.rotate_hoisted(part, [-k for k in range(1, len(masks))])]
        return self.arithmetic.each(lambda row: evaluator.dot(moved, row), masks)

    def scores(self, key: EncryptedTensor) -> EncryptedTensor:
        """See :class:`Tensor`."""
        evaluator, layout = self._evaluator, self.arithmetic.layout
        query = evaluator.drop_level(self._one(), ATTENTION_LEVEL - 2)

        def part(item: tuple[int, Ciphertext]) -> Ciphertext:
            k, masked = item
            product = evaluator.multiply(query, masked, rescale=False)
            return evaluator.rotate(product, k * layout.distance_step, out=product) if k else product

        products = self.arithmetic.each(part, enumerate(key._shifted(self.arithmetic.key_masks)))
        total = products[0]
        for product in products[1:]:
            evaluator.add(total, product, out=total)
        evaluator.rescale(total, out=total)
        total = evaluator.inner_sum(total, *layout.blocks_of_head)
        return self._with([evaluator.set_scale(total, total.scale * math.sqrt(layout.head_dim))])

    def exponents(self, factor: float, floor: float) -> EncryptedTensor:
        """See :class:`Tensor`."""
        scores = self._evaluator.set_scale(self._one(), self._one().scale / factor)
        shift = self.arithmetic.exponents(floor, scores.level, scores.scale)
        return self._with([self._evaluator.add(scores, shift)])

    def total(self) -> EncryptedTensor:
        """See :class:`Tensor`."""
        return self._with([self._evaluator.inner_sum(self._one(), *self.arithmetic.layout.distances)])

    def mix(self, value: EncryptedTensor) -> EncryptedTensor:
        """See :class:`Tensor`."""
        evaluator, layout = self._evaluator, self.arithmetic.layout
        weights = evaluator.drop_level(self._one(), ATTENTION_LEVEL - 2)
        steps = [k * layout.distance_step for k in range(1, layout.tokens)]
        moved = [weights, *evaluator.rotate_hoisted(weights, steps)]
        mixed = evaluator.dot(moved, value._shifted(self.arithmetic.value_masks))
        return self._with([mixed], heads=True)

    def ready(self, levels: int, *others: Tensor, before: Chebyshev | None = None) -> None:
        """See :class:`Tensor`. Raises ``ValueError`` for more levels than a refresh gives."""
        tensors = [self, *(cast("EncryptedTensor", other) for other in others)]
        last, parameters = tensors[-1], self.arithmetic.parameters
        if MASK_LEVEL + levels > parameters.max_level:
            raise ValueError(f"{levels} levels are more than a refresh gives")
        left = min(tensor.level for tensor in tensors) - MASK_LEVEL
        if left >= levels + (last._mapping(before) if before else 0):
            return
        wanted = {id(tensor): parameters.scale for tensor in tensors}
        if before:
            wanted[id(last)] = self.arithmetic.scale_before(before)
        owners = [tensor for tensor in tensors for _ in tensor.parts]
        parts = [part for tensor in tensors for part in tensor.parts]
        fresh = iter(self.arithmetic.refresh(parts, [wanted[id(owner)] for owner in owners]))
        for tensor in tensors:
            tensor.parts = tuple(next(fresh) for _ in tensor.parts)

    def _mapping(self, polynomial: Chebyshev) -> int:
        """Return how many levels the polynomial's interval takes at the present scale."""
        parameters = self.arithmetic.parameters
        return max(polynomial.levels(parameters, part.scale) for part in self.parts) - depth(polynomial)


def encrypt(
    secret_key: SecretKey, layout: Layout, hidden: Float64, *, start: int = 0, level: int = ATTENTION_LEVEL
) -> list[Ciphertext]:
    """Encrypt hidden states (tokens, width), the first as token ``start``: the client's side.

    The last is repeated in the slots of tokens after it. No token sees those, their values are in the same
    ranges as the others', and the server does not learn how many tokens there are.
    """
    missing = layout.tokens - start - len(hidden)
    if missing < 0:
        raise ValueError(f"{len(hidden)} tokens from token {start} on, where {layout.tokens} have room")
    padded = np.concatenate([hidden, np.repeat(hidden[-1:], missing, axis=0)])
    return [secret_key.encrypt(slots, level) for slots in layout.pack(padded, start)]


def decrypt(secret_key: SecretKey, tensor: EncryptedTensor, features: int) -> Float64:
    """Decrypt hidden states (tokens, features): the client's side."""
    slots = [secret_key.decrypt(part).real for part in tensor.parts]
    return tensor.arithmetic.layout.unpack(slots, features, tensor.tokens, tensor.start)


def evaluation_keys(secret_key: SecretKey, layout: Layout) -> EvaluationKeys:
    """Make the keys that a server needs for a layout: the client's side."""
    rotations = layout.rotations(secret_key.parameters.max_level)
    return secret_key.evaluation_keys(rotations, conjugation=True)
