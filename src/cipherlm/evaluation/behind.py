"""Models called with private texts alone: the public prefix is put before them, and nothing of it returned.

What a model makes of the prefix is exact, and so is no part of what is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cipherlm.linear.prefix import PublicPrefix, cache_name, public_prefix_cache
from cipherlm.models.linear import EncryptedLinearModel


class BehindPrefix:
    """A model that reads the prefix with every text."""

    def __init__(self, model: Any, prefix: Sequence[int]) -> None:
        self._model, self._prefix = model, list(prefix)

    def __call__(self, input_ids: torch.Tensor, **options: Any) -> Any:
        """Return the model's outputs, of whose logits (batch, tokens, vocabulary) the prefix is cut off."""
        rows = input_ids.new_tensor(self._prefix).expand(len(input_ids), -1)
        output = self._model(input_ids=torch.cat([rows, input_ids], dim=1), **options)
        output.logits = output.logits[:, len(self._prefix) :]
        return output


class BehindCache:
    """A model that starts from the prefix's keys and values, as a client with linear layers at a server."""

    def __init__(self, model: Any, prefix: PublicPrefix) -> None:
        self._model, self._prefix = model, prefix

    def __call__(self, input_ids: torch.Tensor, **options: Any) -> Any:
        """Return the model's outputs (batch, tokens, ...)."""
        cache = self._prefix.cache(self._model, len(input_ids))
        return self._model(
            input_ids=input_ids, **{**options, "use_cache": True, cache_name(self._model): cache}
        )


def behind(model: Any, prefix: Sequence[int]) -> Any:
    """Return an encrypted model as one that is called with what comes behind its public prefix."""
    if not prefix:
        return model
    if not isinstance(model, EncryptedLinearModel):
        return BehindPrefix(model, prefix)
    encrypted: Any = model
    with model.in_clear():
        return BehindCache(model, public_prefix_cache(encrypted, torch.tensor(prefix)))
