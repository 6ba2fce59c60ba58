"""A model at a server, used as if it were here."""

from __future__ import annotations

import os
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
from transformers import GPT2Config, PreTrainedTokenizerBase

from cipherlm.engine import EngineError, SecretKey
from cipherlm.models.ckks import Backend
from cipherlm.models.client import Constants, client_model
from cipherlm.models.config import EncryptionConfig
from cipherlm.models.integration import EncryptedGPT2LMHeadModel
from cipherlm.models.loading import load_tokenizer
from cipherlm.models.modules import Float64
from cipherlm.progress import Progress, silent
from cipherlm.schemes.ckks.session import Client, Geometry
from cipherlm.serving import keystore
from cipherlm.serving.bundle import (
    CONSTANTS_NAME,
    STATE_NAME,
    Bundle,
    BundleError,
    client_description,
    generate_keys,
)
from cipherlm.serving.ckks import CkksBackend
from cipherlm.serving.client import Connection
from cipherlm.serving.errors import ServerError
from cipherlm.serving.keystore import KeySet, KeyStoreError
from cipherlm.serving.protocol import UNKNOWN_KEYS
from cipherlm.serving.tfhe import TfheBackend

DEFAULT_KEYS = "default"


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
        progress: Progress = silent,
    ) -> RemoteModel:
        """Connect to ``cipherlm serve`` with the client's bundle of the model, and upload keys if need be.

        ``keys`` names a key set on this machine ("default"); it is made where there is none, and knows the
        bundle that it was made from, so that ``bundle`` can be left out later. ``passphrase``, or what
        returns it, is asked for only if the keys have one; new keys get it. ``verify`` is True, a file of
        certificates to trust, or False.

        Raises ``BundleError``, ``KeyStoreError``, ``PassphraseError``, and for the server's side
        :class:`~cipherlm.serving.errors.RemoteError`; ``WrongModel`` if it hosts another model.
        """
        chosen = _key_set(keys or DEFAULT_KEYS, bundle, passphrase, progress)
        opened = _bundle_of(chosen, bundle)
        description = opened.about["description"]
        if keystore.parameters_fingerprint(description) != chosen.parameters_fingerprint:
            raise KeyStoreError(
                f"the keys {chosen.name!r} are for another model: choose another name, and there will be "
                "new keys"
            )
        secret = chosen.secret(_asked(passphrase) if chosen.has_passphrase else None)
        connection = Connection(
            url, token=token, verify=verify, model=str(opened.about["fingerprint"]), progress=progress
        )
        try:
            connection.describe()
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
    def config(self) -> Any:
        """The model's configuration."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where the client's part of the model is."""
        return self.model.device

    def generate(self, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        """Continue token ids (n, tokens), with the options of transformers' ``generate``.

        Returns them with what follows, (n, tokens + new). Texts need not start with the public prefix.
        """
        prefix = torch.tensor(self.prefix, dtype=input_ids.dtype, device=input_ids.device)
        added = 0
        if len(prefix) and not bool((input_ids[:, : len(prefix)] == prefix).all()):
            input_ids, added = self.model.with_prefix(input_ids), len(prefix)
        mask = options.pop("attention_mask", None)
        if mask is not None and not bool(mask.bool().all()):
            raise ValueError("an attention_mask that hides tokens cannot be used: run texts one by one")
        if options.get("max_length") is not None:
            options["max_length"] += added
        with torch.inference_mode():
            generate = cast("Any", self.model).generate
            generated = generate(input_ids, attention_mask=torch.ones_like(input_ids), **options)
        result: torch.Tensor = generated[:, added:]
        return result

    def close(self) -> None:
        """End the session with the server."""
        self._connection.close()

    def __enter__(self) -> RemoteModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"RemoteModel({self.name!r} at {self._connection.url!r})"


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


def _key_set(
    name: str,
    bundle: str | os.PathLike[str] | None,
    passphrase: Callable[[], str | None] | str | None,
    progress: Progress,
) -> KeySet:
    """Return the keys of a name, made from the bundle if there are none."""
    if name in keystore.names():
        return KeySet.load(None, name)
    if bundle is None:
        raise KeyStoreError(
            f"there are no keys {name!r} yet: give the client's bundle, from which they are made"
        )
    description = client_description(bundle)
    with progress("making keys"):
        material = generate_keys(description, progress)
    with progress("storing keys"):
        return KeySet.create(None, name, description, material.secret, material.public, _asked(passphrase))


def _bundle_of(keys: KeySet, bundle: str | os.PathLike[str] | None) -> Bundle:
    if bundle is None and "bundle" not in keys.description:
        raise BundleError("which model? give the client's bundle, the directory `client` of an export")
    return Bundle.load(keys.description["bundle"] if bundle is None else bundle, "client")


def _model(
    bundle: Bundle, secret: bytes, connection: Connection, progress: Progress
) -> EncryptedGPT2LMHeadModel:
    """Return the client's model, connected."""
    root = bundle.directory
    encryption = EncryptionConfig.from_pretrained(root)
    if encryption.scheme != bundle.scheme:
        raise BundleError(f"{root} is damaged: two schemes")
    constants: Mapping[str, Constants] = {}
    circuits: Mapping[str, _Circuit] = {}
    backend: Backend | None = None
    if bundle.scheme == "ckks":
        geometry = Geometry.from_dict(bundle.about["parameters"])
        constants = _constants(bundle)
        try:
            secret_key = SecretKey.from_bytes(secret, geometry.parameters)
        except EngineError as error:
            raise KeyStoreError("the secret key is for another model, or damaged") from error
        backend = CkksBackend(Client(secret_key, geometry), connection)
    else:
        tfhe = TfheBackend.load(root, connection, progress)
        tfhe.load_secret(secret)
        circuits = {
            name: _Circuit(tfhe, name, circuit.description.tokens) for name, circuit in tfhe.circuits.items()
        }
    try:
        state = load_tensors(root / STATE_NAME)
        config = GPT2Config.from_pretrained(root)
        model = client_model(config, encryption, state, constants, circuits, progress=progress)
    except (SafetensorError, ValueError) as error:
        raise BundleError(f"{root} is damaged: {error}") from error
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
