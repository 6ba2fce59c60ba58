"""Polynomials for softmax, layer normalisation and activations agree with the functions, on clear numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cipherlm.schemes.ckks.approximation import gelu_new
from cipherlm.schemes.ckks.calibration import ExactActivation, ExactFunctions, ExactSoftmax
from cipherlm.schemes.ckks.functions import Activation, LayerNorm, Softmax
from cipherlm.schemes.ckks.simulation import Noise, SimulatedTensor, visible
from cipherlm.schemes.ckks.tensor import Linear

KEYS = 16
SOFTMAX = Softmax.fit((-22, 17), KEYS)


def centred_scores(random, low, high, queries=KEYS, keys=KEYS, heads=3):
    """Scores as far apart as calibration allows, each row centred on what it sees."""
    seen = visible((heads, queries, keys))
    scores = random.normal(size=(heads, queries, keys)) * random.choice(
        [0.3, 3, 30], size=(heads, queries, 1)
    )
    scores = np.where(seen, scores, 0)
    scores = np.where(seen, scores - scores.sum(-1, keepdims=True) / seen.sum(-1, keepdims=True), 0)
    largest = np.maximum(scores.max(-1, keepdims=True) / high, scores.min(-1, keepdims=True) / low)
    return scores / np.maximum(largest, 1)


def attended(softmax, scores, value, noise=None):
    return softmax(SimulatedTensor(scores, noise), SimulatedTensor(value, noise)).values


@settings(max_examples=50, deadline=None)
@given(queries=st.integers(1, KEYS), more=st.integers(0, 8), seed=st.integers(0, 2**32 - 1))
def test_softmax(queries, more, seed):
    random, keys = np.random.default_rng(seed), min(KEYS, queries + more)
    scores = centred_scores(random, -22, 17, queries, keys)
    value = random.normal(size=(3, keys, 4))
    want = attended(ExactSoftmax(), scores, value)
    assert np.abs(attended(SOFTMAX, scores, value) - want).max() < 2e-5
    noise = Noise.of(1 << 14, 36, seed)
    assert np.abs(attended(SOFTMAX, scores, value, noise) - want).max() < 1e-3


@pytest.mark.parametrize(("scores", "keys"), [((-3, 2), 2), ((-5, 4), 64), ((-30, 60), 64), ((-20, 12), 256)])
def test_softmax_of_other_sizes(scores, keys):
    random = np.random.default_rng(keys)
    x, value = centred_scores(random, *scores, queries=keys, keys=keys), random.normal(size=(3, keys, 4))
    error = np.abs(attended(Softmax.fit(scores, keys), x, value) - attended(ExactSoftmax(), x, value))
    assert error.max() < 5e-3


def test_softmax_beyond_its_range_stays_a_mean():
    """Scores a third too far: rows still weigh values by about the softmax, and nothing explodes."""
    random = np.random.default_rng(5)
    scores, value = 1.33 * centred_scores(random, -22, 17), random.uniform(-1, 1, (3, KEYS, 4))
    assert np.abs(attended(SOFTMAX, scores, value) - attended(ExactSoftmax(), scores, value)).max() < 0.05


@pytest.mark.parametrize("squares", [(0.5, 2), (0.01, 1), (0.1, 6), (30, 900)])
def test_layer_norm(squares):
    random = np.random.default_rng(1)
    norm = LayerNorm.fit(squares, 1e-5)
    assert norm.start.degree == 15
    for size in (1.0, 0.5, 1.1):  # in range; below, where results are too small; a little above
        x = random.normal(size=(40, 64))
        x *= np.sqrt(random.uniform(*squares, (40, 1)) / (x**2).mean(-1, keepdims=True))
        x *= np.sqrt(squares[0] / (x**2).mean(-1, keepdims=True)).min() * size if size == 0.5 else size
        want = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
        got = norm(SimulatedTensor(x)).values
        if size == 0.5:
            assert np.all(np.abs(got) <= 1.01 * np.abs(want))
            assert np.all(np.sign(got) == np.sign(x))
        else:
            assert np.abs(got - want).max() < 1e-3
    with pytest.raises(ValueError, match="no inverse square root"):
        LayerNorm.fit((1e-6, 1), 1e-9)


def test_gelu_outside_its_range_goes_on_as_gelu():
    x = np.linspace(-12, 12, 1000)
    assert np.abs(Activation.fit((-8, 8))(SimulatedTensor(x)).values - gelu_new(x)).max() < 1e-3


def test_a_kink_takes_the_higher_degree_and_what_no_degree_serves_is_refused():
    def relu(x):
        return np.maximum(x, 0)

    x = np.linspace(-8, 8, 1000)
    curve = Activation.fit((-8, 8), relu)
    assert (Activation.fit((-8, 8)).curve.degree, curve.curve.degree) == (63, 127)
    assert np.abs(curve(SimulatedTensor(x)).values - relu(x)).max() < 0.02
    with pytest.raises(ValueError, match="no polynomial of degree 127 on inputs from -80 to 80: error"):
        Activation.fit((-80, 80), np.sign)


def test_calibration():
    functions = ExactFunctions(1e-5)
    with pytest.raises(ValueError, match="not calibrated"):
        functions.fit(8)
    gelu = ExactActivation()
    gelu(SimulatedTensor(np.array([-2.0, 4.0])))
    gelu(SimulatedTensor(np.array([-1.0, 3.0])))
    assert gelu.inputs.around_zero == (-2.5, 5.0)
    assert gelu.inputs.above_zero == (-1.28, 6.25)


def test_linear():
    random = np.random.default_rng(2)
    linear = Linear(random.normal(size=(4, 6)), random.normal(size=6))
    x, gain, shift = random.normal(size=(3, 5, 4)), random.normal(size=4), random.normal(size=4)
    plain = SimulatedTensor(x[0]) @ linear
    folded = SimulatedTensor(x[0]) @ linear.after(gain, shift)
    assert np.allclose(folded.values, (x[0] * gain + shift) @ linear.weight + linear.bias)
    centred = (SimulatedTensor(x[0]) @ linear.centred()).values
    assert np.allclose(centred, plain.values - plain.values.mean(-1, keepdims=True))
    with pytest.raises(ValueError, match="fit together"):
        Linear(np.ones((2, 3)), np.ones(2))


def test_noise_is_that_of_the_parameters():
    x = SimulatedTensor(np.zeros(20_000), Noise.of(1 << 14, 36, 0))
    assert (x * x).values.std() == pytest.approx(3.97e-8, rel=0.05)
    assert not (x * 2.0).values.any()
    assert not (x + x - x).values.any()
