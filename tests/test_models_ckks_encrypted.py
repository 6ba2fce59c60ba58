"""CKKS behind the interface of transformers, on real ciphertexts."""

import pytest
import torch
from transformers import DynamicCache

from cipherlm import (
    EncryptedModel,
    EncryptionConfig,
    get_encrypted_model,
    load_model,
    load_tokenizer,
)
from cipherlm.evaluation.texts import calibration_sentences, encode, evaluation_sentences

BLOCK = "transformer.h.1"


def calibrated_tiny(target, **options) -> EncryptedModel:
    config = EncryptionConfig(target, scheme="ckks", context=16, **options)
    model = get_encrypted_model(load_model("tiny"), config)
    model.calibrate(encode(load_tokenizer("tiny"), calibration_sentences()[:30], max_tokens=15))
    model.set_fhe_mode("execute")
    return model


def prompt(model: EncryptedModel, text: str) -> torch.Tensor:
    return model.with_prefix(load_tokenizer("tiny")(text, return_tensors="pt")["input_ids"])


def logits(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.slow
@pytest.mark.parametrize("target", [[BLOCK], ["transformer.h.0.attn", "transformer.h.2.mlp"]])
def test_hybrid_modules_on_ciphertexts(target):
    model = calibrated_tiny(target)
    ids = prompt(model, "The old man looked at the sea, and")
    expected = logits(load_model("tiny"), ids)
    # A prompt, more tokens one by one, and a prompt that is longer than what goes side by side.
    for tokens in (4, 5, 6):
        assert (logits(model, ids[:, :tokens]) - expected[:, :tokens]).abs().max() < 0.01
    assert model.placement.traffic.to_server > 0
    model.remote_modules[target[0]]._text = None
    assert (logits(model, ids) - expected).abs().max() < 0.01
    assert ids.shape[1] > model.encryption_config.tokens


def test_an_mlp_with_post_quantum_parameters():
    model = calibrated_tiny(["transformer.h.2.mlp"], post_quantum=True)
    ids = prompt(model, "The old man looked")
    assert (logits(model, ids) - logits(load_model("tiny"), ids)).abs().max() < 0.01
    assert model.placement.geometry.parameters.log_qp <= 411


@pytest.mark.slow
def test_tokens_behind_a_short_prompt_are_as_close_as_it():
    """In the whole model, calibrated as the demonstration does it: logits of at most 20, within 0.005."""
    model = get_encrypted_model(load_model("tiny"), EncryptionConfig())
    model.compile(encode(load_tokenizer("tiny"), calibration_sentences()))
    model.set_fhe_mode("execute")
    ids = prompt(model, "The old man was a man, and he")[:, :7]
    cache, expected = DynamicCache(), logits(load_model("tiny"), ids)
    with torch.no_grad():
        parts = [model(rows, past_key_values=cache).logits for rows in ids.split([4, 1, 1, 1], dim=1)]
    assert (torch.cat(parts, dim=1) - expected).abs().max() < 0.005


@pytest.mark.slow
@pytest.mark.parametrize("post_quantum", [False, True])
def test_the_whole_model_generates_on_ciphertexts(post_quantum):
    model = calibrated_tiny("all", post_quantum=post_quantum)
    ids = prompt(model, "The old man")
    expected = load_model("tiny").generate(ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), expected)
    traffic = model.placement.traffic
    assert min(traffic.keys, traffic.to_server, traffic.to_client, traffic.refreshes) > 0
    assert len(model.remote_modules["transformer.h"]._text.sent) == ids.shape[1] + 3 - 1 - 1


@pytest.mark.slow
def test_greedy_texts_are_those_of_the_clear_model():
    """Eight new tokens behind ten prompts of eight tokens, on ciphertexts: at least nine texts are equal."""
    clear, model, equal = load_model("tiny"), calibrated_tiny("all"), 0
    sentences = evaluation_sentences()[::8]
    assert len(sentences) == 10
    for sentence in sentences:
        ids = prompt(model, sentence)[:, :8]
        expected = clear.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)
        got = model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)
        equal += torch.equal(got, expected)
    assert equal >= 9
