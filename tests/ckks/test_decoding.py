"""One token at a time, behind a prompt and its keys and values."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cipherlm.models.gpt2 import Args, Attention, Block
from cipherlm.nn.clear import ClearTensor
from cipherlm.nn.rotary import Rotary
from cipherlm.nn.softmax import FittedSoftmax, Softmax
from cipherlm.nn.tensor import Cache, Prefix, depth
from cipherlm.schemes.ckks.context import CONTEXT_LEVEL
from cipherlm.schemes.ckks.decoding import MOST_SEPARATED, EncryptedToken
from cipherlm.schemes.ckks.decoding_layout import DecodingShape
from cipherlm.schemes.ckks.layout import LINEAR_LEVEL, Layout

from .conftest import Parties
from .models import behind, filled
from .models import linear as random_linear

RANDOM = np.random.default_rng(5)
ROTARY = [
    Rotary.of(10, 512, {"rope_theta": 1e4}),
    Rotary.of(10, 512, {"rope_theta": 1e4, "rope_type": "yarn", "factor": 8.0}),
]


def linear(inputs, outputs):
    return random_linear(RANDOM, inputs, outputs)


@pytest.mark.parametrize(("inputs", "outputs"), [(8, 8), (8, 32), (32, 8), (16, 64), (64, 64)])
def test_every_weight_is_used_once(inputs, outputs):
    shape = DecodingShape(64, inputs, outputs)
    used = np.zeros((outputs, inputs), int)
    slots = np.arange(shape.longer * shape.copies)
    for d in range(shape.diagonals):
        np.add.at(used, (slots % outputs, np.roll(shape.input, -d)[slots]), 1)
    assert np.all(used == 1)


@pytest.mark.parametrize(("tokens", "heads", "head_dim"), [(4, 3, 10), (8, 12, 64), (16, 4, 32)])
def test_transposition(tokens, heads, head_dim):
    """Heads of a prompt come to where decoding has them, a token in each repetition."""
    layout = Layout(8192, tokens, heads, head_dim)
    values = RANDOM.normal(size=(heads, tokens, head_dim))
    slots, count = layout.pack_heads(values), tokens - 1
    moved = sum(mask * np.roll(slots, -step) for step, mask in layout.decoding.transposition(count))
    order = layout.decoding.head_order
    for token, repetition in enumerate(moved.reshape(tokens, -1)):
        flat = values[:, token].ravel() * (token < count)
        assert np.allclose(repetition[order >= 0], flat[order[order >= 0]])


@pytest.mark.parametrize("features", [1, 30, 100, 200])
def test_linear_layers(small, features):
    there, back = linear(small.layout.width, features), linear(features, small.layout.width)
    hidden = RANDOM.normal(size=small.layout.width)
    y = small.encrypt_token(hidden, 5) @ there
    want = hidden @ there.weight + there.bias
    assert np.abs(small.decrypt_token(y, features) - want).max() < 1e-5
    assert np.abs(small.decrypt_token(y @ back) - (want @ back.weight + back.bias)).max() < 1e-5


@pytest.mark.parametrize(("features", "level"), [(30, 3), (30, 4), (100, 3), (200, 3), (200, 4)])
def test_columns_before_linear_layers(small, features, level):
    """Hidden states times a column that leaves the matrix its level alone: nothing is refreshed."""
    there, hidden = linear(small.layout.width, features), RANDOM.normal(size=small.layout.width)
    column = small.encrypt_column([0.7] * small.layout.padded_heads, 5, level)
    refreshes = small.arithmetic.refreshes
    y = small.encrypt_token(hidden, 5).scaled(column) @ there
    assert small.arithmetic.refreshes == refreshes
    want = 0.7 * hidden @ there.weight + there.bias
    assert np.abs(small.decrypt_token(y, features) - want).max() < 1e-5


@pytest.mark.parametrize("level", [3, 4])
def test_columns_of_heads_before_a_linear_layer(small, level):
    back, factors = linear(30, small.layout.width), RANDOM.uniform(0.5, 1, 3)
    values = RANDOM.normal(size=(3, 10))
    heads, column = small.encrypt_token_heads(values, 5), small.encrypt_column(factors, 5, level)
    other = small.encrypt_column(1 / factors, 5, level - 1)
    for columns, factor in (((column,), factors[:, None]), ((column, other), 1.0)):
        want = (values * factor).ravel() @ back.weight + back.bias
        got = small.decrypt_token(heads.scaled(*columns) @ back)
        assert np.abs(got - want).max() < 2e-5


def test_a_matrix_behind_a_function_has_no_copies(small):
    """At the level of the matrix there is none for a shift: it has all its diagonals instead."""
    there, hidden = linear(small.layout.width, 200), RANDOM.normal(size=small.layout.width)
    refreshes = small.arithmetic.refreshes
    y = small.encrypt_token(hidden, 5, level=LINEAR_LEVEL) @ there
    assert small.arithmetic.refreshes == refreshes
    want = hidden @ there.weight + there.bias
    assert np.abs(small.decrypt_token(y, 200) - want).max() < 1e-5


@pytest.mark.parametrize("prefix_tokens", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_block_after_block_of_tokens(small, prefix_tokens):
    """A prompt, then tokens that fill its group and begin the next ones: as if all had come at once."""
    width = small.layout.width
    block = filled(Block(Args(width, 3, 120, 1, 64, 1e-5, "gelu_new"), 0), RANDOM)
    prefix = Prefix(*RANDOM.normal(size=(2, 3, prefix_tokens, 10))) if prefix_tokens else None
    hidden = RANDOM.normal(size=(8, width))
    want = behind(block, hidden, [prefix], prefix_tokens)
    fitted = block.fitted(block.ranges, 16)
    cache, prompt = Cache(prefix), 2
    got = [*small.decrypt(fitted(small.encrypt(hidden[:prompt], prefix_tokens), cache))]
    for index in range(prompt, len(hidden)):
        token = small.encrypt_token(hidden[index], prefix_tokens + index)
        got.append(small.decrypt_token(fitted(token, cache)))
    assert np.abs(np.array(got) - want).max() < 2e-3
    with pytest.raises(ValueError, match="11 tokens are to stay"):
        fitted(small.encrypt_token(hidden[0], 11), cache)


@settings(max_examples=8, deadline=None)
@given(
    rotary=st.sampled_from(ROTARY),
    position=st.integers(0, 4000),
    token=st.integers(0, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_rotary_of_one_token(turning, rotary, position, token, seed):
    """Of a query, in every repetition; and of keys, not of the values that are their imaginary part."""
    query, key, value = np.random.default_rng(seed).normal(size=(3, 3, 10))

    def turned(values):
        return ClearTensor(values[:, None], position=position).rotary(rotary).values[:, 0]

    got = turning.decrypt_token_heads(turning.encrypt_token_heads(query, position).rotary(rotary)._rotated)
    assert np.abs(got.real - turned(query)).max() < 2e-6
    pair = turning.encrypt_token_heads(key + 1j * value, position, past=True)
    want = np.zeros((4, 3, 10), complex)
    for real, tensor in ((turned(key), pair.rotary(rotary)), (key, pair)):
        want[token] = real + 1j * value
        assert np.abs(turning.decrypt_token_heads(tensor._of_token(token)) - want).max() < 4e-6


def score_slots(layout, scores):
    """Return where scores (heads, keys) are: those of a prefix, then those of own keys."""
    decoding, before = layout.decoding, layout.prefix
    slots = []
    for own in (scores[:, :before], scores[:, before:]):
        parts = -(-own.shape[1] // decoding.keys_per_part)
        padded = np.zeros((layout.padded_heads, parts * decoding.keys_per_part))
        padded[: layout.heads, : own.shape[1]] = own
        for part in np.split(padded, parts, axis=1) if parts else []:
            placed = np.zeros((layout.tokens, decoding.lower, layout.padded_heads, layout.tokens))
            placed[..., 0] = part.reshape(layout.padded_heads, decoding.lower, layout.tokens).T
            slots.append(placed.ravel())
    return slots


@settings(max_examples=6, deadline=None)
@given(
    rotary=st.sampled_from([None, *ROTARY]),
    prefix_tokens=st.sampled_from([0, 4, 5, 16, 17, 600]),
    more=st.integers(1, 6),
    seed=st.integers(0, 2**32 - 1),
)
def test_scores_and_sums_of_one_token(turning, rotary, prefix_tokens, more, seed):
    """Behind a prompt of three tokens and others; 600 of a prefix have their scores in two ciphertexts."""
    random, parties = np.random.default_rng(seed), turning.behind(prefix_tokens)
    layout, tokens = parties.layout, 3 + more
    last = prefix_tokens + tokens - 1
    key, value = random.normal(size=(2, 3, tokens, 10))
    query = random.normal(size=(3, 10))
    prefix = Prefix(*random.normal(size=(2, 3, prefix_tokens, 10))) if prefix_tokens else None

    def turned(tensor):
        return tensor.rotary(rotary) if rotary else tensor

    prompt = [parties.encrypt_heads(x[:, :3], prefix_tokens) for x in (key, value)]
    past = turned(prompt[0]).with_past(prompt[1], None, prefix)
    for index in range(3, tokens):
        pair = (key + 1j * value)[:, index]
        pair = parties.encrypt_token_heads(pair, prefix_tokens + index, past=True)
        pair = turned(pair)
        past = pair.with_past(pair, past, prefix)
    keys, values = past
    scores = turned(parties.encrypt_token_heads(query, last)).scores(keys)

    clear_key, clear_value = turned(ClearTensor(key, position=prefix_tokens)).with_past(
        ClearTensor(value, position=prefix_tokens), None, prefix
    )
    clear = turned(ClearTensor(query[:, None], position=last)).scores(clear_key)
    want = score_slots(layout, clear.values[:, 0])
    assert len(want) == len(scores.parts) == layout.decoding.prefix_parts + 1
    for part, slots in zip(scores.parts, want, strict=True):
        got = parties.secret_key.decrypt(part).real
        shape = (layout.tokens, layout.decoding.lower, layout.padded_heads, layout.tokens)
        assert np.abs(got - slots).reshape(shape)[:, :, :3].max() < 2e-5

    # Scores as they are, for weights.
    weights = scores._with(parties.secret_key.encrypt(slots, 8) for slots in want)
    mixed, total = weights.mix(values)
    clear_mixed, clear_total = clear.mix(clear_value)
    scale = np.abs(clear.values).sum()
    got = parties.decrypt_token_heads(mixed.parts[0]).real
    assert np.abs(got - clear_mixed.values[:, 0]).max() < 2e-6 * scale
    got = parties.decrypt_token_heads(weights.total().parts[0]).real
    assert np.abs(got[:, :, :1] - clear_total.values[:, 0]).max() < 2e-6 * scale
    got = parties.decrypt_token_heads(total.parts[0]).real
    assert np.abs(got - clear_total.values[:, 0]).max() < 2e-6 * scale

    # Squares that have no level left: few of them are masked without a refresh.
    factors = random.uniform(0.2, 0.4, 3)
    squares = weights.squared_with(parties.encrypt_column(factors, last, 4))
    assert squares.level == CONTEXT_LEVEL - 1
    refreshes = parties.arithmetic.refreshes
    mixed, total = squares.mix(values)
    many = layout.decoding.prefix_parts + len(values.apart) > MOST_SEPARATED
    assert (parties.arithmetic.refreshes > refreshes) == many
    clear = clear.having((clear.values * factors[:, None, None]) ** 2)
    clear_mixed, clear_total = clear.mix(clear_value)
    scale = max(1, np.abs(clear.values).sum())
    got = parties.decrypt_token_heads(mixed.parts[0]).real
    assert np.abs(got - clear_mixed.values[:, 0]).max() < 3e-5 * scale
    got = parties.decrypt_token_heads(total.parts[0]).real
    assert np.abs(got - clear_total.values[:, 0]).max() < 3e-5 * scale


@pytest.mark.parametrize("prefix_tokens", [0, 5])
def test_softmax_of_one_token(turning, prefix_tokens):
    """Few keys in many places, and a head whose scores are all low, in a range with some that are high."""
    parties, random = turning.behind(prefix_tokens), np.random.default_rng(prefix_tokens)
    layout, tokens = parties.layout, 3
    last, keys = prefix_tokens + tokens, prefix_tokens + tokens + 1
    key, value = random.normal(size=(2, 3, tokens + 1, 10))
    prefix = Prefix(*random.normal(size=(2, 3, prefix_tokens, 10))) if prefix_tokens else None
    prompt = [parties.encrypt_heads(x[:, :tokens], prefix_tokens) for x in (key, value)]
    pair = parties.encrypt_token_heads((key + 1j * value)[:, tokens], last, past=True)
    _, values = pair.with_past(pair, prompt[0].with_past(prompt[1], None, prefix), prefix)
    scores = np.stack([row + random.normal(size=keys) / 4 for row in (-5.0, 0.0, 5.0)])
    softmax = FittedSoftmax((-10.0, 33.0), (-5.5, 5.5), 64)
    slots = score_slots(layout, scores)
    weighed = pair._with(parties.secret_key.encrypt(part, 1) for part in slots)
    assert weighed.places > weighed.keys == keys
    mixed = softmax(weighed, values)
    got = math.prod(parties.decrypt_token_heads(part).real for part in (*mixed.parts, *mixed.factors))
    clear_key, clear_value = ClearTensor(key, position=prefix_tokens).with_past(
        ClearTensor(value, position=prefix_tokens), None, prefix
    )
    want = Softmax()(clear_key.having(scores[:, None]), clear_value).values[:, 0]
    assert np.abs(got - want).max() < 1e-3


@pytest.mark.parametrize(("low", "high"), [(-30.0, 60.0), (-10.0, 33.0), (-4.0, 9.0)])
def test_refreshes_of_softmax_give_no_level_that_is_not_used(small, monkeypatch, low, high):
    """All but the last, behind which other layers come, are to the lowest level that serves."""
    softmax = FittedSoftmax((low, high), (-2.0, 2.0), 8).of(8, 8)
    weights = score_slots(small.layout, np.zeros((3, 8)))
    scores = EncryptedToken(small.arithmetic, (small.secret_key.encrypt(weights[0], 1),), 7)
    before, to = [], []
    refresh = type(small.arithmetic).refresh

    def watched(arithmetic, real, level, shift):
        before.append({ciphertext.level for ciphertext, _, _ in real})
        to.append(level)
        return refresh(arithmetic, real, level, shift)

    class MixedError(Exception):
        pass

    def mix(weights, value):
        raise MixedError

    monkeypatch.setattr(type(small.arithmetic), "refresh", watched)
    monkeypatch.setattr(EncryptedToken, "mix", mix)
    with pytest.raises(MixedError):
        softmax(scores, None)
    assert before == [{1}] * len(to)
    assert to[-1] == 8
    levels = sum(depth(inverse) + 2 for inverse in softmax.inverses) + depth(softmax.exponential)
    assert 0 <= sum(level - 1 for level in to) - levels < 7


@pytest.mark.parametrize("level", [1, 8])
def test_noise_of_a_total_stays_out_of_weights(small, level):
    """What travels beside weights has no imaginary part that would become real in them."""
    layout = small.layout
    weights = score_slots(layout, RANDOM.uniform(0, 1, (3, 9)))
    tensor = EncryptedToken(small.arithmetic, (small.secret_key.encrypt(weights[0] + 1e-6j, level),), 8)
    total = tensor.ready_total(4)
    want = weights[0].reshape(layout.tokens, layout.decoding.lower, -1).sum((0, 1))
    for got, slots in ((tensor, weights[0]), (total, np.tile(want, len(weights[0]) // len(want)))):
        assert np.abs(small.secret_key.decrypt(got._one()).real - slots).max() < 1e-5


@pytest.mark.slow
def test_scores_in_several_ciphertexts():
    """More keys than one ciphertext has places for, with heads that leave it few."""
    parties = Parties.make(tokens=16, heads=16, head_dim=16)
    layout, width = parties.layout, parties.layout.width
    places = layout.decoding.keys_per_part
    clear = filled(Attention(Args(width, 16, 4 * width, 1, 64, 1e-5, "gelu_new"), 0), RANDOM)
    hidden = RANDOM.normal(size=(places + 3, width))
    want = clear(ClearTensor(hidden)).values
    fitted = clear.fitted(clear.ranges, 64)
    cache = Cache()
    got = [*parties.decrypt(fitted(parties.encrypt(hidden[:16]), cache))]
    for index in range(16, len(hidden)):
        got.append(parties.decrypt_token(fitted(parties.encrypt_token(hidden[index], index), cache)))
    assert places == 32
    assert np.abs(np.array(got) - want).max() < 1e-3
