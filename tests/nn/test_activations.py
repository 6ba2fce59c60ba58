"""Activations are those of transformers, and their polynomials keep the errors that are stated."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.activations import ACT2FN

from cipherlm.engine import Chebyshev
from cipherlm.nn.activations import (
    ACTIVATIONS,
    CLOSE,
    COARSEST,
    GUARD,
    Activation,
    EvenCurve,
    FittedGate,
    Gate,
    activation,
    fitted_curve,
)
from cipherlm.nn.approximation import gelu_new, largest, largest_error, minimax
from cipherlm.nn.clear import ClearTensor, Noise
from cipherlm.nn.cost import of_polynomial
from cipherlm.nn.tensor import depth

REACH = 8.0
# Those with a kink: no polynomial is as near to them.
KINKS = {"gelu_10", "hardswish", "leaky_relu", "relu", "relu6"}


def cost(degree):
    return of_polynomial(Chebyshev(np.ones(degree + 1)))


def applied(curve):
    """A curve on clear numbers."""
    return lambda x: curve(ClearTensor(x)).values


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_function_is_that_of_transformers(name):
    x = np.linspace(-12, 12, 4801)
    want = ACT2FN[name](torch.from_numpy(x)).numpy()
    assert np.abs(activation(name)(x) - want).max() < 1e-6


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_polynomial_is_near_the_function(name):
    function, interval = activation(name), (-REACH, REACH)
    curve = applied(fitted := fitted_curve(interval, function))
    error = largest_error(curve, function, interval) / largest(function, interval)
    assert error <= (CLOSE[fitted.before.degree] or COARSEST)
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
    assert fitted_curve((-8, 8), gelu_new).before.degree == 63
    assert fitted_curve((-4, 4), gelu_new).before.degree == 31
    fitted = Activation(relu).fit({"inputs": (-8, 8)}, 0)
    assert fitted.curve.before.degree == 127
    assert np.abs(fitted(ClearTensor(x)).values - relu(x)).max() < 0.02
    with pytest.raises(ValueError, match="no polynomial of degree 127 on inputs from -80 to 80: error"):
        fitted_curve((-80, 80), np.sign)


EVEN = {"gelu", "gelu_fast", "gelu_new", "hardswish", "leaky_relu", "quick_gelu", "relu", "silu"}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_line_and_an_even_function(name):
    """A square takes half of the degree, wherever the rest of the function is a multiple of its input."""
    curve = fitted_curve((-REACH, REACH), activation(name))
    assert isinstance(curve, EvenCurve) == any(activation(name) is activation(even) for even in EVEN)
    if isinstance(curve, EvenCurve):
        assert curve.slope == pytest.approx(0.505 if name == "leaky_relu" else 0.5)
        assert curve.reach == 1.5 * REACH
        assert curve.levels == 1 + depth(curve.polynomial)


def test_a_square_and_half_of_the_degree_are_cheaper():
    assert all(cost(degree // 2) + 1 < cost(degree) for degree in CLOSE)


@pytest.mark.parametrize("name", ["gelu_new", "silu"])
@pytest.mark.parametrize("inputs", [(-10, 10), (-12, 9), (-28.7, 8.7), (-46.6, 15.5), (-1, 20)])
def test_the_cheaper_form_is_about_as_close(name, inputs):
    """An interval has to be symmetric for it: on a one-sided one, one polynomial is much closer."""
    function, curve = activation(name), fitted_curve(inputs, activation(name))
    error = largest_error(applied(curve), function, inputs)
    size = largest(function, inputs)
    one = minimax(function, inputs, curve.before.degree, guard=GUARD)
    assert error <= max(2 * largest_error(one, function, inputs), 2e-5 * size)
    if inputs in ((-10, 10), (-12, 9)):
        assert isinstance(curve, EvenCurve)
    if inputs == (-46.6, 15.5):
        assert not isinstance(curve, EvenCurve)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(["gelu_new", "silu", "quick_gelu"]),
    low=st.floats(-50, 0),
    high=st.floats(0.5, 30),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_interval(name, low, high, seed):
    """Symmetric or one-sided, whichever form is chosen: the error that is stated, with noise too."""
    function = activation(name)
    curve = fitted_curve((low, high), function)
    x = np.random.default_rng(seed).uniform(low, high, 4000)
    bound = (CLOSE[curve.before.degree] or COARSEST) * largest(function, (low, high))
    assert np.abs(applied(curve)(x) - function(x)).max() <= bound * (1 + 1e-6)
    noisy = curve(ClearTensor(x, Noise.of(1 << 14, 36, seed))).values
    assert np.abs(noisy - function(x)).max() <= bound + 1e-4
    # Further out it still is near, and does not grow as fast as its degree allows.
    reach = 0.2 * (high - low)
    beyond = np.linspace(low - reach, high + reach, 1001)
    assert np.abs(applied(curve)(beyond) - function(beyond)).max() < 0.25 * np.abs(function(beyond)).max()


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
