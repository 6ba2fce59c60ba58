"""Which block's errors change the logits most: each block encrypted alone, all others in the clear."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cipherlm.evaluation.fidelity import divergences
from cipherlm.evaluation.prompts import Answered
from cipherlm.linear.groups import linear_layers
from cipherlm.models.linear import EncryptedLinearModel


@dataclass(frozen=True)
class LogitError:
    """What errors in a part of a model do to its logits.

    ``rms`` is the root mean square of the change of a logit, less the mean change over the vocabulary, which
    a distribution does not depend on; ``divergence`` the mean Kullback-Leibler divergence in nats.
    """

    rms: float
    divergence: float


def block_parts(model: nn.Module) -> dict[str, list[str]]:
    """Return a clear model's blocks by name, with the names of what has linear layers in each.

    The blocks are the longest list of modules of the model. Raises ``ValueError`` if there is none.
    """
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    if not lists:
        raise ValueError(f"a {type(model).__name__} has no list of blocks")
    longest = max(lists, key=lambda name: len(lists[name]))
    return {
        f"{longest}.{index}": [
            f"{longest}.{index}.{name}" for name, child in block.named_children() if linear_layers(child)
        ]
        for index, block in enumerate(lists[longest])
    }


def encrypted_within(model: Any, part: str) -> list[str]:
    """Return the names of a model's encrypted modules that are ``part`` or lie in it."""
    return [name for name in _encrypted(model) if f"{name}.".startswith(f"{part}.")]


def logit_errors(
    model: Any, called: Any, texts: Sequence[Answered], parts: Mapping[str, Sequence[str]]
) -> Iterator[tuple[str, LogitError]]:
    """Yield the effect of each part: its encrypted modules in the model's mode, all others in the clear.

    ``parts`` has the encrypted modules of each by name, and ``called`` is the model as it is called with
    texts behind the prefix.
    """
    with torch.inference_mode():
        with model.in_clear():
            clear = [called(input_ids=text.ids[:, :-1], use_cache=False).logits[0] for text in texts]
        for part, names in parts.items():
            with only(model, names):
                logits = [called(input_ids=text.ids[:, :-1], use_cache=False).logits[0] for text in texts]
            yield part, _error(torch.cat(clear), torch.cat(logits))


@contextmanager
def only(model: Any, names: Sequence[str]) -> Iterator[None]:
    """Let all encrypted modules but those named compute in the clear for as long as the context lasts."""
    if isinstance(model, EncryptedLinearModel):
        mode: Any = model.fhe_mode
        with model.in_clear():
            if names:
                model.set_fhe_mode(mode, names)
            yield
        return
    with ExitStack() as stack:
        for name, module in model.encrypted_modules.items():
            if name not in names:
                stack.enter_context(module.in_clear())
        yield


def _error(clear: torch.Tensor, logits: torch.Tensor) -> LogitError:
    change = logits.double() - clear.double()
    change -= change.mean(dim=-1, keepdim=True)
    rms = change.square().mean().sqrt().nan_to_num(nan=math.inf)
    return LogitError(rms.item(), divergences(clear, logits).mean().item())


def _encrypted(model: Any) -> list[str]:
    return list(model.remote_modules if isinstance(model, EncryptedLinearModel) else model.encrypted_modules)
