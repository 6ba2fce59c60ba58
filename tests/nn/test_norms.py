"""Normalisation by a polynomial and Newton's iteration, over ratios of mean squares up to 640."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cipherlm.nn.clear import ClearTensor, Noise
from cipherlm.nn.norms import FittedNorm, Norm

EPSILON = 1e-5


def with_squares(random, low, high, rows=40, width=64):
    """Hidden states whose mean squares lie between two, from one end to the other."""
    x = random.normal(size=(rows, width))
    wanted = np.geomspace(low, high, rows)[:, None]
    return x * np.sqrt(wanted / (x**2).mean(-1, keepdims=True))


def normalised(x, epsilon=EPSILON):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon)


def relative_error(norm, x, epsilon=EPSILON, noise=None):
    """The largest error of a row, next to its size."""
    got, want = norm(ClearTensor(x, noise)).values, normalised(x, epsilon)
    return (np.abs(got - want).max(-1) / np.abs(want).max(-1)).max()


@pytest.mark.parametrize("squares", [(0.5, 2), (0.1, 6), (30, 900), (0.01, 1)])
def test_in_the_range_and_around_it(squares):
    random = np.random.default_rng(1)
    norm = FittedNorm.fit(squares, EPSILON)
    x = with_squares(random, *squares)
    assert relative_error(norm, x) < 1.1e-4
    # A little above it is as near.
    assert relative_error(norm, 1.1 * x) < 1e-3
    # Below it, results are too small and keep their sign.
    low = with_squares(random, 0.1 * squares[0], squares[0])
    got, want = norm(ClearTensor(low)).values, normalised(low)
    assert np.all(np.abs(got) <= 1.01 * np.abs(want))
    assert np.all(np.sign(got) == np.sign(low))


@settings(max_examples=30, deadline=None)
@given(
    low=st.floats(1e-4, 100),
    ratio=st.floats(1.1, 640),
    epsilon=st.sampled_from([1e-6, 1e-5, 1e-12]),
    seed=st.integers(0, 2**32 - 1),
)
def test_wide_ratios(low, ratio, epsilon, seed):
    random = np.random.default_rng(seed)
    norm = FittedNorm.fit((low, low * ratio), epsilon)
    x = with_squares(random, low, low * ratio)
    assert norm.start.degree <= 63
    assert relative_error(norm, x, epsilon) < 1.1e-4


@pytest.mark.parametrize("ratio", [4, 64, 640])
def test_noise_of_ciphertexts(ratio):
    """Small rows suffer most: their noise is that of the largest."""
    norm = FittedNorm.fit((1.0, ratio), EPSILON)
    x = with_squares(np.random.default_rng(2), 1.0, ratio)
    assert relative_error(norm, x, noise=Noise.of(1 << 14, 36, 0)) < 2e-4


def test_too_wide_a_ratio_is_refused():
    with pytest.raises(ValueError, match="no inverse square root of degree 63"):
        FittedNorm.fit((1e-6, 1), 1e-9)


def test_the_exact_norm_remembers_mean_squares():
    norm = Norm(EPSILON)
    x = with_squares(np.random.default_rng(5), 0.3, 7)
    assert np.allclose(norm(ClearTensor(x)).values, normalised(x), atol=1e-12)
    assert norm.ranges[".squares"] == pytest.approx((0.3 / 1.25**2, 7 * 1.25**2))
    fitted = norm.fit({"squares": norm.ranges[".squares"]}, 0)
    assert relative_error(fitted, x) < 1e-5
    with pytest.raises(ValueError, match="not calibrated"):
        _ = norm.fresh().ranges
    with pytest.raises(TypeError, match="no polynomial yet"):
        norm(x)
