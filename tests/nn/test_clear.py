"""Clear tensors compute what their names say, and have the noise of ciphertexts."""

from __future__ import annotations

import numpy as np
import pytest

from cipherlm.nn.clear import ClearTensor, Noise, visible


def test_noise_is_that_of_the_parameters():
    x = ClearTensor(np.zeros(20_000), Noise.of(1 << 14, 36, 0))
    assert (x * x).values.std() == pytest.approx(3.97e-8, rel=0.05)
    assert not (x * 2.0).values.any()
    assert not (x + x - x).values.any()


def test_the_last_query_sees_all_keys():
    want = [[True] * 3 + [False] * 2, [True] * 4 + [False], [True] * 5]
    assert visible((3, 5)).tolist() == want
    assert np.broadcast_to(visible((2, 3, 5)), (2, 3, 5)).tolist() == [want, want]


def test_a_result_keeps_noise_and_position():
    noise = Noise.of(1 << 14, 36, 0)
    x = ClearTensor(np.ones((2, 3)), noise, 7)
    for result in (x + x, x * x, x * 2.0, x + 1.0, x.having(np.zeros((2, 1))), x.mean_square(None)):
        assert (result.noise, result.position) == (noise, 7)
