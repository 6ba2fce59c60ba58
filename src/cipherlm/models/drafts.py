"""Drafts: tokens that a client proposes, several of which one evaluation verifies.

transformers has this as assisted decoding (Leviathan, Kalman and Matias, "Fast inference from transformers
via speculative decoding", 2023): ``generate(prompt_lookup_num_tokens=...)`` proposes what followed the last
tokens earlier in the text (Saxena, "Prompt lookup decoding", 2023), ``generate(assistant_model=...)`` what a
small model in the clear at the client goes on with, or a :class:`~cipherlm.models.eagle.DraftHead`. What a
model generates greedily is the same with drafts and without.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cipherlm.models.eagle import CONFIG_NAME, DRAFT_TOKENS, DraftHead
from cipherlm.models.loading import load_model


def load_draft(directory: str | os.PathLike[str], config: Any) -> Any:
    """Return the draft in a directory, for a model of this configuration: a ``DraftHead``, or a causal model.

    Raises ``FileNotFoundError`` if there is none, and ``ValueError`` if it is damaged or has another
    vocabulary or, a head, another width.
    """
    head = Path(directory, CONFIG_NAME).is_file()
    draft: Any = DraftHead.from_pretrained(directory) if head else load_model(directory)
    for name in ("vocab_size", "hidden_size") if head else ("vocab_size",):
        ours, theirs = getattr(config, name), getattr(draft.config, name)
        if ours != theirs:
            raise ValueError(
                f"the draft {os.fspath(directory)!r} is for another model: its {name} is {theirs}, and the "
                f"model's is {ours}. A draft needs the model's own tokenizer"
            )
    if not head:
        # By default, transformers proposes up to 20 tokens, and fewer where the assistant is not sure.
        draft.generation_config.num_assistant_tokens = DRAFT_TOKENS
        draft.generation_config.assistant_confidence_threshold = 0.0
    return draft


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
