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
from cipherlm.schemes.ckks.arithmetic import MAPPING_SHIFT, PLAIN_SHIFT, Arithmetic
from cipherlm.schemes.ckks.evaluator import Evaluator
from cipherlm.schemes.ckks.refresh import MASK_LEVEL

Float64 = NDArray[np.float64]
C = TypeVar("C", bound="CiphertextTensor")


@dataclass(eq=False)
class CiphertextTensor(Tensor):
    """What tensors of ciphertexts have in common, whatever their packing.

    Values are of the size of ``unit``: a refresh brings them to the default scale divided by that.
    """

    arithmetic: Arithmetic = field(repr=False)
    parts: tuple[Ciphertext, ...]
    unit: float = field(default=1.0, kw_only=True)

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

    def _one(self) -> Ciphertext:
        (part,) = self.parts
        return part

    def _paired(self: C, other: C) -> list[tuple[Ciphertext, Ciphertext]]:
        count = max(len(self.parts), len(other.parts))
        a, b = (x.parts * (count // len(x.parts)) for x in (self, other))
        return list(zip(a, b, strict=True))

    def __add__(self: C, other: C | float) -> C:
        if not isinstance(other, CiphertextTensor):
            return self._with(self._evaluator.add(part, other) for part in self.parts)
        return self._with(added(self._evaluator, a, b) for a, b in self._paired(other))

    def __mul__(self: C, other: C | float) -> C:
        evaluator = self._evaluator
        if isinstance(other, CiphertextTensor):
            return self._with((evaluator.multiply(a, b) for a, b in self._paired(other)), unit=1.0)
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
            # A refresh can bring a copy in that scale for nothing.
            copy = self._with(self.parts)
            scales = [self._refreshed_scale, lower]
            self._refresh([self, copy], scales, None if together else least, shift=MAPPING_SHIFT)
            scaled = list(copy.parts)
        else:
            parts = self.parts if together else [evaluator.drop_level(part, least + 1) for part in self.parts]
            scaled = [evaluator.adjust_scale(part, lower) for part in parts]
        total = evaluator.inner_sum(evaluator.dot(scaled, scaled), *self._features)
        return self._with([evaluator.set_scale(total, total.scale * width / gain, out=total)], unit=1.0)

    @property
    def _along(self) -> Sequence[CiphertextTensor]:
        """Tensors of one ciphertext that need a refresh, and join one in which a pair has room."""
        return ()

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
        if sum(len(tensor.parts) for tensor in lacking) % 2:
            # Two ciphertexts are refreshed as one: another comes along for nothing.
            able = [t for t in tensors if t not in lacking and len(t.parts) == 1 and t.level < top]
            lacking += sorted([*able, *self._along], key=lambda t: t.level)[:1]
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
        parts = [part for tensor in tensors for part in tensor.parts]
        wanted = [scale for tensor, scale in zip(tensors, scales, strict=True) for _ in tensor.parts]
        top = self.arithmetic.parameters.max_level if level is None else level
        fresh = iter(self.arithmetic.refresh(parts, wanted, top, shift))
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


def added(evaluator: Evaluator, a: Ciphertext, b: Ciphertext) -> Ciphertext:
    """Return the sum. Where scales differ, whichever has the level to spare takes the other's."""
    if abs(a.scale / b.scale - 1) > 2**-40:
        if a.level < b.level:
            a, b = b, a
        a = evaluator.adjust_scale(a, b.scale)
    return evaluator.add(a, b)
