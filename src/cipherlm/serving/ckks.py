"""CKKS between two parties: weights and evaluation keys at the server, the secret key at the client."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from cipherlm.engine import (
    Ciphertext,
    EvaluationKeys,
    PublicKey,
    RefreshReply,
    RefreshRequest,
    SecretKey,
)
from cipherlm.engine.errors import EngineError, InternalError
from cipherlm.errors import Refused
from cipherlm.models.architecture import Args, architecture_of
from cipherlm.models.backends import TextLost
from cipherlm.nn.blocks import attention_layers
from cipherlm.nn.module import Module
from cipherlm.nn.ranges import Interval
from cipherlm.nn.tensor import Prefix
from cipherlm.nn.weights import part
from cipherlm.schemes.ckks.geometry import Geometry
from cipherlm.schemes.ckks.layout import ATTENTION_LEVEL
from cipherlm.schemes.ckks.session import MOST_CHUNKS, Client, Hosted, Server, Session
from cipherlm.serving.bounds import Bounds
from cipherlm.serving.computation import Evaluator, Exchange, Report
from cipherlm.serving.errors import RemoteError, SessionLost

Float64 = NDArray[np.float64]
Read = TypeVar("Read")

WEIGHTS_NAME = "weights.safetensors"
MODULES_NAME = "modules.json"
MODULES_VERSION = 2
EVALUATION, PUBLIC = "evaluation", "public"

MESSAGE_BYTES = 32 << 20
"""What the ciphertexts of one message may take: a refresh of a few at the highest level."""

MOST_ROUNDS = 64
"""Of refreshes that a block may take in one pass. One of GPT-2's size takes 7 to 9, and 15 where eight chunks
follow a thousand tokens."""

_SLACK = 1 << 20


class CkksHostedModel:
    """A server's modules with their weights, encoded once for all sessions; each brings its own keys."""

    def __init__(
        self, modules: Mapping[str, Hosted], geometry: Geometry, fingerprint: str, name: str
    ) -> None:
        self.geometry, self.name, self.fingerprint = geometry, name, fingerprint
        self._server = Server(modules, geometry)

    @classmethod
    def load(cls, directory: Path, geometry: Geometry, fingerprint: str, name: str) -> CkksHostedModel:
        """Load the modules that :func:`save_modules` wrote. Raises ``ValueError`` if they are damaged."""
        return cls(load_modules(directory, geometry), geometry, fingerprint, name)

    @property
    def description(self) -> dict[str, Any]:
        """What clients may know, as JSON: see ``HostedModel.description``."""
        return {
            "scheme": "ckks",
            "name": self.name,
            "modules": list(self._server.modules),
            "parameters": parameters_of(self.geometry),
            "fingerprint": self.fingerprint,
            "keys": {EVALUATION: self.geometry.evaluation_key_bytes + _SLACK, PUBLIC: _SLACK},
            "max_tokens": self.geometry.context,
            "message_bytes": MESSAGE_BYTES,
            "chunks": MOST_CHUNKS,
        }

    def open(self, keys: Mapping[str, Path]) -> CkksComputation:
        """Start a session with a client's keys. Raises ``Refused`` for any that are not for this model."""
        if set(keys) != {EVALUATION, PUBLIC}:
            raise Refused(f"a CKKS session needs keys of the kinds {EVALUATION!r} and {PUBLIC!r}")
        return CkksComputation(self._server, partial(_read_keys, dict(keys), self.geometry))


class CkksComputation:
    """One session: a client's keys, and the keys and values of its tokens, encrypted.

    ``read_keys`` reads the keys: now, and again for an evaluation after they were released.
    """

    def __init__(self, server: Server, read_keys: Callable[[], tuple[EvaluationKeys, PublicKey]]) -> None:
        self._parameters = server.geometry.parameters
        self._read_keys = read_keys
        keys, public_key = read_keys()
        self._fingerprint = keys.fingerprint
        self._exchange: Exchange | None = None
        self._session: Session | None = server.open(keys, public_key, self._refresh)
        self._lock = threading.Lock()  # keys may be released when an evaluation begins

    def evaluate(
        self, module: str, start: int, count: int, inputs: Sequence[bytes], exchange: Exchange, report: Report
    ) -> list[bytes]:
        """See ``Computation.evaluate``."""
        if self._session is None:
            raise Refused("the session is closed")
        if len(inputs) > MOST_CHUNKS:
            raise Refused(f"tokens come in {MOST_CHUNKS} ciphertexts at most, not in {len(inputs)}")
        ciphertexts = [self._input(data) for data in inputs]
        with self._lock:
            session = self._session
            if session is None:
                raise Refused("the session is closed")
            if not session.has_keys:
                session.load_keys(*self._read_keys())
            self._exchange = exchange
            try:
                results = session.evaluate(module, start, ciphertexts, count, report)
            finally:
                self._exchange = None
        return [result.to_bytes() for result in results]

    def release_keys(self) -> None:
        """See ``Computation.release_keys``: hundreds of megabytes. The text's KV cache stays."""
        with self._lock:
            if self._session is not None:
                self._session.release_keys()

    def close(self) -> None:
        """Let go of the keys and of all ciphertexts."""
        with self._lock:
            if self._session is not None:
                self._session.close()
                self._session = None

    def _input(self, data: bytes) -> Ciphertext:
        """Return a ciphertext as :meth:`Client.encrypt` makes it. Raises ``Refused`` for any other."""
        ciphertext = _parsed(lambda: Ciphertext.from_bytes(data, self._parameters))
        if not ciphertext.seeded:
            raise Refused(
                "a ciphertext whose second half is not expanded from a seed: a client may not choose it"
            )
        about = (ciphertext.level, ciphertext.degree, ciphertext.key_fingerprint)
        if about != (ATTENTION_LEVEL, 1, self._fingerprint) or ciphertext.scale != self._parameters.scale:
            raise Refused("a ciphertext of another level or scale, or under another key")
        return ciphertext

    def _refresh(self, request: RefreshRequest) -> RefreshReply:
        assert self._exchange is not None
        reply = self._exchange(request.to_bytes())
        return _parsed(lambda: RefreshReply.from_bytes(reply, self._parameters))


class CkksBackend:
    """The client's side: the secret key, and a connection to where the weights are.

    ``message_bytes`` is what a reply to a refresh may have at most: a request for more is not answered.
    """

    def __init__(self, client: Client, connection: Evaluator, message_bytes: int = MESSAGE_BYTES) -> None:
        self._client, self._connection, self._message_bytes = client, connection, message_bytes
        self._parameters = client.geometry.parameters

    def evaluate(self, name: str, hidden: Float64, start: int, report: Report | None = None) -> Float64:
        """Return a module's outputs (tokens, width) for hidden states (tokens, width) from ``start`` on.

        Raises ``TextLost`` where the server no longer has the tokens before ``start``: a new session is open.
        """
        rows = []
        for position, count in self._client.passes(start, len(hidden)):
            tokens = hidden[position - start : position - start + count]
            inputs = [ciphertext.to_bytes() for ciphertext in self._client.encrypt(tokens, position)]
            try:
                results = self._connection.evaluate(name, position, count, inputs, self._refresh, report)
            except SessionLost as error:
                self._connection.reopen()
                raise TextLost(str(error)) from error
            rows.append(self._decrypted(results, len(inputs), count, position))
        return np.concatenate(rows)

    def _decrypted(self, results: Sequence[bytes], sent: int, count: int, position: int) -> Float64:
        if len(results) != sent:
            raise RemoteError(f"the server sent {len(results)} ciphertexts, and {sent} were expected")
        try:
            outputs = [Ciphertext.from_bytes(result, self._parameters) for result in results]
            return self._client.decrypt(outputs, count, position)
        except EngineError as error:
            raise RemoteError(f"the server sent no result that can be decrypted: {error}") from error

    def _refresh(self, request: bytes) -> bytes:
        try:
            parsed = RefreshRequest.from_bytes(request, self._parameters)
            if parsed.reply_bytes > self._message_bytes:
                raise RemoteError(
                    f"the server asks for {parsed.size} fresh ciphertexts at level {parsed.to_level}, more "
                    "than a message of this model holds"
                )
            return self._client.refresh(parsed).to_bytes()
        except EngineError as error:
            raise RemoteError(f"the server sent no ciphertexts that can be refreshed: {error}") from error


def parameters_of(geometry: Geometry) -> dict[str, Any]:
    """Return what keys depend on, as JSON: the geometry, and the digest of what follows from it."""
    return {"geometry": geometry.to_dict(), "digest": geometry.digest}


def bounds_of(description: Mapping[str, Any], blocks: int) -> Bounds:
    """Return what the server of a described model of so many blocks may ask for in one evaluation."""
    return Bounds(int(description["message_bytes"]), MOST_ROUNDS * blocks)


def chunks_of(description: Mapping[str, Any]) -> int:
    """Return how many chunks of a prompt the server of a described model takes in one evaluation."""
    return min(int(description["chunks"]), MOST_CHUNKS)


def geometry_of(description: Mapping[str, Any]) -> Geometry:
    """Return the geometry of a described model.

    Raises ``ValueError`` for one that makes no sense, or that another version of CipherLM computes with.
    """
    parameters = description.get("parameters")
    geometry = Geometry.from_dict(parameters.get("geometry") if isinstance(parameters, dict) else None)
    if parameters_of(geometry) != parameters:
        raise ValueError("the model is of another version of CipherLM, which needs other keys")
    return geometry


def generate(geometry: Geometry) -> tuple[SecretKey, Mapping[str, Callable[[Any], object]]]:
    """Make a secret key, and by kind what writes the keys for a server to a file."""
    client = Client.generate(geometry)
    public = {
        EVALUATION: lambda file: client.evaluation_keys().write_to(file),
        PUBLIC: lambda file: client.public_key().write_to(file),
    }
    return client.secret_key, public


@dataclass(frozen=True, eq=False)
class RemotePart:
    """What a server needs of a remote module: the exact module, the prefix, and ranges for polynomials."""

    module: Module
    prefixes: Sequence[Prefix]
    ranges: Mapping[str, Interval]


def save_modules(directory: Path, model_type: str, args: Args, parts: Mapping[str, RemotePart]) -> list[Path]:
    """Write what a server evaluates, by the names of the modules in the model of transformers.

    Returns the paths of :data:`WEIGHTS_NAME` and :data:`MODULES_NAME`. Weights are kept in single precision.
    """
    arrays: dict[str, Float64] = {}
    for name, remote in parts.items():
        arrays |= {f"{name}.{key}": value for key, value in remote.module.weights.items()}
        for index, prefix in enumerate(remote.prefixes):
            arrays[f"{name}.prefix.{index}.keys"] = prefix.keys
            arrays[f"{name}.prefix.{index}.values"] = prefix.values
    about = {
        "version": MODULES_VERSION,
        "model_type": model_type,
        "args": asdict(cast(Any, args)),
        "modules": {name: {"ranges": dict(remote.ranges)} for name, remote in parts.items()},
    }
    weights, text = directory / WEIGHTS_NAME, directory / MODULES_NAME
    save_file({key: np.ascontiguousarray(value, np.float32) for key, value in arrays.items()}, weights)
    text.write_text(json.dumps(about, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return [weights, text]


def load_modules(directory: Path, geometry: Geometry) -> dict[str, Hosted]:
    """Read what :func:`save_modules` wrote, with its polynomials fitted.

    Raises ``ValueError``, naming the file, if it is damaged.
    """
    weights, text = directory / WEIGHTS_NAME, directory / MODULES_NAME
    try:
        arrays = load_file(weights)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{weights} is missing or damaged: {error}") from error
    try:
        about = json.loads(text.read_text(encoding="utf-8"))
        if about.get("version") != MODULES_VERSION:
            raise ValueError(
                f"version {about.get('version')!r} is not known: export the model again with this CipherLM"
            )
        architecture = architecture_of(about["model_type"])
        args = architecture.args.from_dict(about["args"])
        return {
            name: _hosted(architecture.make(name, args), part(arrays, name), facts["ranges"], geometry)
            for name, facts in about["modules"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{text} is missing, damaged or not of {weights.name}: {error}") from error


def _hosted(
    module: Module, arrays: Mapping[str, NDArray[Any]], ranges: Mapping[str, Any], geometry: Geometry
) -> Hosted:
    shape = (geometry.heads, geometry.prefix, geometry.head_dim)
    prefixes = []
    for index in range(attention_layers(module)):
        own = part(arrays, f"prefix.{index}")
        for kind in ("keys", "values"):
            if own[kind].shape != shape:
                raise ValueError(f"the prefix's {kind} are of the shape {own[kind].shape}, not {shape}")
        prefixes.append(Prefix(own["keys"], own["values"]))
    weights = {key: value for key, value in arrays.items() if not key.startswith("prefix.")}
    missing = sorted(set(module.weights) - set(weights))
    if missing:
        raise ValueError(f"{missing[0]} is missing")
    module.load(weights)
    intervals = {name: (float(low), float(high)) for name, (low, high) in ranges.items()}
    return Hosted(module.fitted(intervals, geometry.context), prefixes)


def modules_fingerprint(directory: Path) -> str:
    """Return the SHA-256 that names what a server evaluates."""
    digest = hashlib.sha256()
    for name in (WEIGHTS_NAME, MODULES_NAME):
        digest.update(hashlib.sha256((directory / name).read_bytes()).digest())
    return digest.hexdigest()


def _check_complete(keys: EvaluationKeys, geometry: Geometry) -> None:
    """Raise ``Refused`` unless keys serve all that is computed in a geometry."""
    parameters = geometry.parameters
    held = keys.galois_levels
    elements = {
        pow(5, rotation, 2 * parameters.degree): level for rotation, level in geometry.rotations.items()
    }
    conjugation = 2 * parameters.degree - 1
    for element, level in {**elements, conjugation: parameters.max_level}.items():
        if held.get(element, -1) < level:
            raise Refused("the evaluation keys are for another model: make keys for this one")
    if (keys.relinearization_level or -1) < parameters.max_level:
        raise Refused("the evaluation keys lack the one for products: make keys for this model")


def _read_keys(keys: Mapping[str, Path], geometry: Geometry) -> tuple[EvaluationKeys, PublicKey]:
    """Read a client's keys. Raises ``Refused`` for any that are not for this geometry."""
    parameters = geometry.parameters
    # The shorter one first: an error in it is found before the long ones are read.
    public = _parsed(lambda: PublicKey.from_bytes(keys[PUBLIC].read_bytes(), parameters))
    with keys[EVALUATION].open("rb") as file:
        evaluation = _parsed(lambda: EvaluationKeys.read_from(file, parameters))
        if file.read(1):
            raise Refused("the evaluation keys are followed by something else")
    if evaluation.fingerprint != public.fingerprint:
        raise Refused("the evaluation keys and the public key belong to different secret keys")
    _check_complete(evaluation, geometry)
    return evaluation, public


def _parsed(read: Callable[[], Read]) -> Read:
    """Read what a client sent. Raises ``Refused`` with what the engine finds wrong with these bytes."""
    try:
        return read()
    except InternalError:
        raise
    except EngineError as error:
        raise Refused(str(error)) from error
