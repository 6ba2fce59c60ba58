"""Linear transformations by diagonals."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _native
from .parameters import Parameters

Storage = Literal["int16", "int32", "residues"]
_STORAGE = {"int16": 0, "int32": 1, "residues": 2}
_CHUNK = 64  # diagonals encoded at a time


class LinearTransformation(_native.Handle):
    """A matrix on the slots: output = sum over k of ``diagonal[k] * rotate(input, k)``.

    ``diagonals`` are pairs of a rotation k and a vector. A vector shorter than the
    slots is repeated as a whole, after each of its values was repeated ``inner``
    times: ``np.tile(np.repeat(vector, inner), ...)``. A vector that repeats as a whole
    is a polynomial in a power of X, takes so much less memory and is transformed so
    much faster; repeated values do not have that.

    Diagonals are split into baby steps below ``giant_step`` and giant steps, its
    multiples. Rotation keys are needed for :attr:`rotations`, at ``level``. With ``stages``,
    a divisor of the giant step and a multiple of it, a baby step is two rotations: by a
    multiple of the first stage, and by the rest; and so is a giant step with the second.
    That takes as many rotations in all, and far fewer keys. All matrices that are applied
    to one input together have the same stage of baby steps.

    ``storage`` says how the diagonals are kept. ``"int16"`` and ``"int32"`` keep their
    coefficients as integers, with one common factor a diagonal, and transform them on
    the fly: 2 or 4 bytes for each of the ``degree`` coefficients, and a relative error
    of 4e-5 or 1e-9. ``"residues"`` keeps them ready, in 8 bytes for each coefficient
    and prime.

    A matrix takes one level: its product is rescaled to the scale of the input. With ``scale`` it takes none:
    the diagonals are encoded at that scale, and the product, at the input's level, has the product of both
    scales. That suits the last step of a computation, at level 0 even.
    """

    __slots__ = (
        "_memory",
        "baby_steps",
        "giant_step",
        "giant_steps",
        "level",
        "parameters",
        "scale",
        "stages",
        "storage",
    )

    def __init__(
        self,
        parameters: Parameters,
        diagonals: Mapping[int, ArrayLike] | Iterable[tuple[int, ArrayLike]],
        *,
        level: int,
        giant_step: int,
        inner: int = 1,
        storage: Storage = "int32",
        scale: float | None = None,
        stages: tuple[int, int] | None = None,
    ) -> None:
        stages = stages or (giant_step, parameters.slots)
        handle = _native.create(
            "cl_lintrans_new", parameters.handle, level, giant_step, *stages, _STORAGE[storage], scale or 0.0
        )
        super().__init__(handle)
        self._memory: NDArray[Any] | None = None  # what the library reads coefficients from
        self.parameters, self.level, self.giant_step, self.storage = parameters, level, giant_step, storage
        self.scale, self.stages = scale, stages
        used: set[int] = set()
        items = iter(diagonals.items() if isinstance(diagonals, Mapping) else diagonals)
        while chunk := list(itertools.islice(items, _CHUNK)):
            used.update(rotation % parameters.slots for rotation, _ in chunk)
            self._add(chunk, inner)
        self._split(used)

    def _split(self, used: Iterable[int]) -> None:
        """Remember which baby steps and giant steps diagonals are made of."""
        parts = {(k % self.giant_step, k - k % self.giant_step) for k in used}
        self.baby_steps = frozenset(baby for baby, _ in parts)
        self.giant_steps = frozenset(giant for _, giant in parts)

    @property
    def rotations(self) -> frozenset[int]:
        """The rotations that need keys."""
        fine, coarse = self.stages
        return split_rotations(self.baby_steps, fine) | split_rotations(self.giant_steps, coarse)

    def _add(self, chunk: list[tuple[int, ArrayLike]], inner: int) -> None:
        vectors = np.ascontiguousarray([np.asarray(vector) for _, vector in chunk], np.complex128)
        if vectors.ndim != 2:
            raise ValueError("diagonals must be vectors of one length")
        _native.call(
            "cl_lintrans_add",
            self.handle,
            _native.int64s([rotation for rotation, _ in chunk]),
            len(chunk),
            vectors.ctypes.data,
            vectors.shape[1],
            inner,
        )

    @classmethod
    def from_matrix(
        cls,
        parameters: Parameters,
        matrix: NDArray[Any],
        *,
        level: int,
        inner: int = 1,
        baby_steps: int | None = None,
        storage: Storage = "int32",
    ) -> LinearTransformation:
        """Make the transformation y = matrix @ x of ``inner`` vectors side by side.

        Feature f of vector t is in slot ``f * inner + t``; the matrix is square, with as
        many rows as there are features. Diagonals beyond those of the matrix are left
        out, so a matrix of few diagonals (see :func:`folded`) is fast.
        """
        size = matrix.shape[0]
        if matrix.shape != (size, size) or size * inner != parameters.slots:
            raise ValueError(
                f"a square matrix of {parameters.slots // inner} rows is needed, not {matrix.shape}"
            )
        babies = baby_steps or 1 << (size.bit_length() // 2)
        return cls(
            parameters,
            ((d * inner, diagonal) for d, diagonal in matrix_diagonals(matrix) if np.any(diagonal)),
            level=level,
            giant_step=babies * inner,
            inner=inner,
            storage=storage,
        )

    def coefficients(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[Any]]:
        """Return rotations, multipliers and coefficients, (diagonals, degree), for :meth:`restore`.

        Raises ``ValueError`` where diagonals are kept as residues, and
        :class:`~cipherlm.engine.EngineError` where their values repeat.
        """
        if self.storage == "residues":
            raise ValueError("diagonals that are kept as residues cannot be stored")
        count, degree = self.diagonals, self.parameters.degree
        rotations, multipliers = np.empty(count, np.int64), np.empty(count, np.int64)
        coefficients = np.empty((count, degree), self.storage)
        _native.call(
            "cl_lintrans_stored",
            self.handle,
            rotations.ctypes.data,
            multipliers.ctypes.data,
            coefficients.ctypes.data,
        )
        return rotations, multipliers, coefficients

    @classmethod
    def restore(
        cls,
        parameters: Parameters,
        rotations: NDArray[np.int64],
        multipliers: NDArray[np.int64],
        coefficients: NDArray[Any],
        *,
        level: int,
        giant_step: int,
        scale: float | None = None,
    ) -> LinearTransformation:
        """Make a matrix of what :meth:`coefficients` gave.

        ``coefficients`` are int16 or int32 and are not copied: an array that is mapped from a file is read
        when it is needed, and shared by all processes that map it.
        """
        if coefficients.dtype.name not in ("int16", "int32") or not coefficients.flags.c_contiguous:
            raise ValueError("coefficients are contiguous int16 or int32")
        if coefficients.shape != (len(rotations), parameters.degree) or len(multipliers) != len(rotations):
            raise ValueError(f"{len(rotations)} diagonals do not have coefficients {coefficients.shape}")
        storage: Storage = "int16" if coefficients.dtype == np.int16 else "int32"
        matrix = cls(parameters, (), level=level, giant_step=giant_step, storage=storage, scale=scale)
        matrix._memory = coefficients
        places, factors = (np.ascontiguousarray(values, np.int64) for values in (rotations, multipliers))
        _native.call(
            "cl_lintrans_restore",
            matrix.handle,
            places.ctypes.data,
            factors.ctypes.data,
            len(places),
            coefficients.ctypes.data,
        )
        matrix._split(map(int, places))
        return matrix

    @property
    def nbytes(self) -> int:
        """The memory that the diagonals take."""
        return _native.integers("cl_lintrans_info", self.handle, 2)[0]

    @property
    def diagonals(self) -> int:
        """The number of diagonals that are not zero."""
        return _native.integers("cl_lintrans_info", self.handle, 2)[1]

    def __repr__(self) -> str:
        return (
            f"LinearTransformation({self.diagonals} diagonals, level {self.level}, {self.storage}, "
            f"{self.nbytes / 1e6:.1f} MB)"
        )


def split_rotations(rotations: Iterable[int], giant_step: int) -> frozenset[int]:
    """Return the baby and giant steps that rotations are made of."""
    steps = {part for k in rotations for part in (k % giant_step, k - k % giant_step)}
    return frozenset(steps - {0})


def matrix_diagonals(matrix: NDArray[Any]) -> Iterator[tuple[int, NDArray[Any]]]:
    """Yield (d, diagonal) with diagonal[f] = matrix[f, (f + d) % n], for every d."""
    rows = np.arange(matrix.shape[0])
    for d in range(matrix.shape[0]):
        yield d, matrix[rows, (rows + d) % matrix.shape[0]]


def paired(first: NDArray[Any], second: NDArray[Any]) -> NDArray[np.complex128]:
    """Return one matrix for two real ones on real input: :meth:`Evaluator.split` parts them."""
    return np.asarray((first + 1j * second) / 2, np.complex128)


def folded(matrix: NDArray[Any]) -> NDArray[np.complex128]:
    """Return a matrix of half the diagonals for a real one on real input.

    The upper half of the diagonals, d + n/2, goes to the imaginary part of diagonal d,
    n/2 rows further down: split the result, and add the imaginary part, rotated by n/2
    features, to the real part.
    """
    size = matrix.shape[0]
    rows, result = np.arange(size), np.zeros(matrix.shape, np.complex128)
    for d in range(size // 2):
        columns = (rows + d) % size
        result[rows, columns] = matrix[rows, columns] + 1j * matrix[rows - size // 2, columns]
    return result / 2
