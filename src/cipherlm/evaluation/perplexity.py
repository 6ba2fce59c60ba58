"""Perplexity of a model on a text."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from cipherlm.evaluation.forward import batched_logits


@dataclass(frozen=True)
class Perplexity:
    """``exp`` of the mean loss over the ``tokens`` that were predicted, in windows of ``window`` tokens."""

    value: float
    tokens: int
    window: int


def perplexity(model: Any, ids: torch.Tensor, *, window: int, batch_size: int = 16) -> Perplexity:
    """Measure a model on the token ids (1, tokens) of a text.

    The text is cut into windows that do not overlap, and every token of a window but its first is predicted
    from those before it. Short windows give higher figures: compare figures of the same window only.
    """
    if window < 2:
        raise ValueError(f"a window of {window} tokens predicts nothing; at least 2 are needed")
    windows = [ids[:, start : start + window] for start in range(0, ids.shape[1] - 1, window)]
    if not windows:
        raise ValueError("the text is too short: at least 2 tokens are needed")
    loss, tokens = 0.0, 0
    for index, logits in batched_logits(model, windows, batch_size=batch_size):
        target = windows[index][0, 1:]
        loss += torch.nn.functional.cross_entropy(logits[:-1].double(), target, reduction="sum").item()
        tokens += target.numel()
    return Perplexity(_exp(loss / tokens), tokens, window)


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
