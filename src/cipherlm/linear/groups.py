"""Finding the linear layers of a model, and which of them have one input, so that one product serves them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from cipherlm.linear.products import Float32, LinearGroup

logger = logging.getLogger(__name__)

LinearLayer = nn.Linear | Conv1D


def linear_layers(model: nn.Module) -> dict[str, LinearLayer]:
    """Return the layers of ``model`` that are a product and a bias and nothing else, by name.

    Layers with a forward of their own are left out, and so is the output projection of
    ``nn.MultiheadAttention``, which is never called. Raises ``ValueError`` for adapters, for quantised
    weights and for weights that are not in memory.
    """
    found: dict[str, LinearLayer] = {}
    for name, module in model.named_modules():
        if hasattr(module, "base_layer"):
            raise ValueError(
                f"{name} has an adapter: encrypt the model first and add adapters then, or merge them "
                "(merge_and_unload())"
            )
        if not isinstance(module, (nn.Linear, Conv1D)) or isinstance(module, NonDynamicallyQuantizableLinear):
            continue
        if not isinstance(module.weight, torch.Tensor) or not module.weight.is_floating_point():
            raise ValueError(f"the weights of {name} are quantised: load the model without quantisation")
        if type(module).forward in (nn.Linear.forward, Conv1D.forward):
            found[name] = module
    return found


def output_embedding(model: nn.Module) -> str | None:
    """Return the name of the layer that makes logits of hidden states, if ``model`` has one."""
    get = getattr(model, "get_output_embeddings", None)
    layer = get() if get is not None else None
    return next((name for name, module in model.named_modules() if module is layer), None)


def shape(layer: LinearLayer) -> tuple[int, int]:
    """Return (out_features, in_features)."""
    rows, columns = layer.weight.shape
    return (columns, rows) if isinstance(layer, Conv1D) else (rows, columns)


def weights_of(layers: Mapping[str, LinearLayer], group: LinearGroup) -> Float32:
    """Return the stacked matrix (rows, in_features) of a group.

    Raises ``ValueError`` if weights are not in memory or not finite.
    """
    matrices = []
    for name in group.members:
        weight = layers[name].weight.detach()
        if weight.is_meta:
            raise ValueError(f"the weights of {name} are not in memory: load the model without offloading")
        if not bool(weight.isfinite().all()):
            raise ValueError(f"the weights of {name} have NaN or infinity")
        matrices.append((weight.T if isinstance(layers[name], Conv1D) else weight).to("cpu", torch.float32))
    stacked: Float32 = np.ascontiguousarray(torch.cat(matrices).numpy())
    return stacked


def find_groups(
    model: nn.Module, names: Sequence[str], example: Mapping[str, Any] | None = None
) -> tuple[LinearGroup, ...]:
    """Return the layers ``names`` in groups of one input, in the model's order.

    The model runs once in the clear, on ``example``, the arguments of a call; without it, on two tokens or
    on what the class has as ``dummy_inputs``. Layers that get the same tensor are one group. A layer that
    the run does not reach is a group of its own: that costs exchanges, and never changes a result. So it is
    with all layers, and a warning, if the model cannot be run on guessed arguments. Raises what the model
    raises on ``example``.
    """
    layers = linear_layers(model)
    inputs: dict[str, torch.Tensor] = {}
    for arguments in _guesses(model) if example is None else [example]:
        try:
            inputs = _inputs(model, {name: layers[name] for name in names}, arguments)
            break
        except Exception as error:
            if example is not None:
                raise
            logger.debug("cannot run %s on %s: %s", type(model).__name__, list(arguments), error)
    else:
        logger.warning(
            "cannot run %s on guessed inputs, so every linear layer makes an exchange of its own: "
            "give an example of the arguments of a call",
            type(model).__name__,
        )
    together: dict[object, list[str]] = {}
    for name in names:
        key = (id(inputs[name]), shape(layers[name])[1]) if name in inputs else name
        together.setdefault(key, []).append(name)
    return tuple(
        LinearGroup(
            members[0],
            tuple(members),
            shape(layers[members[0]])[1],
            tuple(shape(layers[name])[0] for name in members),
        )
        for members in together.values()
    )


def _inputs(
    model: nn.Module, layers: Mapping[str, LinearLayer], arguments: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """Return what each layer gets first in one call. The tensors live on, so that their ids are theirs."""
    seen: dict[str, torch.Tensor] = {}
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(_evaluating(model))
        for name, layer in layers.items():

            def record(module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                if args and isinstance(args[0], torch.Tensor):
                    seen.setdefault(name, args[0])

            hook = layer.register_forward_pre_hook(record)
            stack.callback(hook.remove)
        model(**arguments)
    return seen


def _guesses(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Yield arguments that a model of ``transformers`` may take."""
    config = getattr(model, "config", None)
    device = next((parameter.device for parameter in model.parameters()), None)
    ids = torch.zeros(1, 2, dtype=torch.long, device=device)
    if getattr(config, "is_encoder_decoder", False):
        yield {"input_ids": ids, "decoder_input_ids": ids}
    yield {"input_ids": ids}
    dummy = getattr(model, "dummy_inputs", None)
    if isinstance(dummy, Mapping):
        yield {
            name: value.to(device) if isinstance(value, torch.Tensor) else value
            for name, value in dummy.items()
        }
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
    if isinstance(size, int):
        yield {"pixel_values": torch.zeros(1, channels, size, size, device=device)}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Turn off dropout and the like, and put every module back as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
