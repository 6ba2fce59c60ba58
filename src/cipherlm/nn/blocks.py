"""Running parts of a model: block after block, with the keys and values of earlier tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from cipherlm.nn.clear import ClearTensor
from cipherlm.nn.module import Float64, Module, Weights
from cipherlm.nn.ranges import Interval
from cipherlm.nn.softmax import FittedSoftmax, Softmax
from cipherlm.nn.tensor import Cache, Prefix, T
from cipherlm.nn.weights import joined, part

Report = Callable[[int, int], None]


class Blocks(Module):
    """The blocks of a model, from embedded tokens to the hidden states before the last normalisation."""

    def __init__(self, blocks: Iterable[Any]) -> None:
        self.blocks = list(blocks)

    def __call__(self, x: T, caches: Sequence[Cache] | None = None, report: Report | None = None) -> T:
        """Return the last hidden states of hidden states (tokens, width).

        ``caches`` are each block's keys and values of the tokens before them. ``report`` hears after each
        block how many of all are done.
        """
        for index, block in enumerate(self.blocks):
            x = block(x, caches[index] if caches else None)
            if report is not None:
                report(index + 1, len(self.blocks))
        return x

    def sanitize(self, weights: Weights) -> dict[str, Float64]:
        """Return the weights of transformers' list of blocks by their names here."""
        return joined({f"blocks.{i}": b.sanitize(part(weights, str(i))) for i, b in enumerate(self.blocks)})


def evaluate(module: Module, x: T, caches: Sequence[Cache], report: Report | None = None) -> T:
    """Return the outputs of blocks, a block, an attention layer or an MLP, with a cache for each attention.

    The caches keep the keys and values of these tokens too.
    """
    if isinstance(module, Blocks):
        return module(x, caches, report)
    result: T = module(x, caches[0]) if caches else module(x)
    return result


def attention_layers(module: Module) -> int:
    """Return how many attention layers there are in a module."""
    return sum(1 for kind in (Softmax, FittedSoftmax) for _ in module.named(kind))


def prefixes(module: Module, hidden: Float64) -> list[Prefix]:
    """Return each attention layer's keys and values for the hidden states (tokens, width) of a prefix.

    They are computed exactly, and what the functions meet there is forgotten: the first tokens of a text have
    values far outside the ranges of others.
    """
    caches = [Cache() for _ in range(attention_layers(module))]
    evaluate(module.recording(), ClearTensor(hidden), caches)
    return [Prefix(key.values, value.values) for key, value in (cache.past for cache in caches)]


def calibrated(
    module: Module, texts: Iterable[Float64], before: Sequence[Prefix | None]
) -> dict[str, Interval]:
    """Return the ranges that a module's functions meet on texts (tokens, width), each behind a prefix."""
    recording = module.recording()
    start = before[0].tokens if before and before[0] else 0
    for hidden in texts:
        evaluate(recording, ClearTensor(np.asarray(hidden), position=start), [Cache(p) for p in before])
    return recording.ranges
