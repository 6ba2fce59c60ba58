"""Drafts: tokens that a client proposes, several of which one evaluation verifies.

transformers has this as assisted decoding (Leviathan, Kalman and Matias, "Fast inference from transformers
via speculative decoding", 2023): ``generate(prompt_lookup_num_tokens=...)`` proposes what followed the last
tokens earlier in the text (Saxena, "Prompt lookup decoding", 2023), ``generate(assistant_model=...)`` what a
small model in the clear at the client goes on with. What a model generates greedily is the same with drafts
and without.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


def drafts_asked(options: Mapping[str, Any], generation_config: Any) -> bool:
    """Say whether options of transformers' ``generate`` ask for drafts."""
    return bool(_looked_up(options, generation_config)) or options.get("assistant_model") is not None


def refuse_drafts(options: Mapping[str, Any], generation_config: Any) -> None:
    """Raise ``ValueError`` for drafts in a generation whose length is hidden from a server.

    How many of them are right depends on the text, and shows in where the next evaluation starts.
    """
    if drafts_asked(options, generation_config):
        raise ValueError(
            "drafts (prompt_lookup_num_tokens, assistant_model) show a server how many of them are right: "
            "leave them out, or pass reveal_length=True"
        )


@contextmanager
def bounded_drafts(options: Mapping[str, Any], generation_config: Any, most: int) -> Iterator[dict[str, Any]]:
    """Give options of ``generate`` in which a draft has at most so many tokens.

    An assistant's own setting is changed for as long as the context lasts.
    """
    bounded, assistant = dict(options), options.get("assistant_model")
    looked_up = _looked_up(options, generation_config)
    if looked_up:
        bounded["prompt_lookup_num_tokens"] = min(looked_up, most)
    if assistant is None:
        yield bounded
        return
    config = assistant.generation_config
    names = ("num_assistant_tokens", "num_assistant_tokens_schedule")
    before = {name: getattr(config, name) for name in names}
    config.num_assistant_tokens = min(config.num_assistant_tokens or most, most)
    config.num_assistant_tokens_schedule = "constant"
    try:
        yield bounded
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def _looked_up(options: Mapping[str, Any], generation_config: Any) -> int | None:
    config = options.get("generation_config") or generation_config
    given = options.get("prompt_lookup_num_tokens")
    count: int | None = given if given is not None else getattr(config, "prompt_lookup_num_tokens", None)
    return count
