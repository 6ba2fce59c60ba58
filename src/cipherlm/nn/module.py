"""Models as trees of linear layers and functions, which ranges, weights and names are found by walking."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from cipherlm.nn.ranges import Interval, Range

if TYPE_CHECKING:
    from typing_extensions import Self

Float64 = NDArray[np.float64]
Weights = Mapping[str, NDArray[Any]]
M = TypeVar("M", bound="Module")


class Module:
    """A part of a model. What it consists of are the modules, and lists of modules, among its attributes."""

    __call__: Any

    def sanitize(self, weights: Weights) -> dict[str, Float64]:
        """Return the weights of transformers' module of this kind, rearranged, by their names here."""
        raise NotImplementedError

    def children(self) -> Iterator[tuple[str, Module]]:
        """Yield its parts by name, in the order in which they were given to it."""
        for name, value in vars(self).items():
            if isinstance(value, Module):
                yield name, value
            elif isinstance(value, list):
                yield from ((f"{name}.{i}", item) for i, item in enumerate(value) if isinstance(item, Module))

    def named(self, kind: type[M], prefix: str = "") -> Iterator[tuple[str, M]]:
        """Yield all modules of a kind in this one by their names, joined by dots, this one among them."""
        if isinstance(self, kind):
            yield prefix, self
        for name, child in self.children():
            yield from child.named(kind, f"{prefix}.{name}" if prefix else name)

    def replaced(self, others: Mapping[str, Module]) -> Self:
        """Return a copy with other modules under these names; all else in it is shared."""
        result = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Module):
                setattr(result, name, _replaced(value, name, others))
            elif isinstance(value, list):
                setattr(result, name, [_replaced(v, f"{name}.{i}", others) for i, v in enumerate(value)])
        return result

    @property
    def ranges(self) -> dict[str, Interval]:
        """What the functions have met, by name, with a margin. Raises ``ValueError`` if nothing has run."""
        return {
            f"{name}.{what}": seen.interval
            for name, function in self.named(Nonlinearity)
            for what, seen in function.seen.items()
        }

    @property
    def range_names(self) -> list[str]:
        """The names in :attr:`ranges`."""
        return [f"{name}.{what}" for name, f in self.named(Nonlinearity) for what in f.seen]

    def recording(self) -> Self:
        """Return a copy whose functions have met nothing yet."""
        return self.replaced({name: function.fresh() for name, function in self.named(Nonlinearity)})

    def fitted(self, ranges: Mapping[str, Interval], keys: int) -> Self:
        """Return the module with polynomials for these ranges, for at most ``keys`` keys to a query.

        Raises ``ValueError`` where ranges are missing or too many, and where no polynomial serves one.
        """
        if set(ranges) != set(self.range_names):
            other = sorted(set(ranges) ^ set(self.range_names))[0]
            raise ValueError(f"the range {other} is missing, or of another model")
        fitted = {}
        for name, function in self.named(Nonlinearity):
            own = {what: ranges[f"{name}.{what}"] for what in function.seen}
            try:
                fitted[name] = function.fit(own, keys)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        return self.replaced(fitted)

    @property
    def weights(self) -> dict[str, Float64]:
        """The weights and biases of linear layers, by name."""
        arrays = {}
        for name, layer in self.named(Linear):
            arrays[f"{name}.weight"], arrays[f"{name}.bias"] = layer.weight, layer.bias
        return arrays

    def load(self: M, weights: Weights) -> M:
        """Take weights and biases (zeros where there are none) of all linear layers, and return the module.

        Raises ``ValueError`` for one that is missing, is of another shape, or is of no layer.
        """
        known = set()
        for name, layer in self.named(Linear):
            at = f"{name}." if name else ""
            if f"{at}weight" not in weights:
                raise ValueError(f"{at}weight is missing")
            layer.take(name, weights[f"{at}weight"], weights.get(f"{at}bias"))
            known |= {f"{at}weight", f"{at}bias"}
        other = sorted(set(weights) - known)
        if other:
            raise ValueError(f"{other[0]} is no weight of this model")
        return self


class Linear(Module):
    """Clear weights of ``x @ weight + bias``: ``weight`` (inputs, outputs), ``bias`` (outputs,)."""

    def __init__(self, weight: Float64, bias: Float64) -> None:
        if weight.ndim != 2 or bias.shape != weight.shape[1:]:
            raise ValueError(f"weight {weight.shape} and bias {bias.shape} do not fit together")
        self.weight, self.bias = weight, bias

    @classmethod
    def of(cls, inputs: int, outputs: int) -> Linear:
        """Return a layer of these widths, whose weights are to be loaded."""
        return cls(np.zeros((inputs, outputs)), np.zeros(outputs))

    def take(self, name: str, weight: NDArray[Any], bias: NDArray[Any] | None) -> None:
        """Take other weights of the same shape. Raises ``ValueError``, with the name, for any other."""
        if weight.shape != self.weight.shape or (bias is not None and bias.shape != self.bias.shape):
            raise ValueError(f"{name} has weights of the shape {weight.shape}, not {self.weight.shape}")
        self.weight = np.asarray(weight, np.float64)
        self.bias = np.zeros(weight.shape[1]) if bias is None else np.asarray(bias, np.float64)


class Nonlinearity(Module):
    """A function on clear numbers, which remembers what it meets, until a polynomial takes its place."""

    seen: dict[str, Range]

    def fresh(self) -> Nonlinearity:
        """Return the function with nothing met yet."""
        raise NotImplementedError

    def fit(self, ranges: Mapping[str, Interval], keys: int) -> Module:
        """Return the polynomials for ranges of these names; ``keys`` is how many a query sees at most.

        Raises ``ValueError`` for ranges that no polynomial serves.
        """
        raise NotImplementedError


def _replaced(value: Any, name: str, others: Mapping[str, Module]) -> Any:
    if not isinstance(value, Module):
        return value
    if name in others:
        return others[name]
    inner = {key[len(name) + 1 :]: other for key, other in others.items() if key.startswith(f"{name}.")}
    return value.replaced(inner) if inner else value
