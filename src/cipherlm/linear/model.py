"""A client's model: everything but the weights of remote layers, in files and in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from cipherlm.linear.modules import replace
from cipherlm.linear.products import LinearGroup, Products

LAYERS_NAME = "remote_layers.json"
WEIGHTS_NAME = "model.safetensors"
FORMAT_VERSION = 1


def client_state_dict(
    model: nn.Module, groups: Iterable[LinearGroup]
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the parameters and buffers that a client needs, each once, and the other names of shared ones.

    The weights of ``groups`` are not among them, unless another module has them too: an output embedding
    that is tied to the input's, for example. The second dictionary has, for each other name, the name
    under which the first has it.
    """
    modules = dict(model.named_modules())
    remote = {id(modules[name]) for group in groups for name in group.members}
    left_out = {
        f"{name}.weight"
        for name, module in model.named_modules(remove_duplicate=False)
        if id(module) in remote
    }
    state: dict[str, torch.Tensor] = {}
    shared: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in model.state_dict().items():
        if name in left_out:
            continue
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and key in seen:
            shared[name] = seen[key]
        else:
            seen[key] = name
            state[name] = tensor.contiguous()
    return state, shared


def with_half_embeddings(state: Mapping[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    """Return the state of a client with its token embedding and its output layer in half precision.

    They are most of what a client downloads. A weight is rounded by at most 2^-11 of itself, or 2^-25 where
    it is below 2^-14. Only weights in single precision are rounded, and a matrix that would overflow is not.
    :func:`in_single_precision` is the way back.
    """
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = {id(getattr(layer, "weight", None)) for layer in layers}
    names = {
        name
        for name, weight in model.named_parameters(remove_duplicate=False)
        if id(weight) in weights and weight.dtype == torch.float32
    }
    halved = {name: tensor.half() for name, tensor in state.items() if name in names}
    return {**state, **{name: tensor for name, tensor in halved.items() if tensor.isfinite().all()}}


def in_single_precision(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the state with all that is in half precision in single precision, which clients compute in."""
    return {name: t.float() if t.dtype == torch.float16 else t for name, t in state.items()}


def save_client_model(
    model: PreTrainedModel, groups: Sequence[LinearGroup], directory: str | os.PathLike[str]
) -> None:
    """Write what ``load_client_model`` reads: the configuration, the groups, and what is not remote.

    ``model`` is the clear model or the one with remote layers.
    """
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    state, shared = client_state_dict(model, groups)
    state = with_half_embeddings(state, model)
    first = model.get_submodule(groups[0].name)
    assert isinstance(first.weight, torch.Tensor)
    description = {
        "version": FORMAT_VERSION,
        "architecture": type(model).__name__,
        "dtype": str(first.weight.dtype).removeprefix("torch."),
        "groups": [group.to_dict() for group in groups],
        "shared": shared,
    }
    (path / LAYERS_NAME).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    save_file(state, path / WEIGHTS_NAME, metadata={"format": "pt"})
    model.config.save_pretrained(path)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(path)


def load_groups(directory: str | os.PathLike[str]) -> tuple[LinearGroup, ...]:
    """Return the groups of the client's model in ``directory``. Raises as ``load_client_model``."""
    return _described(Path(directory))[0]


def load_client_model(
    directory: str | os.PathLike[str], products: Products, *, attn_implementation: str | None = None
) -> PreTrainedModel:
    """Return the model in ``directory``, whose remote layers ``products`` computes.

    Nothing is allocated for the weights of remote layers. The class is one of ``transformers``, and no
    code from the directory is run. Raises ``FileNotFoundError`` if there is no client's model, and
    ``ValueError``, naming the file, if one is damaged.
    """
    path = Path(directory)
    groups, description = _described(path)
    dtype = getattr(torch, str(description.get("dtype")), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"{path / LAYERS_NAME} is damaged: no type {description.get('dtype')!r}")
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        model = empty_model(model_class(description.get("architecture")), config, dtype=dtype, **options)
        replace(model, groups, products)
    # transformers raises whatever a wrong configuration leads to.
    except Exception as error:
        raise ValueError(f"the model in {path} is damaged: {error}") from error
    _load(model, path / WEIGHTS_NAME, description.get("shared"), single=dtype == torch.float32)
    if model.can_generate() and (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    model.train(False)  # eval(), which transformers leaves without annotations
    return model


def model_class(architecture: Any) -> Any:
    """Return the class of ``transformers`` with that name. Raises ``ValueError`` if there is none."""
    found = getattr(transformers, architecture, None) if isinstance(architecture, str) else None
    if not isinstance(found, type) or not issubclass(found, PreTrainedModel):
        raise ValueError(f"transformers {transformers.__version__} has no model class {architecture!r}")
    return found


def empty_model(architecture: Any, config: Any, **options: Any) -> PreTrainedModel:
    """Return a model whose parameters have no memory yet. ``options`` are those of ``_from_config``."""
    with _NoParameters():
        model: PreTrainedModel = architecture._from_config(config, **options)
    return model


class _NoParameters(TorchFunctionMode):
    """Make what ``torch.empty`` makes, which is parameters, without memory.

    Under ``torch.device("meta")`` buffers that no file has (the frequencies of rotary embeddings) would have
    no values either.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = {**(kwargs or {}), "device": "meta"} if func is torch.empty else kwargs or {}
        return func(*args, **kwargs)


def _described(path: Path) -> tuple[tuple[LinearGroup, ...], dict[str, Any]]:
    file = path / LAYERS_NAME
    if not file.is_file():
        raise FileNotFoundError(f"no client's model in {os.fspath(path)!r}: no {LAYERS_NAME}")
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(description, dict) or description.get("version") != FORMAT_VERSION:
            raise ValueError("of a version that is not known here")
        groups = description.get("groups")
        if not isinstance(groups, list) or not groups:
            raise ValueError("no groups")
        return tuple(LinearGroup.from_dict(values) for values in groups), description
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def _load(model: nn.Module, file: Path, shared: Any, *, single: bool) -> None:
    """Give ``model`` the tensors in ``file``, and those in ``shared`` under their other names."""
    if not isinstance(shared, Mapping):
        raise ValueError(f"{file.parent / LAYERS_NAME} is damaged: no shared names")
    try:
        state = in_single_precision(load_file(file)) if single else load_file(file)
        found = model.load_state_dict(state, strict=False, assign=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, source in shared.items():
        owner, _, attribute = name.rpartition(".")
        if name not in found.missing_keys or source not in tensors:
            raise ValueError(f"{file.parent / LAYERS_NAME} is damaged: {name!r} is not shared")
        setattr(model.get_submodule(owner), attribute, tensors[source])
    missing = [name for name in found.missing_keys if name not in shared]
    # Also what no file has and the architecture makes in an unusual way.
    missing += [name for name, buffer in model.named_buffers() if buffer.is_meta]
    wrong = [*missing, *found.unexpected_keys]
    if wrong:
        kind = "lacks" if missing else "has unknown"
        raise ValueError(f"{file} is damaged: it {kind} {', '.join(wrong[:3])}")
