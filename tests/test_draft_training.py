"""A draft head learns from the same numbers that it later proposes tokens from."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from cipherlm.models.eagle import DraftHead

TRAINING = Path(__file__).parent.parent / "training"
WIDTH, TOKENS, STEPS = 32, 11, 4


@pytest.fixture(scope="module")
def training():
    sys.path.insert(0, str(TRAINING))
    try:
        import train_draft

        yield train_draft
    finally:
        sys.path.remove(str(TRAINING))


def test_steps_of_training_are_those_of_a_draft(training):
    """All positions at once, as in training, give what one draft after the other gives."""
    sizes = {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(3)
    head = DraftHead(LlamaConfig(vocab_size=60, hidden_size=WIDTH, num_hidden_layers=1, **sizes))
    features, embeddings = torch.randn(2, 2, TOKENS, WIDTH)
    with torch.no_grad():
        steps = list(training.rolled_out(head, features, embeddings, STEPS))
        for last in range(TOKENS - STEPS):
            seen = features[:, : last + 1]
            for step in range(STEPS):
                following = head(seen, embeddings[:, : last + 1 + step])[:, -1:]
                assert (steps[step][:, last + step] - following[:, 0]).abs().max() < 1e-4
                seen = torch.cat([seen, following], dim=1)


def test_a_loss_that_can_be_learned(training):
    """On one text, learned by heart, nearly all of a draft is right."""
    torch.manual_seed(4)
    sizes = {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    head = DraftHead(LlamaConfig(vocab_size=60, hidden_size=WIDTH, num_hidden_layers=1, **sizes))
    table = torch.randn(60, WIDTH)
    ids = torch.randint(0, 60, (24,))
    # The features from which the output layer, here the same table, chooses the next token.
    text = training.Text(ids, 4 * table[ids[1:]], 4)
    frozen = training.Frozen(table, table)
    args = training.argparse.Namespace(
        prefix=2, question_weight=0.2, noise=0.02, steps=2, decay=0.7, feature_weight=0.1
    )
    optimizer, first = torch.optim.AdamW(head.parameters(), lr=3e-3), None
    for _ in range(150):
        loss = training.loss_of(head, [text], frozen, args)
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2 * first

    class Model:
        def get_input_embeddings(self):
            return torch.nn.Embedding.from_pretrained(table)

        def get_output_embeddings(self):
            return torch.nn.Embedding.from_pretrained(table)

    shares = training.kept_tokens(head, Model(), [text], 3)
    assert shares[0] >= shares[1] >= shares[2] > 0.8
