"""Softmax by normalise-and-square agrees with softmax, on clear numbers and with the noise of ciphertexts."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cipherlm.nn.clear import ClearTensor, Noise, visible
from cipherlm.nn.softmax import HIDDEN, LEAST_KEYS, FittedSoftmax, Softmax, SquaringSoftmax

KEYS, LOW, HIGH, LEAST_MEAN = 16, -22.0, 17.0, -9.0
SOFTMAX = SquaringSoftmax.fit((LOW, HIGH), 0.0, KEYS)
BELOW = SquaringSoftmax.fit((LOW, HIGH), LEAST_MEAN, KEYS)


def scores_about(random, means, low, high, queries=KEYS, keys=KEYS, heads=3):
    """Scores as far apart as calibration allows, each row with its mean of what it sees."""
    seen = visible((heads, queries, keys))
    sizes = random.choice([0.3, 3, 30], size=(heads, queries, 1))
    scores = np.where(seen, random.normal(size=(heads, queries, keys)) * sizes, 0)
    scores = np.where(seen, scores - scores.sum(-1, keepdims=True) / seen.sum(-1, keepdims=True), 0)
    means = np.broadcast_to(means, (heads, queries, 1))
    beyond = np.maximum(
        scores.max(-1, keepdims=True) / (high - means), scores.min(-1, keepdims=True) / (low - means)
    )
    return np.where(seen, scores / np.maximum(beyond, 1) + means, 0)


def attended(softmax, scores, value, noise=None):
    return softmax(ClearTensor(scores, noise), ClearTensor(value, noise)).values


def largest_error(softmax, scores, value, noise=None):
    return np.abs(attended(softmax, scores, value, noise) - attended(Softmax(), scores, value)).max()


@settings(max_examples=50, deadline=None)
@given(queries=st.integers(1, KEYS), more=st.integers(0, 8), seed=st.integers(0, 2**32 - 1))
def test_centred_scores(queries, more, seed):
    random, keys = np.random.default_rng(seed), min(KEYS, queries + more)
    scores = scores_about(random, 0.0, LOW, HIGH, queries, keys)
    value = random.normal(size=(3, keys, 4))
    assert largest_error(SOFTMAX, scores, value) < 3e-4
    assert largest_error(SOFTMAX, scores, value, Noise.of(1 << 14, 36, seed)) < 1e-3


@settings(max_examples=50, deadline=None)
@given(
    queries=st.integers(1, KEYS),
    more=st.integers(0, 8),
    least=st.floats(LEAST_MEAN, 0),
    most=st.floats(0, 8),
    seed=st.integers(0, 2**32 - 1),
)
def test_scores_whose_means_are_not_zero(queries, more, least, most, seed):
    """Down to the least mean that was said, and up to anything that the scores' range allows."""
    random, keys = np.random.default_rng(seed), min(KEYS, queries + more)
    means = random.uniform(least, most, (3, queries, 1))
    means[:, -1] = least
    scores = scores_about(random, means, LOW, HIGH, queries, keys)
    value = random.normal(size=(3, keys, 4))
    assert largest_error(BELOW, scores, value) < 3e-4
    assert largest_error(BELOW, scores, value, Noise.of(1 << 14, 36, seed)) < 2e-3


def test_means_below_what_was_said_need_it_said():
    """The least mean is no ornament: without it, rows far below zero come out wrong."""
    random = np.random.default_rng(6)
    scores = scores_about(random, LEAST_MEAN, LOW, HIGH) * 0.2 + 0.8 * LEAST_MEAN
    value = random.normal(size=(3, KEYS, 4))
    assert largest_error(BELOW, scores, value) < 3e-4
    assert largest_error(SOFTMAX, scores, value) > 1e-2


@pytest.mark.parametrize(
    ("scores", "mean", "keys"),
    [
        ((-3, 2), 0, 2),
        ((-5, 4), -2, 64),
        ((-30, 60), 0, 64),
        ((-30, 60), -12, 64),
        ((-20, 12), 0, 256),
        ((-20, 12), -5, 256),
    ],
)
def test_other_sizes(scores, mean, keys):
    random = np.random.default_rng(keys)
    x = scores_about(random, mean, *scores, queries=keys, keys=keys)
    value = random.normal(size=(3, keys, 4))
    assert largest_error(SquaringSoftmax.fit(scores, mean, keys), x, value) < 5e-3


@settings(max_examples=30, deadline=None)
@given(places=st.integers(KEYS, 64), least=st.floats(LEAST_MEAN, 0), seed=st.integers(0, 2**32 - 1))
def test_places_that_are_not_seen_weigh_little(places, least, seed):
    """A row with places for more keys than it sees: the first query here sees KEYS of them."""
    random = np.random.default_rng(seed)
    softmax = SquaringSoftmax.fit((LOW, HIGH), least, KEYS, places)
    weight = places * math.exp(softmax.floor)
    assert weight <= HIDDEN * math.exp(least * 0.5**softmax.squarings) * (1 + 1e-9)
    queries = places - KEYS + 1
    scores = scores_about(random, least, LOW, HIGH, queries, places)
    value = random.normal(size=(3, places, 4))
    got, want = (attended(s, scores, value)[:, 0] for s in (softmax, Softmax()))
    assert np.abs(got - want).max() < 3e-4


def test_beyond_its_range_it_stays_a_mean():
    """Scores a third too far: rows still weigh values by about the softmax, and nothing explodes."""
    random = np.random.default_rng(5)
    value = random.uniform(-1, 1, (3, KEYS, 4))
    assert largest_error(SOFTMAX, 1.33 * scores_about(random, 0.0, LOW, HIGH), value) < 0.05


@settings(max_examples=20, deadline=None)
@given(keys=st.integers(1, 40), seed=st.integers(0, 2**32 - 1))
def test_any_number_of_keys(keys, seed):
    random = np.random.default_rng(seed)
    scores = scores_about(random, -1.0, -6, 5, 1, keys)
    value = random.normal(size=(3, keys, 4))
    softmax = FittedSoftmax((-6, 5), (-1.5, 2), 40)
    assert largest_error(softmax, scores, value) < 3e-4
    [(fitted, places)] = softmax._fitted
    assert fitted == min(40, max(LEAST_KEYS, 1 << (keys - 1).bit_length())) <= places
    attended(softmax, scores, value)
    assert len(softmax._fitted) == 1  # as at first
    with pytest.raises(ValueError, match="41 tokens are more than the 40"):
        attended(softmax, np.zeros((3, 1, 41)), np.zeros((3, 41, 4)))


def test_the_exact_softmax_remembers_scores_and_means():
    softmax = Softmax()
    scores = np.array([[[4.0, 100.0], [-3.0, 1.0]]])  # the first query does not see the second key
    attended(softmax, scores, np.ones((1, 2, 3)))
    assert softmax.ranges == {".scores": (-3.75, 5.0), ".means": (-1.25, 5.0)}
    fitted = softmax.fit({"scores": (-3.75, 5.0), "means": (-1.25, 5.0)}, 12)
    assert (fitted.scores, fitted.means, fitted.most) == ((-3.75, 5.0), (-1.25, 5.0), 12)
    with pytest.raises(ValueError, match="not calibrated"):
        _ = softmax.fresh().ranges
