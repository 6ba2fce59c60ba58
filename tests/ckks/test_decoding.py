"""One token at a time, behind a prompt and its keys and values."""

from __future__ import annotations

import numpy as np
import pytest

from cipherlm.models.gpt2 import MLP, Attention, Block
from cipherlm.schemes.ckks.calibration import ExactFunctions
from cipherlm.schemes.ckks.layout import DecodingShape, Layout
from cipherlm.schemes.ckks.simulation import SimulatedTensor
from cipherlm.schemes.ckks.tensor import Cache, Linear

from .conftest import Parties

RANDOM = np.random.default_rng(5)


def linear(inputs, outputs):
    return Linear(RANDOM.normal(size=(inputs, outputs)) / inputs**0.5, RANDOM.normal(size=outputs) / 10)


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


def random_block(width, heads):
    exact = ExactFunctions(1e-5)
    attention = Attention(heads, linear(width, 3 * width), linear(width, width).centred(), exact.softmax)
    mlp = MLP(linear(width, 4 * width), linear(4 * width, width).centred(), exact.activation)
    return Block(exact.ln_1, attention, exact.ln_2, mlp), exact


@pytest.mark.parametrize("prefix_tokens", [0, 1])
def test_block_after_block_of_tokens(small, prefix_tokens):
    """A prompt, then tokens that fill its group and begin the next ones: as if all had come at once."""
    layout, width = small.layout, small.layout.width
    block, exact = random_block(width, layout.heads)
    prefix = tuple(RANDOM.normal(size=(2, layout.heads, prefix_tokens, layout.head_dim)))
    hidden = RANDOM.normal(size=(8, width))
    hidden -= hidden.mean(-1, keepdims=True)
    want = block(SimulatedTensor(hidden), Cache(prefix)).values
    fitted = block.with_functions(exact.fit(16))
    cache, prompt = Cache(prefix if prefix_tokens else None), 2
    got = [*small.decrypt(fitted(small.encrypt(hidden[:prompt], prefix_tokens), cache))]
    for index in range(prompt, len(hidden)):
        token = small.encrypt_token(hidden[index], prefix_tokens + index)
        got.append(small.decrypt_token(fitted(token, cache)))
    assert np.abs(np.array(got) - want).max() < 2e-3
    with pytest.raises(ValueError, match="token 11 behind"):
        fitted(small.encrypt_token(hidden[0], 11), cache)


@pytest.mark.slow
def test_scores_in_several_ciphertexts():
    """More keys than one ciphertext has places for, with heads that leave it few."""
    parties = Parties.make(tokens=16, heads=16, head_dim=16)
    layout, width = parties.layout, parties.layout.width
    places = layout.decoding.keys_per_part
    exact = ExactFunctions(1e-5)
    clear = Attention(16, linear(width, 3 * width), linear(width, width), exact.softmax)
    hidden = RANDOM.normal(size=(places + 3, width))
    want = clear(SimulatedTensor(hidden)).values
    fitted = Attention(16, clear.c_attn, clear.c_proj, exact.softmax.fit(64))
    cache = Cache()
    got = [*parties.decrypt(fitted(parties.encrypt(hidden[:16]), cache))]
    for index in range(16, len(hidden)):
        got.append(parties.decrypt_token(fitted(parties.encrypt_token(hidden[index], index), cache)))
    assert places == 32
    assert np.abs(np.array(got) - want).max() < 1e-3
