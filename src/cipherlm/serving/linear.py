"""Linear layers at a server: products on a client's ciphertexts, with no library for models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from cipherlm.engine import Ciphertext, EvaluationKeys, Evaluator
from cipherlm.engine.errors import EngineError, InternalError
from cipherlm.errors import Refused
from cipherlm.linear.plan import Plan
from cipherlm.linear.server import LinearServer
from cipherlm.serving.bundle import LINEAR

Read = TypeVar("Read")

MAX_ROWS = 16
"""Vectors in one exchange: longer texts are several exchanges, so that no client computes for long."""
IN_FLIGHT = 4
"""Exchanges that one client may have asked for and not been answered."""
_FRAME_BYTES = 256
"""More than a ciphertext has beside its polynomials."""
_KEYS_SLACK = 1 << 16


class LinearHostedModel:
    """The matrices of a model's linear layers, kept once for all clients; see ``HostedProducts``."""

    def __init__(self, server: LinearServer, fingerprint: str, name: str) -> None:
        self.server, self.name, self.fingerprint = server, name, fingerprint

    @classmethod
    def load(cls, directory: Path, fingerprint: str, name: str) -> LinearHostedModel:
        """Map the matrices in a bundle. Raises ``ValueError`` if they are damaged or missing."""
        try:
            return cls(LinearServer.load(directory), fingerprint, name)
        except FileNotFoundError as error:
            raise ValueError(str(error)) from error

    @property
    def description(self) -> dict[str, Any]:
        """What clients may know, as JSON: see ``HostedProducts.description``."""
        return describe(self.server.plan, self.fingerprint, self.name)

    def connect(self, keys: bytes) -> LinearProducts:
        """Take a client's keys. Raises ``Refused`` for any that are not for this plan."""
        return LinearProducts(self.server, keys)


class LinearProducts:
    """One client's products; see ``Products`` in :mod:`cipherlm.serving.computation`."""

    def __init__(self, server: LinearServer, keys: bytes) -> None:
        parameters = server.plan.parameters
        evaluation = _parsed(lambda: EvaluationKeys.from_bytes(keys, parameters))
        _check_complete(evaluation, server.plan)
        self._server, self._fingerprint = server, evaluation.fingerprint
        self._evaluator: Evaluator | None = Evaluator(parameters, evaluation)

    def multiply(self, group: str, transposed: bool, rows: int, inputs: Sequence[bytes]) -> list[bytes]:
        """See ``Products.multiply``."""
        evaluator, plan = self._evaluator, self._server.plan
        if evaluator is None:
            raise Refused("the connection is closed")
        try:
            width = plan.of(group, transposed).packing.inputs
        except ValueError as error:
            raise Refused(str(error)) from error
        if not 1 <= rows <= MAX_ROWS or len(inputs) != rows * width:
            raise Refused(
                f"{len(inputs)} ciphertexts for {rows} vectors of {group}: 1 to {MAX_ROWS} are multiplied at "
                f"a time, of {width} ciphertexts each"
            )
        ciphertexts = [self._input(data, plan) for data in inputs]
        vectors = [ciphertexts[start : start + width] for start in range(0, len(ciphertexts), width)]
        try:
            results = self._server.multiply(evaluator, group, vectors, transposed=transposed)
        except (InternalError, EngineError):
            raise
        except ValueError as error:  # of another level or scale, or without a seed
            raise Refused(str(error)) from error
        return [ciphertext.to_bytes() for row in results for ciphertext in row]

    def close(self) -> None:
        """Let go of the keys."""
        self._evaluator = None

    def _input(self, data: bytes, plan: Plan) -> Ciphertext:
        ciphertext = _parsed(lambda: Ciphertext.from_bytes(data, plan.parameters))
        if ciphertext.key_fingerprint != self._fingerprint:
            raise Refused("a ciphertext under another key than the connection's")
        return ciphertext


def describe(plan: Plan, fingerprint: str, name: str) -> dict[str, Any]:
    """Return what clients may know of a model with linear layers at the server."""
    return {
        "scheme": "ckks",
        "placement": LINEAR,
        "name": name,
        "modules": list(plan.groups),
        "fingerprint": fingerprint,
        "plan": plan.digest,
        "keys": {},
        "max_rows": MAX_ROWS,
        "key_bytes": key_bytes(plan),
        "message_bytes": max(key_bytes(plan), exchange_bytes(plan)),
    }


def key_bytes(plan: Plan) -> int:
    """Return how many bytes evaluation keys for a plan have at most: they are sent with seeds."""
    parameters = plan.parameters
    return len(plan.rotations) * len(parameters.q + parameters.p) * parameters.degree * 8 + _KEYS_SLACK


def exchange_bytes(plan: Plan) -> int:
    """Return how many bytes the ciphertexts of a request or a reply have at most."""
    polynomial = plan.parameters.degree * 8
    widest = max(max(group.packing.inputs, 2 * group.packing.outputs) for group in plan.all())
    return MAX_ROWS * widest * (polynomial + _FRAME_BYTES)


def _check_complete(keys: EvaluationKeys, plan: Plan) -> None:
    """Raise ``Refused`` unless keys serve all products of a plan."""
    parameters = plan.parameters
    order = parameters.degree * (4 if parameters.real else 2)
    held = keys.galois_levels
    if any(pow(5, rotation, order) not in held for rotation in plan.rotations if rotation):
        raise Refused("the evaluation keys lack rotations that this model needs: make keys for its plan")


def _parsed(read: Callable[[], Read]) -> Read:
    """Read what a client sent. Raises ``Refused`` with what the engine finds wrong with these bytes."""
    try:
        return read()
    except InternalError:
        raise
    except EngineError as error:
        raise Refused(str(error)) from error
