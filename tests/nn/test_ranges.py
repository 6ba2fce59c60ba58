"""Ranges keep the extremes of what was seen, with a margin of the right kind."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from cipherlm.nn.ranges import MARGIN, Range

values = arrays.arrays(np.float64, st.integers(1, 20), elements=st.floats(-1e6, 1e6))


@given(first=values, second=values)
def test_margin_around_zero(first, second):
    both, seen = np.concatenate([first, second]), Range()
    seen.see(first)
    seen.see(second)
    low, high = seen.interval
    assert (seen.low, seen.high) == (both.min(), both.max())
    assert low == MARGIN * min(both.min(), 0)
    assert high == MARGIN * max(both.max(), 0)
    assert low <= 0 <= high


@given(seen=arrays.arrays(np.float64, st.integers(1, 20), elements=st.floats(1e-9, 1e9)))
def test_margin_of_positive_values_is_a_ratio(seen):
    squares = Range(positive=True)
    squares.see(seen)
    low, high = squares.interval
    assert low == pytest.approx(seen.min() / MARGIN**2)
    assert high == pytest.approx(seen.max() * MARGIN**2)


def test_nothing_seen():
    seen = Range()
    seen.see(np.zeros((3, 0)))
    with pytest.raises(ValueError, match="not calibrated: run the model on text first"):
        _ = seen.interval
    seen.see(np.array([[-2.0, 4.0]]))
    assert seen.interval == (-2.5, 5.0)
