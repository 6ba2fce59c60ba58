"""The texts that come with the package: sentences to evaluate on, and others to calibrate on."""

from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch


def evaluation_sentences() -> list[str]:
    """Return the sentences on which agreement is measured."""
    return _lines(files(__package__).joinpath("sentences.txt").read_text(encoding="utf-8"))


def calibration_sentences() -> list[str]:
    """Return the sentences from which value ranges are taken. None of them is an evaluation sentence."""
    return _lines(files(__package__).joinpath("calibration.txt").read_text(encoding="utf-8"))


def read_sentences(path: str | Path) -> list[str]:
    """Return the lines of a text file that are not blank; ``ValueError`` if there is none."""
    try:
        sentences = _lines(Path(path).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8") from error
    if not sentences:
        raise ValueError(f"{path} has no text")
    return sentences


def encode(tokenizer: Any, texts: Iterable[str], *, max_tokens: int | None = None) -> list[torch.Tensor]:
    """Return one row of token ids (1, tokens) a text, cut to ``max_tokens``."""
    rows = [torch.tensor([tokenizer(text)["input_ids"][:max_tokens]]) for text in texts]
    if not rows or any(row.shape[1] == 0 for row in rows):
        raise ValueError("a text without a single token")
    return rows


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]
