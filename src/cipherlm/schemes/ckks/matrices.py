"""Clear weights as linear transformations of slots, of a prompt and of one token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cipherlm.engine import (
    Ciphertext,
    LinearTransformation,
    folded,
    matrix_diagonals,
    paired,
)
from cipherlm.schemes.ckks.arithmetic import Arithmetic, Encodings
from cipherlm.schemes.ckks.decoding_layout import (
    DECODING_BABY_STEPS,
    DECODING_STAGES,
    MOST_COPIES,
    DecodingShape,
)
from cipherlm.schemes.ckks.evaluator import Evaluator

Float64 = NDArray[np.float64]


class Matrix:
    """A matrix on packed features: blocks of a period each, two outputs at once where there are two.

    Two real blocks with one input are the real and the imaginary part of one transformation; one block alone
    is folded to half its diagonals (see :func:`~cipherlm.engine.paired`, :func:`~cipherlm.engine.folded`).
    ``rows`` (outputs, period, inputs * period) are blocks of outputs in the order of slots.
    """

    def __init__(self, encodings: Encodings, rows: Sequence[Float64], *, level: int) -> None:
        layout = encodings.layout
        self.layout, self.outputs, self.inputs = layout, len(rows), rows[0].shape[1] // layout.period
        self._transformations = [
            [
                self._transformation(encodings, self._joined(rows[first : first + 2], part), level)
                for first in range(0, len(rows), 2)
            ]
            for part in range(self.inputs)
        ]

    def _joined(self, rows: Sequence[Float64], part: int) -> NDArray[np.complex128]:
        blocks = [row[:, part * self.layout.period : (part + 1) * self.layout.period] for row in rows]
        return paired(*blocks) if len(blocks) == 2 else folded(blocks[0])

    def _transformation(
        self, encodings: Encodings, matrix: NDArray[np.complex128], level: int
    ) -> LinearTransformation:
        tokens = self.layout.tokens
        return encodings.transformation(
            (
                (d * tokens, np.repeat(diagonal, tokens))
                for d, diagonal in matrix_diagonals(matrix)
                if np.any(diagonal)
            ),
            level=level,
            giant_step=self.layout.baby_steps * tokens,
            stages=self.layout.stages,
        )

    @property
    def nbytes(self) -> int:
        """The memory that the diagonals take."""
        return sum(matrix.nbytes for part in self._transformations for matrix in part)

    def apply(self, arithmetic: Arithmetic, inputs: Sequence[Ciphertext]) -> list[Ciphertext]:
        """Return one ciphertext an output, one level below the matrix's."""
        if len(inputs) != self.inputs:
            raise ValueError(f"a matrix of {self.inputs} parts, and {len(inputs)} ciphertexts")
        evaluator, joined = arithmetic.evaluator, list[Ciphertext]()
        for ciphertext, matrices in zip(inputs, self._transformations, strict=True):
            results = arithmetic.transformed(ciphertext, matrices)
            joined = (
                [evaluator.add(a, b) for a, b in zip(joined, results, strict=True)] if joined else results
            )
        outputs: list[Ciphertext] = []
        for result in joined:
            real, imaginary = evaluator.split(result)
            if len(outputs) + 2 <= self.outputs:
                outputs += [real, imaginary]
            else:
                half = self.layout.period // 2 * self.layout.tokens
                outputs.append(evaluator.add(real, evaluator.rotate(imaginary, half)))
        return outputs


class DecodingMatrix:
    """A matrix on one token's features; see :class:`~cipherlm.schemes.ckks.decoding_layout.DecodingShape`.

    ``matrix`` (outputs, inputs) has the two periods as its shape. A real one is folded to half its diagonals.
    """

    def __init__(
        self,
        encodings: Encodings,
        matrix: NDArray[Any],
        *,
        level: int,
        most_copies: int = MOST_COPIES,
    ) -> None:
        outputs, inputs = matrix.shape
        self.shape = DecodingShape(encodings.parameters.slots, inputs, outputs, most_copies)
        self.real = not np.iscomplexobj(matrix)
        self.level = level
        self._encodings = encodings
        self._transformation = encodings.transformation(
            self._folded(matrix) if self.real else self._diagonals(matrix, 0, self.shape.diagonals),
            level=level,
            giant_step=DECODING_BABY_STEPS,
            stages=DECODING_STAGES,
        )

    def _diagonals(self, matrix: NDArray[Any], first: int, last: int) -> Iterator[tuple[int, NDArray[Any]]]:
        output, source = np.arange(self.shape.slots) % self.shape.outputs, self.shape.input
        for d in range(first, last):
            yield d, matrix[output, np.roll(source, -d)]

    def _folded(self, matrix: NDArray[Any]) -> Iterator[tuple[int, NDArray[Any]]]:
        half = self.shape.diagonals // 2
        lower = self._diagonals(matrix, 0, half)
        upper = self._diagonals(matrix, half, 2 * half)
        for (d, first), (_, second) in zip(lower, upper, strict=True):
            yield d, (first + 1j * np.roll(second, half)) / 2

    @property
    def nbytes(self) -> int:
        """The memory that the diagonals take."""
        return self._transformation.nbytes

    def shifted(self, evaluator: Evaluator, ciphertext: Ciphertext, level: int) -> Ciphertext:
        """Return inputs, at a level, with every copy shifted to those that it takes care of.

        Other matrices of this shape take them too. The ciphertext has a level more, where there are copies.
        """
        shape = self.shape
        if shape.copies == 1:
            return evaluator.drop_level(ciphertext, level)
        masks = self._encodings.keep(
            ("copies", shape, level),
            lambda: [
                self._encodings.mask((shape.copy == copy) * 1.0, level + 1) for copy in range(shape.copies)
            ],
        )
        ciphertext = evaluator.drop_level(ciphertext, level + 1)
        steps = [copy * shape.diagonals for copy in range(1, shape.copies)]
        return evaluator.dot([ciphertext, *evaluator.rotate_hoisted(ciphertext, steps)], masks)

    def apply(self, evaluator: Evaluator, shifted: Ciphertext) -> Ciphertext:
        """Return the outputs, one level below the matrix's, of :meth:`shifted` inputs."""
        result = evaluator.transform(shifted, self._transformation)
        result = evaluator.inner_sum(result, *self.shape.sums)
        if not self.real:
            return result
        real, imaginary = evaluator.split(result)
        return evaluator.add(real, evaluator.rotate(imaginary, self.shape.diagonals // 2))
