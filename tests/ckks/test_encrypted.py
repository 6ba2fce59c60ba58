"""Encrypted tensors agree with clear ones, and refresh themselves where they must."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cipherlm.engine import Chebyshev
from cipherlm.models.gpt2 import Args, Attention, Block
from cipherlm.nn.activations import Activation, Curve, EvenCurve, Gate
from cipherlm.nn.clear import ClearTensor, Noise
from cipherlm.nn.rotary import Rotary
from cipherlm.nn.tensor import Cache, Prefix
from cipherlm.schemes.ckks.encrypted import EncryptedTensor

from .models import behind, filled
from .models import linear as random_linear
from .parties import InProcessRefresh

RANDOM = np.random.default_rng(11)
ARGS = Args(30, 3, 120, 1, 64, 1e-5, "gelu_new")
ROTARY = [
    Rotary.of(10, 512, {"rope_theta": 1e4}),
    Rotary.of(10, 512, {"rope_theta": 1e4, "rope_type": "yarn", "factor": 8.0}),
]


def linear(inputs, outputs):
    return random_linear(RANDOM, inputs, outputs)


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


def test_only_what_lacks_levels_is_refreshed(small, hidden):
    arithmetic = small.arithmetic

    def refreshed(levels, needed, then=None):
        tensors = [small.encrypt(hidden, level=level) for level in levels]
        before, parts = arithmetic.refreshes, [tensor.parts for tensor in tensors]
        tensors[0].ready(needed, *tensors[1:], then=then)
        kept = [tensor.parts is old for tensor, old in zip(tensors, parts, strict=True)]
        for tensor in tensors:
            assert largest(small.decrypt(tensor), hidden) < 1e-5
        return [tensor.level for tensor in tensors], kept, arithmetic.refreshes - before

    assert refreshed([8, 8, 1], 2) == ([8, 8, 8], [True, True, False], 1)
    assert refreshed([1, 5, 2], 2) == ([8, 5, 8], [False, True, False], 1)
    assert refreshed([1, 5], 2, then=1) == ([4, 5], [False, True], 1)
    assert refreshed([1, 3], 2, then=1) == ([4, 3], [False, True], 1)
    assert refreshed([3, 4], 2, then=0) == ([3, 4], [True, True], 0)


@pytest.mark.parametrize(("ratio", "levels"), [(1.6, 6), (2.0, 5), (1024.0, 5)])
def test_a_scale_that_a_refresh_misses_has_a_level_more(small, hidden, ratio, levels):
    """Scales change by integers: by 2 where 1.6 is wanted, after which an interval is no longer free."""
    cubic = Chebyshev(np.array([0.0, 0.5] + [0.0] * 29 + [0.25]), (-1, 1))
    parameters, evaluator = small.arithmetic.parameters, small.arithmetic._evaluator
    (part,) = small.encrypt(hidden / 8, level=2).parts
    scale = parameters.scale * 2**16 / ratio
    part = evaluator.set_scale(evaluator.multiply(part, round(scale / parameters.scale)), scale)
    tensor = EncryptedTensor(small.arithmetic, (part,), len(hidden))
    tensor.ready(5, before=cubic, then=0)
    assert tensor.level == 1 + levels
    result = tensor.polynomial(cubic)
    assert result.level == 1
    assert largest(small.decrypt(result), cubic(hidden / 8)) < 1e-3


@pytest.mark.parametrize(
    ("name", "reach", "kind", "degree"),
    [
        ("silu", 5.0, EvenCurve, 15),
        ("silu", 10.0, EvenCurve, 31),
        ("relu", 5.0, EvenCurve, 63),
        ("tanh", 5.0, Curve, 63),
        ("gelu_10", 16.0, Curve, 127),
    ],
)
def test_activations_and_gates_of_any_degree(small, hidden, name, reach, kind, degree):
    """The highest degree takes all levels of a refresh: the product with the other layer needs another."""
    hidden = reach * np.tanh(hidden)
    gate, other = Gate(name), hidden[::-1].copy()
    want = gate(ClearTensor(hidden), ClearTensor(other)).values
    ranges = {"inputs": (-reach, reach)}
    fitted, alone = gate.fit(ranges, 0), Activation(name).fit(ranges, 0)
    assert (type(fitted.curve), fitted.curve.polynomial.degree) == (kind, degree)
    exact = fitted(ClearTensor(hidden), ClearTensor(other)).values
    assert largest(exact, want) < (0.05 * reach if name in ("relu", "gelu_10") else 1e-3)
    for level in (1, 4, 8):
        x = small.encrypt(hidden, level=level)
        got = fitted(x, small.encrypt(other, level=level))
        assert largest(small.decrypt(got), exact) < 2e-5 * reach**2
        got = alone(small.encrypt(hidden, level=level))
        assert largest(small.decrypt(got), alone(ClearTensor(hidden)).values) < 2e-5 * reach


@pytest.mark.parametrize(("name", "inputs"), [("silu", (-21.0, 20.0)), ("gelu_new", (-9.0, 8.0))])
def test_the_noise_of_a_square_is_the_simulated_one(small, name, inputs):
    """What the polynomial of an even part makes of the square's error: the wider the interval, the more.

    The refresh before it, of slots that repeat, is not simulated, and adds as much as two or three roundings.
    """
    fitted = Activation(name).fit({"inputs": inputs}, 0)
    assert isinstance(fitted.curve, EvenCurve)
    x = RANDOM.uniform(*inputs, (small.layout.tokens, small.layout.width))
    parameters = small.arithmetic.parameters
    noise = Noise.of(parameters.degree, float(np.log2(parameters.scale)), 2)
    exact = fitted(ClearTensor(x)).values
    got = small.decrypt(fitted(small.encrypt(x, level=1))) - exact
    assert 0.5 < got.std() / (fitted(ClearTensor(x, noise)).values - exact).std() < 3.5


def random_prefix(tokens, heads=3, head_dim=10):
    return Prefix(*RANDOM.normal(size=(2, heads, tokens, head_dim)))


@pytest.mark.parametrize("prefix_tokens", [0, 1])
def test_attention(small, prefix_tokens):
    layout = small.layout
    exact = filled(Attention(ARGS, 0), RANDOM)
    tokens = layout.tokens - prefix_tokens
    prefix = random_prefix(prefix_tokens) if prefix_tokens else None
    hidden = RANDOM.normal(size=(tokens, layout.width))
    want = behind(exact, hidden, [prefix], 0)
    attention = exact.fitted(exact.ranges, layout.tokens)
    for count in (tokens, 1):  # the same keys, weights and masks serve fewer tokens
        got = attention(small.encrypt(hidden[:count], prefix_tokens), Cache(prefix))
        assert largest(small.decrypt(got), want[:count]) < 1e-4
    with pytest.raises(ValueError, match="right behind a clear prefix"):
        attention(small.encrypt(hidden, prefix_tokens), Cache(random_prefix(2)))


def test_block(small):
    """Normalisation, attention, GELU and both residual sums; twice, so that nothing is left in the prefix."""
    layout, width = small.layout, small.layout.width
    block = filled(Block(ARGS, 0), RANDOM)
    hidden = RANDOM.normal(size=(layout.tokens - 1, width))
    prefix = random_prefix(1)
    want = behind(block, behind(block, hidden, [prefix], 0), [prefix], 0)
    fitted = block.fitted(block.ranges, layout.tokens)
    got = fitted(fitted(small.encrypt(hidden, 1), Cache(prefix)), Cache(prefix))
    assert largest(small.decrypt(got), want) < 2e-3


@settings(max_examples=8, deadline=None)
@given(rotary=st.sampled_from(ROTARY), position=st.integers(0, 4000), seed=st.integers(0, 2**32 - 1))
def test_rotary_of_queries(turning, rotary, position, seed):
    values = np.random.default_rng(seed).normal(size=(3, 4, 10))
    tensor = turning.encrypt_heads(values, position)
    assert tensor.rotated is tensor.parts[0]
    turned = tensor.rotary(rotary).rotated
    got = turning.decrypt_heads(tensor._with([turned]))
    assert largest(got, ClearTensor(values, position=position).rotary(rotary).values) < 2e-6


def score_slots(layout, scores):
    """Return where scores (heads, queries, keys) are: own ones by distance, then those of a prefix."""
    own = np.zeros((len(layout.feature_at), layout.padded_heads, layout.tokens))
    parts = np.zeros((layout.prefix_parts, *own.shape))
    for t in range(layout.tokens):
        for a in range(t + 1):
            own[a :: layout.tokens, : layout.heads, t] = scores[:, t, layout.prefix + t - a]
    places = parts.reshape(-1, *own.shape[1:])
    places[: layout.prefix, : layout.heads] = scores[:, :, : layout.prefix].transpose(2, 0, 1)
    return [layout.repeated(part) for part in (own, *parts)]


@settings(max_examples=6, deadline=None)
@given(
    rotary=st.sampled_from([None, *ROTARY]),
    prefix_tokens=st.sampled_from([0, 4, 5, 16, 17, 40]),
    seed=st.integers(0, 2**32 - 1),
)
def test_scores_and_sums_behind_a_prefix(turning, rotary, prefix_tokens, seed):
    """Of rotated queries and keys; 17 tokens of a prefix have their scores in two ciphertexts."""
    random, parties = np.random.default_rng(seed), turning.behind(prefix_tokens)
    layout = parties.layout
    query, key, value = random.normal(size=(3, 3, 4, 10))
    prefix = random_prefix(prefix_tokens) if prefix_tokens else None

    def attended(make):
        q, k, v = (make(x) for x in (query, key, value))
        if rotary:
            q, k = q.rotary(rotary), k.rotary(rotary)
        k, v = k.with_past(v, None, prefix)
        return q.scores(k), v

    clear, clear_values = attended(lambda x: ClearTensor(x, position=prefix_tokens))
    scores, values = attended(lambda x: parties.encrypt_heads(x, prefix_tokens))
    assert len(scores.parts) == 1 + -(-prefix_tokens // 16)
    want = score_slots(layout, clear.values)
    for part, slots in zip(scores.parts, want, strict=True):
        # The padding of heads has no meaning.
        got = parties.secret_key.decrypt(part).real.reshape(-1, layout.padded_heads, layout.tokens)
        assert largest(got[:, :3], slots.reshape(got.shape)[:, :3]) < 2e-5

    # Scores as they are, for weights.
    weights = scores._with(parties.secret_key.encrypt(slots, 8) for slots in want)
    mixed, total = weights.mix(values)
    clear_mixed, clear_total = clear.mix(clear_values)
    assert largest(parties.decrypt_heads(mixed), clear_mixed.values) < 2e-5
    sums = np.broadcast_to(clear_total.values, clear_mixed.values.shape)
    assert largest(parties.decrypt_heads(total), sums) < 2e-5


def test_mistakes(small, hidden):
    with pytest.raises(ValueError, match="have room"):
        small.encrypt(hidden, start=1)
    with pytest.raises(ValueError, match="5 heads"):
        small.encrypt(hidden).to_heads(linear(30, 90), 5)
    with pytest.raises(ValueError, match="parts"):
        small.encrypt(hidden) @ linear(200, 4)
