"""What the comparisons with CKKS start from: a model, texts behind its public prefix, and calibration."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cipherlm.cli import CommandError, UsageError
from cipherlm.cli.common import configured, encrypted, encryption_config, is_saved
from cipherlm.progress import TerminalProgress

if TYPE_CHECKING:
    import torch

    from cipherlm.evaluation.prompts import Answered
    from cipherlm.models.config import EncryptionConfig

CHAT_TOKENS, SENTENCE_TOKENS = 32, 8
BLOCK_TEXTS = 4


@dataclass(frozen=True, eq=False)
class Setup:
    """A clear model, what of it is to be encrypted, and the texts to measure on."""

    clear: Any
    config: EncryptionConfig
    prefix: list[int]
    texts: list[Answered]
    calibration: list[torch.Tensor]
    kind: str
    """What the texts are: ``"chats"`` or ``"sentences"``."""
    left_out: int
    """How many were too long."""
    room: int
    """How many tokens a text has at most behind the prefix."""


def prepare(options: argparse.Namespace, progress: TerminalProgress) -> Setup:
    """Load the clear model, and let it answer the prompts to measure on and to calibrate on."""
    config = configured(options)  # before the model, so that a wrong option is told at once

    from cipherlm.evaluation.prompts import answered
    from cipherlm.models.loading import load_model, load_tokenizer
    from cipherlm.models.targets import means_linear

    tokenizer, clear = load_tokenizer(options.model), load_model(options.model)
    config = _default_modules(options, clear, config)
    linear, chats = means_linear(clear, config), _on_chats(options, tokenizer)
    if linear and options.calibration:
        raise UsageError("--calibration is for ranges of values, and linear layers need none")
    if chats and options.tokens:
        raise UsageError("--tokens cuts sentences; a conversation cannot be cut")
    config, prefix = _with_prefix(options, tokenizer, clear, config, linear=linear, chats=chats)
    new_tokens = options.max_new_tokens or (CHAT_TOKENS if chats else SENTENCE_TOKENS)
    prompts = _prompts(options, tokenizer, prefix, chats=chats)
    model_room = int(clear.config.max_position_embeddings) - len(prefix)
    if chats and not linear and not hasattr(options, "context") and not is_saved(options):
        needed = max(ids.shape[1] for ids in prompts) + new_tokens - 1
        config = replace(config, context=len(prefix) + min(needed, model_room))
    room = model_room if linear else min(model_room, config.context - len(prefix))
    longest = room - new_tokens + 1  # the last token is predicted, but never read
    if longest < 1:
        raise UsageError(
            f"--max-new-tokens {new_tokens} leaves no room for a prompt: {room} tokens have room"
        )
    if not chats:
        prompts = [ids[:, : min(options.tokens or longest, longest)] for ids in prompts]
    fitting = [ids for ids in prompts if ids.shape[1] <= longest]
    if not fitting:
        raise CommandError(f"no conversation has room: {longest} tokens behind the public prefix at most")
    with progress("generating the clear model's answers"):
        texts = [answered(clear, ids, prefix, new_tokens) for ids in fitting]
    calibration: list[torch.Tensor] = []
    if not linear and not _is_saved_calibrated(options):
        with progress("generating texts to calibrate on"):
            calibration = _calibration(options, tokenizer, clear, prefix, len(prefix) + room, chats=chats)
    kind = "chats" if chats else "sentences"
    return Setup(clear, config, prefix, texts, calibration, kind, len(prompts) - len(fitting), room)


def calibrated(
    options: argparse.Namespace,
    setup: Setup,
    config: EncryptionConfig,
    clear: Any,
    progress: TerminalProgress,
) -> Any:
    """Return ``clear`` encrypted as ``config`` says, in place, and calibrated unless it needs nothing."""
    from cipherlm.models.linear import EncryptedLinearModel

    model: Any = encrypted(options, clear, config, progress)
    if not isinstance(model, EncryptedLinearModel) and not model.is_calibrated:
        with progress("calibrating"):
            model.calibrate(setup.calibration)
    return model


def header(options: argparse.Namespace, model: Any, setup: Setup) -> dict[str, Any]:
    """Return what was measured, for JSON."""
    from cipherlm.models.linear import EncryptedLinearModel

    linear = isinstance(model, EncryptedLinearModel)
    return {
        "model": options.model,
        "scheme": "ckks",
        "placement": "linear" if linear else "modules",
        "modules": list(model.remote_modules if linear else model.encrypted_modules),
        "mode": options.mode,
        "prefix_tokens": len(setup.prefix),
        setup.kind: len(setup.texts),
        "left_out": setup.left_out,
    }


def title(result: dict[str, Any], modules: str | None = None) -> str:
    """Return what ``header`` gave as one line; ``modules`` takes the place of their names."""
    noise = {"simulate": "with the noise of ciphertexts", "execute": "on ciphertexts"}
    names = result["modules"]
    named = f"{len(names)} linear layers" if result["placement"] == "linear" else ", ".join(names)
    return f"{result['model']}, {modules or named}, CKKS {noise.get(result['mode'], 'without noise')}"


def _default_modules(options: argparse.Namespace, clear: Any, config: EncryptionConfig) -> EncryptionConfig:
    """Return the configuration, with linear layers where nothing was asked for and blocks cannot be."""
    from cipherlm.models.architecture import MODULES
    from cipherlm.models.config import LINEAR

    asked = options.target_modules is not None or options.block is not None or is_saved(options)
    if asked or clear.config.model_type in MODULES:
        return config
    return encryption_config(options, target_modules=LINEAR)


def _on_chats(options: argparse.Namespace, tokenizer: Any) -> bool:
    return bool(options.chats) or (not options.sentences and bool(getattr(tokenizer, "chat_template", None)))


def _with_prefix(
    options: argparse.Namespace,
    tokenizer: Any,
    clear: Any,
    config: EncryptionConfig,
    *,
    linear: bool,
    chats: bool,
) -> tuple[EncryptionConfig, list[int]]:
    """Return the configuration with the public prefix of the texts, and this prefix."""
    from cipherlm.models.chat import public_head
    from cipherlm.models.geometry import public_prefix

    if linear:
        return config, public_head(tokenizer) if chats else []
    if chats and not is_saved(options):
        config = replace(config, prefix=public_head(tokenizer))
    return config, public_prefix(config, clear.config)


def _prompts(
    options: argparse.Namespace, tokenizer: Any, prefix: list[int], *, chats: bool
) -> list[torch.Tensor]:
    """Return the private texts (1, tokens) to measure on."""
    from cipherlm.evaluation.chats import evaluation_chats, read_chats
    from cipherlm.evaluation.prompts import chat_prompts
    from cipherlm.evaluation.texts import encode, evaluation_sentences, read_sentences

    if chats:
        given = read_chats(options.chats) if options.chats else evaluation_chats()
        return chat_prompts(tokenizer, given[: options.limit], prefix)
    sentences = read_sentences(options.sentences) if options.sentences else evaluation_sentences()
    return encode(tokenizer, sentences[: options.limit])


def _is_saved_calibrated(options: argparse.Namespace) -> bool:
    from pathlib import Path

    from cipherlm.models.storage import CALIBRATION_NAME

    return is_saved(options) and Path(options.model, CALIBRATION_NAME).is_file()


def _calibration(
    options: argparse.Namespace, tokenizer: Any, clear: Any, prefix: list[int], longest: int, *, chats: bool
) -> list[torch.Tensor]:
    """Return texts (1, tokens) to take ranges from, with the prefix, none longer than ``longest``."""
    from cipherlm.evaluation.calibration import chat_texts, sentence_texts
    from cipherlm.evaluation.chats import calibration_chats, read_chats
    from cipherlm.evaluation.texts import calibration_sentences, read_sentences

    path = options.calibration
    if chats:
        given = read_chats(path) if path else calibration_chats()
        return chat_texts(clear, tokenizer, prefix, given, longest=longest)
    sentences = read_sentences(path) if path else calibration_sentences()
    return sentence_texts(tokenizer, prefix, sentences, longest=longest)
