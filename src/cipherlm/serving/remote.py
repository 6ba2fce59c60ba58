"""A model at a server, used as if it were here."""

from __future__ import annotations

import os
import re
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_tensors
from transformers import GPT2Config, LogitsProcessorList, PreTrainedTokenizerBase, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from cipherlm.engine import EngineError, SecretKey
from cipherlm.models.attention import EncryptedAttention
from cipherlm.models.ckks import Backend
from cipherlm.models.client import Constants, client_model
from cipherlm.models.config import EncryptionConfig
from cipherlm.models.integration import EncryptedGPT2LMHeadModel
from cipherlm.models.loading import load_tokenizer
from cipherlm.models.modules import Float64
from cipherlm.progress import Progress, silent
from cipherlm.schemes.ckks.session import Client
from cipherlm.serving import keystore
from cipherlm.serving.bounds import Bounds
from cipherlm.serving.bundle import (
    CONSTANTS_NAME,
    STATE_NAME,
    Bundle,
    BundleError,
    client_description,
    generate_keys,
)
from cipherlm.serving.ckks import CkksBackend, bounds_of, geometry_of
from cipherlm.serving.client import Connection
from cipherlm.serving.errors import ServerError
from cipherlm.serving.key_lock import making_keys
from cipherlm.serving.keystore import KeySet, KeyStoreError
from cipherlm.serving.protocol import UNKNOWN_KEYS
from cipherlm.serving.tfhe import TfheBackend

_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]+")


class RemoteModel:
    """A GPT-2 whose encrypted modules a server computes. Its ``generate`` is that of transformers.

    Made by :meth:`connect`. The secret key, the text and what is not remote are here; close it when done.
    """

    def __init__(
        self,
        model: EncryptedGPT2LMHeadModel,
        tokenizer: PreTrainedTokenizerBase,
        connection: Connection,
        name: str,
    ) -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self._connection = connection
        # A connection that is still open would keep the interpreter from ending.
        self._ended = weakref.finalize(self, connection.close)

    @classmethod
    def connect(
        cls,
        url: str,
        *,
        bundle: str | os.PathLike[str] | None = None,
        keys: str | None = None,
        token: str | None = None,
        passphrase: Callable[[], str | None] | str | None = None,
        verify: str | os.PathLike[str] | bool = True,
        insecure_plain_http: bool = False,
        progress: Progress = silent,
    ) -> RemoteModel:
        """Connect to ``cipherlm serve`` with the client's bundle of the model, and upload keys if need be.

        ``keys`` names a key set on this machine; without a name, it is one that fits the model. Where there
        is none it is made, under the model's name, and remembers the bundle, which can be left out later.
        ``passphrase``, or what returns it, is asked for only if the keys have one; new keys get it.
        ``verify`` is True, a file of certificates to trust, or False, which does not go with a ``token``.
        A server on another machine needs ``https://``, unless ``insecure_plain_http``.

        Raises ``BundleError``, ``KeyStoreError``, ``PassphraseError``, and for the server's side
        :class:`~cipherlm.serving.errors.RemoteError`; ``WrongModel`` if it hosts another model.
        """
        expected = None if bundle is None else client_description(bundle)
        connection = Connection(
            url,
            token=token,
            verify=verify,
            insecure_plain_http=insecure_plain_http,
            model=None if expected is None else str(expected["fingerprint"]),
            progress=progress,
        )
        try:
            described = connection.describe()
            chosen = _key_set(keys, expected, described, passphrase, progress)
            opened = _bundle_of(chosen, bundle, described)
            secret = chosen.secret(_asked(passphrase) if chosen.has_passphrase else None)
            model = _model(opened, secret, connection, progress)
            _open(connection, chosen)
        except BaseException:
            connection.close()
            raise
        return cls(model, load_tokenizer(opened.directory), connection, str(opened.about["name"]))

    @property
    def prefix(self) -> list[int]:
        """The public token ids that are put before every text; none with TFHE."""
        return self.model.prefix

    @property
    def context_length(self) -> int:
        """How many tokens a text and what follows may have together, without the prefix."""
        placement, modules = self.model.placement, self.model.encrypted_modules.values()
        if placement is not None:
            return placement.geometry.context - len(placement.prefix)
        return min(m.circuit_tokens for m in modules if isinstance(m, EncryptedAttention))

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where the client's part of the model is."""
        return self.model.device

    def generate(self, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        """Continue token ids (n, tokens), with the options of transformers' ``generate``.

        Returns them with what follows, (n, tokens + new). Texts need not start with the public prefix; where
        they do not, streamers, stopping criteria and logits processors see nothing of it either.

        The server is asked until the token budget (``max_new_tokens``) is reached, whatever ends the text, so
        that it does not learn how long the text is; with ``reveal_length=True`` it is not. See
        :meth:`~cipherlm.models.integration.EncryptedGPT2LMHeadModel.generate`.
        """
        prefix = torch.tensor(self.prefix, dtype=input_ids.dtype, device=input_ids.device)
        added = 0
        if len(prefix) and not bool((input_ids[:, : len(prefix)] == prefix).all()):
            input_ids, added = self.model.with_prefix(input_ids), len(prefix)
        mask = options.pop("attention_mask", None)
        if mask is not None and not bool(mask.bool().all()):
            raise ValueError("an attention_mask that hides tokens cannot be used: run texts one by one")
        for name in ("max_length", "min_length"):
            if options.get(name) is not None:
                options[name] += added
        for name, kind in (
            ("stopping_criteria", StoppingCriteriaList),
            ("logits_processor", LogitsProcessorList),
        ):
            if added and options.get(name):
                options[name] = kind([_behind(added, function) for function in options[name]])
        if added and options.get("streamer") is not None:
            options["streamer"] = _Streamer(options["streamer"], added)
        with torch.inference_mode():
            generate = cast("Any", self.model).generate
            generated = generate(input_ids, attention_mask=torch.ones_like(input_ids), **options)
        result: torch.Tensor = generated[:, added:]
        return result

    def close(self) -> None:
        """End the session with the server."""
        self._ended()

    def __enter__(self) -> RemoteModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"RemoteModel({self.name!r} at {self._connection.url!r})"


def _behind(added: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of token ids that is called without the first ones."""

    def called(input_ids: torch.Tensor, *rest: Any, **options: Any) -> Any:
        return function(input_ids[:, added:], *rest, **options)

    return called


class _Streamer(BaseStreamer):  # type: ignore[misc, no-untyped-call, unused-ignore]
    """A streamer that does not see the first tokens of a prompt."""

    def __init__(self, streamer: Any, added: int) -> None:
        self._streamer, self._added = streamer, added

    def put(self, value: torch.Tensor) -> None:
        """Hand on the prompt without its first tokens, then everything."""
        self._streamer.put(value[..., self._added :])
        self._added = 0

    def end(self) -> None:
        """Hand on the end."""
        self._streamer.end()


@dataclass(frozen=True)
class _Circuit:
    """A TFHE circuit at the server, as an encrypted module of a model sees it."""

    backend: TfheBackend
    name: str
    tokens: int

    def execute(self, x: Float64) -> Float64:
        """Return the outputs (t, outputs) for hidden states (t, width)."""
        return self.backend.evaluate(self.name, x)


def _asked(passphrase: Callable[[], str | None] | str | None) -> str | None:
    return passphrase() if callable(passphrase) else passphrase


_BUNDLE = "the client's bundle, the directory `client` of its export: give --bundle DIR, or bundle= in Python"


def _key_set(
    name: str | None,
    bundle: Mapping[str, Any] | None,
    described: Mapping[str, Any],
    passphrase: Callable[[], str | None] | str | None,
    progress: Progress,
) -> KeySet:
    """Return the keys of a name, or some that fit, made from the bundle if there are none.

    Where another process is making keys, those are waited for.
    """
    found = _existing(name, described)
    if found is not None:
        return found
    with making_keys(progress):
        return _existing(name, described) or _made(name, bundle, passphrase, progress)


def _existing(name: str | None, described: Mapping[str, Any]) -> KeySet | None:
    there = keystore.names()
    if name is not None and name in there:
        chosen = KeySet.load(None, name)
        if not chosen.fits(described):
            raise KeyStoreError(
                f"the keys {name!r} are for another model: give another name, and new ones are made"
            )
        return chosen
    if name is None:
        fitting = [keys for keys in map(_loaded, there) if keys is not None and keys.fits(described)]
        # The model's own first: they know its bundle.
        fitting.sort(key=lambda keys: keys.description.get("fingerprint") != described["fingerprint"])
        if fitting:
            return fitting[0]
    return None


def _made(
    name: str | None,
    bundle: Mapping[str, Any] | None,
    passphrase: Callable[[], str | None] | str | None,
    progress: Progress,
) -> KeySet:
    if bundle is None:
        raise KeyStoreError(f"there are no keys for this model yet, and they are made from {_BUNDLE}")
    if name is None:
        name = f"{_NOT_IN_NAMES.sub('-', str(bundle['name'])).lstrip('-.')[:40]}-{bundle['fingerprint'][:8]}"
    with progress("making keys"):
        material = generate_keys(bundle, progress)
    with progress("storing keys"):
        return KeySet.create(None, name, bundle, material.secret, material.public, _asked(passphrase))


def _loaded(name: str) -> KeySet | None:
    """Return keys, or None for damaged ones, which are no reason not to use others."""
    try:
        return KeySet.load(None, name)
    except KeyStoreError:
        return None


def _bundle_of(keys: KeySet, bundle: str | os.PathLike[str] | None, described: Mapping[str, Any]) -> Bundle:
    if bundle is not None:
        return Bundle.load(bundle, "client")
    known = keys.description
    if "bundle" not in known or known.get("fingerprint") != described["fingerprint"]:
        raise BundleError(f"the keys fit this model, and what else a client needs is in {_BUNDLE}")
    return Bundle.load(known["bundle"], "client")


def _model(
    bundle: Bundle, secret: bytes, connection: Connection, progress: Progress
) -> EncryptedGPT2LMHeadModel:
    """Return the client's model, connected."""
    root = bundle.directory
    try:
        encryption = EncryptionConfig.from_pretrained(root)
        config = GPT2Config.from_pretrained(root)
        state = load_tensors(root / STATE_NAME)
    except (SafetensorError, OSError, ValueError) as error:
        raise BundleError(f"{root} is damaged: {error}") from error
    if encryption.scheme != bundle.scheme:
        raise BundleError(f"{root} is damaged: two schemes")
    constants: Mapping[str, Constants] = {}
    circuits: Mapping[str, _Circuit] = {}
    backend: Backend | None = None
    if bundle.scheme == "ckks":
        geometry = geometry_of(bundle.about)
        connection.bounds = bounds_of(bundle.about["description"], config.n_layer)
        constants = _constants(bundle)
        try:
            secret_key = SecretKey.from_bytes(secret, geometry.parameters)
        except EngineError as error:
            raise KeyStoreError("the secret key is for another model, or damaged") from error
        backend = CkksBackend(Client(secret_key, geometry), connection, connection.bounds.message_bytes)
    else:
        connection.bounds = Bounds(int(bundle.about["description"]["message_bytes"]), rounds=0)
        tfhe = TfheBackend.load(root, connection, progress)
        tfhe.load_secret(secret)
        circuits = {
            name: _Circuit(tfhe, name, circuit.description.tokens) for name, circuit in tfhe.circuits.items()
        }
    try:
        model = client_model(config, encryption, state, constants, circuits, progress=progress)
    except (ValueError, RuntimeError) as error:  # torch raises the latter for weights of another shape
        raise BundleError(f"{root} is damaged: {' '.join(str(error).split())}") from error
    if backend is not None:
        model.connect(backend)
    return model


def _constants(bundle: Bundle) -> dict[str, Constants]:
    path = bundle.directory / CONSTANTS_NAME
    try:
        outputs = load_file(path)
        return {
            name: Constants(np.asarray(outputs[name], np.float64), bool(facts["centred"]), facts["extra"])
            for name, facts in bundle.about["remote"].items()
        }
    except (SafetensorError, OSError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{path} is damaged: {error}") from error


def _open(connection: Connection, keys: KeySet) -> None:
    """Open a session; upload the keys that the server lacks."""
    try:
        connection.open(keys.fingerprints)
    except ServerError as error:
        if error.code != UNKNOWN_KEYS:
            raise
        for kind, fingerprint in keys.fingerprints.items():
            connection.upload(kind, Path(keys.path(kind)), sha256=fingerprint)
        connection.open(keys.fingerprints)
