"""GPT-2 with polynomials for functions, on clear numbers, against the model of transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cipherlm.evaluation.texts import calibration_sentences, evaluation_sentences
from cipherlm.models.gpt2 import GPT2, Ends, caches
from cipherlm.models.loading import load_model, load_tokenizer
from cipherlm.schemes.ckks.simulation import Noise, SimulatedTensor

PREFIX = [0]  # <|endoftext|>


class Fixture:
    def __init__(self):
        self.clear = load_model("tiny")
        tokenizer = load_tokenizer("tiny")
        self.texts, calibration = (
            [tokenizer(text)["input_ids"] for text in texts]
            for texts in (evaluation_sentences(), calibration_sentences())
        )
        self.exact, self.ends = GPT2.from_transformers(self.clear), Ends.from_transformers(self.clear)
        self.prefix = self.exact.keys_values(self.ends.embed(PREFIX))
        hidden = [self.ends.embed(ids, len(PREFIX)) for ids in calibration]
        longest = max(map(len, self.texts)) + len(PREFIX)
        self.fitted = self.exact.fitted(self.exact.calibrated(hidden, self.prefix), longest)

    def logits(self, model, ids, noise=None):
        hidden = SimulatedTensor(self.ends.embed(ids, len(PREFIX)), noise)
        return self.ends.logits(model(hidden, caches(self.prefix)).values)

    def clear_logits(self, ids):
        with torch.inference_mode():
            return self.clear(torch.tensor([PREFIX + ids])).logits[0, len(PREFIX) :].double().numpy()


@pytest.fixture(scope="module")
def tiny():
    return Fixture()


def test_the_exact_model_is_the_clear_model(tiny):
    for ids in tiny.texts[:5]:
        assert np.abs(tiny.logits(tiny.exact, ids) - tiny.clear_logits(ids)).max() < 1e-3


def test_the_fitted_model_agrees_with_the_clear_model(tiny):
    """With the noise of ring degree 2^14, on sentences that calibration has not seen."""
    noise = Noise.of(1 << 14, 36, seed=1)
    agree = [
        tiny.logits(tiny.fitted, ids, noise).argmax(-1) == tiny.clear_logits(ids).argmax(-1)
        for ids in tiny.texts
    ]
    assert np.mean(np.concatenate(agree)) >= 0.99


def test_without_a_prefix(tiny):
    hidden = tiny.ends.embed(tiny.texts[0])
    with torch.inference_mode():
        want = tiny.clear(torch.tensor([tiny.texts[0]])).logits[0].double().numpy()
    assert np.abs(tiny.ends.logits(tiny.exact(SimulatedTensor(hidden)).values) - want).max() < 1e-3
