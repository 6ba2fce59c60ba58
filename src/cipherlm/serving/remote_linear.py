"""A model of any architecture whose linear layers a server computes, used as if it were here."""

from __future__ import annotations

import itertools
import os
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cipherlm.linear.model import load_client_model, load_groups
from cipherlm.linear.prefix import PREFIX_NAME, PublicPrefix, reading_new_tokens
from cipherlm.models.chat import template_ids
from cipherlm.models.drafts import drafts_asked, refuse_drafts
from cipherlm.models.loading import load_tokenizer
from cipherlm.progress import Progress, counted, silent
from cipherlm.serving.bundle import Bundle, BundleError
from cipherlm.serving.errors import RemoteError
from cipherlm.serving.key_use import BUDGET
from cipherlm.serving.remote_products import RemoteProducts

_CONTEXT_NAMES = ("max_position_embeddings", "n_positions")


class RemoteLinearModel:
    """A model whose linear layers are at a server; all else, and the text, is here.

    Made by :meth:`connect`. ``model`` is an ordinary model of transformers, whose attributes this has too.
    Close it when done.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        products: RemoteProducts,
        name: str,
        public_prefix: PublicPrefix | None = None,
        frame: Mapping[str, str] | None = None,
        key_budget: int = BUDGET,
        progress: Progress = silent,
    ) -> None:
        self.model, self.tokenizer, self.name, self.products = model, tokenizer, name, products
        self.public_prefix = public_prefix
        self._frame, self._progress = frame or {}, progress
        self._key_budget, self._texts = key_budget, 0
        if progress is not silent:
            _show_calls(model, products, progress)
        # A connection that is still open would keep the interpreter from ending.
        self._ended = weakref.finalize(self, products.close)

    @classmethod
    def connect(
        cls,
        url: str,
        *,
        bundle: str | os.PathLike[str],
        token: str | None = None,
        verify: str | os.PathLike[str] | bool = True,
        insecure_plain_http: bool = False,
        key_budget: int = BUDGET,
        attn_implementation: str | None = None,
        progress: Progress = silent,
    ) -> RemoteLinearModel:
        """Connect to ``cipherlm serve`` with the client's bundle of the model.

        Keys are made for this model alone, sent as the connection opens, and never stored; others take their
        place after ``key_budget`` texts. ``token``,
        ``verify`` and ``insecure_plain_http`` are as for :class:`~cipherlm.serving.remote.RemoteModel`,
        ``attn_implementation`` as for transformers.

        Raises ``BundleError``, and for the server's side :class:`~cipherlm.serving.errors.RemoteError`;
        ``WrongModel`` if it hosts another model.
        """
        opened = Bundle.load(bundle, "client")
        with progress("making keys"):
            products = RemoteProducts(
                url,
                opened,
                token=token,
                verify=verify,
                insecure_plain_http=insecure_plain_http,
            )
        try:
            with progress("connecting"):
                products.connect()
            with progress("loading the model"):
                model, prefix = _model(opened, products, attn_implementation)
                tokenizer = load_tokenizer(opened.directory)
        except BaseException:
            products.close()
            raise
        return cls(
            model,
            tokenizer,
            products,
            str(opened.about["name"]),
            prefix,
            opened.about.get("prefix"),
            key_budget,
            progress,
        )

    @property
    def prefix(self) -> list[int]:
        """The public token ids that cost nothing where a text begins with them."""
        return [] if self.public_prefix is None else self.public_prefix.ids.tolist()

    @property
    def system(self) -> str | None:
        """The system prompt of chats that the model was exported with."""
        return self._frame.get("system")

    @property
    def context_length(self) -> int:
        """How many tokens a text and what follows may have together.

        Raises ``ValueError`` if the model's configuration does not say.
        """
        for name in _CONTEXT_NAMES:
            length = getattr(self.config.get_text_config(), name, None)
            if isinstance(length, int):
                return length
        raise ValueError("the model's configuration does not say how long its context is")

    def prompt_ids(self, prompt: str) -> tuple[torch.Tensor, int]:
        """Return a prompt as token ids (1, tokens), and how many of them are not to be shown.

        Of a model that was exported with a prefix of texts, the prompt is behind it; with a system prompt, it
        is a question, of which only the answer is shown.
        """
        if self.system is not None:
            messages = [{"role": "system", "content": self.system}, {"role": "user", "content": prompt}]
            ids = template_ids(self.tokenizer, messages)
            return torch.tensor([ids]), len(ids)
        before = self.prefix if "text" in self._frame else []
        ids = list(self.tokenizer(prompt, add_special_tokens=not before)["input_ids"])
        if not ids:
            raise ValueError("the prompt is empty")
        return torch.tensor([before + ids]), len(before)

    def generate(
        self, input_ids: torch.Tensor, *, reveal_length: bool = False, **options: Any
    ) -> torch.Tensor:
        """Continue token ids (n, tokens), with the options of transformers' ``generate``.

        As many tokens as the texts share with the public prefix cost nothing. Samplers, beams, padding with
        an ``attention_mask`` and a key-value cache of one's own are as in transformers.

        The server is asked as often as the token budget (``max_new_tokens``) allows, whatever ends the text,
        so that it does not learn how long the text is; with ``reveal_length=True``, and for models with an
        encoder, it is not.
        """
        self._spend(len(input_ids) * (options.get("num_return_sequences") or 1))
        with torch.inference_mode():
            if reveal_length or getattr(self.config, "is_encoder_decoder", False):
                return self._generate(input_ids, options)
            refuse_drafts(options, getattr(self.model, "generation_config", None))
            steps = self._budget(input_ids, options)
            return _at_full_length(
                self.model, lambda: self._generate(input_ids, options), steps, self._progress
            )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "model":  # while there is none
            raise AttributeError(name)
        return getattr(self.model, name)

    def close(self) -> None:
        """End the connection to the server."""
        self._ended()

    def __enter__(self) -> RemoteLinearModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"RemoteLinearModel({self.name!r} at {self.products.url!r})"

    def _spend(self, texts: int) -> None:
        """Count texts against the budget of a key, and make other keys when that is spent."""
        if self._texts and self._texts + texts > self._key_budget:
            self.products.renew_keys()
            self._texts = 0
        self._texts += texts

    def _generate(self, input_ids: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        mask = options.get("attention_mask")
        prefix = self._shared_prefix(input_ids, mask) if _keeps_no_cache(options) else None
        if prefix is None:
            model: Any = self.model
            drafted = drafts_asked(options, model.generation_config)
            with reading_new_tokens(model) if drafted else nullcontext():
                generated: torch.Tensor = model.generate(input_ids, **options)
            return generated
        behind = len(prefix.ids)
        rest = {name: value for name, value in options.items() if name != "attention_mask"}
        mask = None if mask is None else mask[:, behind:]
        return prefix.generate(self.model, input_ids[:, behind:], mask, **rest)

    def _shared_prefix(self, input_ids: torch.Tensor, mask: torch.Tensor | None) -> PublicPrefix | None:
        """Return as much of the public prefix as all texts begin with; a token at least is left of each."""
        if self.public_prefix is None or input_ids.dim() != 2:
            return None
        length = min(len(self.public_prefix.ids), input_ids.shape[1] - 1)
        same = (input_ids[:, :length].cpu() == self.public_prefix.ids[:length]).all(dim=0)
        if mask is not None:
            same &= mask[:, :length].cpu().bool().all(dim=0)
        shared = int(same.long().cumprod(0).sum())
        return self.public_prefix.first(shared) if shared else None

    def _budget(self, input_ids: torch.Tensor, options: dict[str, Any]) -> int:
        """Return how many new tokens ``generate`` may make."""
        given = options.get("generation_config") or self.model.generation_config
        new = options.get("max_new_tokens")
        if new is None and options.get("max_length") is None:
            new = getattr(given, "max_new_tokens", None)
        if new is not None:
            return int(new)
        return int((options.get("max_length") or given.max_length or 20) - input_ids.shape[1])


def _show_calls(model: PreTrainedModel, products: RemoteProducts, progress: Progress) -> None:
    """Let ``progress`` show how far each call of ``model`` is."""
    open_calls = ExitStack()
    total = len(products.plan.groups)

    def begin(*_: Any) -> None:
        report = open_calls.enter_context(counted(progress, "computing on ciphertexts", "product"))
        numbers = itertools.count()
        products.on_product = lambda: report(next(numbers), total)

    def end(*_: Any) -> None:
        products.on_product = lambda: None
        open_calls.close()

    model.register_forward_pre_hook(begin)
    model.register_forward_hook(end, always_call=True)


def _model(
    bundle: Bundle, products: RemoteProducts, attn_implementation: str | None
) -> tuple[PreTrainedModel, PublicPrefix | None]:
    root = bundle.directory
    try:
        if {group.name: group for group in load_groups(root)} != dict(products.plan.groups):
            raise ValueError("the model's linear layers are not those of the plan")
        model = load_client_model(root, products, attn_implementation=attn_implementation)
        file = Path(root, PREFIX_NAME)
        return model, PublicPrefix.load(file) if file.is_file() else None
    except (OSError, ValueError) as error:
        raise BundleError(f"{root} is damaged: {error}") from error


def _keeps_no_cache(options: dict[str, Any]) -> bool:
    """Return whether the caller leaves the key-value cache to ``generate``."""
    mine = ("past_key_values", "cache", "inputs_embeds")
    return options.get("use_cache") is not False and all(options.get(name) is None for name in mine)


def _at_full_length(
    model: PreTrainedModel, generate: Callable[[], torch.Tensor], steps: int, progress: Progress
) -> torch.Tensor:
    """Return what ``generate`` does, after ``steps`` calls of the model in any case.

    So it is where ``generate`` fails by itself. Behind the end, tokens that nobody reads are evaluated, as
    many at a time as before. See :mod:`cipherlm.models.length`.
    """
    calls, rows = 0, 1

    def count(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal calls, rows
        calls += 1
        ids = kwargs.get("input_ids", args[0] if args else None)
        rows = rows if ids is None else len(ids)

    def fill() -> None:
        unread = torch.zeros(rows, 1, dtype=torch.long, device=model.device)
        if steps > calls:
            with progress("hiding how long the text is"):
                for _ in range(steps - calls):
                    model.forward(input_ids=unread, use_cache=False)  # which shows nothing of its own

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        result = generate()
    except RemoteError:
        raise
    except Exception:
        hook.remove()
        if calls:
            fill()
        raise
    finally:
        hook.remove()
    fill()
    return result
