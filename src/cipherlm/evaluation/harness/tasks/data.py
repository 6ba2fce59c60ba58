"""The documents of the tasks beside this file, read without a network."""

import json
from pathlib import Path
from typing import Any

import datasets


def choice(**_: Any) -> dict[str, Any]:
    """Return the beginnings of sentences, each with four endings of which one fits."""
    return _split("choice.jsonl")


def text(**_: Any) -> dict[str, Any]:
    """Return the texts that perplexity is measured on."""
    return _split("text.jsonl")


def _split(name: str) -> dict[str, Any]:
    lines = Path(__file__).with_name(name).read_text(encoding="utf-8").splitlines()
    return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}
