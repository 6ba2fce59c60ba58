"""Finding the modules that a configuration names, and saying what there is where it names none."""

import difflib
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import nn
from transformers import GPT2LMHeadModel
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from transformers.pytorch_utils import Conv1D

from cipherlm.linear.groups import linear_layers, output_embedding
from cipherlm.models.architecture import MODULES, architecture_of
from cipherlm.models.config import LINEAR_SCHEMES, EncryptionConfig

_LISTED = 12
_WRAPPERS = ("Lora", "ModulesToSave")
"""What the classes of adapters are called."""


def find_targets(model: nn.Module, config: EncryptionConfig) -> dict[str, GPT2Attention]:
    """Return the attention modules of ``model`` that ``config`` names, in the model's order.

    Raises ``ValueError`` if a name fits no attention module, or if one of them lacks a head.
    """
    modules = dict(model.named_modules())
    available = {
        name: module
        for name, module in modules.items()
        if isinstance(module, GPT2Attention) and not module.is_cross_attention
    }
    targets = {name: available[name] for name in match(config.target_modules, list(available), list(modules))}
    for name, attention in targets.items():
        if not all(isinstance(layer, Conv1D) for layer in (attention.c_attn, attention.c_proj)):
            raise ValueError(
                f"the weights of {name} are not plain (adapters? 8-bit loading?): merge or load them first"
            )
        missing = [head for head in config.heads or [] if head >= attention.num_heads]
        if missing:
            raise ValueError(f"{name} has heads 0 to {attention.num_heads - 1}, no head {missing[0]}")
    return targets


def find_remote(model: nn.Module, config: EncryptionConfig) -> dict[str, nn.Module]:
    """Return what CKKS is to encrypt of ``model``, in the model's order.

    Attention modules, MLPs, blocks, or the list of all blocks. Raises ``ValueError`` if a name fits none of
    these, if one lies in another, if weights in them are not plain, or for an activation that no polynomial
    serves.
    """
    modules, model_config = dict(model.named_modules()), cast(Any, model.config)
    layer = architecture_of(model_config.model_type).layer
    available = _remote_modules(model)
    if config.is_whole:
        names = available[:1]
    else:
        names = match(config.target_modules, available, list(modules), "attention module, MLP or block")
    for name in names:
        inner = [other for other in names if other.startswith(f"{name}.")]
        if inner:
            raise ValueError(f"{inner[0]} lies in {name}, which is encrypted too: name one of them")
        for inside, module in modules[name].named_modules():
            weight = getattr(module, "weight", None)
            matrix = isinstance(weight, torch.Tensor) and weight.dim() == 2
            kind = type(module).__name__
            if kind.startswith(_WRAPPERS) or (matrix and kind != layer):
                raise ValueError(
                    f"the weights of {f'{name}.{inside}'.rstrip('.')} are not plain (adapters? 8-bit "
                    "loading?): merge or load them first"
                )
    return {name: modules[name] for name in names}


def means_linear(model: nn.Module, config: EncryptionConfig) -> bool:
    """Say whether ``config`` names linear layers of ``model``, and not modules that hold some."""
    if config.is_linear or config.is_whole or config.scheme not in LINEAR_SCHEMES:
        return config.is_linear
    if getattr(getattr(model, "config", None), "model_type", None) not in MODULES:
        return True
    if _fits_any(config, _remote_modules(model)):
        return False
    # Where nothing fits, what is closest is told.
    return _fits_any(config, list(linear_layers(model))) or not isinstance(model, GPT2LMHeadModel)


def find_linear(model: nn.Module, config: EncryptionConfig) -> list[str]:
    """Return the names of the linear layers that ``config`` names, in the model's order.

    Raises ``ValueError`` if there are none, and as ``linear_layers`` does.
    """
    layers = list(linear_layers(model))
    if not config.is_linear:
        return match(
            config.target_modules, layers, [name for name, _ in model.named_modules()], "linear layer"
        )
    names = [name for name in layers if name != output_embedding(model)]
    if not names:
        raise ValueError(f"a {type(model).__name__} has no linear layers that can be remote")
    return names


def _remote_modules(model: nn.Module) -> list[str]:
    """Return the names of what can be remote, the list of all blocks first."""
    config: Any = model.config
    architecture = architecture_of(config.model_type)
    return list(architecture.names(config.num_hidden_layers))


def _fits_any(config: EncryptionConfig, available: list[str]) -> bool:
    try:
        return bool(match(config.target_modules, available))
    except ValueError:
        return False


def match(
    wanted: str | Sequence[str],
    available: list[str],
    others: Sequence[str] = (),
    kind: str = "attention module",
) -> list[str]:
    """Return the names among ``available`` that ``wanted`` means, as PEFT's ``target_modules`` does.

    A name or its ending after a dot, or a pattern for either as in names of files; as one string, a regular
    expression for the whole name as well.
    ``others`` are names that exist but cannot be used, and ``kind`` is what can. Raises ``ValueError`` where
    an entry fits nothing.
    """
    entries = [wanted] if isinstance(wanted, str) else wanted
    found: set[str] = set()
    for entry in entries:
        names = [name for name in available if _is_named(name, entry)]
        if not names and isinstance(wanted, str):
            names = [name for name in available if _fits(entry, name)]
        if not names:
            raise ValueError(_no_such_module(entry, available, others, kind))
        found.update(names)
    return [name for name in available if name in found]


def _is_named(name: str, entry: str) -> bool:
    return name == entry or name.endswith(f".{entry}") or fnmatchcase(f".{name}", f"*.{entry}")


def _fits(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error:  # not meant as a regular expression
        return False


def _no_such_module(entry: str, available: Sequence[str], others: Sequence[str], kind: str) -> str:
    kinds = kind if "," in kind else f"{kind}s"
    if any(_is_named(name, entry) for name in others):
        problem = f"module {entry!r} cannot be encrypted, only {kinds} can"
    else:
        endings = dict.fromkeys(name.rpartition(".")[2] for name in available)
        close = difflib.get_close_matches(entry, [*available, *endings], n=3, cutoff=0.6)
        problem = f"there is no {kind} {entry!r}"
        if close:
            problem += f"; did you mean {' or '.join(map(repr, close))}?"
    listed = ", ".join(available[:_LISTED]) or "none"
    if len(available) > _LISTED:
        listed += f", ... {available[-1]} ({len(available)} in all)"
    return f"{problem} ({kinds} of this model: {listed})"
