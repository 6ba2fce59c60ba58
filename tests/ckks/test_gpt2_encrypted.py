"""GPT-2's layers on real ciphertexts: attention with the weights of GPT-2 small, and the embedded model."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from cipherlm.evaluation.texts import calibration_sentences, evaluation_sentences
from cipherlm.models.gpt2 import GPT2, Attention, Ends, caches
from cipherlm.models.loading import load_model, load_tokenizer
from cipherlm.schemes.ckks.calibration import ExactSoftmax
from cipherlm.schemes.ckks.simulation import SimulatedTensor
from cipherlm.schemes.ckks.tensor import Linear

from .conftest import Parties

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

    def linear(name):
        return Linear(weights[f"attn.{name}.weight"], weights[f"attn.{name}.bias"])

    positions = load_file(WEIGHTS / "wpe.safetensors")
    table = next(iter(positions.values())).astype(np.float64)
    return linear("c_attn"), linear("c_proj"), weights["ln_1.weight"], weights["ln_1.bias"], table


@pytest.mark.parametrize("index", [0, 6])
def test_attention_of_gpt2_small(gpt2, index):
    """All heads with both projections, within a thousandth of the largest output."""
    c_attn, c_proj, gain, shift, positions = layer(index)
    exact, random = ExactSoftmax(), np.random.default_rng(index)

    def hidden():
        x = 0.13 * random.normal(size=(8, 768)) + positions[:8]
        x -= x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * gain + shift

    clear = Attention(12, c_attn, c_proj, exact)
    for _ in range(8):
        clear(SimulatedTensor(hidden()))
    attention = Attention(12, c_attn, c_proj, exact.fit(8))
    x = hidden()
    want = clear(SimulatedTensor(x)).values
    got = gpt2.decrypt(attention(gpt2.encrypt(x)))
    assert np.abs(got - want).max() < 1e-3 * np.abs(want).max()


def test_the_embedded_model_on_ciphertexts():
    """Every block, seven tokens behind a clear prefix: the clear model's choices."""
    model, tokenizer = load_model("tiny"), load_tokenizer("tiny")
    clear, ends = GPT2.from_transformers(model), Ends.from_transformers(model)
    prefix = clear.keys_values(ends.embed([0]))
    texts = [ends.embed(tokenizer(text)["input_ids"], 1) for text in calibration_sentences()]
    fitted = clear.fitted(clear.calibrated(texts, prefix), 8)
    parties = Parties.make(tokens=8, heads=4, head_dim=32)
    for text in evaluation_sentences()[:2]:
        hidden = ends.embed(tokenizer(text)["input_ids"][:7], 1)
        got = ends.logits(parties.decrypt(fitted(parties.encrypt(hidden, start=1), caches(prefix))))
        want = ends.logits(clear(SimulatedTensor(hidden), caches(prefix)).values)
        assert np.abs(got - want).max() < 0.01
        assert np.array_equal(got.argmax(-1), want.argmax(-1))
