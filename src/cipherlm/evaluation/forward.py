"""Batches of sequences of different lengths through a causal model."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch


def batched_logits(
    model: Any, sequences: Sequence[torch.Tensor], *, batch_size: int = 16
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the index and the logits (tokens, vocabulary) of every sequence (1, tokens), in any order.

    Sequences of similar length share a batch and are padded on the right. A causal model needs no mask for
    that: no position sees the padding after it.
    """
    order = sorted(range(len(sequences)), key=lambda index: sequences[index].shape[1])
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        rows = [sequences[index][0] for index in indices]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False).logits
        for row, index in enumerate(indices):
            yield index, logits[row, : sequences[index].shape[1]]
