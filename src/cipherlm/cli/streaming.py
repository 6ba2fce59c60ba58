"""Tokens as they come out of ``generate``, with the time each took."""

import time
from collections.abc import Callable
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
        self._tokenizer = tokenizer
        self._on_token = on_token
        self._last: float | None = None

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt first, then a token a call."""
        now = time.perf_counter()
        if self._last is not None:
            token = GeneratedToken(self._tokenizer.decode(value.tolist()), now - self._last)
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
) -> torch.Tensor:
    """Continue the token ids (1, tokens) and return all of them.

    ``reveal_length`` is for a model at a server.
    """
    choice: dict[str, Any] = {"do_sample": False}
    if sampling is not None and sampling.sample:
        torch.manual_seed(sampling.seed)
        choice = {"do_sample": True, "temperature": sampling.temperature, "top_k": sampling.top_k}
    if reveal_length:
        choice["reveal_length"] = True
    generated: torch.Tensor = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        pad_token_id=model.config.eos_token_id,
        streamer=stream,
        **choice,
    )
    return generated
