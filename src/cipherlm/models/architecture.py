"""What an architecture's file has to say: its classes, and where they stand in the model of transformers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

from cipherlm.nn.module import Module
from cipherlm.nn.rotary import Rotary

MODULES = {
    "gpt2": "cipherlm.models.gpt2",
    "llama": "cipherlm.models.llama",
    "mistral": "cipherlm.models.llama",
    "qwen2": "cipherlm.models.llama",
}
"""The file of each architecture, by the ``model_type`` of transformers."""


class Args(Protocol):
    """What blocks depend on, whatever the architecture."""

    @property
    def width(self) -> int:
        """The width of hidden states."""

    @property
    def heads(self) -> int:
        """How many heads there are."""

    @property
    def head_dim(self) -> int:
        """How many features a head has."""

    @property
    def inner(self) -> int:
        """How many features an MLP has inside."""

    @property
    def layers(self) -> int:
        """How many blocks there are."""

    @property
    def positions(self) -> int:
        """How many tokens a text may have."""

    @property
    def epsilon(self) -> float:
        """What normalisations add to mean squares."""

    @property
    def rope(self) -> Rotary | None:
        """The rotation of queries and keys, if there is one."""


@dataclass(frozen=True)
class Architecture:
    """The classes of an architecture, made of ``(args, index)``, and the whole model of ``args``."""

    args: Any
    blocks: str
    """The name of the list of all blocks in the model of transformers."""
    parts: Mapping[str, Any]
    """The parts of a block that can be remote, by their names there."""
    block: Any
    model: Any
    embedding: str
    """The name of the token embedding in the model of transformers."""
    norm: str
    """The name of the normalisation behind the blocks there."""
    positions: str | None = None
    """The name of the embedding of positions there, if there is one."""
    layer: str = "Linear"
    """The class of its linear layers in the model of transformers."""
    centred: bool = False
    """Whether normalisations take the mean off first: blocks then need hidden states whose mean is zero."""

    def make(self, name: str, args: Args) -> Module:
        """Return the module that stands at ``name`` in the model of transformers, without its weights.

        Raises ``ValueError`` where nothing that can be remote stands there.
        """
        if name == self.blocks:
            module: Module = self.model(args)
            return module
        block, _, inside = name.removeprefix(f"{self.blocks}.").partition(".")
        made = self.block if not inside else self.parts.get(inside)
        if made is None or not block.isdecimal() or not name.startswith(f"{self.blocks}."):
            raise ValueError(f"{name} is no module that can be remote")
        module = made(args, int(block))
        return module

    def names(self, layers: int) -> Iterable[str]:
        """Yield the names of all that can be remote in a model of so many blocks."""
        yield self.blocks
        for index in range(layers):
            yield f"{self.blocks}.{index}"
            yield from (f"{self.blocks}.{index}.{part}" for part in self.parts)

    def is_centred(self, name: str) -> bool:
        """Say whether the module at ``name`` needs inputs whose mean is zero, and its outputs lack theirs."""
        inside = name.removeprefix(self.blocks).lstrip(".").partition(".")[2]
        return self.centred and not inside


def architecture_of(model_type: Any) -> Architecture:
    """Return the architecture of a ``model_type``. Raises ``ValueError`` for one that is not there."""
    if model_type not in MODULES:
        raise ValueError(
            f"cannot encrypt the architecture {model_type!r}; supported: {', '.join(MODULES)}. "
            'Its linear layers can be encrypted: target_modules="linear"'
        )
    architecture: Architecture = import_module(MODULES[model_type]).ARCHITECTURE
    return architecture
