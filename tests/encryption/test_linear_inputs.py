"""Errors and seeds of what clients of linear layers send: fresh encryptions in the real ring, at level 0.

The other tests open ciphertexts of the standard ring coefficient by coefficient. Here the client's own
decryption of encrypted zeros shows the error, in slots: sums of all coefficients' errors.
"""

from __future__ import annotations

import numpy as np
import pytest

from cipherlm.engine import Evaluator, SecretKey
from cipherlm.linear.client import LinearClient
from cipherlm.linear.plan import make_plan
from cipherlm.linear.products import LinearGroup

SIGMA = 3.2
COUNT = 24
SCALE = 2.0**30
# The standard deviation of 24 x 4096 numbers is off by more than 2 % with a probability below 1e-17 (nine
# of its own deviations, which are 1 / sqrt(2 x 24 x 4096)).
TOLERANCE = 0.02


@pytest.fixture(scope="module")
def client() -> LinearClient:
    weights = {"a": np.random.default_rng(0).normal(size=(3000, 48)).astype(np.float32)}
    return LinearClient(make_plan([LinearGroup("a", ("a",), 48, (3000,))], weights))


def coefficient_errors(secret_key: SecretKey, ciphertexts: list) -> np.ndarray:
    """Errors in slots, divided by what a slot makes of coefficients that are alike."""
    slots = np.stack([secret_key.decrypt(ciphertext) for ciphertext in ciphertexts]) * SCALE
    return slots / np.sqrt(2 * secret_key.parameters.degree)


def test_fresh_encryptions_have_the_standard_error(client):
    key = client.secret_key
    errors = coefficient_errors(key, [key.encrypt(np.zeros(1), 0, SCALE) for _ in range(COUNT)])
    assert errors.std() == pytest.approx(SIGMA, rel=TOLERANCE)
    # Independent from one ciphertext to the next: 0.13 is 8.3 deviations of a correlation of 4096 numbers.
    correlations = np.corrcoef(errors) - np.eye(COUNT)
    assert np.abs(correlations).max() < 0.13


def test_equal_inputs_make_unequal_ciphertexts(client):
    x = np.ones((COUNT, 48))
    rows, _ = client.encrypt("a", x)
    sent = [row[0].to_bytes() for row in rows]
    assert len(set(sent)) == COUNT
    # Half of the bits differ between any two, within eight deviations.
    bits = np.unpackbits(np.array([list(data[100:-4]) for data in sent], np.uint8), axis=1)
    differing = np.mean(bits[:-1] != bits[1:], axis=1)
    assert np.abs(differing - 0.5).max() < 8 * 0.5 / np.sqrt(bits.shape[1])


def test_rotation_keys_have_errors(client):
    """The error of a key switch is the rounding's and that of the key: without the latter it is smaller."""
    key, parameters = client.secret_key, client.plan.parameters
    evaluator = Evaluator(parameters, client.evaluation_keys())
    rotations = sorted(client.plan.rotations)[:2]
    products = [
        rotated
        for _ in range(COUNT // 2)
        for rotated in evaluator.rotate_hoisted(key.encrypt(np.zeros(1), 0, SCALE), rotations)
    ]
    degree, part = parameters.degree, parameters.q[0] / parameters.p[0]
    rounding = np.sqrt((1 + 4 * degree / 3) / 12)
    digit = SIGMA * np.sqrt(2 * degree) * part / np.sqrt(12)
    expected = np.sqrt(SIGMA**2 + rounding**2 + digit**2)
    # The secret key is fixed, and the rounding's error goes with its norm: 5 % more.
    assert coefficient_errors(key, products).std() == pytest.approx(expected, rel=0.05)
    assert np.hypot(SIGMA, rounding) < 0.9 * expected
