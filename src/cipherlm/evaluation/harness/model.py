"""The model ``cipherlm`` of lm-evaluation-harness: the harness's own for transformers, encrypted.

    python -m cipherlm.evaluation.harness --model cipherlm \
        --model_args pretrained=tiny,placement=whole,mode=simulate --tasks cipherlm_choice,cipherlm_text
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from cipherlm.evaluation.behind import BehindPrefix
from cipherlm.evaluation.calibration import chat_texts, sentence_texts
from cipherlm.evaluation.chats import calibration_chats
from cipherlm.evaluation.texts import calibration_sentences
from cipherlm.models.chat import public_head
from cipherlm.models.config import ALL, LINEAR, EncryptionConfig
from cipherlm.models.integration import get_encrypted_model
from cipherlm.models.loading import load_model, load_tokenizer

PLACEMENTS = {"whole": ALL, "linear": LINEAR}
MODES = ("clear", "disable", "simulate", "execute")
CONTEXT = 64


@register_model("cipherlm")
class CipherLM(HFLM):  # type: ignore[misc, unused-ignore]
    """A model whose blocks (``placement="whole"``) or linear layers (``"linear"``) are encrypted.

    ``mode`` is ``"execute"`` on ciphertexts, ``"simulate"`` with their noise on clear numbers, ``"disable"``
    the same arithmetic without noise, and ``"clear"`` the clear model, called in the same way. A whole model
    takes one text at a time, of at most ``context`` tokens, behind its public prefix: the token for the
    beginning of a text, or with ``chat=True`` the head of the chat template, for ``--apply_chat_template``.
    Linear layers take batches.
    """

    def __init__(
        self,
        pretrained: str = "tiny",
        placement: str = "whole",
        mode: str = "simulate",
        context: int | None = None,
        chat: bool = False,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        if placement not in PLACEMENTS or mode not in MODES:
            name, given, known = (
                ("mode", mode, MODES)
                if placement in PLACEMENTS
                else ("placement", placement, tuple(PLACEMENTS))
            )
            raise ValueError(f"{name} must be one of {', '.join(known)}, not {given!r}")
        whole = placement == "whole"
        del device  # ciphertexts are computed on the CPU; the harness names a GPU by default
        if whole and str(batch_size or 1) != "1":
            raise ValueError("a whole model takes one text at a time: leave batch_size out")
        if not whole and (context is not None or chat):
            raise ValueError("context and chat are for placement=whole; linear layers need neither")
        self._mode, self._placement = mode, placement
        tokenizer, clear = load_tokenizer(pretrained), load_model(pretrained)
        longest = context or min(CONTEXT, int(clear.config.max_position_embeddings))
        config = EncryptionConfig(LINEAR)
        calibration: list[torch.Tensor] = []
        if whole:
            prefix = public_head(tokenizer) if chat else [_first_token(clear)]
            config = EncryptionConfig(ALL, prefix=prefix, context=longest)
            if mode != "clear":
                calibration = (
                    chat_texts(clear, tokenizer, prefix, calibration_chats(), longest=longest)
                    if chat
                    else sentence_texts(tokenizer, prefix, calibration_sentences(), longest=longest)
                )
        encrypted: Any = get_encrypted_model(clear, config)
        if calibration:
            encrypted.calibrate(calibration)
        encrypted.set_fhe_mode("disable" if mode == "clear" else mode)
        self._prefix: list[int] = list(encrypted.prefix) if whole else []
        if whole:
            options.setdefault("max_length", longest - len(self._prefix))
        super().__init__(
            pretrained=encrypted,
            tokenizer=tokenizer,
            batch_size=batch_size or 1,
            max_batch_size=max_batch_size or 64,
            **options,
        )

    @property
    def max_gen_toks(self) -> int:
        """The tokens of an answer where a task does not say: fewer where the context is short."""
        most: int = min(super().max_gen_toks, self.max_length // 2)
        return most

    def get_model_info(self) -> dict[str, Any]:
        """Return what goes into the results; nothing is asked of the hub."""
        return {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": self.model.dtype,
            "placement": self._placement,
            "mode": self._mode,
            "public_prefix": self._prefix,
        }

    def _model_call(self, inps: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Return logits (batch, tokens, vocabulary) of token ids, with the public prefix before them."""
        model: Any = self.model
        if self._prefix and not self._starts_with_prefix(inps):
            model = BehindPrefix(model, self._prefix)
        with torch.inference_mode(), self._computing():
            logits: torch.Tensor = model(input_ids=inps, use_cache=False).logits
        return logits

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **options: Any
    ) -> torch.Tensor:
        """Return texts with their continuations, as ``generate`` gives them."""
        if not self._prefix:
            with self._computing():
                generated: torch.Tensor = super()._model_generate(context, max_length, stop, **options)
            return generated
        # One text, and so no padding.
        options.pop("attention_mask", None)
        if not options.get("do_sample"):
            options.pop("temperature", None)
            options["do_sample"] = False
        added = 0 if self._starts_with_prefix(context) else len(self._prefix)
        given = torch.cat([context.new_tensor([self._prefix[:added]]), context], dim=1)
        with self._computing():
            generated = self.model.generate(
                given,
                attention_mask=torch.ones_like(given),
                max_length=max_length + added,
                stop_strings=stop,
                tokenizer=self.tokenizer,
                pad_token_id=self.tokenizer.pad_token_id,
                **options,
            )
        return generated[:, added:]

    def _starts_with_prefix(self, ids: torch.Tensor) -> bool:
        start = ids[:, : len(self._prefix)]
        return start.shape[1] == len(self._prefix) and bool((start == start.new_tensor(self._prefix)).all())

    @contextmanager
    def _computing(self) -> Iterator[None]:
        if self._mode != "clear":
            yield
            return
        with self.model.in_clear():
            yield


def _first_token(clear: Any) -> int:
    """Return the token that texts begin with."""
    token = clear.config.bos_token_id
    if token is None:
        raise ValueError("the model has no token for the beginning of a text: give placement=linear")
    return int(token)
