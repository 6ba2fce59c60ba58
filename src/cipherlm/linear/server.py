"""The server's half: matrices, kept once for all clients, and products on ciphertexts."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cipherlm.engine import Ciphertext, Evaluator, LinearTransformation
from cipherlm.linear.plan import GroupPlan, Plan

PLAN_NAME = "linear_plan.json"
MATRICES_NAME = "matrices.int16"
_INDEX_NAME = "matrices.json"
Row = list[Ciphertext]
"""The ciphertexts of one vector."""


class Matrices:
    """The diagonals of one direction of one group: ``blocks[source][target]``."""

    def __init__(self, plan: GroupPlan, blocks: list[list[LinearTransformation]]) -> None:
        self.plan, self.blocks = plan, blocks

    @property
    def nbytes(self) -> int:
        """The memory that the diagonals take, or the part of a file."""
        return sum(block.nbytes for row in self.blocks for block in row)

    def multiply(self, evaluator: Evaluator, rows: Sequence[Row]) -> list[Row]:
        """Return the outputs of every row of inputs, rounded for the way back."""
        sums: list[list[Ciphertext]] | None = None  # by output, then by row
        for source, blocks in enumerate(self.blocks):
            products = evaluator.transform_many([row[source] for row in rows], blocks)
            if sums is None:
                sums = products
                continue
            for total, product in zip(sums, products, strict=True):
                for a, b in zip(total, product, strict=True):
                    evaluator.add(a, b, out=a)
        assert sums is not None, "a packing has at least one input"
        for output in sums:
            for ciphertext in output:
                ciphertext.round(self.plan.first, self.plan.second)
        return [list(row) for row in zip(*sums, strict=True)]


class LinearServer:
    """Multiplies ciphertexts by the weights of groups. It holds no key; evaluators come with each call."""

    def __init__(self, plan: Plan, forward: Mapping[str, Matrices], backward: Mapping[str, Matrices]) -> None:
        self.plan = plan
        self._matrices = {False: forward, True: backward}

    @classmethod
    def build(cls, plan: Plan, weights: Mapping[str, NDArray[np.floating[Any]]]) -> "LinearServer":
        """Encode the weights, (rows, in_features) for each group."""
        forward = {name: encode(plan, plan.forward[name], weights[name]) for name in plan.forward}
        backward = {name: encode(plan, plan.backward[name], weights[name].T) for name in plan.backward}
        return cls(plan, forward, backward)

    @property
    def nbytes(self) -> int:
        """The memory that all matrices take."""
        return sum(matrices.nbytes for side in self._matrices.values() for matrices in side.values())

    def multiply(
        self, evaluator: Evaluator, group: str, rows: Sequence[Row], *, transposed: bool = False
    ) -> list[Row]:
        """Return the outputs of every row of input ciphertexts.

        Raises ``ValueError`` for a group that is not there, and for inputs that no client of this plan makes:
        of another number, level or scale, or without a seed.
        """
        plan = self.plan.of(group, transposed)
        for row in rows:
            if len(row) != plan.packing.inputs:
                raise ValueError(f"{group} takes {plan.packing.inputs} ciphertexts, not {len(row)}")
            for ciphertext in row:
                if ciphertext.level != 0 or ciphertext.degree != 1 or not ciphertext.seeded:
                    raise ValueError(f"an input of {group} is a fresh, seeded ciphertext at level 0")
                if abs(ciphertext.scale / plan.input_scale - 1) > 1e-9:
                    raise ValueError(f"an input of {group} has another scale than the plan's")
        if not rows:
            return []
        return self._matrices[transposed][group].multiply(evaluator, rows)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the plan and the diagonals, which :meth:`load` maps into memory."""
        _write(
            Path(directory),
            self.plan,
            (
                (name, transposed, matrices)
                for transposed, side in self._matrices.items()
                for name, matrices in side.items()
            ),
        )

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> "LinearServer":
        """Map what :meth:`save` wrote: nothing is read before it is needed, and processes share it.

        Raises ``FileNotFoundError`` where a file is missing and ``ValueError`` where one is damaged.
        """
        path = Path(directory)
        plan = load_plan(path)
        degree = plan.parameters.degree
        try:
            index = json.loads((path / _INDEX_NAME).read_text(encoding="utf-8"))
            total = sum(len(entry["rotations"]) for entry in index)
            file = path / MATRICES_NAME
            coefficients = np.memmap(file, np.int16, "r", shape=(total, degree))
            blocks: dict[tuple[str, bool], list[LinearTransformation]] = {}
            start = 0
            for entry in index:
                count = len(entry["rotations"])
                matrix = plan.of(entry["group"], entry["transposed"])
                blocks.setdefault((entry["group"], entry["transposed"]), []).append(
                    LinearTransformation.restore(
                        plan.parameters,
                        np.array(entry["rotations"], np.int64),
                        np.array(entry["multipliers"], np.int64),
                        coefficients[start : start + count],
                        level=0,
                        giant_step=matrix.giant_step,
                        scale=matrix.weight_scale,
                    )
                )
                start += count
            sides: dict[bool, dict[str, Matrices]] = {
                transposed: {name: _arrange(side[name], blocks.get((name, transposed), [])) for name in side}
                for transposed, side in ((False, plan.forward), (True, plan.backward))
            }
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the matrices in {os.fspath(path)!r} are damaged: {error}") from error
        return cls(plan, sides[False], sides[True])


def encode_to(
    directory: str | os.PathLike[str],
    plan: Plan,
    weights: Mapping[str, NDArray[np.floating[Any]]],
    report: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write what :meth:`LinearServer.save` does, with one group's diagonals in memory at a time.

    ``report`` hears how many matrices of how many are encoded.
    """

    def encoded() -> Iterator[tuple[str, bool, Matrices]]:
        work = [(name, False) for name in plan.forward] + [(name, True) for name in plan.backward]
        for done, (name, transposed) in enumerate(work):
            report(done, len(work))
            matrix = weights[name].T if transposed else weights[name]
            yield (
                name,
                transposed,
                encode(plan, plan.of(name, transposed), matrix),
            )

    _write(Path(directory), plan, encoded())


def _write(path: Path, plan: Plan, matrices: Iterable[tuple[str, bool, Matrices]]) -> None:
    path.mkdir(parents=True, exist_ok=True)
    index: list[dict[str, Any]] = []
    with (path / MATRICES_NAME).open("wb") as file:
        for name, transposed, group in matrices:
            for block in (block for row in group.blocks for block in row):
                rotations, multipliers, coefficients = block.coefficients()
                index.append(
                    {
                        "group": name,
                        "transposed": transposed,
                        "rotations": rotations.tolist(),
                        "multipliers": multipliers.tolist(),
                    }
                )
                file.write(coefficients.tobytes())
    (path / _INDEX_NAME).write_text(json.dumps(index), encoding="utf-8")
    (path / PLAN_NAME).write_text(json.dumps(plan.to_dict()), encoding="utf-8")


def load_plan(directory: Path) -> Plan:
    """Read a plan. Raises ``FileNotFoundError`` or ``ValueError``."""
    file = directory / PLAN_NAME
    if not file.is_file():
        raise FileNotFoundError(f"no linear layers in {os.fspath(directory)!r}: no {PLAN_NAME}")
    try:
        return Plan.from_dict(json.loads(file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def encode(
    plan: Plan,
    group: GroupPlan,
    matrix: NDArray[np.floating[Any]],
    kind: type[LinearTransformation] = LinearTransformation,
) -> Matrices:
    """Return the diagonals of a matrix (rows, columns), of a ``kind`` of linear transformations."""
    packing = group.packing
    blocks = [
        [
            kind(
                plan.parameters,
                packing.diagonals_of(matrix, source, target),
                level=0,
                giant_step=group.giant_step,
                storage="int16",
                scale=group.weight_scale,
            )
            for target in range(packing.outputs)
        ]
        for source in range(packing.inputs)
    ]
    return Matrices(group, blocks)


def _arrange(plan: GroupPlan, blocks: list[LinearTransformation]) -> Matrices:
    outputs = plan.packing.outputs
    if len(blocks) != plan.packing.inputs * outputs:
        raise ValueError(f"{len(blocks)} blocks for {plan.packing.inputs} x {outputs}")
    return Matrices(plan, [blocks[i : i + outputs] for i in range(0, len(blocks), outputs)])
