"""Packings against NumPy: whatever the shape, diagonals and slots make the product."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cipherlm.linear.packing import Packing, choose_packing

SLOTS = 64


def rotated_sums(packing: Packing, matrix: np.ndarray, x: np.ndarray) -> np.ndarray:
    """What the server computes, in the clear."""
    inputs = packing.spread(x)
    outputs = np.zeros((len(x), packing.outputs, packing.slots))
    for source in range(packing.inputs):
        for target in range(packing.outputs):
            for d, diagonal in packing.diagonals_of(matrix, source, target):
                outputs[:, target] += diagonal * np.roll(inputs[:, source], -d, axis=1)
    return outputs


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 300), st.integers(1, 200), st.integers(0, 2**32))
def test_a_packing_multiplies(rows, columns, seed):
    generator = np.random.default_rng(seed)
    matrix, x = generator.normal(size=(rows, columns)), generator.normal(size=(2, columns))
    packing = choose_packing(rows, columns, SLOTS)
    outputs = rotated_sums(packing, matrix, x)
    assert np.allclose(packing.gather(outputs), x @ matrix.T, atol=1e-12 * columns)
    # The bound of the slots' norm holds, and is not far from what there is.
    norms = np.linalg.norm(outputs, axis=2).max(axis=1)
    assert (norms <= packing.norm(matrix) * np.linalg.norm(x, axis=1)).all()


@pytest.mark.parametrize("shape", [(2304, 768), (768, 3072), (3072, 576), (576, 1536), (2048, 8192)])
def test_packings_of_models_are_dense(shape):
    packing = choose_packing(*shape, 4096)
    assert packing.diagonals * 4096 <= 1.5 * shape[0] * shape[1]


def test_the_bound_is_tight_for_the_worst_input():
    matrix = np.random.default_rng(1).normal(size=(40, 30))
    packing = choose_packing(40, 30, SLOTS)
    bound = packing.norm(matrix)
    # Every slot is a linear function of the input: the greatest norm is a singular value.
    slots = rotated_sums(packing, matrix, np.eye(30))
    exact = max(np.linalg.norm(slots[:, target], 2) for target in range(packing.outputs))
    assert exact <= bound <= 1.06 * exact * np.sqrt(packing.inputs)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_empty_matrices_are_refused(shape):
    with pytest.raises(ValueError, match="cannot be packed"):
        choose_packing(*shape, SLOTS)
