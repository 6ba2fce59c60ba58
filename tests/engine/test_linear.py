"""Linear transformations agree with NumPy, in every layout and storage."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cipherlm.engine import (
    InvalidArgumentError,
    KeyMaterialError,
    LevelError,
    LinearTransformation,
    Parameters,
    ScaleError,
    folded,
    paired,
)

from .conftest import Party

# Error of a result whose largest value is of size 1, by storage.
BOUND = {"int16": 2**-11, "int32": 2**-14, "residues": 2**-14}
GIANT = 32


def expected(diagonals, x, inner=1):
    slots = len(x)
    total = np.zeros(slots, complex)
    for rotation, vector in diagonals.items():
        expanded = np.repeat(vector, inner)
        total += np.tile(expanded, slots // len(expanded)) * np.roll(x, -rotation)
    return total


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rotations=st.sets(st.sampled_from([0, 1, 2, 8, 16, 32, 33, 64, 72, 96]), min_size=1, max_size=6),
    length=st.sampled_from([4, 64, 512, 4096]),
    inner=st.sampled_from([1, 8]),
    storage=st.sampled_from(sorted(BOUND)),
    level=st.integers(1, 4),
    stages=st.sampled_from([None, (8, 64), (1, 32), (GIANT, 64)]),
    seed=st.integers(0, 2**32 - 1),
)
def test_diagonals(each: Party, rotations, length, inner, storage, level, stages, seed):
    random = np.random.default_rng(seed)
    if length * inner > each.parameters.slots:
        length //= inner
    diagonals = {
        k: random.normal(size=length) + (0 if each.parameters.real else 1j * random.normal(size=length))
        for k in rotations
    }
    x = each.values(1, seed)
    matrix = LinearTransformation(
        each.parameters,
        diagonals,
        level=level,
        giant_step=GIANT,
        inner=inner,
        storage=storage,
        stages=stages,
    )
    assert matrix.diagonals == len(rotations)
    ct = each.secret_key.encrypt(x)
    result = each.evaluator.transform(ct, matrix)
    want = expected(diagonals, x, inner)
    assert result.level == level - 1
    assert result.scale == ct.scale
    assert each.error(result, want) < BOUND[storage] * max(1, np.abs(want).max())


def test_several_matrices_on_several_inputs(party: Party):
    random, slots = party.random, party.parameters.slots
    sets = [{0: random.normal(size=slots), 33: random.normal(size=slots)}, {1: random.normal(size=64)}]
    matrices = [LinearTransformation(party.parameters, d, level=2, giant_step=GIANT) for d in sets]
    inputs = [party.values() for _ in range(3)]
    results = party.evaluator.transform_many([party.secret_key.encrypt(x) for x in inputs], matrices)
    for diagonals, row in zip(sets, results, strict=True):
        for x, result in zip(inputs, row, strict=True):
            assert party.error(result, expected(diagonals, x)) < 2**-11


def test_matrices_two_at_once():
    """Two real matrices ride as one complex one, and one as half as many diagonals."""
    parameters = Parameters.preset(12)
    size, inner = 256, parameters.slots // 256
    random = np.random.default_rng(3)
    first, second, third = (random.normal(size=(size, size)) / 16 for _ in range(3))
    both = LinearTransformation.from_matrix(parameters, paired(first, second), level=1, inner=inner)
    half = LinearTransformation.from_matrix(parameters, folded(third), level=1, inner=inner)
    assert (both.diagonals, half.diagonals) == (size, size // 2)
    party = Party.make(parameters, tuple(both.rotations | half.rotations | {size // 2 * inner}))
    x = random.uniform(-1, 1, (size, inner))
    ct, ev = party.secret_key.encrypt(x.ravel()), party.evaluator
    (combined,), (single,) = ev.transform_many([ct], [both, half])
    upper, lower = ev.split(single)
    results = [*ev.split(combined), ev.add(upper, ev.rotate(lower, size // 2 * inner))]
    for matrix, result in zip((first, second, third), results, strict=True):
        assert party.error(result, (matrix @ x).ravel()) < 2**-9  # scale 2^28


def test_memory_by_storage(party: Party):
    slots, degree = party.parameters.slots, party.parameters.degree
    diagonals = {k: party.random.normal(size=slots) for k in range(4)}

    def size(values, storage, inner=1):
        return LinearTransformation(
            party.parameters, values, level=2, giant_step=4, storage=storage, inner=inner
        ).nbytes

    assert size(diagonals, "int16") == 4 * 2 * degree
    assert size(diagonals, "int32") == 4 * 4 * degree
    assert size(diagonals, "residues") == 4 * 3 * 8 * degree
    periodic = {k: v[: slots // 8] for k, v in diagonals.items()}
    assert size(periodic, "int16") == 4 * 2 * degree // 8
    assert size({0: np.zeros(slots)}, "int32") == 0


def test_mistakes(party: Party):
    p, ev, ones = party.parameters, party.evaluator, np.ones(8)
    with pytest.raises(LevelError):
        LinearTransformation(p, {0: ones}, level=0, giant_step=8)
    with pytest.raises(InvalidArgumentError, match="giant step"):
        LinearTransformation(p, {0: ones}, level=1, giant_step=7)
    with pytest.raises(InvalidArgumentError, match="twice"):
        LinearTransformation(p, [(1, ones), (1 - p.slots, ones)], level=1, giant_step=8)
    with pytest.raises(InvalidArgumentError, match="divide"):
        LinearTransformation(p, {0: np.ones(7)}, level=1, giant_step=8)
    with pytest.raises(InvalidArgumentError, match="finite"):
        LinearTransformation(p, {0: np.full(8, np.inf)}, level=1, giant_step=8)
    with pytest.raises(ScaleError):
        LinearTransformation(p, {0: np.full(8, 1e30)}, level=1, giant_step=8)
    matrix = LinearTransformation(p, {7: ones}, level=3, giant_step=8)
    with pytest.raises(KeyMaterialError, match="rotation by 7"):
        ev.transform(party.secret_key.encrypt(party.values()), matrix)
    with pytest.raises(LevelError, match="level 3"):
        ev.transform(party.secret_key.encrypt(party.values(), 2), matrix)
