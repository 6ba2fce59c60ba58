"""What tensors of ciphertexts have in common, whatever their packing: levels, scales, refreshes."""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from cipherlm.engine import (
    Chebyshev,
    Ciphertext,
)
from cipherlm.nn.tensor import Tensor, depth
from cipherlm.schemes.ckks.arithmetic import MAPPING_SHIFT, PLAIN_SHIFT, Arithmetic, Scaled
from cipherlm.schemes.ckks.evaluator import Evaluator
from cipherlm.schemes.ckks.refresh import MASK_LEVEL

Float64 = NDArray[np.float64]
A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C", bound="CiphertextTensor")


@dataclass(eq=False)
class CiphertextTensor(Tensor):
    """What tensors of ciphertexts have in common, whatever their packing.

    Values are of the size of ``unit``: a refresh brings them to the default scale divided by that. ``copies``
    says how often the slots of each ciphertext repeat, or of all of them: a refresh sends that much less.
    """

    arithmetic: Arithmetic = field(repr=False)
    parts: tuple[Ciphertext, ...]
    unit: float = field(default=1.0, kw_only=True)
    copies: tuple[int, ...] = field(default=(1,), kw_only=True)

    @property
    def level(self) -> int:
        """The lowest level of its ciphertexts."""
        return min(part.level for part in self.parts)

    @property
    def most_levels(self) -> int:
        """See :class:`Tensor`."""
        return self.arithmetic.parameters.max_level - MASK_LEVEL

    @property
    def _evaluator(self) -> Evaluator:
        return self.arithmetic.evaluator

    def _masked(self, parts: Sequence[Ciphertext], masks: Sequence[Float64]) -> Ciphertext:
        """Return the sum of ciphertexts times masks, at the scale of the first."""
        return self._evaluator.dot(parts, [self.arithmetic.encodings.mask(m, parts[0].level) for m in masks])

    def _real(self, ciphertext: Ciphertext, factor: float = 1.0) -> Ciphertext:
        """Return the real part divided by a factor."""
        real, _ = self._evaluator.split(ciphertext)
        return self._evaluator.set_scale(real, real.scale * 2 * factor, out=real)

    def _imaginary(self, ciphertext: Ciphertext) -> Ciphertext:
        """Return the imaginary part."""
        _, imaginary = self._evaluator.split(ciphertext)
        return self._evaluator.set_scale(imaginary, imaginary.scale * 2, out=imaginary)

    def real(self: C) -> C:
        """Return the real parts, for sums that are refreshed together with something else.

        In a sum the imaginary parts of noise add up like the real ones. Of two ciphertexts that are refreshed
        as one, the imaginary part of each joins the real part of the other.
        """
        return self._with(map(self._real, self.parts))

    @property
    @abstractmethod
    def _features(self) -> tuple[int, int]:
        """Step and count of a sum over the features of hidden states."""

    def _with(self: C, parts: Iterable[Ciphertext], **changes: Any) -> C:
        return replace(self, parts=tuple(parts), **changes)

    def _common_copies(self, *others: CiphertextTensor) -> tuple[int, ...]:
        """Return how often the slots of what this and others are combined to repeat."""
        copies = self.copies
        for other in others:
            copies = tuple(min(pair) for pair in zip(*broadcast(copies, other.copies), strict=True))
        return copies

    def _one(self) -> Ciphertext:
        (part,) = self.parts
        return part

    def _paired(self: C, other: C) -> list[tuple[Ciphertext, Ciphertext]]:
        return list(zip(*broadcast(self.parts, other.parts), strict=True))

    def __add__(self: C, other: C | float) -> C:
        if not isinstance(other, CiphertextTensor):
            return self._with(self._evaluator.add(part, other) for part in self.parts)
        return self._with(
            (added(self._evaluator, a, b) for a, b in self._paired(other)), copies=self._common_copies(other)
        )

    def __mul__(self: C, other: C | float) -> C:
        evaluator = self._evaluator
        if isinstance(other, CiphertextTensor):
            products = (evaluator.multiply(a, b) for a, b in self._paired(other))
            return self._with(products, unit=1.0, copies=self._common_copies(other))
        if other == round(other):
            return self._with(evaluator.multiply(part, round(other)) for part in self.parts)
        sign = 1 if other > 0 else -1
        scaled = self._with(evaluator.set_scale(part, part.scale / abs(other)) for part in self.parts)
        return scaled if sign > 0 else scaled * sign

    def polynomial(self: C, polynomial: Chebyshev) -> C:
        """See :class:`Tensor`."""
        return self._with(
            self.arithmetic.each(lambda c: self._evaluator.polynomial(c, polynomial), self.parts)
        )

    def mean_square(self: C, before: Chebyshev, gain: float = 1.0) -> C:
        """See :class:`Tensor`."""
        evaluator, width = self._evaluator, self.arithmetic.layout.width
        self.unit = gain**-0.5
        # Lower values make a lower square: the sum over the width must not outgrow the default scale.
        wanted = self.arithmetic.scale_before(before) * gain
        lower = math.sqrt(wanted * self.arithmetic.parameters.scale / width)
        # Where another refresh has to follow the square, it takes place at the lowest levels.
        levels = depth(before) + 2
        together = levels <= self.most_levels
        least = MASK_LEVEL + (levels if together else 1)
        if self.level < least + 1:
            # A refresh brings that scale, and a product with an integer the usual one: neither takes a level.
            factor = max(1, round(self._refreshed_scale / lower))
            self._refresh([self], [lower], None if together else least, shift=MAPPING_SHIFT)
            scaled = list(self.parts)
            larger = [evaluator.multiply(part, factor) for part in scaled]
            self.parts = tuple(evaluator.set_scale(part, part.scale * factor, out=part) for part in larger)
        else:
            parts = self.parts if together else [evaluator.drop_level(part, least + 1) for part in self.parts]
            scaled = [evaluator.adjust_scale(part, lower) for part in parts]
        total = evaluator.inner_sum(evaluator.dot(scaled, scaled), *self._features)
        evaluator.set_scale(total, total.scale * width / gain, out=total)
        return self._with([total], unit=1.0, copies=self.arithmetic.layout.copies(self._features[0]))

    @property
    def _refreshed_scale(self) -> float:
        return self.arithmetic.parameters.scale / self.unit

    def ready(
        self, levels: int, *others: Tensor, before: Chebyshev | None = None, then: int | None = None
    ) -> None:
        """See :class:`Tensor`. Raises ``ValueError`` for more levels than a refresh gives."""
        tensors = [self, *(cast("CiphertextTensor", other) for other in others)]
        ahead, parameters = tensors[-1], self.arithmetic.parameters
        if MASK_LEVEL + levels > parameters.max_level:
            raise ValueError(f"{levels} levels are more than a refresh gives")
        top = parameters.max_level
        if then is not None:
            missed = 1 if before and ahead._missed(before) else 0
            top = min(top, MASK_LEVEL + levels + then + missed)
        needed = {id(tensor): MASK_LEVEL + levels for tensor in tensors}
        if before:
            needed[id(ahead)] += ahead._mapping(before)
        lacking = [tensor for tensor in tensors if tensor.level < needed[id(tensor)]]
        if not lacking:
            return
        scales = [
            self.arithmetic.scale_before(before) if before and tensor is ahead else tensor._refreshed_scale
            for tensor in lacking
        ]
        self._refresh(lacking, scales, top, shift=MAPPING_SHIFT if before else PLAIN_SHIFT)

    def ready_total(self: C, levels: int, then: int | None = None) -> C:
        """See :class:`Tensor`.

        Two ciphertexts are refreshed as one: the total of an odd number of them costs least before that.
        """
        if self.level - MASK_LEVEL >= levels or len(self.parts) % 2 == 0:
            return super().ready_total(levels, then)
        total = self.total().real()
        self.ready(levels, total, then=then)
        return total

    def _refresh(
        self,
        tensors: Sequence[CiphertextTensor],
        scales: Sequence[float],
        level: int | None = None,
        *,
        shift: int,
    ) -> None:
        """Refresh tensors together, in place, to a level (the highest, if None) and near these scales."""
        scaled = [
            Scaled(part, scale, copies)
            for tensor, scale in zip(tensors, scales, strict=True)
            for part, copies in zip(*broadcast(tensor.parts, tensor.copies), strict=True)
        ]
        top = self.arithmetic.parameters.max_level if level is None else level
        fresh = iter(self.arithmetic.refresh(scaled, top, shift))
        for tensor in tensors:
            tensor.parts = tuple(next(fresh) for _ in tensor.parts)

    def _missed(self, polynomial: Chebyshev) -> bool:
        """Whether a refresh can miss the scale before a polynomial, so that its interval takes a level."""
        arithmetic = self.arithmetic
        wanted = arithmetic.scale_before(polynomial)
        scales = (arithmetic.refreshed_scales(part, wanted, MAPPING_SHIFT) for part in self.parts)
        return any(
            scale and polynomial.levels(arithmetic.parameters, scale) > depth(polynomial)
            for scale in itertools.chain.from_iterable(scales)
        )

    def _mapping(self, polynomial: Chebyshev) -> int:
        """Return how many levels the polynomial's interval takes at the present scale."""
        parameters = self.arithmetic.parameters
        return max(polynomial.levels(parameters, part.scale) for part in self.parts) - depth(polynomial)


def broadcast(a: Sequence[A], b: Sequence[B]) -> tuple[Sequence[A], Sequence[B]]:
    """Return both at the length of the longer one: one item stands for as many."""
    count = max(len(a), len(b))
    return [*a] * (count // len(a)), [*b] * (count // len(b))


def added(evaluator: Evaluator, a: Ciphertext, b: Ciphertext) -> Ciphertext:
    """Return the sum. Where scales differ, whichever has the level to spare takes the other's."""
    if abs(a.scale / b.scale - 1) > 2**-40:
        if a.level < b.level:
            a, b = b, a
        a = evaluator.adjust_scale(a, b.scale)
    return evaluator.add(a, b)
