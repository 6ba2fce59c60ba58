"""``nn.Linear`` without its weights: a product that somebody else makes, and the bias."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn
from weakref import ref

import numpy as np
import torch
from torch import nn
from torch.autograd.function import once_differentiable

from cipherlm.linear.products import Float64, LinearGroup, Products


class RemoteWeight(torch.Tensor):
    """The shape, type and device of a weight that is not here. Whatever needs its values raises."""

    layer: str

    @staticmethod
    def of(layer: str, size: tuple[int, int], like: torch.Tensor) -> RemoteWeight:
        """Return the weight of ``layer``, with the type and device of ``like``."""
        weight: RemoteWeight = torch.Tensor._make_wrapper_subclass(
            RemoteWeight, size, dtype=like.dtype, device=like.device
        )
        weight.layer = layer
        return weight

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"RemoteWeight({self.layer!r}, {tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> NoReturn:
        given = [*args, *(kwargs or {}).values()]
        layer = next((value.layer for value in given if isinstance(value, RemoteWeight)), "a remote layer")
        raise RuntimeError(f"the weights of {layer} are on the server: {func} cannot read or change them")


@dataclass
class _Result:
    """The product of one input, for those members of a group that have not asked for it yet."""

    x: Float64
    source: ref[torch.Tensor]
    output: torch.Tensor
    waiting: set[str]


class GroupProduct:
    """One product for the members of a group, made when the first of them is called.

    Another member gets its part of that product if its input has the same values: a product is never stale,
    however the model calls its layers. Each member gets its part once.
    """

    def __init__(self, group: LinearGroup, products: Products) -> None:
        self.group = group
        self.products = products
        self._last: _Result | None = None
        ends = np.cumsum(group.out_features).tolist()
        starts = [0, *ends[:-1]]
        self._rows = {n: slice(*part) for n, *part in zip(group.members, starts, ends, strict=True)}

    def rows(self, member: str) -> slice:
        """Return which rows of the stacked matrix are those of ``member``."""
        return self._rows[member]

    def part(self, member: str, x: torch.Tensor) -> torch.Tensor:
        """Return x @ W.T (..., out_features) for x (..., in_features), W the weights of ``member``."""
        if x.shape[-1] != self.group.in_features:
            raise ValueError(f"{member} takes {self.group.in_features} features, not {x.shape[-1]}")
        values = _to_numpy(x)
        result = self._last
        if result is None or not self._serves(result, member, x, values):
            output = _Product.apply(x, self, values)  # type: ignore[no-untyped-call]
            result = self._last = _Result(values, ref(x), output, set(self.group.members))
        result.waiting.discard(member)
        if not result.waiting:
            self._last = None
        part = result.output[:, self.rows(member)].contiguous()
        return part.view(*x.shape[:-1], part.shape[-1])

    def multiply(self, x: Float64, *, transposed: bool = False) -> Float64:
        """Return the product of ``x`` (n, features). Raises ``ValueError`` unless it is finite."""
        name = self.group.name
        if not np.isfinite(x).all():
            what = "the gradient behind" if transposed else "the input of"
            raise ValueError(
                f"{what} {name} has NaN or infinity, which cannot be encrypted: look for an overflow "
                "(float16?) or for rows that attend to nothing (padding; try attn_implementation='eager')"
            )
        expected = (len(x), self.group.in_features if transposed else self.group.rows)
        if not len(x):
            return np.zeros(expected)
        product = self.products.product(name, x, transposed=transposed)
        if product.shape != expected:
            raise ValueError(f"the product of {name} has the shape {product.shape}, not {expected}")
        return product

    def __deepcopy__(self, memo: dict[int, Any]) -> GroupProduct:
        # A copy of a model has the same server.
        copy = memo[id(self)] = GroupProduct(self.group, self.products)
        return copy

    @staticmethod
    def _serves(result: _Result, member: str, x: torch.Tensor, values: Float64) -> bool:
        differentiable = torch.is_grad_enabled() and x.requires_grad
        if member not in result.waiting or result.output.requires_grad != differentiable:
            return False
        # A gradient goes back to this tensor, and not to another with the same values.
        if differentiable and result.source() is not x:
            return False
        return result.output.dtype == x.dtype and np.array_equal(result.x, values)


class _Product(torch.autograd.Function):
    """The product (n, rows) of a group. It is linear, so that its gradient is one with the transpose."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, product: GroupProduct, values: Float64) -> torch.Tensor:
        ctx.product, ctx.shape = product, x.shape
        return _to_torch(product.multiply(values), x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        values = ctx.product.multiply(_to_numpy(gradient), transposed=True)
        return _to_torch(values, gradient).view(ctx.shape), None, None


class RemoteLinear(nn.Linear):
    """Takes the place of an ``nn.Linear`` or ``Conv1D`` whose weights are elsewhere.

    The bias stays here, under its name. An ``nn.Linear``, so that PEFT puts adapters on it: ``weight`` has
    a shape, a type and a device, and raises where its values are needed.
    """

    _like: torch.Tensor

    def __init__(
        self, name: str, product: GroupProduct, bias: nn.Parameter | None, like: torch.Tensor
    ) -> None:
        nn.Module.__init__(self)
        self.name = name
        self.product = product
        self.in_features = product.group.in_features
        self.out_features = product.group.out_features[product.group.members.index(name)]
        self.bias = bias  # type: ignore[assignment]
        # Follows .to(), so that the weight's type and device do.
        device = "cpu" if like.is_meta else like.device
        self.register_buffer("_like", torch.empty(0, dtype=like.dtype, device=device), persistent=False)

    @property
    def weight(self) -> RemoteWeight:  # type: ignore[override]
        """What can be known of the weights here."""
        return RemoteWeight.of(self.name, (self.out_features, self.in_features), self._like)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the layer's output (..., out_features) for ``input`` (..., in_features), in its type.

        Raises ``ValueError``, naming the layer, for NaN and infinity, and what the connection raises.
        """
        output = self.product.part(self.name, input)
        return output if self.bias is None else output + self.bias.to(output.dtype)


def replace(
    model: nn.Module, groups: Iterable[LinearGroup], products: Products
) -> Mapping[str, RemoteLinear]:
    """Put remote layers in the place of the linear layers that ``groups`` name, and return them by name.

    A layer that the model has in two places is replaced in both. Raises ``ValueError``, before the first
    change, if the model has no such layer.
    """
    aliases: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        aliases.setdefault(id(module), []).append(name)
    modules = dict(model.named_modules())
    remote: dict[str, RemoteLinear] = {}
    for group in groups:
        product = GroupProduct(group, products)
        for name, rows in zip(group.members, group.out_features, strict=True):
            layer = modules.get(name)
            size = sorted(getattr(layer, "weight", torch.empty(0)).shape)
            if layer is None or size != sorted((rows, group.in_features)):
                raise ValueError(f"the model has no linear layer {name!r} of {group.in_features} x {rows}")
            remote[name] = RemoteLinear(name, product, getattr(layer, "bias", None), layer.weight)
            remote[name].train(layer.training)
    for name, module in remote.items():
        for alias in aliases[id(modules[name])]:
            parent, _, attribute = alias.rpartition(".")
            setattr(model.get_submodule(parent), attribute, module)
    return remote


def _to_numpy(x: torch.Tensor) -> Float64:
    """Return the rows (n, features) of ``x``, copied."""
    array: Float64 = x.detach().reshape(-1, x.shape[-1]).to("cpu", torch.float64, copy=True).numpy()
    return array


def _to_torch(values: Float64, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(values).to(like.device, like.dtype)
