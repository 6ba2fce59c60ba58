"""GPT-2's layers on real ciphertexts: attention with the weights of GPT-2 small, and the embedded model."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from cipherlm.evaluation.texts import calibration_sentences, evaluation_sentences
from cipherlm.models.gpt2 import Args, Attention
from cipherlm.models.loading import load_model, load_tokenizer
from cipherlm.nn.blocks import calibrated, evaluate
from cipherlm.nn.clear import ClearTensor
from cipherlm.nn.tensor import Cache
from cipherlm.nn.weights import part

from .conftest import Parties
from .models import Clear, behind

WEIGHTS = Path(os.environ.get("CIPHERLM_GPT2_WEIGHTS", "no such directory"))

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def gpt2() -> Parties:
    return Parties.make(tokens=8, heads=12, head_dim=64)


def layer(index: int):
    path = WEIGHTS / f"h{index}-attention.safetensors"
    if not path.exists():
        pytest.skip("set CIPHERLM_GPT2_WEIGHTS to a directory with the weights of GPT-2's blocks")
    weights = {name: array.astype(np.float64) for name, array in load_file(path).items()}
    args = Args.of({"n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024})
    attention = Attention(args, index)
    attention.load(attention.sanitize(part(weights, "attn")))
    positions = load_file(WEIGHTS / "wpe.safetensors")
    table = next(iter(positions.values())).astype(np.float64)
    return attention, weights["ln_1.weight"], weights["ln_1.bias"], table


@pytest.mark.parametrize("index", [0, 6])
def test_attention_of_gpt2_small(gpt2, index):
    """All heads with both projections, within a thousandth of the largest output."""
    clear, gain, shift, positions = layer(index)
    random = np.random.default_rng(index)

    def hidden():
        x = 0.13 * random.normal(size=(8, 768)) + positions[:8]
        x -= x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * gain + shift

    for _ in range(8):
        clear(ClearTensor(hidden()))
    attention = clear.fitted(clear.ranges, 8)
    x = hidden()
    want = clear(ClearTensor(x)).values
    got = gpt2.decrypt(attention(gpt2.encrypt(x)))
    assert np.abs(got - want).max() < 1e-3 * np.abs(want).max()


def test_the_embedded_model_on_ciphertexts():
    """Every block, seven tokens behind a clear prefix: the clear model's choices."""
    clear, tokenizer = Clear(load_model("tiny")), load_tokenizer("tiny")
    before = clear.prefixes([0])

    def embedded(text, most=None):
        return clear.embed([0, *tokenizer(text)["input_ids"][:most]])[1:]

    ranges = calibrated(clear.exact, map(embedded, calibration_sentences()), before)
    fitted = clear.exact.fitted(ranges, 8)
    parties = Parties.make(tokens=8, heads=4, head_dim=32)
    for text in evaluation_sentences()[:2]:
        hidden = embedded(text, 7)
        caches = [Cache(prefix) for prefix in before]
        got = clear.logits(parties.decrypt(evaluate(fitted, parties.encrypt(hidden, start=1), caches)))
        want = clear.logits(behind(clear.exact, hidden, before, 1))
        assert np.abs(got - want).max() < 0.01
        assert np.array_equal(got.argmax(-1), want.argmax(-1))
