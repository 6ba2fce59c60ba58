"""Who computes the remote modules of a model: over a network, here on ciphertexts, or on clear numbers."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain, starmap
from typing import Protocol

import numpy as np

from cipherlm.nn.blocks import Report, evaluate
from cipherlm.nn.clear import ClearTensor, Noise
from cipherlm.nn.module import Float64
from cipherlm.nn.tensor import Cache
from cipherlm.schemes.ckks.geometry import Geometry
from cipherlm.schemes.ckks.session import FLOOD, Hosted

WEIGHT_ERROR = 4e-5
"""The relative error of diagonals in 16 bits, as servers keep them."""


class TextLost(Exception):  # noqa: N818 - nobody's error
    """The other side no longer has the keys and values of this text: it has to start anew."""


class Backend(Protocol):
    """Whoever evaluates remote modules, and keeps the keys and values of each one's present text."""

    def evaluate(self, name: str, hidden: Float64, start: int, report: Report | None = None) -> Float64:
        """Return a module's outputs (tokens, width) for hidden states (tokens, width) from ``start`` on.

        Rows right behind the prefix start a new text; others go on where the text ends, or at one of its
        tokens, which is then dropped with all behind it. May raise :class:`TextLost` for those: then the same
        text comes again, from its start.
        """


class Simulated:
    """A backend on clear numbers: the same polynomials, with the noise of ciphertexts or with none."""

    def __init__(self, modules: Mapping[str, Hosted], geometry: Geometry, *, noise: bool) -> None:
        self._modules, self._geometry = modules, geometry
        parameters = geometry.parameters
        log_scale = float(np.log2(parameters.scale))
        self._noise = (
            Noise.of(parameters.degree, log_scale, weights=WEIGHT_ERROR, flood=FLOOD) if noise else None
        )
        self._seen: dict[str, tuple[list[Cache], int]] = {}

    def evaluate(self, name: str, hidden: Float64, start: int, report: Report | None = None) -> Float64:
        """See :class:`Backend`. Raises ``ValueError`` for rows that do not go on where the last ended."""
        hosted = self._modules[name]
        known, seen = self._seen.pop(name, ([], self._geometry.prefix))
        if start == self._geometry.prefix:
            known = hosted.caches()
        elif not self._geometry.prefix < start <= seen:
            raise ValueError(f"tokens from position {start} on, where {seen} was expected")
        elif start < seen:
            for cache in known:
                cache.past = tuple(kept.having(kept.values[:, :start]) for kept in cache.past)
        results, rest = [], hidden
        # The chunks in which ciphertexts go, so that the same polynomials serve each row.
        passes = self._geometry.passes(start, len(hidden))
        for position, count in chain.from_iterable(starmap(self._geometry.chunks, passes)):
            places = self._geometry.places(position, count)
            x = ClearTensor(rest[:count], self._noise, position, places)
            results.append(evaluate(hosted.module, x, known, report).values)
            rest = rest[count:]
        self._seen[name] = known, start + len(hidden)
        outputs = np.concatenate(results)
        return self._noise.of_result(outputs) if self._noise else outputs
