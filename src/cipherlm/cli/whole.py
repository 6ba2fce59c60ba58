"""What the verbs do with whole chat models: the head of the template is public, and chats give the ranges."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cipherlm.cli import CommandError
from cipherlm.progress import Progress

if TYPE_CHECKING:
    from cipherlm.models.ckks import CkksModel

CONTEXT = 256
"""The most tokens of a conversation, unless something else is asked for."""


def is_chat(tokenizer: Any) -> bool:
    """Say whether a model is for chats."""
    return bool(getattr(tokenizer, "chat_template", None))


def whole_chat_model(
    model: Any,
    tokenizer: Any,
    progress: Progress,
    *,
    system: str | None = None,
    context: int | None = None,
    chats: str | None = None,
    post_quantum: bool = False,
) -> CkksModel:
    """Return a clear model with all its blocks on ciphertexts, calibrated.

    What its template begins with, with the ``system`` prompt, is public. Ranges come from the ``chats`` in a
    file, or from those that come with the package, where they have not been found before. Raises
    ``CommandError`` for what cannot be.
    """
    from cipherlm.evaluation.calibration import chat_texts
    from cipherlm.evaluation.chats import calibration_chats, read_chats
    from cipherlm.models.calibrations import calibrate_once
    from cipherlm.models.chat import public_head
    from cipherlm.models.config import EncryptionConfig
    from cipherlm.models.integration import get_encrypted_model

    try:
        given = read_chats(chats) if chats else calibration_chats()
        head, context = public_head(tokenizer, system), context or CONTEXT
        config = EncryptionConfig(prefix=head, context=context, post_quantum=post_quantum)
        encrypted: Any = get_encrypted_model(model, config, progress=progress)
    except ValueError as error:
        raise CommandError(str(error)) from error

    def texts() -> Any:
        with encrypted.in_clear():
            return chat_texts(encrypted, tokenizer, head, given, longest=context)

    with progress("finding ranges of values"):
        if chats:
            encrypted.calibrate(texts())
        else:
            calibrate_once(encrypted, texts)
    whole: CkksModel = encrypted
    return whole
