"""A remote model's ``generate`` as a caller sees it: without the public prefix."""

from __future__ import annotations

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from cipherlm import EncryptionConfig, get_encrypted_model, load_model, load_tokenizer
from cipherlm.evaluation.texts import calibration_sentences, encode
from cipherlm.serving.remote import RemoteModel


class Closed:
    url = "nowhere"

    def close(self) -> None:
        """Nothing is open."""


@pytest.fixture(scope="module")
def remote() -> RemoteModel:
    """A model that is computed here, on clear numbers, under the interface of one at a server."""
    tokenizer = load_tokenizer("tiny")
    model = get_encrypted_model(load_model("tiny"), EncryptionConfig("all", scheme="ckks"))
    model.calibrate(encode(tokenizer, calibration_sentences()[:20], max_tokens=12))
    return RemoteModel(model, tokenizer, Closed(), "tiny")  # type: ignore[arg-type]


class Heard(BaseStreamer, StoppingCriteria):  # type: ignore[misc]
    def __init__(self) -> None:
        self.put_ids: list[list[int]] = []
        self.seen: list[list[int]] = []

    def put(self, value: torch.Tensor) -> None:
        self.put_ids.append(value.flatten().tolist())

    def end(self) -> None:
        self.put_ids.append([])

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        self.seen.append(input_ids[0].tolist())
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("with_prefix", [False, True])
def test_the_prefix_stays_out_of_sight(remote, with_prefix):
    ids = remote.tokenizer("The old man", return_tensors="pt").input_ids
    clear = load_model("tiny").generate(
        torch.cat([torch.tensor([remote.prefix]), ids], dim=1), max_new_tokens=3, do_sample=False
    )
    if with_prefix:
        ids = torch.cat([torch.tensor([remote.prefix]), ids], dim=1)
    expected = clear[:, 0 if with_prefix else len(remote.prefix) :]
    heard = Heard()
    got = remote.generate(
        ids,
        max_new_tokens=3,
        do_sample=False,
        streamer=heard,
        stopping_criteria=StoppingCriteriaList([heard]),
    )
    assert torch.equal(got, expected)
    tokens = expected[0].tolist()
    count = ids.shape[1]
    assert heard.put_ids == [tokens[:count], *[[token] for token in tokens[count:]], []]
    assert heard.seen == [tokens[: count + k] for k in (1, 2, 3)]
    assert remote.generate(ids, max_length=count + 1, do_sample=False).shape[1] == count + 1


def test_padding_is_refused(remote):
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(ValueError, match="one by one"):
        remote.generate(ids, attention_mask=torch.tensor([[0, 1, 1]]), max_new_tokens=1)
