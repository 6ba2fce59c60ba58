"""Top-k agreement: how often another model's first guesses hold the clear model's next token."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cipherlm.evaluation.fidelity import RANKS
from cipherlm.evaluation.fidelity import ranks as ranks_of
from cipherlm.evaluation.forward import batched_logits


@dataclass(frozen=True)
class Agreement:
    """The share of ``positions`` where the clear model's next token is among the k first guesses."""

    positions: int
    top: dict[int, float]


def next_tokens(model: Any, sequences: Sequence[torch.Tensor], *, batch_size: int = 16) -> list[torch.Tensor]:
    """Return a model's most likely next token at every position of every sequence (1, tokens)."""
    found: list[torch.Tensor] = [torch.empty(0)] * len(sequences)
    for index, logits in batched_logits(model, sequences, batch_size=batch_size):
        found[index] = logits.argmax(dim=-1)
    return found


def top_k_agreement(
    model: Any,
    sequences: Sequence[torch.Tensor],
    reference: Sequence[torch.Tensor],
    *,
    ranks: Sequence[int] = RANKS,
    batch_size: int = 16,
) -> Agreement:
    """Compare a model's guesses with ``reference``, the clear model's ``next_tokens``."""
    hits, positions = dict.fromkeys(ranks, 0), 0
    for index, logits in batched_logits(model, sequences, batch_size=batch_size):
        ahead = ranks_of(logits, reference[index])
        positions += ahead.numel()
        for rank in ranks:
            hits[rank] += int((ahead < rank).sum())
    if not positions:
        raise ValueError("no sequence to compare on")
    return Agreement(positions, {rank: hits[rank] / positions for rank in ranks})
