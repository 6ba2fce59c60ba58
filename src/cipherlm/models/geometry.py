"""How a model's hidden states lie in ciphertexts: told by its configuration alone, without torch."""

from __future__ import annotations

from typing import Any

from cipherlm.models.architecture import Args
from cipherlm.models.config import EncryptionConfig
from cipherlm.schemes.ckks.geometry import Geometry


def public_prefix(config: EncryptionConfig, model_config: Any) -> list[int]:
    """Return the ids of the public tokens that every text starts with.

    Raises ``ValueError`` where neither configuration names any, and for ids that are not the model's.
    """
    if config.prefix is None:
        if getattr(model_config, "bos_token_id", None) is None:
            raise ValueError("the model has no token for the beginning of a text: give prefix=[...]")
        prefix = [int(model_config.bos_token_id)]
    else:
        prefix = config.prefix
    if max(prefix) >= model_config.vocab_size:
        raise ValueError(f"prefix: token {max(prefix)} is not one of the model's {model_config.vocab_size}")
    return prefix


def geometry_of(config: EncryptionConfig, args: Args, prefix: list[int]) -> Geometry:
    """Return what client and server have to agree on. Raises ``ValueError`` for what does not fit."""
    if config.context > args.positions:
        raise ValueError(f"context={config.context} is more than the {args.positions} tokens of the model")
    return Geometry(
        args.heads,
        args.head_dim,
        config.tokens,
        len(prefix),
        config.context,
        post_quantum=config.post_quantum,
        width=args.width,
        inner=args.inner,
        rotary=args.rope is not None,
    )
