"""CKKS between two parties: weights and evaluation keys at the server, the secret key at the client."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

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
from cipherlm.models.activations import DEFAULT_ACTIVATION
from cipherlm.models.ckks import (
    AttentionPart,
    BlockRanges,
    BlocksPart,
    MLPPart,
    Part,
    TextLost,
)
from cipherlm.models.gpt2 import GPT2, MLP, Attention, Block
from cipherlm.schemes.ckks.calibration import ExactFunctions
from cipherlm.schemes.ckks.layout import ATTENTION_LEVEL
from cipherlm.schemes.ckks.session import Client, Geometry, Module, Server, Session
from cipherlm.schemes.ckks.tensor import KeyValue, Linear
from cipherlm.serving.bounds import Bounds
from cipherlm.serving.computation import Evaluator, Exchange, Report
from cipherlm.serving.errors import RemoteError, SessionLost

Float64 = NDArray[np.float64]
Read = TypeVar("Read")

WEIGHTS_NAME = "weights.safetensors"
MODULES_NAME = "modules.json"
EVALUATION, PUBLIC = "evaluation", "public"

MESSAGE_BYTES = 32 << 20
"""What the ciphertexts of one message may take: a refresh of a few at the highest level."""

MOST_ROUNDS = 32
"""Of refreshes that a block may take, for a prompt or for one token. GPT-2's takes 8 and 12."""

_SLACK = 1 << 20


class CkksHostedModel:
    """A server's modules with their weights, encoded once for all sessions; each brings its own keys."""

    def __init__(
        self, modules: Mapping[str, Module], geometry: Geometry, fingerprint: str, name: str
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
            "keys": {EVALUATION: _key_bytes(self.geometry), PUBLIC: _SLACK},
            "max_tokens": self.geometry.context,
            "message_bytes": MESSAGE_BYTES,
        }

    def open(self, keys: Mapping[str, Path]) -> CkksComputation:
        """Start a session with a client's keys. Raises ``Refused`` for any that are not for this model."""
        if set(keys) != {EVALUATION, PUBLIC}:
            raise Refused(f"a CKKS session needs keys of the kinds {EVALUATION!r} and {PUBLIC!r}")
        parameters = self.geometry.parameters
        with keys[EVALUATION].open("rb") as file:
            evaluation = _parsed(lambda: EvaluationKeys.read_from(file, parameters))
            if file.read(1):
                raise Refused("the evaluation keys are followed by something else")
        public = _parsed(lambda: PublicKey.from_bytes(keys[PUBLIC].read_bytes(), parameters))
        if evaluation.fingerprint != public.fingerprint:
            raise Refused("the evaluation keys and the public key belong to different secret keys")
        _check_complete(evaluation, self.geometry)
        return CkksComputation(self._server, evaluation, public)


class CkksComputation:
    """One session: a client's keys, and the keys and values of its tokens, encrypted."""

    def __init__(self, server: Server, keys: EvaluationKeys, public_key: PublicKey) -> None:
        self._parameters = server.geometry.parameters
        self._fingerprint = keys.fingerprint
        self._exchange: Exchange | None = None
        self._session: Session | None = server.open(keys, public_key, self._refresh)

    def evaluate(
        self, module: str, start: int, count: int, inputs: Sequence[bytes], exchange: Exchange, report: Report
    ) -> list[bytes]:
        """See ``Computation.evaluate``."""
        session = self._session
        if session is None:
            raise Refused("the session is closed")
        if len(inputs) != 1:
            raise Refused(f"tokens come in one ciphertext, not in {len(inputs)}")
        ciphertext = self._input(inputs[0])
        self._exchange = exchange
        try:
            results = session.evaluate(module, start, [ciphertext], count, report)
        finally:
            self._exchange = None
        return [result.to_bytes() for result in results]

    def close(self) -> None:
        """Let go of the keys and of all ciphertexts."""
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
        for position, count in self._client.chunks(start, len(hidden)):
            chunk = hidden[position - start : position - start + count]
            inputs = [ciphertext.to_bytes() for ciphertext in self._client.encrypt(chunk, position)]
            try:
                results = self._connection.evaluate(name, position, count, inputs, self._refresh, report)
            except SessionLost as error:
                self._connection.reopen()
                raise TextLost(str(error)) from error
            rows.append(self._decrypted(results, count, position))
        return np.concatenate(rows)

    def _decrypted(self, results: Sequence[bytes], count: int, position: int) -> Float64:
        if len(results) != 1:
            raise RemoteError(f"the server sent {len(results)} ciphertexts, and one was expected")
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
    """Return what keys depend on, as JSON: the geometry, and a hash of what keys it needs."""
    rotations = sorted(geometry.layout.rotations(geometry.parameters.max_level).items())
    digest = hashlib.sha256(json.dumps(rotations).encode()).hexdigest()
    return {"geometry": geometry.to_dict(), "rotations": digest}


def bounds_of(description: Mapping[str, Any], blocks: int) -> Bounds:
    """Return what the server of a described model of so many blocks may ask for in one evaluation."""
    return Bounds(int(description["message_bytes"]), MOST_ROUNDS * blocks)


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


def save_modules(
    directory: Path,
    parts: Mapping[str, Part],
    prefixes: Mapping[str, Sequence[KeyValue]],
    ranges: Mapping[str, Sequence[BlockRanges]],
) -> list[Path]:
    """Write what a server evaluates: exact parts, keys and values of the prefix, and ranges for polynomials.

    Returns the paths of :data:`WEIGHTS_NAME` and :data:`MODULES_NAME`. Weights are kept in single precision.
    """
    arrays: dict[str, Float64] = {}
    about: dict[str, Any] = {}
    for name, part in parts.items():
        kind, layers, facts = _taken_apart(part)
        about[name] = {"kind": kind, **facts, "ranges": [dict(own) for own in ranges[name]]}
        for key, layer in layers.items():
            arrays[f"{name}.{key}.weight"], arrays[f"{name}.{key}.bias"] = layer.weight, layer.bias
        for index, pair in enumerate(prefixes[name]):
            arrays[f"{name}.prefix.{index}.key"], arrays[f"{name}.prefix.{index}.value"] = pair
    weights, text = directory / WEIGHTS_NAME, directory / MODULES_NAME
    save_file({key: np.ascontiguousarray(value, np.float32) for key, value in arrays.items()}, weights)
    text.write_text(json.dumps(about, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return [weights, text]


def load_modules(directory: Path, geometry: Geometry) -> dict[str, Module]:
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
        return {name: _module(name, facts, arrays, geometry) for name, facts in about.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{text} is missing, damaged or not of {weights.name}: {error}") from error


def _module(
    name: str, facts: dict[str, Any], arrays: Mapping[str, NDArray[Any]], geometry: Geometry
) -> Module:
    def array(key: str) -> Float64:
        return np.asarray(arrays[f"{name}.{key}"], np.float64)

    width = geometry.heads * geometry.head_dim

    def array_of(key: str, *shape: int) -> Float64:
        found = array(key)
        if found.shape != shape:
            raise ValueError(f"{name}.{key} is of the shape {found.shape}, not {shape}")
        return found

    def layer(key: str, inputs: int, outputs: int) -> Linear:
        return Linear(array_of(f"{key}.weight", inputs, outputs), array_of(f"{key}.bias", outputs))

    def attention(at: str) -> Attention:
        layers = layer(f"{at}c_attn", width, 3 * width), layer(f"{at}c_proj", width, width)
        return Attention(geometry.heads, *layers, exact.softmax)

    def mlp(at: str) -> MLP:
        inner = len(array(f"{at}c_fc.bias"))
        return MLP(layer(f"{at}c_fc", width, inner), layer(f"{at}c_proj", inner, width), exact.activation)

    used = facts.get("activation", DEFAULT_ACTIVATION)  # bundles of the first version name none
    exact = ExactFunctions(float(facts.get("epsilon", 0.0)))
    part: Part
    count = 1
    if facts["kind"] == "attention":
        part = AttentionPart(attention(""))
    elif facts["kind"] == "mlp":
        part, count = MLPPart(mlp(""), used), 0
    elif facts["kind"] == "blocks":
        count = int(facts["blocks"])
        blocks = [
            Block(exact.ln_1, attention(f"{i}.attn."), exact.ln_2, mlp(f"{i}.mlp.")) for i in range(count)
        ]
        part = BlocksPart(GPT2(tuple(blocks), exact.epsilon, used))
    else:
        raise ValueError(f"a module of the kind {facts['kind']!r}")
    pair = (geometry.heads, geometry.prefix, geometry.head_dim)
    prefix = [
        (array_of(f"prefix.{i}.key", *pair), array_of(f"prefix.{i}.value", *pair)) for i in range(count)
    ]
    ranges = [{key: (float(low), float(high)) for key, (low, high) in own.items()} for own in facts["ranges"]]
    return Module(part.fitted(ranges, geometry.context), prefix)


def _taken_apart(part: Part) -> tuple[str, dict[str, Linear], dict[str, Any]]:
    """Return the kind of a part, its linear layers by name, and what else it consists of."""
    if isinstance(part, AttentionPart):
        return "attention", {"c_attn": part.attention.c_attn, "c_proj": part.attention.c_proj}, {}
    if isinstance(part, MLPPart):
        layers = {"c_fc": part.mlp.c_fc, "c_proj": part.mlp.c_proj}
        return "mlp", layers, {"activation": part.activation}
    if not isinstance(part, BlocksPart):
        raise TypeError(f"{type(part).__name__} cannot be saved")
    model, layers = part.model, {}
    for i, block in enumerate(model.blocks):
        layers[f"{i}.attn.c_attn"], layers[f"{i}.attn.c_proj"] = block.attn.c_attn, block.attn.c_proj
        layers[f"{i}.mlp.c_fc"], layers[f"{i}.mlp.c_proj"] = block.mlp.c_fc, block.mlp.c_proj
    facts = {"blocks": len(model.blocks), "epsilon": model.epsilon, "activation": model.activation}
    return "blocks", layers, facts


def modules_fingerprint(directory: Path) -> str:
    """Return the SHA-256 that names what a server evaluates."""
    digest = hashlib.sha256()
    for name in (WEIGHTS_NAME, MODULES_NAME):
        digest.update(hashlib.sha256((directory / name).read_bytes()).digest())
    return digest.hexdigest()


def _key_bytes(geometry: Geometry) -> int:
    """Return how many bytes the evaluation keys of this geometry have, at most.

    A key has a polynomial for each digit of two primes, modulo all primes up to its level and two more.
    """
    parameters = geometry.parameters
    top = parameters.max_level
    levels = [*geometry.layout.rotations(top).values(), top, top]
    polynomials = sum((level + 2) // 2 * (level + 3) for level in levels)
    return polynomials * parameters.degree * 8 + _SLACK


def _check_complete(keys: EvaluationKeys, geometry: Geometry) -> None:
    """Raise ``Refused`` unless keys serve all that is computed in a geometry."""
    parameters = geometry.parameters
    held = keys.galois_levels
    wanted = geometry.layout.rotations(parameters.max_level)
    elements = {pow(5, rotation, 2 * parameters.degree): level for rotation, level in wanted.items()}
    conjugation = 2 * parameters.degree - 1
    for element, level in {**elements, conjugation: parameters.max_level}.items():
        if held.get(element, -1) < level:
            raise Refused("the evaluation keys are for another model: make keys for this one")
    if (keys.relinearization_level or -1) < parameters.max_level:
        raise Refused("the evaluation keys lack the one for products: make keys for this model")


def _parsed(read: Callable[[], Read]) -> Read:
    """Read what a client sent. Raises ``Refused`` with what the engine finds wrong with these bytes."""
    try:
        return read()
    except InternalError:
        raise
    except EngineError as error:
        raise Refused(str(error)) from error
