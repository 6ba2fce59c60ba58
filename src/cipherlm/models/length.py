"""Generations whose length a server does not learn.

A server sees every evaluation, and whether another one follows would tell it when a text ends. A server that
cheats chooses what the client decrypts: it could have a bit of the text, or of the secret key, decide whether
the text ends. So a generation runs to its token budget whatever ends its text: a token or a string that ends
it, a criterion, an error of what was decrypted, a caller who has lost interest. What is evaluated behind the
end are tokens that nobody reads; they are encrypted as all others are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cipherlm.linear.prefix import cache_name
from cipherlm.models.modules import cache_of

BUCKET = 4
"""Lengths are rounded up to a multiple of it, so that the length of a prompt shows no more exactly."""

LARGEST = 2.0**20
"""Larger hidden states are of no model: a server has made them up, to see whether the client fails."""


def evaluated_tokens(longest: int, prefix: int, room: int) -> int:
    """Return how many tokens, with those of the public prefix, a generation evaluates.

    ``longest`` is how many tokens the text may have with prompt and prefix, the last of which is never read,
    and ``room`` how many can be evaluated.
    """
    behind = -(-max(longest - 1 - prefix, 0) // BUCKET) * BUCKET
    return min(prefix + behind, room)


def bounded(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return hidden states that can be encrypted: then nothing that was decrypted makes a client fail."""
    return np.clip(np.nan_to_num(rows, nan=0.0, posinf=LARGEST, neginf=-LARGEST), -LARGEST, LARGEST)


def at_full_length(model: Any, generate: Callable[[], Any], tokens: Callable[[], int]) -> Any:
    """Return what ``generate`` does, after the model has been called with texts up to ``tokens()`` long.

    Raises what ``generate`` raises: at once if a call of the model has failed, which depends on the form of
    what the server sends and not on what is in it; otherwise only at the full length.
    """
    seen: list[tuple[torch.Tensor, Any]] = []
    inside = False

    def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal inside
        inside = True
        seen[:] = [(kwargs["input_ids"] if "input_ids" in kwargs else args[0], cache_of(kwargs))]

    def after(*_: Any) -> None:
        nonlocal inside
        inside = False

    def fill() -> None:
        if not seen:
            return
        ids, cache = seen[0]
        if cache is None:
            while seen[0][0].shape[1] < tokens():
                model(input_ids=torch.cat([seen[0][0], ids[:, -1:]], dim=1))
            return
        length = cache.get_seq_length()
        for _ in range(length, tokens()):
            model(input_ids=ids[:, -1:], **{cache_name(model): cache})
        # Behind the text are tokens that do not belong to it.
        cache.crop(length - cache.get_seq_length())

    hooks = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after),
    ]
    try:
        try:
            result = generate()
        except Exception:
            if not inside:
                with torch.no_grad():
                    fill()
            raise
        try:
            with torch.no_grad():
                fill()
        except Exception as error:
            # The text is there. That the server has failed behind it depends on nothing in it.
            warnings.warn(f"the server failed behind the end of the text: {error}", stacklevel=3)
        return result
    finally:
        for hook in hooks:
            hook.remove()
