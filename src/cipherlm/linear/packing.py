"""How vectors lie in slots, and how a matrix becomes diagonals.

An input of n features lies in the slots again and again: slot s holds feature ``s % n``. Slot s of the input
rotated by d then holds feature ``(s + d) % n``, so that a slot collects, over the diagonals d = 0, 1, ...,
the products of a run of features with one row of the matrix. With ``depth`` diagonals, n / depth slots share
a row: each collects a run, and the client adds up what they hold. Nothing is masked or repeated at the
server, so the product takes no level (after Halevi and Shoup, CRYPTO 2014, with the last sums left to the
client).

Slots get random signs that are fixed and public. A coefficient is a sum over slots: with random signs, no
input makes the terms of one pile up. :mod:`cipherlm.linear.plan` builds on that.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
Matrix = NDArray[np.floating[Any]]
_SIGNS = 2026
_ITERATIONS = 12


@dataclass(frozen=True)
class Packing:
    """A matrix of ``rows`` x ``columns`` in ciphertexts of ``slots`` real slots.

    The columns are split over ``inputs`` ciphertexts, the rows over ``outputs``. A row takes ``runs`` slots
    of an output.
    """

    rows: int
    columns: int
    slots: int
    inputs: int
    outputs: int
    runs: int

    @property
    def period(self) -> int:
        """The features in one input."""
        return -(-self.columns // self.inputs)

    @property
    def depth(self) -> int:
        """The diagonals of one input for one output: the longest run."""
        return -(-self.period // self.runs)

    @property
    def diagonals(self) -> int:
        """All diagonals."""
        return self.inputs * self.outputs * self.depth

    @property
    def per_output(self) -> int:
        """The rows in one output, but perhaps the last."""
        return -(-self.rows // self.outputs)

    @property
    def repetitions(self) -> int:
        """How often the whole input lies in the slots that collect."""
        # A run beyond the last slot goes on at the first: right only where the period divides the slots.
        over = 0 if self.slots % self.period == 0 else self.depth - 1
        return (self.slots - over) // self.period

    @property
    def capacity(self) -> int:
        """The rows that an output can hold."""
        return self.repetitions * (self.period // self.runs)

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        """Where the runs begin, and where the last one ends."""
        return np.arange(self.runs + 1, dtype=np.int64) * self.period // self.runs

    def spread(self, x: Float64) -> Float64:
        """Return the slots of every input, (n, inputs, slots), for vectors (n, columns)."""
        padded = np.zeros((len(x), self.inputs * self.period))
        padded[:, : self.columns] = x
        parts = padded.reshape(len(x), self.inputs, self.period)
        repeats = -(-self.slots // self.period)
        return np.tile(parts, (1, 1, repeats))[:, :, : self.slots]

    @cached_property
    def places(self) -> NDArray[np.int64]:
        """The slots that hold the runs of a row, (per_output, runs)."""
        row = np.arange(self.per_output)[:, None]
        repetition, within = np.divmod(row, self.period // self.runs)
        return np.asarray(repetition * self.period + within + self._starts[None, : self.runs])

    @cached_property
    def signs(self) -> Float64:
        """The sign of every slot of an output."""
        generator = np.random.Generator(np.random.PCG64(_SIGNS))
        return 1.0 - 2.0 * generator.integers(0, 2, self.slots)

    def gather(self, slots: Float64) -> Float64:
        """Return vectors (n, rows) for the slots of every output, (n, outputs, slots)."""
        sums = (slots * self.signs)[:, :, self.places].sum(axis=-1)
        return np.asarray(sums.reshape(len(slots), self.outputs * self.per_output)[:, : self.rows])

    def part(self, matrix: Matrix, source: int, target: int) -> Float64:
        """Return what of a matrix (rows, columns) is between an input and an output, zeros where there is
        none."""
        first_row, first_column = target * self.per_output, source * self.period
        part = np.zeros((self.per_output, self.period))
        given = matrix[first_row : first_row + self.per_output, first_column : first_column + self.period]
        part[: given.shape[0], : given.shape[1]] = given
        return part

    def diagonals_of(self, matrix: Matrix, source: int, target: int) -> Iterator[tuple[int, Float64]]:
        """Yield (d, diagonal) from an input to an output, for a matrix (rows, columns)."""
        rows, lengths = self.part(matrix, source, target), np.diff(self._starts)
        for d in range(self.depth):
            places = self.places[:, d < lengths]
            diagonal = np.zeros(self.slots)
            diagonal[places] = np.take_along_axis(rows, (places + d) % self.period, axis=1)
            yield d, diagonal * self.signs

    def norm(self, matrix: Matrix) -> float:
        """Return the greatest Euclidean norm that the slots of an output take for an input of norm 1.

        Each slot is a row of the matrix without the features beyond its run: the norm is the greatest
        singular value of all these, here with a margin of 5 % for the iteration that finds it.
        """
        parts = [
            [self._part_norm(self.part(matrix, source, target)) for source in range(self.inputs)]
            for target in range(self.outputs)
        ]
        return float(np.linalg.norm(parts, axis=1).max())

    def _part_norm(self, rows: Float64) -> float:
        columns = np.arange(self.period)
        stacked = np.concatenate(
            [
                np.where((columns - self.places[:, run, None]) % self.period < length, rows, 0.0)
                for run, length in enumerate(np.diff(self._starts))
            ]
        ).astype(np.float32)
        vectors = (
            np.random.Generator(np.random.PCG64(_SIGNS)).normal(size=(self.period, 4)).astype(np.float32)
        )
        norm = 0.0
        for _ in range(_ITERATIONS):
            vectors, _ = np.linalg.qr(vectors)
            images = stacked @ vectors
            norm = float(np.linalg.norm(images, 2))
            vectors = stacked.T @ images
            if not vectors.any():
                return 0.0
        return 1.05 * norm


def choose_packing(rows: int, columns: int, slots: int, *, output_cost: float = 40.0) -> Packing:
    """Return the packing that costs least, with the fewest inputs.

    An output costs as much as so many diagonals: its key switches, its bytes. Raises ``ValueError`` for
    sizes that are not positive.
    """
    if rows < 1 or columns < 1 or slots < 2:
        raise ValueError(f"a matrix of {rows} x {columns} cannot be packed")
    best: tuple[float, Packing] | None = None
    inputs = -(-columns // slots)
    period = -(-columns // inputs)
    runs = np.arange(1, period + 1)
    depths = -(-period // runs)
    over = 0 if slots % period == 0 else depths - 1
    capacities = (slots - over) // period * (period // runs)
    for outputs in range(1, rows + 1):
        if best is not None and outputs * output_cost >= best[0]:
            break
        possible = np.flatnonzero(capacities >= -(-rows // outputs))
        if len(possible):
            packing = Packing(rows, columns, slots, inputs, outputs, int(runs[possible[-1]]))
            cost = packing.diagonals + outputs * output_cost
            if best is None or cost < best[0]:
                best = (cost, packing)
    assert best is not None, "an output holds one row at least"
    return best[1]
