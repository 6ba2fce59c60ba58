"""What functions tell of their polynomials is what they compute with, and errors are those of NumPy."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.polynomial import chebyshev

from cipherlm.nn.activations import CLOSE, Activation, Gate, activation
from cipherlm.nn.clear import ClearTensor
from cipherlm.nn.fitted import Choice
from cipherlm.nn.norms import FittedNorm
from cipherlm.nn.softmax import LEAST_KEYS, FittedSoftmax

POINTS = 5001
SEEDS = st.integers(0, 2**32 - 1)


@dataclass(frozen=True, eq=False)
class Levelled(ClearTensor):
    """Clear numbers that know how many products are behind each other, and which polynomials they met."""

    depth: int = 0
    met: list = field(default_factory=list)

    def deeper(self, *others, by=0):
        depth = max([self.depth, *(x.depth for x in others if isinstance(x, Levelled))])
        return replace(self, depth=depth + by)

    def __add__(self, other):
        return super().__add__(other).deeper(other)

    def __mul__(self, other):
        return super().__mul__(other).deeper(other, by=isinstance(other, Levelled))

    def polynomial(self, polynomial):
        self.met.append(polynomial)
        return super().polynomial(polynomial).deeper(by=polynomial.degree.bit_length())

    def mean_square(self, before, gain=1.0):
        return super().mean_square(before, gain).deeper(by=1)

    def mix(self, value):
        mixed, total = super().mix(value)
        return mixed.deeper(value, by=1), total


def check(choice: Choice, result: Levelled) -> None:
    """Compare what is told with what has been computed."""
    assert [stage.degree for stage in choice.stages] == [polynomial.degree for polynomial in result.met]
    assert choice.levels == sum(stage.levels for stage in choice.stages) == result.depth
    told = json.loads(json.dumps(choice.to_dict()))
    assert told["levels"] == choice.levels
    assert [stage["error"] for stage in told["stages"]] == [stage.error for stage in choice.stages]
    for stage, polynomial in zip(choice.stages, result.met, strict=True):
        low, high = polynomial.interval
        assert low <= stage.interval[0] < stage.interval[1] <= high


def grid(stage, polynomial):
    """Points of a stage's interval, and the polynomial there by NumPy alone."""
    x = np.linspace(*stage.interval, POINTS)
    low, high = polynomial.interval
    return x, chebyshev.chebval((2 * x - low - high) / (high - low), polynomial.coefficients)


@settings(max_examples=25, deadline=None)
@given(low=st.floats(1e-3, 100), ratio=st.floats(1.1, 640), seed=SEEDS)
def test_a_norm(low, ratio, seed):
    norm = FittedNorm.fit((low, low * ratio), 1e-5)
    (choice,) = norm.choices()
    (stage,) = choice.stages
    x = Levelled(np.random.default_rng(seed).normal(size=(3, 16)) * low**0.5)
    check(choice, norm(x))
    squares, y = grid(stage, x.met[0])
    assert stage.interval == pytest.approx((norm.gain * (low + 1e-5), norm.gain * (low * ratio + 1e-5)))
    for _ in range(stage.steps):
        y = 1.5 * y - y**3 * squares
    error = np.abs(y * np.sqrt(2 * squares) - 1).max()
    assert error == pytest.approx(stage.error, rel=0.05, abs=1e-12)
    assert stage.error <= stage.tolerance == pytest.approx(1e-4)
    assert stage.relative


@pytest.mark.parametrize("kind", [Activation, Gate])
@pytest.mark.parametrize("name", ["gelu_new", "silu", "relu"])
@pytest.mark.parametrize("inputs", [(-4, 3), (-9, 8), (-21, 19)])
def test_activations(kind, name, inputs):
    fitted = kind(name).fit({"inputs": inputs}, 0)
    (choice,) = fitted.choices()
    (stage,) = choice.stages
    x = Levelled(np.random.default_rng(1).uniform(*inputs, (4, 8)))
    check(choice, fitted(x) if kind is Activation else fitted(x, x))
    points, y = grid(stage, x.met[0])
    degree, size = stage.degree, np.abs(activation(name)(np.linspace(*inputs, POINTS))).max()
    if stage.name == "even part":
        assert stage.interval[0] == -1  # of 2 (x / reach)^2 - 1
        degree, points = 2 * degree + 1, fitted.curve.reach * np.sqrt((points + 1) / 2)
        y += points / 2
        assert stage.tolerance <= (CLOSE[degree] or 0.03) * size
    else:
        assert stage.interval == inputs
        assert stage.tolerance == pytest.approx((CLOSE[degree] or 0.03) * size)
    assert stage.error == pytest.approx(np.abs(y - activation(name)(points)).max(), rel=0.05)
    assert stage.error <= stage.tolerance


@settings(max_examples=25, deadline=None)
@given(
    high=st.floats(2, 30),
    low=st.floats(-30, -2),
    least=st.floats(-8, 0),
    keys=st.integers(1, 64),
    seed=SEEDS,
)
def test_softmax(high, low, least, keys, seed):
    """Every stage by itself: sums of a softmax that was in use, and the division behind them."""
    softmax, random = FittedSoftmax((low, high), (least, 2.0), 64), np.random.default_rng(seed)
    scores = Levelled(random.uniform(-1, 1, (1, 1, keys)))
    result = softmax(scores, Levelled(random.normal(size=(1, keys, 3))))
    (choice,) = softmax.choices()
    check(choice, result)
    assert choice.keys == max(LEAST_KEYS, 1 << (keys - 1).bit_length()) <= choice.places
    assert choice.cost == softmax.of(keys, keys).cost
    names = [stage.name for stage in choice.stages]
    assert names == ["exponential", *["inverse"] * (len(names) - 2), "reciprocal"]
    for stage, polynomial in zip(choice.stages, result.met, strict=True):
        x, y = grid(stage, polynomial)
        # Only the highest degree may be further off than was asked for: the next interval allows for it.
        assert stage.error <= stage.tolerance or (stage.degree == 31 and stage.name != "reciprocal")
        if stage.name == "exponential":
            scale = y @ np.exp(x) / (np.exp(x) @ np.exp(x))  # the factor that goes with it
            assert np.abs(y - scale * np.exp(x)).max() == pytest.approx(stage.error, rel=0.5, abs=1e-12)
            continue
        # x p(x) lies around one number: the factor that goes with the inverse.
        product = x * y
        middle = (product.max() + product.min()) / 2
        error = product.max() / middle - 1
        for _ in range(stage.steps):
            error = error**2
        assert error == pytest.approx(stage.error, rel=0.05, abs=1e-9)
        assert stage.relative


def test_softmax_before_its_first_use():
    """All numbers of keys that there may be; then those that there were."""
    softmax = FittedSoftmax((-6, 5), (-1.5, 2), 40)
    assert [(choice.keys, choice.places) for choice in softmax.choices()] == [
        (8, 8), (16, 16), (32, 32), (40, 40)
    ]  # fmt: skip
    assert softmax._fitted == {}  # looking does not count
    used = softmax.of(12, 64)
    (choice,) = softmax.choices()
    assert (choice.keys, choice.places) == (16, 64)
    assert choice.stages[0].degree == used.exponential.degree
