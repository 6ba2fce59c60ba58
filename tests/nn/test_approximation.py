"""Polynomials keep the errors that are stated for their intervals, and stay tame outside."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cipherlm.nn.approximation import (
    exponential,
    gelu_new,
    inverse,
    inverse_error,
    inverse_square_root,
    largest_error,
    minimax,
)


@pytest.mark.parametrize(
    ("interval", "degree", "bound"), [((-6.6, 3), 15, 6e-8), ((-4.5, 4.5), 15, 1e-7), ((-6.6, 3), 11, 1e-4)]
)
def test_exponential(interval, degree, bound):
    assert largest_error(exponential(interval, degree), np.exp, interval) < bound


@pytest.mark.parametrize(("reach", "degree", "bound"), [(6, 31, 2e-4), (8, 63, 4e-7), (10, 63, 1e-5)])
def test_gelu_new(reach, degree, bound):
    interval = (-reach, reach)
    curve = minimax(gelu_new, interval, degree, guard=0.25)
    assert largest_error(curve, gelu_new, interval) < bound
    # Half as far again it is GELU still, not a polynomial of its degree.
    assert largest_error(curve, gelu_new, (-1.5 * reach, 1.5 * reach)) < 0.01
    assert abs(minimax(gelu_new, interval, degree)(1.5 * reach)) > 1e5


@pytest.mark.parametrize(
    ("low", "degree", "bound"), [(1 / 16, 15, 1e-4), (1 / 64, 15, 8e-3), (1 / 64, 31, 1e-4)]
)
def test_inverse_square_root(low, degree, bound):
    root = inverse_square_root((low, 1), degree)
    assert largest_error(root, lambda x: x**-0.5, (low, 1), relative=True) < bound


@settings(max_examples=40, deadline=None)
@given(low=st.floats(0.01, 0.9), length=st.floats(0.1, 10), degree=st.sampled_from([3, 7, 15, 31]))
def test_inverse(low, length, degree):
    interval = (low, low + length)
    polynomial, error = inverse(interval, degree), inverse_error(interval, degree)
    assume(error > 1e-7)
    measured = largest_error(polynomial, lambda x: 1 / x, interval, relative=True)
    assert measured == pytest.approx(error, rel=1e-3)
    # Below the interval, quotients are too small and never change their sign.
    x = np.linspace(0, low, 100)
    assert np.all(x * polynomial(x) > -1e-9)
    assert np.all(x * polynomial(x) < 1 + error + 1e-9)


def test_minimax_is_level():
    """A best approximation of degree n reaches its largest error, with alternating signs, n + 2 times."""
    polynomial = minimax(np.exp, (-1, 1), 5)
    x = np.linspace(-1, 1, 4001)
    error = polynomial(x) - np.exp(x)
    peaks = [
        part[np.abs(part).argmax()] for part in np.split(error, np.flatnonzero(np.diff(np.sign(error))) + 1)
    ]
    assert len(peaks) == 7
    assert np.ptp(np.abs(peaks)) < 0.05 * np.abs(peaks).max()


def test_mistakes():
    for interval in ((1, 1), (2, 1), (0, np.inf), (np.nan, 1)):
        with pytest.raises(ValueError, match="empty"):
            minimax(gelu_new, interval, 7)
    for make in (inverse, inverse_square_root):
        with pytest.raises(ValueError, match="positive"):
            make((0, 1), 7)
    with pytest.raises(ValueError, match="finite"), np.errstate(invalid="ignore"):
        minimax(np.sqrt, (-1, 1), 7)
