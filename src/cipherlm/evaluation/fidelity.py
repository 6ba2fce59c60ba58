"""How far a model's next-token distributions are from the clear model's, position by position.

Functions of logits (positions, vocabulary). Where logits are not finite, a model counts as wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy, log_softmax

RANKS = (1, 5, 10)


def ranks(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return how many tokens each position's logits put before the given one: 0 for the first guess."""
    target = logits.gather(-1, tokens[:, None])
    # Not "how many are greater": a NaN, greater than nothing, would then count as a first guess.
    return (~(logits <= target)).sum(dim=-1)


def divergences(clear: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Return each position's Kullback-Leibler divergence of ``logits`` from ``clear``, in nats."""
    log_q, log_p = (log_softmax(values.double(), dim=-1) for values in (logits, clear))
    p = log_p.exp()
    # Tokens that the clear model excludes, with a logit of minus infinity, contribute nothing.
    found = torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(dim=-1)
    # Rounding makes some of them slightly negative.
    return found.clamp_min(0.0).nan_to_num(nan=math.inf)


def losses(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of the given token at each position, in nats."""
    return cross_entropy(logits.double(), tokens, reduction="none").nan_to_num(nan=math.inf)


@dataclass(frozen=True)
class Comparison:
    """Two models on one text: a value a position (positions,).

    ``ranks`` are those of the clear model's next token among the other's guesses, ``divergences`` those of
    the two distributions, ``losses`` and ``clear_losses`` those of the token that the text has next.
    """

    ranks: torch.Tensor
    divergences: torch.Tensor
    losses: torch.Tensor
    clear_losses: torch.Tensor

    @classmethod
    def of(cls, clear: torch.Tensor, logits: torch.Tensor, text: torch.Tensor) -> Comparison:
        """Compare logits (positions, vocabulary); ``text`` (positions,) has each position's next token."""
        return cls(
            ranks(logits, clear.argmax(dim=-1)),
            divergences(clear, logits),
            losses(logits, text),
            losses(clear, text),
        )

    def __getitem__(self, positions: slice) -> Comparison:
        return Comparison(
            self.ranks[positions],
            self.divergences[positions],
            self.losses[positions],
            self.clear_losses[positions],
        )

    @property
    def equal_tokens(self) -> int:
        """How many first guesses are those of the clear model, up to the first that is another.

        On a text that the clear model generated greedily, this is how long the other's greedy text is the
        same: up to there, both have read the same tokens.
        """
        other = (self.ranks != 0).nonzero()
        return int(other[0]) if len(other) else len(self.ranks)


@dataclass(frozen=True)
class Fidelity:
    """What several comparisons come to.

    ``top`` has the share of positions where the clear model's next token is among the k first guesses.
    """

    positions: int
    top: dict[int, float]
    mean_divergence: float
    worst_divergence: float
    perplexity: float
    clear_perplexity: float


def summarised(comparisons: Sequence[Comparison], *, top: Sequence[int] = RANKS) -> Fidelity:
    """Return the means over all positions. Raises ``ValueError`` if there is none."""
    found = [torch.cat([c.ranks for c in comparisons])] if comparisons else []
    if not found or not len(found[0]):
        raise ValueError("no position to compare on")
    divergence = torch.cat([c.divergences for c in comparisons])
    return Fidelity(
        positions=len(found[0]),
        top={k: (found[0] < k).double().mean().item() for k in top},
        mean_divergence=divergence.mean().item(),
        worst_divergence=divergence.max().item(),
        perplexity=torch.cat([c.losses for c in comparisons]).mean().exp().item(),
        clear_perplexity=torch.cat([c.clear_losses for c in comparisons]).mean().exp().item(),
    )
