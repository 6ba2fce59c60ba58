"""Products in one process: on ciphertexts, or in the clear with the errors of ciphertexts."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cipherlm.engine import Ciphertext, Evaluator
from cipherlm.linear.client import LinearClient
from cipherlm.linear.plan import Plan, errors
from cipherlm.linear.products import Float64
from cipherlm.linear.server import LinearServer, Row


class LocalProducts:
    """Client and server in one process, with bytes between them as over a connection."""

    def __init__(self, plan: Plan, weights: Mapping[str, NDArray[np.floating[Any]]]) -> None:
        self.plan, self._weights = plan, weights

    @cached_property
    def server(self) -> LinearServer:
        """The server's half, made when it is needed first."""
        return LinearServer.build(self.plan, self._weights)

    @cached_property
    def client(self) -> LinearClient:
        """The client's half, with a key of its own."""
        return LinearClient(self.plan)

    @cached_property
    def _evaluator(self) -> Evaluator:
        return Evaluator(self.plan.parameters, self.client.evaluation_keys())

    def product(self, group: str, x: Float64, *, transposed: bool = False) -> Float64:
        """Return x @ W.T, or x @ W, as ``Products`` says, by way of ciphertexts."""
        rows, norms = self.client.encrypt(group, x, transposed=transposed)
        results = self.server.multiply(self._evaluator, group, self._sent(rows), transposed=transposed)
        return self.client.decrypt(group, self._sent(results), norms, transposed=transposed)

    def _sent(self, rows: list[Row]) -> list[Row]:
        return [[Ciphertext.from_bytes(c.to_bytes(), self.plan.parameters) for c in row] for row in rows]


class SimulatedProducts:
    """A simulation: clear products with random errors as large as those of the ciphertexts."""

    def __init__(self, plan: Plan, weights: Mapping[str, NDArray[np.floating[Any]]], seed: int = 0) -> None:
        self.plan = plan
        self._generator = np.random.default_rng(seed)
        # What int16 rounds is a fixed change of the weights.
        self._weights = {
            name: np.asarray(weights[name], np.float64)
            + self._generator.normal(0.0, errors(plan.forward[name], plan).weight, weights[name].shape)
            for name in plan.groups
        }

    def product(self, group: str, x: Float64, *, transposed: bool = False) -> Float64:
        """Return x @ W.T, or x @ W, as ``Products`` says, with errors."""
        matrix = self._weights[group] if not transposed else self._weights[group].T
        error = errors(self.plan.of(group, transposed), self.plan)
        norms = np.linalg.norm(x, axis=1, keepdims=True)
        rows = np.linalg.norm(matrix, axis=1)
        deviations = norms * np.hypot(error.input * rows, error.output)
        return np.asarray(x @ matrix.T + self._generator.normal(size=deviations.shape) * deviations)
