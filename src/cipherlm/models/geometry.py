"""How a GPT-2's hidden states lie in ciphertexts: told by its configuration alone, without torch."""

from __future__ import annotations

from typing import Any

from cipherlm.models.config import EncryptionConfig
from cipherlm.schemes.ckks.session import Geometry


def public_prefix(config: EncryptionConfig, model_config: Any) -> list[int]:
    """Return the ids of the public tokens that every text starts with.

    Raises ``ValueError`` where neither configuration names any, and for ids that are not the model's.
    """
    if config.prefix is None:
        if model_config.bos_token_id is None:
            raise ValueError("the model has no token for the beginning of a text: give prefix=[...]")
        prefix = [int(model_config.bos_token_id)]
    else:
        prefix = config.prefix
    if max(prefix) >= model_config.vocab_size:
        raise ValueError(f"prefix: token {max(prefix)} is not one of the model's {model_config.vocab_size}")
    return prefix


def geometry_of(config: EncryptionConfig, model_config: Any) -> Geometry:
    """Return what client and server have to agree on. Raises ``ValueError`` for what does not fit."""
    heads, prefix = model_config.n_head, public_prefix(config, model_config)
    if config.context > model_config.n_positions:
        raise ValueError(
            f"context={config.context} is more than the {model_config.n_positions} tokens of the model"
        )
    return Geometry(
        heads,
        model_config.n_embd // heads,
        config.tokens,
        len(prefix),
        config.context,
        post_quantum=config.post_quantum,
    )
