"""A model at a server, used as if it were here."""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file as load_tensors
from transformers import AutoConfig, LogitsProcessorList, PreTrainedTokenizerBase, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from cipherlm.models.client import client_model
from cipherlm.models.config import EncryptionConfig
from cipherlm.models.drafts import load_draft
from cipherlm.models.encrypted import EncryptedModel
from cipherlm.models.loading import load_tokenizer
from cipherlm.progress import Progress, silent
from cipherlm.serving.bundle import (
    DRAFT_NAME,
    LINEAR,
    STATE_NAME,
    Bundle,
    BundleError,
    client_description,
)
from cipherlm.serving.client import Connection
from cipherlm.serving.errors import ServerError
from cipherlm.serving.key_choice import BUNDLE_HINT, KeyChoice
from cipherlm.serving.key_use import BUDGET, KeyUse, server_identity
from cipherlm.serving.keystore import KeySet
from cipherlm.serving.protocol import UNKNOWN_KEYS
from cipherlm.serving.schemes import scheme_of


class RemoteModel:
    """A model whose encrypted modules a server computes. Its ``generate`` is that of transformers.

    Made by :meth:`connect`. The secret key, the text and what is not remote are here; close it when done.
    """

    def __init__(
        self,
        model: EncryptedModel,
        tokenizer: PreTrainedTokenizerBase,
        connection: Connection,
        name: str,
        keys: Keys | None = None,
        bundle: Bundle | None = None,
    ) -> None:
        self.model, self.tokenizer, self.name, self._bundle = model, tokenizer, name, bundle
        self._connection, self._keys = connection, keys
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
        key_budget: int = BUDGET,
        tell: Callable[[str], None] = warnings.warn,
        progress: Progress = silent,
    ) -> RemoteModel:
        """Connect to ``cipherlm serve`` with the client's bundle of the model, and upload keys if need be.

        ``keys`` names a key set on this machine; without a name, it is one that fits the model. Where there
        is none it is made, under the model's name, and remembers the bundle, which can be left out later.
        Keys belong to the server and the model that they are used with first, and serve ``key_budget`` texts;
        then new ones take their place, under the name with a number, and ``tell`` hears why.
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
            if described.get("placement") == LINEAR:
                raise BundleError(
                    "linear layers are at this server: give the client's bundle (--bundle), in Python to "
                    "RemoteLinearModel.connect"
                )
            asked = cache(lambda: passphrase() if callable(passphrase) else passphrase)
            choice = KeyChoice(
                keys, expected, described, server_identity(url), asked, progress, tell, key_budget
            )
            chosen = choice.take()
            opened = _bundle_of(chosen, bundle, described)
            model, use_secret = _model(opened, connection, progress)
            used = Keys(choice, connection, use_secret)
            used.open(chosen)
        except BaseException:
            connection.close()
            raise
        tokenizer = load_tokenizer(opened.directory)
        return cls(model, tokenizer, connection, str(opened.about["name"]), used, opened)

    @cached_property
    def draft(self) -> Any:
        """The draft in the client's bundle, an ``assistant_model`` for :meth:`generate`, or None.

        Raises ``BundleError`` for one that is damaged or of another model.
        """
        if self._bundle is None or not self._bundle.has_draft:
            return None
        try:
            return load_draft(self._bundle.directory / DRAFT_NAME, self.config)
        except (OSError, ValueError) as error:
            raise BundleError(f"{self._bundle.directory} is damaged: {error}") from error

    @property
    def prefix(self) -> list[int]:
        """The public token ids that are put before every text; none with TFHE."""
        return self.model.prefix

    @property
    def context_length(self) -> int:
        """How many tokens a text and what follows may have together, without the prefix."""
        return self.model.room - len(self.prefix)

    def context_tokens(self, ids: Sequence[int]) -> int:
        """Return how many of them a text takes: those of the prefix, if it starts with it, do not count."""
        prefix = self.prefix
        return len(ids) - len(prefix) * (list(ids[: len(prefix)]) == prefix)

    @property
    def forward(self) -> Any:
        """That of the model, whose arguments tell what its key-value cache is called."""
        return self.model.forward

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
        :meth:`~cipherlm.models.encrypted.EncryptedModel.generate`.
        """
        if self._keys is not None:
            self._keys.spend(len(input_ids) * (options.get("num_return_sequences") or 1))
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


class Keys:
    """The keys of a connection, and those that take their place when they are spent."""

    def __init__(
        self, choice: KeyChoice, connection: Connection, use_secret: Callable[[bytes], None]
    ) -> None:
        self._choice, self._connection, self._use_secret = choice, connection, use_secret

    def open(self, keys: KeySet) -> None:
        """Open a session with keys from now on; upload those that the server lacks."""
        self._use_secret(keys.secret(self._choice.passphrase() if keys.has_passphrase else None))
        self._use = KeyUse(keys.directory)
        try:
            self._connection.open(keys.fingerprints)
        except ServerError as error:
            if error.code != UNKNOWN_KEYS:
                raise
            for kind, fingerprint in keys.fingerprints.items():
                self._connection.upload(kind, Path(keys.path(kind)), sha256=fingerprint)
            self._connection.open(keys.fingerprints)

    def spend(self, texts: int) -> None:
        """Note texts that are about to be generated, with new keys if those that are used are spent."""
        while not self._use.spend(texts, self._choice.budget):
            self.open(self._choice.take())


def _bundle_of(keys: KeySet, bundle: str | os.PathLike[str] | None, described: Mapping[str, Any]) -> Bundle:
    if bundle is not None:
        return Bundle.load(bundle, "client")
    known = keys.description
    if "bundle" not in known or known.get("fingerprint") != described["fingerprint"]:
        raise BundleError(f"the keys fit this model, and what else a client needs is in {BUNDLE_HINT}")
    return Bundle.load(known["bundle"], "client")


def _model(
    bundle: Bundle, connection: Connection, progress: Progress
) -> tuple[EncryptedModel, Callable[[bytes], None]]:
    """Return the client's model, and what connects it with a secret key."""
    root = bundle.directory
    try:
        encryption = EncryptionConfig.from_pretrained(root)
        config = AutoConfig.from_pretrained(root, trust_remote_code=False)
        state = load_tensors(root / STATE_NAME)
    except (SafetensorError, OSError, ValueError) as error:
        raise BundleError(f"{root} is damaged: {error}") from error
    if encryption.scheme != bundle.scheme:
        raise BundleError(f"{root} is damaged: two schemes")
    scheme = scheme_of(bundle.kind)
    parts, use_secret = scheme.client_parts(bundle, int(config.num_hidden_layers), connection, progress)
    try:
        model = client_model(config, encryption, state, parts, progress=progress)
    except (ValueError, RuntimeError) as error:  # torch raises the latter for weights of another shape
        raise BundleError(f"{root} is damaged: {' '.join(str(error).split())}") from error
    return model, partial(use_secret, model)
