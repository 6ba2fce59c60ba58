"""What encrypted modules of either scheme have in common: modes, and calls that cannot be right."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cipherlm.progress import Progress, silent

Float64 = NDArray[np.float64]
FheMode = Literal["disable", "simulate", "execute"]
MODES: tuple[FheMode, ...] = get_args(FheMode)


class EncryptedModule(nn.Module):
    """Takes the place of a module of a clear model: the same weights under the same names, the same call."""

    def __init__(self, name: str, progress: Progress = silent) -> None:
        super().__init__()
        self.name = name
        self.progress = progress
        self.mode: FheMode = "disable"
        self._in_clear = False

    @property
    @abstractmethod
    def is_calibrated(self) -> bool:
        """Whether the parameters are there, so that the mode ``"disable"`` works."""

    @abstractmethod
    def check_ready(self, tokens: int) -> None:
        """Raise unless a sequence of ``tokens`` can run in the present mode."""

    @contextmanager
    def in_clear(self) -> Iterator[None]:
        """Compute as the clear model does, in floating point, for as long as the context lasts."""
        before, self._in_clear = self._in_clear, True
        try:
            yield
        finally:
            self._in_clear = before

    def check_call(
        self, tokens: int, attention_mask: torch.Tensor | None, head_mask: Any, past: int = 0
    ) -> None:
        """Raise for what an encrypted module cannot do, ``ValueError`` in most cases.

        ``tokens`` are new, behind ``past`` ones.
        """
        self.check_ready(past + tokens)
        if attention_mask is not None and not is_causal(attention_mask, tokens, past):
            raise ValueError(
                f"{self.name} is encrypted and attends to every earlier token: a mask that hides some "
                "(padding, packed sequences) cannot be used; run sequences of different lengths one by one"
            )
        if head_mask is not None:
            raise ValueError(f"{self.name} is encrypted and cannot take a head_mask")
        if self.training:
            raise RuntimeError(f"{self.name} is encrypted and cannot be trained: call model.eval() first")


def cache_of(call: Mapping[str, Any]) -> Any:
    """Return the key-value cache among the arguments of a call, or None.

    transformers 5.24 calls ``cache`` what was ``past_key_values`` before.
    """
    return next((call[name] for name in ("cache", "past_key_values") if call.get(name) is not None), None)


def is_causal(mask: torch.Tensor, tokens: int, past: int = 0) -> bool:
    """Say whether ``mask``, in any of transformers' forms, hides the later tokens and nothing else.

    Rows of it are ``tokens`` new ones, behind ``past`` others.
    """
    if mask.dim() == 2:  # (batch, tokens), 1 for a token and 0 for padding
        return bool(mask.bool().all())
    allowed = mask if mask.dtype == torch.bool else mask == 0
    causal = torch.ones(tokens, past + tokens, dtype=torch.bool, device=mask.device).tril(past)
    return allowed.shape[-2:] == causal.shape and bool((allowed == causal).all())


def to_numpy(tensor: torch.Tensor) -> Float64:
    """Return a copy in double precision, whatever the tensor's device and type."""
    array: Float64 = tensor.detach().to("cpu", torch.float64, copy=True).numpy()
    return array
