"""The text that the embedded model learns from: reading it, splitting it, cutting it into windows."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

# Editions differ in their typography. A small vocabulary has no room for two kinds of quotation marks, and
# prompts are typed with the plain ones.
_TYPOGRAPHY = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "—": "--", "_": None})


def read_books(directory: Path) -> dict[str, str]:
    """Return the normalised text of every `*.txt` in `directory`, by file name, one paragraph a line.

    Files named `wikitext2*` are left out: they are kept for measuring, and are tokenised in another way.
    """
    books = {}
    for path in sorted(directory.glob("*.txt")):
        if not path.name.startswith("wikitext2"):
            text = path.read_text(encoding="utf-8").translate(_TYPOGRAPHY)
            paragraphs = (re.sub(r"\s+", " ", line).strip() for line in text.splitlines())
            kept = [p for p in paragraphs if p and not p.startswith("Produced by")]
            books[path.stem] = "\n".join(kept) + "\n"
    if not books:
        raise FileNotFoundError(f"no books (*.txt) in {directory}")
    return books


def split_book(text: str, held_out: float) -> tuple[str, str]:
    """Cut off the last part of a book (the share `held_out` of its characters) at a paragraph's end."""
    cut = text.rfind("\n", 0, round(len(text) * (1 - held_out))) + 1
    return text[:cut], text[cut:]


class Windows:
    """Training windows over one long token sequence.

    An epoch cuts the sequence at a fresh random phase and visits the pieces in random order, so that every
    token is seen about once an epoch and at ever different positions. Half of the pieces are moved back to
    the start of a sentence, because prompts start there, and `prefix_share` of them start with the prefix.
    """

    def __init__(
        self, ids: np.ndarray, tokenizer: PreTrainedTokenizerBase, length: int, prefix_share: float, seed: int
    ) -> None:
        self.ids, self.length, self.prefix_share = ids, length, prefix_share
        self.prefix_id = tokenizer.eos_token_id
        self.random = np.random.default_rng(seed)
        vocabulary = tokenizer.get_vocab()
        # A sentence inside a paragraph starts with a token that carries a space (" The"), a prompt does not
        # ("The"): where a sentence becomes the start of a window, its first token changes accordingly.
        self.without_space = np.arange(len(vocabulary))
        starts_word = np.zeros(len(vocabulary), dtype=bool)
        ends_sentence = np.zeros(len(vocabulary), dtype=bool)
        for token, index in vocabulary.items():
            if token[0] == "Ġ" and token[1:] in vocabulary:
                self.without_space[index] = vocabulary[token[1:]]
                starts_word[index] = token[1].isupper()
            ends_sentence[index] = re.fullmatch(r"""[.?!]["']?""", token) is not None
        begins = np.zeros(len(ids), dtype=bool)
        begins[1:] = (ends_sentence[ids[:-1]] & starts_word[ids[1:]]) | (ids[:-1] == vocabulary["Ċ"])
        positions = np.where(begins, np.arange(len(ids)), 0)
        self.sentence_start = np.maximum.accumulate(positions)

    def __len__(self) -> int:
        return (len(self.ids) - 1) // self.length - 1

    def epoch(self, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield batches of inputs and of the tokens that follow them, both (batch, length)."""
        phase = self.random.integers(self.length)
        starts = phase + self.length * self.random.permutation(len(self))
        for first in range(0, len(starts) - batch_size + 1, batch_size):
            chosen = starts[first : first + batch_size]
            at_sentence = self.random.random(batch_size) < 0.5
            chosen = np.where(at_sentence, self.sentence_start[chosen], chosen)
            window = self.ids[chosen[:, None] + np.arange(self.length + 1)]
            window[at_sentence, 0] = self.without_space[window[at_sentence, 0]]
            prefixed = self.random.random(batch_size) < self.prefix_share
            window[prefixed, 1:] = window[prefixed, :-1]
            window[prefixed, 0] = self.prefix_id
            batch = torch.from_numpy(window)
            yield batch[:, :-1], batch[:, 1:]
