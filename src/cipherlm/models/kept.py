"""The key-value cache of a text, kept for one that goes on from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

from cipherlm.linear.prefix import PublicPrefix, cache_name, reading_new_tokens


class KeptCache:
    """Continues texts with a causal model of ``transformers``, and reads what they share only once.

    The cache of the last text is kept. Of the next one, as much is read as it does not have in common with
    that at its beginning. ``prefix`` has the keys and values of a public beginning, which are then not
    computed at all.
    """

    def __init__(self, model: Any, prefix: PublicPrefix | None = None) -> None:
        self._model = model
        self._cache, self._cached = DynamicCache(config=model.config), list[int]()
        if prefix is not None:
            self._cache, self._cached = prefix.cache(model), prefix.ids.tolist()

    def shared(self, ids: Sequence[int]) -> int:
        """Return how many tokens of a text need not be read."""
        # The last token is always read anew: its logits choose the next one.
        return min(in_common(self._cached, ids), len(ids) - 1)

    def generate(self, ids: Sequence[int], **options: Any) -> list[int]:
        """Return a text with what follows, by the ``options`` of ``generate``. Raises what that does."""
        kept = self.shared(ids)
        # Also what a generation that failed has left behind.
        surplus = self._cache.get_seq_length() - kept
        if surplus > 0:
            self._cache.crop(-surplus)
        self._cached = self._cached[:kept]
        given = torch.tensor([list(ids)], device=self._model.device)
        with reading_new_tokens(self._model):
            generated: list[int] = self._model.generate(
                given,
                attention_mask=torch.ones_like(given),
                **options,
                **{cache_name(self._model): self._cache},
            )[0].tolist()
        self._cached = generated[: self._cache.get_seq_length()]
        return generated


def in_common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many items two sequences have in common at their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
