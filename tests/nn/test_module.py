"""Models as trees: parts by name, copies, ranges, polynomials, weights."""

from __future__ import annotations

import numpy as np
import pytest

from cipherlm.nn.activations import Activation, FittedActivation
from cipherlm.nn.blocks import Blocks, attention_layers, calibrated, evaluate, prefixes
from cipherlm.nn.clear import ClearTensor
from cipherlm.nn.module import Linear, Module, Nonlinearity
from cipherlm.nn.norms import FittedNorm, Norm
from cipherlm.nn.softmax import FittedSoftmax, Softmax
from cipherlm.nn.tensor import Cache, Prefix
from cipherlm.nn.weights import after, centred, joined, layer, part

WIDTH, HEADS = 6, 2


class Attention(Module):
    def __init__(self):
        self.qkv, self.softmax = Linear.of(WIDTH, 3 * WIDTH), Softmax()

    def __call__(self, x, cache=None):
        query, key, value = x.to_heads(self.qkv, HEADS)
        if cache is not None:
            key, value = cache.extend(key, value)
        return self.softmax(query.scores(key), value) @ self.out

    out = Linear(np.eye(WIDTH), np.zeros(WIDTH))  # of the class: no part of it


class Block(Module):
    def __init__(self, index):
        self.index = index
        self.norm, self.attention = Norm(1e-5), Attention()
        self.layers = [Linear.of(WIDTH, 9), Activation("silu"), Linear.of(9, WIDTH)]

    def __call__(self, x, cache=None):
        x = x + self.attention(self.norm(x), cache)
        first, act, second = self.layers
        return x + act(x @ first) @ second

    def sanitize(self, weights):
        return joined({name: part(weights, name) for name in ("attention.qkv", "layers.0", "layers.2")})


@pytest.fixture
def model():
    random, blocks = np.random.default_rng(0), Blocks(Block(i) for i in range(2))
    weights = {
        k: random.normal(size=v.shape) / (v.ndim * v.shape[0] ** 0.5) for k, v in blocks.weights.items()
    }
    return blocks.load(weights)


HIDDEN = np.random.default_rng(1).normal(size=(8, WIDTH))
FUNCTIONS = ["norm", "attention.softmax", "layers.1"]
NAMES = ["norm.squares", "attention.softmax.scores", "attention.softmax.means", "layers.1.inputs"]


def test_parts_have_names(model):
    assert [name for name, _ in model.children()] == ["blocks.0", "blocks.1"]
    assert [name for name, _ in model.named(Nonlinearity)] == [
        f"blocks.{i}.{name}" for i in range(2) for name in FUNCTIONS
    ]
    assert [name for name, _ in model.named(Attention)] == ["blocks.0.attention", "blocks.1.attention"]
    assert list(model.named(Blocks)) == [("", model)]
    assert model.range_names == [f"blocks.{i}.{name}" for i in range(2) for name in NAMES]
    assert set(model.weights) == {
        f"blocks.{i}.{name}.{kind}"
        for i in range(2)
        for name in ("attention.qkv", "layers.0", "layers.2")
        for kind in ("weight", "bias")
    }
    assert attention_layers(model) == 2


def test_replaced_is_a_copy_that_shares_the_rest(model):
    other, again = Activation("relu"), Attention()
    copied = model.replaced({"blocks.1.layers.1": other, "blocks.0.attention": again})
    first, second = copied.blocks
    assert second.layers[1] is other
    assert first.attention is again
    assert model.blocks[1].layers[1] is not other
    assert model.blocks[0].attention is not again
    assert second.layers[0] is model.blocks[1].layers[0]
    assert second.attention is model.blocks[1].attention
    assert first.norm is model.blocks[0].norm
    assert (first.index, second.index) == (0, 1)
    assert isinstance(copied, Blocks)
    whole = model.replaced({"blocks.0": model.blocks[1]})
    assert whole.blocks == [model.blocks[1], model.blocks[1]]


def test_ranges(model):
    with pytest.raises(ValueError, match="not calibrated"):
        _ = model.ranges
    model(ClearTensor(HIDDEN))
    seen = model.ranges
    assert list(seen) == model.range_names
    low, high = seen["blocks.0.norm.squares"]
    squares = (HIDDEN**2).mean(-1)
    assert (low, high) == pytest.approx((squares.min() / 1.25**2, squares.max() * 1.25**2))
    fresh = model.recording()
    with pytest.raises(ValueError, match="not calibrated"):
        _ = fresh.ranges
    fresh(ClearTensor(HIDDEN[:1]))
    assert model.ranges == seen != fresh.ranges
    assert all(fresh.weights[name] is weight for name, weight in model.weights.items())


def test_calibration_is_of_what_comes_behind_the_prefix(model):
    before = prefixes(model, 100 * HIDDEN[:2])
    with pytest.raises(ValueError, match="not calibrated"):
        _ = model.ranges  # what a prefix meets is forgotten
    found = calibrated(model, [HIDDEN[2:5], HIDDEN[5:]], before)
    squares = (HIDDEN[2:] ** 2).mean(-1)
    assert found["blocks.0.norm.squares"] == pytest.approx((squares.min() / 1.25**2, squares.max() * 1.25**2))
    with pytest.raises(ValueError, match="not calibrated"):
        _ = model.ranges
    # Without a prefix, too.
    assert list(calibrated(model, [HIDDEN], [])) == model.range_names


def test_a_prefix_is_what_its_tokens_leave(model):
    whole = evaluate(model, ClearTensor(HIDDEN), [Cache(), Cache()]).values
    before = prefixes(model, HIDDEN[:3])
    assert [prefix.tokens for prefix in before] == [3, 3]
    assert before[0].keys.shape == (HEADS, 3, WIDTH // HEADS)
    caches, reports = [Cache(prefix) for prefix in before], []
    first = evaluate(model, ClearTensor(HIDDEN[3:6], position=3), caches, lambda *done: reports.append(done))
    then = evaluate(model, ClearTensor(HIDDEN[6:], position=6), caches)
    assert np.abs(np.concatenate([first.values, then.values]) - whole[3:]).max() < 1e-12
    assert reports == [(1, 2), (2, 2)]


def test_the_centre_of_a_prefix_is_in_no_result():
    """Softmax does not see what is taken off all keys of a query."""
    random = np.random.default_rng(2)
    query, key, value = random.normal(size=(3, HEADS, 4, 3))
    prefix = Prefix(random.normal(size=(HEADS, 5, 3)) + 7, random.normal(size=(HEADS, 5, 3)))
    assert np.abs((prefix.keys - prefix.centre).mean(1)).max() < 1e-12
    keys, values = Cache(prefix).extend(ClearTensor(key), ClearTensor(value))
    plain = [np.concatenate([prefix.keys, key], 1), np.concatenate([prefix.values, value], 1)]
    assert np.allclose(keys.values, plain[0] - prefix.centre)
    got, want = (
        Softmax()(ClearTensor(query).scores(k), v).values
        for k, v in ((keys, values), (ClearTensor(plain[0]), ClearTensor(plain[1])))
    )
    assert np.abs(got - want).max() < 1e-12


def test_fitted(model):
    want = model(ClearTensor(HIDDEN)).values
    fitted = model.fitted(model.ranges, 8)
    for block in fitted.blocks:
        kinds = (block.norm, block.attention.softmax, block.layers[1])
        assert [type(kind) for kind in kinds] == [FittedNorm, FittedSoftmax, FittedActivation]
        assert block.attention.softmax.most == 8
    assert attention_layers(fitted) == 2
    assert np.abs(fitted(ClearTensor(HIDDEN)).values - want).max() < 1e-4
    assert fitted.weights.keys() == model.weights.keys()
    assert np.array_equal(model(ClearTensor(HIDDEN)).values, want)


def test_what_cannot_be_fitted_is_named(model):
    model(ClearTensor(HIDDEN))
    ranges = {**model.ranges, "blocks.1.norm.squares": (1e-9, 1e6)}
    with pytest.raises(ValueError, match=r"blocks\.1\.norm: no inverse square root"):
        model.fitted(ranges, 8)
    del ranges["blocks.0.layers.1.inputs"]
    with pytest.raises(ValueError, match=r"the range blocks\.0\.layers\.1\.inputs is missing"):
        model.fitted(ranges, 8)


def test_functions_without_polynomials_compute_on_clear_numbers_only(model):
    with pytest.raises(TypeError, match="clear numbers only"):
        model.blocks[0].norm(HIDDEN)


def test_load(model):
    weights = {name: weight + 1 for name, weight in model.weights.items()}
    weights["blocks.0.layers.0.weight"] = weights["blocks.0.layers.0.weight"].astype(np.float32)
    del weights["blocks.1.layers.2.bias"]
    assert model.load(weights) is model
    assert all(np.array_equal(model.weights[name], weight) for name, weight in weights.items())
    assert all(weight.dtype == np.float64 for weight in model.weights.values())
    assert not model.weights["blocks.1.layers.2.bias"].any()
    linear = Linear.of(2, 3).load({"weight": np.ones((2, 3))})  # a tree of one layer
    assert linear.weight.all()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("blocks.0.attention.qkv.weight", None, "blocks.0.attention.qkv.weight is missing"),
        (
            "blocks.1.layers.0.weight",
            np.ones((9, 6)),
            r"blocks.1.layers.0 has weights .* \(9, 6\), not \(6, 9\)",
        ),
        ("blocks.1.layers.0.bias", np.ones(8), "blocks.1.layers.0 has"),
        ("blocks.2.layers.0.bias", np.ones(9), "blocks.2.layers.0.bias is no weight of this model"),
        ("blocks.0.norm.weight", np.ones(6), "blocks.0.norm.weight is no weight"),
    ],
)
def test_weights_that_do_not_fit(model, name, value, message):
    weights = {**model.weights, name: value}
    if value is None:
        del weights[name]
    with pytest.raises(ValueError, match=message):
        model.load(weights)


def test_sanitize_goes_through_the_list_of_blocks(model):
    given = {name.removeprefix("blocks."): weight for name, weight in model.weights.items()}
    given["0.norm.weight"] = np.ones(WIDTH)
    cleaned = model.sanitize(given)
    assert cleaned.keys() == model.weights.keys()
    with pytest.raises(NotImplementedError):
        Module().sanitize({})


def test_linear():
    random = np.random.default_rng(2)
    weights = {"weight": random.normal(size=(4, 6)), "bias": random.normal(size=6)}
    x, gain, shift = random.normal(size=(5, 4)), random.normal(size=4), random.normal(size=4)

    def applied(of):
        return (ClearTensor(x) @ Linear.of(4, 6).load(of)).values

    assert np.allclose(applied(weights), x @ weights["weight"] + weights["bias"])
    folded = (x * gain + shift) @ weights["weight"] + weights["bias"]
    assert np.allclose(applied(after(weights, gain, shift)), folded)
    assert np.allclose(applied(after(weights, gain)), (x * gain) @ weights["weight"] + weights["bias"])
    plain = applied(weights)
    assert np.allclose(applied(centred(weights)), plain - plain.mean(-1, keepdims=True))
    assert not layer(weights["weight"])["bias"].any()
    with pytest.raises(ValueError, match="fit together"):
        Linear(np.ones((2, 3)), np.ones(2))
