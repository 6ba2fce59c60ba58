"""Public texts as token ids: what comes before prompts, and chats around a message."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase


def prefix_ids(
    tokenizer: PreTrainedTokenizerBase, prefix: str | None = None, system: str | None = None
) -> list[int]:
    """Return the token ids that public text comes to: a prefix of texts, or the beginning of a chat.

    A chat begins with what two chats that differ in the user's message alone have in common. Raises
    ``ValueError`` for a tokenizer without a chat template, and for one that leaves the instruction out.
    """
    if prefix and system is not None:
        raise ValueError("a prefix of texts and a system message of chats do not go together")
    if system is None:
        return list(tokenizer(prefix)["input_ids"]) if prefix else []
    first, second = (chat_ids(tokenizer, message, system) for message in ("0", "x"))
    same = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), 0)
    if system not in tokenizer.decode(first[:same]):
        raise ValueError("the model's chat template does not begin with the system message")
    return first[:same]


def chat_ids(tokenizer: PreTrainedTokenizerBase, message: str, system: str | None) -> list[int]:
    """Return a chat of one message as token ids, up to where the answer begins.

    Raises ``ValueError`` for a tokenizer without a chat template.
    """
    if tokenizer.chat_template is None:
        raise ValueError("this model has no chat template: give a prefix (--prefix), not a system message")
    messages = [] if system is None else [{"role": "system", "content": system}]
    text = tokenizer.apply_chat_template(
        [*messages, {"role": "user", "content": message}], tokenize=False, add_generation_prompt=True
    )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
