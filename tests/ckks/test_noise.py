"""The noise of simulations against that of ciphertexts."""

from __future__ import annotations

import numpy as np
import pytest

from cipherlm.engine import Evaluator, Parameters, Plaintext, SecretKey
from cipherlm.nn import approximation
from cipherlm.nn.clear import ClearTensor, Noise
from cipherlm.nn.module import Linear


@pytest.fixture(scope="module")
def parameters():
    return Parameters.preset(14)


@pytest.fixture(scope="module")
def key(parameters):
    return SecretKey.generate(parameters)


@pytest.mark.parametrize(
    "polynomial",
    [
        approximation.exponential((-6.0, 0.5), 15),
        approximation.inverse((0.1, 1.1), 7),
        approximation.inverse((0.05, 1.05), 15),
        approximation.inverse((0.02, 1.02), 31),
        approximation.minimax(approximation.gelu_new, (-4.0, 4.0), 31),
    ],
)
def test_polynomials(parameters, key, polynomial):
    """Within a factor of three in the mean, and of five at its greatest."""
    low, high = polynomial.interval
    x = np.random.default_rng(1).uniform(low, high, parameters.slots)
    scale = parameters.scale * 2 / (high - low)  # at which the interval takes no level
    encrypted = key.encrypt(Plaintext.encode(parameters, x, parameters.max_level, scale))
    evaluator = Evaluator(parameters, key.evaluation_keys({}))
    got = key.decrypt(evaluator.polynomial(encrypted, polynomial)).real - polynomial(x)
    noise = Noise.of(parameters.degree, float(np.log2(parameters.scale)), 2)
    simulated = ClearTensor(x, noise).polynomial(polynomial).values - polynomial(x)
    for size, factor in ((np.std, 3), (lambda error: np.abs(error).max(), 5)):
        assert 1 / factor < size(got) / size(simulated) < factor


def test_matrices_and_results():
    """Rounded diagonals, rotated inputs and flooding, by their formulas."""
    random = np.random.default_rng(3)
    linear = Linear(random.normal(size=(64, 300)), np.zeros(300))
    x = random.normal(size=(40, 64))
    exact = x @ linear.weight

    def error(**options):
        noise = Noise.of(1 << 14, 36.0, 4, **options)
        return (ClearTensor(x, noise) @ linear).values - exact, noise

    rounded, noise = error()
    assert np.std(rounded) == pytest.approx(8 * noise.rounding, rel=0.1)  # rows of the norm 8, and one more
    kept, _ = error(weights=1e-3)
    assert np.std(kept) == pytest.approx(1e-3 * np.std(exact), rel=0.1)
    _, noise = error(flood=16)
    assert np.std(noise.of_result(exact) - exact) == pytest.approx(5e-5, rel=0.05)
