"""Tokens as they come out of ``generate``, with the time each took."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer


@dataclass(frozen=True)
class GeneratedToken:
    """One new token: its text, and the seconds that the model took for it."""

    text: str
    seconds: float


class TokenStream(BaseStreamer):  # type: ignore[misc, no-untyped-call, unused-ignore]
    """A streamer for ``generate`` that keeps every token and hands it on as it comes."""

    def __init__(self, tokenizer: Any, on_token: Callable[[GeneratedToken], None] | None = None) -> None:
        self.tokens: list[GeneratedToken] = []
        self.passes = 0
        """How often the model was called for them: with drafts, a pass may give several."""
        self._tokenizer = tokenizer
        self._on_token = on_token
        self._last: float | None = None

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt first, then the tokens of a pass, which share its time."""
        now, ids = time.perf_counter(), value.reshape(-1).tolist()
        if self._last is not None:
            self.passes += 1
            for one in ids:
                token = GeneratedToken(self._tokenizer.decode([one]), (now - self._last) / len(ids))
                self.tokens.append(token)
                if self._on_token is not None:
                    self._on_token(token)
        self._last = time.perf_counter()

    def end(self) -> None:
        """Nothing is held back, so there is nothing left to do."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; greedily unless ``sample``."""

    sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    seed: int = 0


def generate(
    model: Any,
    ids: torch.Tensor,
    max_new_tokens: int,
    *,
    stream: TokenStream,
    sampling: Sampling | None = None,
    reveal_length: bool = False,
    drafts: Mapping[str, Any] | None = None,
) -> torch.Tensor:
    """Continue the token ids (1, tokens) and return all of them.

    ``reveal_length`` is for a model at a server. ``drafts`` are the options of transformers' ``generate``
    by which tokens are proposed, ``assistant_model`` or ``prompt_lookup_num_tokens``.
    """
    choice: dict[str, Any] = {"do_sample": False}
    if sampling is not None and sampling.sample:
        torch.manual_seed(sampling.seed)
        choice = {"do_sample": True, "temperature": sampling.temperature, "top_k": sampling.top_k}
    if reveal_length:
        choice["reveal_length"] = True
    choice.update(drafts or {})
    generated: torch.Tensor = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        pad_token_id=model.config.eos_token_id,
        streamer=stream,
        **choice,
    )
    return generated
