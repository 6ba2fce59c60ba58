"""What of a GPT-2 is computed on CKKS ciphertexts: the arithmetic of remote modules, and who does it.

A remote module is attention, an MLP, a block, or all blocks together. Rows of hidden states go to a
:class:`Backend` and come back: over a network, in this process on ciphertexts, or on clear numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention, GPT2Block

from cipherlm.models.activations import DEFAULT_ACTIVATION, activation
from cipherlm.models.gpt2 import GPT2, MLP, Attention, Block, attention_layers, caches, linear
from cipherlm.models.modules import Float64
from cipherlm.schemes.ckks.calibration import ExactActivation, ExactSoftmax
from cipherlm.schemes.ckks.functions import Activation, AnySoftmax, Ranges
from cipherlm.schemes.ckks.session import Geometry, Module
from cipherlm.schemes.ckks.simulation import Noise, SimulatedTensor
from cipherlm.schemes.ckks.tensor import Cache, KeyValue, T

Report = Callable[[int, int], None]
BlockRanges = Mapping[str, tuple[float, float]]
"""The ranges of one block's functions, by their names in ``Ranges``."""


class TextLost(Exception):  # noqa: N818 - nobody's error
    """The other side no longer has the keys and values of this text: it has to start anew."""


class Backend(Protocol):
    """Whoever evaluates remote modules, and keeps the keys and values of each one's present text."""

    def evaluate(self, name: str, hidden: Float64, start: int, report: Report | None = None) -> Float64:
        """Return a module's outputs (tokens, width) for hidden states (tokens, width) from ``start`` on.

        Rows right behind the prefix start a new text; others go on where the last ones ended. May raise
        :class:`TextLost` for those: then the same text comes again, from its start.
        """


class Part(Protocol):
    """The arithmetic of one remote module, exact or with fitted polynomials."""

    @property
    def centred(self) -> bool:
        """Whether inputs have to have a mean of zero, and outputs lack theirs."""

    def __call__(self, x: T, caches: Sequence[Cache], report: Report, /) -> T:
        """Return the outputs."""

    def keys_values(self, hidden: Float64, /) -> list[KeyValue]:
        """Return each attention layer's keys and values (heads, tokens, head_dim), computed exactly."""

    def calibrated(self, texts: Iterable[Float64], prefix: Sequence[KeyValue], /) -> list[BlockRanges]:
        """Return the ranges that each block's functions meet on texts (tokens, width) behind a prefix."""

    def fitted(self, ranges: Sequence[BlockRanges], keys: int, /) -> Part:
        """Return the part with polynomials for these ranges, for at most ``keys`` keys to a query."""


@dataclass(frozen=True, eq=False)
class BlocksPart:
    """One block or several."""

    model: GPT2
    centred = True

    def __call__(self, x: T, caches: Sequence[Cache], report: Report) -> T:
        """See :class:`Part`."""
        return self.model(x, caches, report)

    def keys_values(self, hidden: Float64) -> list[KeyValue]:
        """See :class:`Part`."""
        return self.model.keys_values(hidden)

    def calibrated(self, texts: Iterable[Float64], prefix: Sequence[KeyValue]) -> list[BlockRanges]:
        """See :class:`Part`."""
        return [asdict(ranges) for ranges in self.model.calibrated(texts, prefix)]

    def fitted(self, ranges: Sequence[BlockRanges], keys: int) -> BlocksPart:
        """See :class:`Part`."""
        return BlocksPart(self.model.fitted([Ranges(**own) for own in ranges], keys))


@dataclass(frozen=True, eq=False)
class AttentionPart:
    """Attention alone: its input has been normalised, with gain and shift, and its output has its mean."""

    attention: Attention
    centred = False

    def __call__(self, x: T, caches: Sequence[Cache], report: Report) -> T:
        """See :class:`Part`."""
        return self.attention(x, caches[0])

    def keys_values(self, hidden: Float64) -> list[KeyValue]:
        """See :class:`Part`."""
        cache = Cache()
        replace(self.attention, softmax=ExactSoftmax())(SimulatedTensor(hidden), cache)
        assert cache.past is not None
        key, value = cache.past
        return [(key.values, value.values)]

    def calibrated(self, texts: Iterable[Float64], prefix: Sequence[KeyValue]) -> list[BlockRanges]:
        """See :class:`Part`."""
        exact = ExactSoftmax()
        attention = replace(self.attention, softmax=exact)
        for hidden in texts:
            attention(SimulatedTensor(hidden), *(caches(prefix) or ()))
        return [{"scores": exact.scores.around_zero}]

    def fitted(self, ranges: Sequence[BlockRanges], keys: int) -> AttentionPart:
        """See :class:`Part`."""
        return AttentionPart(replace(self.attention, softmax=AnySoftmax(ranges[0]["scores"], keys)))


@dataclass(frozen=True, eq=False)
class MLPPart:
    """An MLP alone: its input has been normalised, with gain and shift, and its output has its mean."""

    mlp: MLP
    activation: str = DEFAULT_ACTIVATION
    """By its name in transformers."""
    centred = False

    def __call__(self, x: T, caches: Sequence[Cache], report: Report) -> T:
        """See :class:`Part`."""
        return self.mlp(x)

    def keys_values(self, hidden: Float64) -> list[KeyValue]:
        """See :class:`Part`."""
        return []

    def calibrated(self, texts: Iterable[Float64], prefix: Sequence[KeyValue]) -> list[BlockRanges]:
        """See :class:`Part`."""
        exact = ExactActivation(activation(self.activation))
        for hidden in texts:
            replace(self.mlp, activation=exact)(SimulatedTensor(hidden))
        return [{"gelu": exact.inputs.around_zero}]

    def fitted(self, ranges: Sequence[BlockRanges], keys: int) -> MLPPart:
        """See :class:`Part`."""
        fitted = Activation.fit(ranges[0]["gelu"], activation(self.activation))
        return replace(self, mlp=replace(self.mlp, activation=fitted))


def part_of(target: Any, config: Any) -> Part:
    """Return the exact arithmetic of a module of a ``GPT2LMHeadModel`` with this configuration.

    ``target`` is a ``GPT2Attention``, ``GPT2MLP`` or ``GPT2Block``, or a list of blocks. Raises
    ``ValueError`` for an activation that is none of ``ACTIVATIONS``.
    """
    if isinstance(target, GPT2Attention):
        return AttentionPart(Attention(target.num_heads, *attention_layers(target), ExactSoftmax()))
    name = config.activation_function
    if isinstance(target, GPT2MLP):
        exact = ExactActivation(activation(name))
        return MLPPart(MLP(linear(target.c_fc), linear(target.c_proj), exact), name)
    blocks = [target] if isinstance(target, GPT2Block) else target
    parts = tuple(Block.from_transformers(block, config) for block in blocks)
    return BlocksPart(GPT2(parts, config.layer_norm_epsilon, name))


def function_names(target: Any) -> list[tuple[str, ...]]:
    """Return the names of the ranges that calibration finds for a module, block by block."""
    if isinstance(target, GPT2Attention):
        return [("scores",)]
    if isinstance(target, GPT2MLP):
        return [("gelu",)]
    return [("ln_1", "scores", "ln_2", "gelu")] * (1 if isinstance(target, GPT2Block) else len(target))


class Simulated:
    """A backend on clear numbers: the same polynomials, with the noise of ciphertexts or with none."""

    def __init__(self, modules: Mapping[str, Module], geometry: Geometry, *, noise: bool) -> None:
        self._modules, self._geometry = modules, geometry
        parameters = geometry.parameters
        self._noise = Noise.of(parameters.degree, float(np.log2(parameters.scale))) if noise else None
        self._seen: dict[str, tuple[list[Cache], int]] = {}

    def evaluate(self, name: str, hidden: Float64, start: int, report: Report | None = None) -> Float64:
        """See :class:`Backend`. Raises ``ValueError`` for rows that do not go on where the last ended."""
        module = self._modules[name]
        known, seen = self._seen.pop(name, ([], 0))
        if start == self._geometry.prefix:
            known = [Cache(past) for past in module.prefix]
        elif start != seen:
            raise ValueError(f"tokens from position {start} on, where {seen} was expected")
        results, rest = [], hidden
        # The chunks in which ciphertexts go, so that the same polynomials serve each row.
        for _, count in self._geometry.chunks(start, len(hidden)):
            x = SimulatedTensor(rest[:count], self._noise)
            result: SimulatedTensor = module.function(x, known, report or _unheard)
            results.append(result.values)
            rest = rest[count:]
        self._seen[name] = known, start + len(hidden)
        return np.concatenate(results)


def _unheard(_done: int, _total: int) -> None:
    pass
