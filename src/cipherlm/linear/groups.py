"""Finding the linear layers of a model, and which of them have one input, so that one product serves them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from cipherlm.linear.products import Float32, LinearGroup

logger = logging.getLogger(__name__)

LinearLayer = nn.Linear | Conv1D
_PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def linear_layers(model: nn.Module) -> dict[str, LinearLayer]:
    """Return the layers of ``model`` that are a product and a bias and nothing else, by name.

    Layers with a forward of their own count if it computes the same. The output projection of
    ``nn.MultiheadAttention``, which is never called, is left out. Raises ``ValueError`` for adapters and for
    quantised weights.
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
        if getattr(module.weight, "dtype", None) not in _PLAIN:
            raise ValueError(f"the weights of {name} are quantised: load the model without quantisation")
        if type(module).forward in (nn.Linear.forward, Conv1D.forward) or _computes_a_product(module):
            found[name] = module
    return found


def _computes_a_product(layer: LinearLayer) -> bool:
    """Try a forward that is not known on one random input."""
    if isinstance(layer, Conv1D) or layer.weight.is_meta:
        return False
    x = torch.randn(1, layer.in_features, dtype=layer.weight.dtype, device=layer.weight.device)
    with torch.no_grad():
        expected = nn.functional.linear(x, layer.weight, layer.bias)
        try:
            return torch.allclose(layer(x), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
        except Exception:  # it takes other arguments
            return False


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
        if not all(extreme.isfinite() for extreme in torch.aminmax(weight)):
            raise ValueError(f"the weights of {name} have NaN or infinity")
        matrices.append((weight.T if isinstance(layers[name], Conv1D) else weight).to("cpu", torch.float32))
    stacked: Float32 = np.ascontiguousarray(torch.cat(matrices).numpy())
    return stacked


def find_groups(
    model: nn.Module, names: Sequence[str], example: Mapping[str, Any] | None = None
) -> tuple[LinearGroup, ...]:
    """Return the layers ``names`` in groups of one input, in the model's order.

    The model runs once in the clear, on ``example``, the arguments of a call; without it, on two tokens or
    on what such models take. Layers that get the same tensor are one group. A layer that the run does not
    reach is a group of its own: that costs exchanges, and never changes a result. So it is with all layers,
    and a warning, if the model cannot be run on guessed arguments. Layers whose weights the model reads
    without calling them are left out, with a warning. Raises what the model raises on ``example``.
    """
    layers = linear_layers(model)
    trial = _Trial(model, {name: layers[name] for name in names})
    for arguments in _guesses(model) if example is None else [example]:
        try:
            trial.run(arguments)
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
    if trial.read:
        logger.warning(
            "%s: the model reads these weights without calling the layer, which stays in the clear",
            ", ".join(sorted(trial.read)),
        )
    together: dict[object, list[str]] = {}
    for name in names:
        if name not in trial.read:
            key = (id(trial.inputs[name]), shape(layers[name])[1]) if name in trial.inputs else name
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


class _Trial(TorchFunctionMode):
    """One call of a model, to see what each layer gets first, and which weights are used outside of it."""

    def __init__(self, model: nn.Module, layers: Mapping[str, LinearLayer]) -> None:
        super().__init__()
        self.model, self.layers = model, layers
        self.inputs: dict[str, torch.Tensor] = {}
        """They live on, so that their ids are theirs."""
        self.read: set[str] = set()
        owners = Counter(id(weight) for module in model.modules() for weight in module._parameters.values())
        # A tied embedding may read the weights that it has too.
        self._weights = {
            id(layer.weight): name for name, layer in layers.items() if owners[id(layer.weight)] == 1
        }
        self._called: list[str] = []

    def run(self, arguments: Mapping[str, Any]) -> None:
        """Call the model. What an earlier call, which failed, has shown is forgotten."""
        self.inputs, self.read, self._called = {}, set(), []
        with ExitStack() as stack, torch.no_grad():
            stack.enter_context(_evaluating(self.model))
            for name, layer in self.layers.items():
                for hook in self._hooks(name, layer):
                    stack.callback(hook.remove)
            stack.enter_context(self)
            self.model(**arguments)

    def _hooks(self, name: str, layer: nn.Module) -> Iterator[RemovableHandle]:
        def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
            self._called.append(name)
            if args and isinstance(args[0], torch.Tensor):
                self.inputs.setdefault(name, args[0])

        def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._called.pop()

        yield layer.register_forward_pre_hook(enter)
        yield layer.register_forward_hook(leave)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in _DESCRIBING:
            for value in (*args, *(kwargs or {}).values()):
                name = self._weights.get(id(value))
                if name is not None and name not in self._called:
                    self.read.add(name)
        return func(*args, **(kwargs or {}))


_DESCRIBING = {
    getattr(torch.Tensor, name).__get__ for name in ("dtype", "device", "shape", "ndim", "requires_grad")
}


def _guesses(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Yield arguments that a model of ``transformers`` may take: text, images, spectra, sound."""
    config = getattr(model, "config", None)
    vision = getattr(config, "vision_config", config)
    device = next((parameter.device for parameter in model.parameters()), None)
    text = {"input_ids": torch.zeros(1, 2, dtype=torch.long, device=device)}
    decoded = {}
    if getattr(config, "is_encoder_decoder", False):
        decoded = {"decoder_input_ids": text["input_ids"]}
        yield text | decoded
    yield text
    size, channels = getattr(vision, "image_size", None), getattr(vision, "num_channels", 3)
    if isinstance(size, int):
        images = {"pixel_values": torch.zeros(1, channels, size, size, device=device)}
        yield images
        yield text | images
    bins, frames = getattr(config, "num_mel_bins", None), getattr(config, "max_source_positions", 100)
    if isinstance(bins, int):
        yield {"input_features": torch.zeros(1, bins, 2 * frames, device=device)} | decoded
    yield {"input_values": torch.zeros(1, 4000, device=device)}


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
