"""GPT-2 with polynomials for functions, on clear numbers, against the model of transformers."""

from __future__ import annotations

import numpy as np
import pytest

from cipherlm.evaluation.texts import calibration_sentences, evaluation_sentences
from cipherlm.models.loading import load_model, load_tokenizer
from cipherlm.nn.blocks import calibrated
from cipherlm.nn.clear import ClearTensor, Noise

from .models import Clear, behind

PREFIX = [0]  # <|endoftext|>


class Fixture:
    def __init__(self):
        self.clear = Clear(load_model("tiny"))
        tokenizer = load_tokenizer("tiny")
        self.texts, calibration = (
            [tokenizer(text)["input_ids"] for text in texts]
            for texts in (evaluation_sentences(), calibration_sentences())
        )
        self.exact = self.clear.exact
        self.prefix = self.clear.prefixes(PREFIX)
        longest = max(map(len, self.texts)) + len(PREFIX)
        ranges = calibrated(self.exact, map(self.embed, calibration), self.prefix)
        self.fitted = self.exact.fitted(ranges, longest)

    def embed(self, ids):
        return self.clear.embed(PREFIX + ids)[len(PREFIX) :]

    def logits(self, model, ids, noise=None):
        return self.clear.logits(behind(model, self.embed(ids), self.prefix, len(PREFIX), noise))

    def clear_logits(self, ids):
        return self.clear.clear_logits(PREFIX + ids)[len(PREFIX) :]


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
    ids = tiny.texts[0]
    got = tiny.clear.logits(tiny.exact(ClearTensor(tiny.clear.embed(ids))).values)
    assert np.abs(got - tiny.clear.clear_logits(ids)).max() < 1e-3
