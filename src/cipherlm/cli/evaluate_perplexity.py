"""Perplexity on a text of the user's, as far as both ways to evaluate share it."""

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cipherlm.cli import UsageError

if TYPE_CHECKING:
    import torch

PERPLEXITY_TOKENS = 4096


def check_options(options: argparse.Namespace) -> None:
    """Refuse what means nothing without a text."""
    for name in ("window", "perplexity_tokens"):
        if getattr(options, name) is not None and options.perplexity is None:
            raise UsageError(f"--{name.replace('_', '-')} belongs to --perplexity")


def text_ids(options: argparse.Namespace, tokenizer: Any) -> "torch.Tensor":
    """Return the token ids (1, tokens) of the text that ``--perplexity`` names."""
    from cipherlm.evaluation.texts import encode

    text = Path(options.perplexity).read_text(encoding="utf-8")
    return encode(tokenizer, [text], max_tokens=options.perplexity_tokens or PERPLEXITY_TOKENS)[0]


def in_words(value: float | None) -> str:
    """Return a perplexity as ``finite`` left it."""
    return "overflow" if value is None else f"{value:.2f}"


def finite(value: float) -> float | None:
    """Return a number that JSON can hold."""
    return value if math.isfinite(value) else None
