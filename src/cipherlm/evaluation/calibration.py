"""Texts to take value ranges from: conversations that the clear model goes on with, or sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cipherlm.evaluation.chats import Chat
from cipherlm.evaluation.prompts import answered, chat_prompts
from cipherlm.evaluation.texts import encode

ANSWER_TOKENS = 24


def chat_texts(
    clear: Any,
    tokenizer: Any,
    prefix: Sequence[int],
    chats: Sequence[Chat],
    *,
    longest: int,
    answer_tokens: int = ANSWER_TOKENS,
) -> list[torch.Tensor]:
    """Return conversations (1, tokens) with the clear model's answers, as they come behind ``prefix``.

    What a model generates has other ranges than what people ask. ``longest`` is for the prefix, the
    conversation and the answer together; the prefix is part of what is returned.
    """
    texts = []
    for ids in chat_prompts(tokenizer, chats, prefix):
        prompt = ids[:, : longest - len(prefix)]
        room = min(answer_tokens, longest - len(prefix) - prompt.shape[1])
        text = answered(clear, prompt, prefix, room).ids if room > 0 else prompt
        texts.append(torch.cat([text.new_tensor([list(prefix)]), text], dim=1))
    return texts


def sentence_texts(
    tokenizer: Any, prefix: Sequence[int], sentences: Sequence[str], *, longest: int
) -> list[torch.Tensor]:
    """Return sentences (1, tokens) with the prefix before them, cut to ``longest`` tokens."""
    found = encode(tokenizer, sentences, max_tokens=longest - len(prefix))
    return [torch.cat([ids.new_tensor([list(prefix)]), ids], dim=1) for ids in found]
