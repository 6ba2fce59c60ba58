"""Activations are those of transformers, and their polynomials keep the errors that are stated."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.activations import ACT2FN

from cipherlm.nn.activations import (
    ACTIVATIONS,
    CLOSE,
    COARSEST,
    Activation,
    FittedGate,
    Gate,
    activation,
    fitted_curve,
)
from cipherlm.nn.approximation import gelu_new, largest, largest_error
from cipherlm.nn.clear import ClearTensor, Noise

REACH = 8.0
# Those with a kink: no polynomial is as near to them.
KINKS = {"gelu_10", "hardswish", "leaky_relu", "relu", "relu6"}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_function_is_that_of_transformers(name):
    x = np.linspace(-12, 12, 4801)
    want = ACT2FN[name](torch.from_numpy(x)).numpy()
    assert np.abs(activation(name)(x) - want).max() < 1e-6


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_polynomial_is_near_the_function(name):
    function, interval = activation(name), (-REACH, REACH)
    curve = fitted_curve(interval, function)
    error = largest_error(curve, function, interval) / largest(function, interval)
    assert error <= (CLOSE[curve.degree] or COARSEST)
    if name not in KINKS:
        assert error < max(CLOSE.values())
    # A quarter of the interval further out it still is, and does not grow as fast as its degree allows.
    guarded = (-1.5 * REACH, 1.5 * REACH)
    assert largest_error(curve, function, guarded) < 0.25 * largest(function, guarded)


def test_transformers_has_no_other_that_is_one_fixed_function():
    assert set(ACT2FN) - set(ACTIVATIONS) == {"prelu", "xielu"}
    for name in ("prelu", "no such", None):
        with pytest.raises(
            ValueError, match=f"{name!r} cannot be computed on ciphertexts; these can: gelu, "
        ):
            activation(name)


def test_an_activation_remembers_its_inputs():
    gelu = Activation("gelu_new")
    for low, high in ((-2.0, 4.0), (-1.0, 3.0)):
        x = np.array([[low, high]])
        assert np.array_equal(gelu(ClearTensor(x)).values, gelu_new(x))
    assert gelu.ranges == {".inputs": (-2.5, 5.0)}
    with pytest.raises(ValueError, match="not calibrated"):
        _ = gelu.fresh().ranges


def test_a_fitted_activation_goes_on_outside_its_range():
    """Half as far again: a polynomial of degree 31 would be in the thousands there."""
    x = np.linspace(-12, 12, 1000)
    fitted = Activation("gelu_new").fit({"inputs": (-8, 8)}, 0)
    assert np.abs(fitted(ClearTensor(x)).values - gelu_new(x)).max() < 0.2


def test_a_kink_takes_the_higher_degree_and_what_no_degree_serves_is_refused():
    relu, x = activation("relu"), np.linspace(-8, 8, 1000)
    assert fitted_curve((-8, 8), gelu_new).degree == 63
    assert fitted_curve((-4, 4), gelu_new).degree == 31
    fitted = Activation(relu).fit({"inputs": (-8, 8)}, 0)
    assert fitted.curve.degree == 127
    assert np.abs(fitted(ClearTensor(x)).values - relu(x)).max() < 0.02
    with pytest.raises(ValueError, match="no polynomial of degree 127 on inputs from -80 to 80: error"):
        fitted_curve((-80, 80), np.sign)


@pytest.mark.parametrize(("name", "bound"), [("silu", 2e-4), ("gelu_new", 2e-4), ("relu", 0.03)])
def test_gate(name, bound):
    """SwiGLU and its like: exact, fitted, and fitted with noise, relative to the largest product."""
    random = np.random.default_rng(3)
    x, other = random.uniform(-REACH, REACH, (50, 20)), random.normal(size=(50, 20))
    gate = Gate(name)
    exact = gate(ClearTensor(x), ClearTensor(other)).values
    assert np.array_equal(exact, activation(name)(x) * other)
    fitted = gate.fit({"inputs": gate.seen["inputs"].interval}, 0)
    assert isinstance(fitted, FittedGate)
    for noise in (None, Noise.of(1 << 14, 36, 0)):
        got = fitted(ClearTensor(x, noise), ClearTensor(other, noise)).values
        assert np.abs(got - exact).max() < bound * np.abs(exact).max()
    assert gate.fresh().seen["inputs"].low == np.inf
