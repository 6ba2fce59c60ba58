"""Private texts to compare two models on: prompts, each with what the clear model answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cipherlm.evaluation.chats import Chat
from cipherlm.evaluation.fidelity import Comparison
from cipherlm.models.chat import template_ids


@dataclass(frozen=True)
class Answered:
    """Token ids (1, tokens) behind the public prefix: a prompt, and the clear model's greedy answer."""

    ids: torch.Tensor
    prompt_tokens: int

    @property
    def answer_tokens(self) -> int:
        """How many tokens the answer has; the first of them is predicted at the prompt's last position."""
        return self.ids.shape[1] - self.prompt_tokens


def chat_prompts(tokenizer: Any, chats: Iterable[Chat], head: Sequence[int]) -> list[torch.Tensor]:
    """Return what each conversation has (1, tokens) behind ``head``, which is public.

    Raises ``ValueError`` if the model has no chat template, or if a conversation starts in another way.
    """
    found = []
    for chat in chats:
        ids = template_ids(tokenizer, chat)
        if ids[: len(head)] != list(head):
            raise ValueError(
                f"the conversation {chat[0]['content'][:40]!r} does not start with the public prefix; "
                "has it a system prompt of its own?"
            )
        found.append(torch.tensor([ids[len(head) :]]))
    return found


def answered(model: Any, prompt: torch.Tensor, head: Sequence[int], max_new_tokens: int) -> Answered:
    """Return a prompt (1, tokens) with the greedy answer of ``model``, which computes in the clear.

    The answer ends as the model's generation does, or with ``max_new_tokens``.
    """
    ids = torch.cat([prompt.new_tensor([list(head)]), prompt], dim=1)
    generated = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=0,  # one text alone is never padded
    )
    return Answered(generated[:, len(head) :], prompt.shape[1])


def compared(model: Any, called: Any, texts: Iterable[Answered]) -> Iterator[Comparison]:
    """Yield, for each text, how an encrypted model compares to itself in the clear.

    ``called`` is the model as it is called with texts behind the prefix. Each position's next token is in
    the text, so that there is one comparison for each token of a text but the first. Texts go one by one: no
    padding, which would be evaluated too.
    """
    for text in texts:
        given, following = text.ids[:, :-1], text.ids[0, 1:]
        with torch.inference_mode():
            with model.in_clear():
                clear = called(input_ids=given, use_cache=False).logits[0]
            yield Comparison.of(clear, called(input_ids=given, use_cache=False).logits[0], following)
