"""Any ``transformers`` model with its linear layers on encrypted data: the same object, more methods."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from cipherlm.linear.clear import ClearProducts
from cipherlm.linear.groups import find_groups, linear_layers, weights_of
from cipherlm.linear.local import LocalProducts, SimulatedProducts
from cipherlm.linear.model import model_class
from cipherlm.linear.modules import RemoteLinear, replace
from cipherlm.linear.plan import make_plan
from cipherlm.linear.products import Float32, Float64, LinearGroup, Products
from cipherlm.models.config import EncryptionConfig
from cipherlm.models.modules import MODES, FheMode
from cipherlm.models.targets import find_linear, match
from cipherlm.progress import Progress, silent


class EncryptedLinearModel(nn.Module):
    """A model whose linear layers are products on encrypted data, made by ``get_encrypted_model``.

    It stays what ``transformers`` made: its class is a subclass of the model's, of the same name. Attention,
    norms and the key-value cache run here in the clear, so that ``generate`` works with any sampler, beams,
    batches, padding and implementation of attention. At first in the mode ``"disable"``: the clear model.
    """

    encryption_config: EncryptionConfig
    groups: tuple[LinearGroup, ...]
    """The layers that make one product each, in the model's order."""
    _weights: dict[str, Float32]
    _transposed: frozenset[str]
    _modes: dict[str, FheMode]
    _backends: _Backends

    @property
    def remote_modules(self) -> dict[str, RemoteLinear]:
        """The remote layers by their name in the model."""
        return {module.name: module for module in self.modules() if isinstance(module, RemoteLinear)}

    @property
    def fhe_mode(self) -> str:
        """The mode of all remote layers, or ``"mixed"``."""
        modes: set[str] = set(self._modes.values())
        return modes.pop() if len(modes) == 1 else "mixed"

    def set_fhe_mode(self, fhe: FheMode, modules: str | Sequence[str] | None = None) -> None:
        """Choose how remote layers run: ``"disable"``, ``"simulate"`` or ``"execute"``.

        ``modules`` names some of them as ``target_modules`` does, and with them the layers that share their
        product; None means all. Raises ``ValueError`` on an unknown mode or name.
        """
        if fhe not in MODES:
            raise ValueError(f"no mode {fhe!r}: choose one of {', '.join(map(repr, MODES))}")
        remote = self.remote_modules
        names = list(remote) if modules is None else match(modules, list(remote), kind="linear layer")
        for product in {remote[name].product for name in names}:
            product.products = self._backends.of(fhe)
            self._modes[product.group.name] = fhe

    def connect(self, products: Products | None) -> None:
        """Let ``products`` compute in the mode ``"execute"``, as with a server elsewhere.

        None stands for a server in this process, with keys of its own, which is also what there is at first.
        """
        self._backends.connect(products)
        for name in [name for name, mode in self._modes.items() if mode == "execute"]:
            self.set_fhe_mode("execute", [name])

    @contextmanager
    def in_clear(self) -> Iterator[None]:
        """Compute as the clear model does for as long as the context lasts, to compare with it."""
        before = dict(self._modes)
        self.set_fhe_mode("disable")
        try:
            yield
        finally:
            for name, mode in before.items():
                self.set_fhe_mode(mode, [name])

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save the clear model as transformers does, and ``encryption_config.json`` beside it.

        Keys are not saved.
        """
        own: Any = super()
        own.save_pretrained(
            save_directory, **{"state_dict": {**self.state_dict(), **self._clear_weights()}, **kwargs}
        )
        self.encryption_config.save_pretrained(save_directory)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike[str],
        *,
        example: Mapping[str, Any] | None = None,
        dtype: str | torch.dtype = "auto",
        **options: Any,
    ) -> EncryptedLinearModel:
        """Load what ``save_pretrained`` wrote. ``options`` are those of transformers.

        Raises ``FileNotFoundError`` if there is no encrypted model in ``directory``, and ``ValueError`` if
        transformers has no class for it.
        """
        config = EncryptionConfig.from_pretrained(directory)
        architectures = AutoConfig.from_pretrained(directory).architectures or [None]
        clear = model_class(architectures[0]).from_pretrained(directory, dtype=dtype, **options)
        return encrypt_linear(clear, config, example)

    def _clear_weights(self) -> dict[str, torch.Tensor]:
        """Return the weights of remote layers as the clear model has them, under all their names."""
        clear: dict[str, torch.Tensor] = {}
        for name, module in self.named_modules(remove_duplicate=False):
            if isinstance(module, RemoteLinear):
                product, rows = module.product, module.product.rows(module.name)
                weight = torch.from_numpy(self._weights[product.group.name][rows]).to(module.weight.dtype)
                clear[f"{name}.weight"] = weight.T if module.name in self._transposed else weight
        return clear


class _Here:
    """Both parties in this process. Nothing is planned, encoded or keyed before the first product.

    The first gradient makes a plan anew, with the transposes, which take as much memory again.
    """

    def __init__(
        self,
        kind: type[LocalProducts] | type[SimulatedProducts],
        groups: tuple[LinearGroup, ...],
        weights: dict[str, Float32],
        progress: Progress,
    ) -> None:
        self._kind, self._groups, self._weights, self._progress = kind, groups, weights, progress
        self._products: LocalProducts | SimulatedProducts | None = None
        self._training = False

    def product(self, group: str, x: Float64, *, transposed: bool = False) -> Float64:
        if self._products is None or (transposed and not self._training):
            self._training = transposed
            with self._progress("encoding gradients" if transposed else "encoding linear layers"):
                plan = make_plan(list(self._groups), self._weights, training=transposed)
                self._products = self._kind(plan, self._weights)
                if isinstance(self._products, LocalProducts):
                    _ = self._products.server
        return self._products.product(group, x, transposed=transposed)


class _Backends:
    """Who computes in which mode. A copy of a model has the same ones, and is connected on its own."""

    def __init__(
        self, groups: tuple[LinearGroup, ...], weights: dict[str, Float32], progress: Progress
    ) -> None:
        self._given = (groups, weights, progress)
        self._modes: dict[FheMode, Products] = {
            "disable": ClearProducts(weights),
            "simulate": _Here(SimulatedProducts, *self._given),
        }
        self.connect(None)

    def of(self, fhe: FheMode) -> Products:
        return self._modes[fhe]

    def connect(self, products: Products | None) -> None:
        self._modes["execute"] = _Here(LocalProducts, *self._given) if products is None else products

    def __deepcopy__(self, memo: dict[int, Any]) -> _Backends:
        copy = memo[id(self)] = _Backends(*self._given)
        copy._modes = dict(self._modes)
        return copy


def encrypt_linear(
    model: nn.Module,
    config: EncryptionConfig,
    example: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> EncryptedLinearModel:
    """Make the linear layers of ``model`` that ``config`` names remote, in place, and return it.

    ``example`` has the arguments of a call, to find layers with one input where guessed arguments do not
    serve. ``progress`` hears of what takes long in this process. Raises ``ValueError``, and changes nothing,
    if ``config`` names a layer that is not there, and for adapters and weights that are quantised or not in
    memory.
    """
    if isinstance(model, EncryptedLinearModel):
        raise ValueError("this model is encrypted already: load the clear one again")
    names = find_linear(model, config)
    layers = linear_layers(model)
    groups = find_groups(model, names, example)
    if not groups:
        raise ValueError(
            f"the linear layers of a {type(model).__name__} cannot be remote: {', '.join(names)}"
        )
    weights = {group.name: weights_of(layers, group) for group in groups}
    transposed = frozenset(name for name in names if isinstance(layers[name], Conv1D))
    backends = _Backends(groups, weights, progress)
    replace(model, groups, backends.of("disable"))
    _forget_quantization(model)
    model.__class__ = _subclass(type(model))
    assert isinstance(model, EncryptedLinearModel)
    model.encryption_config, model.groups = config, groups
    model._weights, model._transposed = weights, transposed
    model._modes, model._backends = {group.name: "disable" for group in groups}, backends
    return model


def _forget_quantization(model: Any) -> None:
    """Let transformers save and train a model from a GGUF file.

    It turns such weights into plain ones when it loads them, and goes on to call the model quantised. Other
    quantised models have been refused for their weights.
    """
    if getattr(model, "is_quantized", False):
        model.is_quantized = False
        for owner, name in ((model, "hf_quantizer"), (model.config, "quantization_config")):
            if hasattr(owner, name):
                delattr(owner, name)


def _subclass(model_class: type[nn.Module]) -> type[nn.Module]:
    """Return a class of the same name: transformers looks at names, for losses and files among others."""
    names = {name: getattr(model_class, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(model_class.__name__, (EncryptedLinearModel, model_class), names)
