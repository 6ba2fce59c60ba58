"""Conversations: the model's own template, and the key-value cache kept from turn to turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from cipherlm.linear.prefix import PublicPrefix
from cipherlm.models.kept import KeptCache, in_common

Message = dict[str, str]


@dataclass(frozen=True)
class Turn:
    """What the model answered, and what it took.

    ``prompt_tokens`` were read for it, those behind what the cache had, ``new_tokens`` generated in so many
    ``passes`` through the model, that of the prompt among them.
    """

    text: str
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    passes: int
    first_token_seconds: float
    seconds: float


def template_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Return the token ids of a conversation that waits for an answer.

    Raises ``ValueError`` if the model has no template, or one that fails on these messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "this model has no chat template: it continues texts (cipherlm generate) and does not answer"
        )
    try:
        encoded = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)
    except Exception as error:  # templates are programs of the model's makers
        raise ValueError(f"the model's chat template fails: {str(error).splitlines()[0]}") from error
    return [int(i) for i in encoded["input_ids"]]


def public_head(tokenizer: Any, system: str | None = None) -> list[int]:
    """Return the tokens that conversations start with: the system prompt, and the first user's header."""
    start: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    first, second = (template_ids(tokenizer, [*start, {"role": "user", "content": text}]) for text in "ab")
    return first[: in_common(first, second)]


class Chat:
    """A conversation with a model that is made for it.

    ``model`` is any causal model of ``transformers``; with linear layers at a server, the key-value cache is
    the client's own and in the clear. ``prefix`` has the keys and values of :func:`public_head`, which are
    then not computed again. Raises ``ValueError`` if the model has no chat template.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, system: str | None = None, prefix: PublicPrefix | None = None
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        template_ids(tokenizer, [*self.messages, {"role": "user", "content": "a"}])
        self._kept = KeptCache(model, prefix)

    def reply(
        self,
        text: str,
        *,
        max_new_tokens: int = 256,
        on_text: Callable[[str], None] | None = None,
        **options: Any,
    ) -> Turn:
        """Answer ``text``. ``on_text`` hears the answer as it comes; ``options`` are those of ``generate``.

        Raises ``ValueError`` where the conversation grows beyond the model's context, and what the connection
        raises. The conversation is then as it was before.
        """
        ids = template_ids(self.tokenizer, [*self.messages, {"role": "user", "content": text}])
        limit = _context_of(self.model)
        if limit is not None and len(ids) + max_new_tokens > limit:
            raise ValueError(
                f"{len(ids)} tokens and {max_new_tokens} new ones are beyond the model's context of {limit}: "
                "start a new conversation"
            )
        kept = self._kept.shared(ids)
        stream = _Stream(self.tokenizer, on_text)
        generated = self._kept.generate(
            ids, max_new_tokens=max_new_tokens, streamer=stream, **{"do_sample": False, **options}
        )
        answer = self._decoded(generated[len(ids) :])
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        return Turn(
            text=answer,
            prompt_tokens=len(ids) - kept,
            cached_tokens=kept,
            new_tokens=len(generated) - len(ids),
            passes=stream.passes,
            first_token_seconds=stream.first,
            seconds=time.perf_counter() - stream.start,
        )

    def _decoded(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()


def _context_of(model: Any) -> int | None:
    """Return how many tokens a text may have, those of a public prefix among them."""
    for one in (model, getattr(model, "model", None)):
        placement = getattr(one, "placement", None)
        if placement is not None:
            return int(placement.geometry.context)
    limit = getattr(model.config, "max_position_embeddings", None)
    return None if limit is None else int(limit)


class _Stream(BaseStreamer):  # type: ignore[misc, no-untyped-call, unused-ignore]
    """Hands on text as soon as its characters are whole, and keeps the time."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None] | None) -> None:
        self._tokenizer, self._on_text = tokenizer, on_text
        self._ids: list[int] = []
        self._shown = ""
        self._prompt, self.passes = True, 0
        self.start, self.first = time.perf_counter(), 0.0

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt first, then the tokens of a pass."""
        if self._prompt:
            self._prompt = False
            return
        self.passes += 1
        if not self._ids:
            self.first = time.perf_counter() - self.start
        self._ids += value.reshape(-1).tolist()
        text = str(self._tokenizer.decode(self._ids, skip_special_tokens=True)).lstrip()
        # A character of several tokens is a replacement character until its last one is there.
        if self._on_text is not None and not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._on_text(text[len(self._shown) :])
            self._shown = text

    def end(self) -> None:
        """Nothing is held back, so there is nothing left to do."""
