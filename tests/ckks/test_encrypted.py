"""Encrypted tensors agree with clear ones, and refresh themselves where they must."""

from __future__ import annotations

import numpy as np
import pytest

from cipherlm.engine import Chebyshev
from cipherlm.models.gpt2 import MLP, Attention, Block
from cipherlm.schemes.ckks.calibration import ExactFunctions
from cipherlm.schemes.ckks.refresh import InProcessRefresh
from cipherlm.schemes.ckks.simulation import SimulatedTensor
from cipherlm.schemes.ckks.tensor import Cache, Linear

RANDOM = np.random.default_rng(11)


def linear(inputs, outputs):
    return Linear(RANDOM.normal(size=(inputs, outputs)) / inputs**0.5, RANDOM.normal(size=outputs) / 10)


def largest(a, b):
    return np.abs(a - b).max()


@pytest.fixture
def hidden(small):
    return RANDOM.normal(size=(small.layout.tokens, small.layout.width))


def test_sums_and_products(small, hidden):
    x, y = small.encrypt(hidden), small.encrypt(-hidden[::-1])
    assert largest(small.decrypt(x + y), hidden - hidden[::-1]) < 1e-6
    assert largest(small.decrypt(x - y * 0.25), hidden + hidden[::-1] / 4) < 1e-6
    assert largest(small.decrypt(x * y * -2 + 1.5), 2 * hidden * hidden[::-1] + 1.5) < 1e-5
    square = Chebyshev(np.array([0.0, 1.0]), (0, 30))
    column = x.mean_square(square)
    assert column._mapping(square) == 0
    assert largest(small.decrypt(x * column), hidden * (hidden**2).mean(-1, keepdims=True)) < 1e-4


@pytest.mark.parametrize("features", [1, 40, 100, 150, 200])
def test_linear_layers_of_any_width(small, hidden, features):
    """Up to the width of a period, and in several ciphertexts beyond it; and back."""
    there, back = linear(small.layout.width, features), linear(features, small.layout.width)
    y = small.encrypt(hidden) @ there
    want = hidden @ there.weight + there.bias
    assert len(y.parts) == small.layout.chunks(features)
    assert largest(small.decrypt(y, features), want) < 1e-5
    assert largest(small.decrypt(y @ back), want @ back.weight + back.bias) < 1e-5


@pytest.mark.parametrize("kind", ["masked", "in process"])
def test_refresh_keeps_values_and_brings_scales(small, hidden, kind):
    arithmetic = small.arithmetic
    masked = arithmetic._refresher
    if kind == "in process":
        arithmetic._refresher = InProcessRefresh(small.secret_key)
    try:
        before, trips = arithmetic.refreshes, arithmetic.round_trips
        tensors = [
            small.encrypt(hidden * size, level=1) * factor for size, factor in ((1, 1.0), (5, 0.3), (2, 3.7))
        ]
        square = Chebyshev(np.array([4.5, 0, 4.5]), (-3, 3))
        tensors[0].ready(7, *tensors[1:], before=square)
    finally:
        arithmetic._refresher = masked
    assert (arithmetic.refreshes - before, arithmetic.round_trips - trips) == (2, 1)
    assert [tensor.level for tensor in tensors] == [8] * 3
    for tensor, factor in zip(tensors, (1, 1.5, 7.4), strict=True):
        assert largest(small.decrypt(tensor), hidden * factor) < 1e-5
    assert tensors[2]._mapping(square) == 0
    tensors[0].ready(7)
    assert arithmetic.round_trips - trips == 1
    with pytest.raises(ValueError, match="more than a refresh"):
        tensors[0].ready(8)


@pytest.mark.parametrize("prefix_tokens", [0, 1])
def test_attention(small, prefix_tokens):
    layout = small.layout
    exact = ExactFunctions(1e-5)
    exact_attention = Attention(
        layout.heads,
        linear(layout.width, 3 * layout.width),
        linear(layout.width, layout.width),
        exact.softmax,
    )
    tokens = layout.tokens - prefix_tokens
    prefix = None
    if prefix_tokens:
        prefix = tuple(RANDOM.normal(size=(2, layout.heads, prefix_tokens, layout.head_dim)))
    hidden = RANDOM.normal(size=(tokens, layout.width))
    want = exact_attention(SimulatedTensor(hidden), Cache(prefix)).values
    attention = Attention(
        layout.heads, exact_attention.c_attn, exact_attention.c_proj, exact.softmax.fit(layout.tokens)
    )
    for count in (tokens, 1):  # the same keys, weights and masks serve fewer tokens
        got = attention(small.encrypt(hidden[:count], prefix_tokens), Cache(prefix))
        assert largest(small.decrypt(got), want[:count]) < 1e-4
    with pytest.raises(ValueError, match="right behind a clear prefix"):
        attention(small.encrypt(hidden, prefix_tokens), Cache((np.zeros((3, 2, 10)),) * 2))


def test_block(small):
    """LayerNorm, attention, GELU and both residual sums; twice, so that nothing is left in the prefix."""
    layout, width = small.layout, small.layout.width
    exact = ExactFunctions(1e-5)
    block = Block(
        exact.ln_1,
        Attention(layout.heads, linear(width, 3 * width), linear(width, width).centred(), exact.softmax),
        exact.ln_2,
        MLP(linear(width, 4 * width), linear(4 * width, width).centred(), exact.activation),
    )
    hidden = RANDOM.normal(size=(layout.tokens - 1, width))
    hidden -= hidden.mean(-1, keepdims=True)
    prefix = tuple(RANDOM.normal(size=(2, layout.heads, 1, layout.head_dim)))
    want = block(block(SimulatedTensor(hidden), Cache(prefix)), Cache(prefix)).values
    fitted = block.with_functions(exact.fit(layout.tokens))
    got = fitted(fitted(small.encrypt(hidden, 1), Cache(prefix)), Cache(prefix))
    assert largest(small.decrypt(got), want) < 2e-3


def test_mistakes(small, hidden):
    with pytest.raises(ValueError, match="have room"):
        small.encrypt(hidden, start=1)
    with pytest.raises(ValueError, match="5 heads"):
        small.encrypt(hidden).to_heads(linear(30, 90), 5)
    with pytest.raises(ValueError, match="parts"):
        small.encrypt(hidden) @ linear(200, 4)
