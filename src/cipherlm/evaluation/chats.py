"""The conversations that come with the package: some to calibrate on, and others to evaluate on.

Each is a list of messages as ``apply_chat_template`` takes them. It ends with the user's words: what a model
answers is for the model to say.
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

Message = dict[str, str]
Chat = list[Message]

_ROLES = ("system", "user", "assistant")


def calibration_chats() -> list[Chat]:
    """Return the conversations from which value ranges are taken. None of them is evaluated on."""
    return _shipped("chats_calibration.jsonl")


def evaluation_chats() -> list[Chat]:
    """Return the conversations on which a chat model is measured."""
    return _shipped("chats_evaluation.jsonl")


def read_chats(path: str | Path) -> list[Chat]:
    """Return the conversations of a JSONL file, one ``{"messages": [{"role", "content"}, ...]}`` a line.

    Blank lines are skipped. Raises ``ValueError`` with the line's number for what is not a conversation that
    waits for an answer, and where there is none.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8") from error
    return _parsed(text, str(path))


def _shipped(name: str) -> list[Chat]:
    return _parsed(files("cipherlm.evaluation").joinpath(name).read_text(encoding="utf-8"), name)


def _parsed(text: str, name: str) -> list[Chat]:
    # Not splitlines(), which also ends lines at characters that JSON has in its strings.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{name} has no conversation")
    return [_chat(line, f"{name}, line {number}") for number, line in lines]


def _chat(line: str, place: str) -> Chat:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place} is not JSON: {error}") from error
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ValueError(f'{place} has no "messages"')
    chat = [_message(message, place) for message in messages]
    if chat[-1]["role"] != "user":
        raise ValueError(
            f"{place} does not end with a message of the user, so that nothing waits for an answer"
        )
    return chat


def _message(message: Any, place: str) -> Message:
    if not isinstance(message, dict) or message.get("role") not in _ROLES:
        raise ValueError(f"{place} has a message whose role is none of {', '.join(_ROLES)}")
    content = message.get("content")
    if not isinstance(content, str) or not content.strip():
        raise ValueError(f"{place} has a message without text")
    return {"role": message["role"], "content": content}
