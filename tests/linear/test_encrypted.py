"""Whole models with their linear layers on ciphertexts."""

import numpy as np
import pytest
import torch

from cipherlm import EncryptionConfig, get_encrypted_model
from cipherlm.linear.prefix import public_prefix_cache

from .architectures import CONFIGS, tiny
from .test_integration import call, padded

LINEAR = EncryptionConfig(target_modules="linear")
BOUND = 2e-3
"""Of the largest logit: what the arithmetic rounds, and what two blocks make of it."""


@pytest.mark.parametrize("mode", ["execute", "simulate"])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_model_on_ciphertexts_equals_its_clear_self(architecture, mode):
    model = get_encrypted_model(tiny(architecture), LINEAR)
    with torch.no_grad():
        expected = model(**call(architecture))
        model.set_fhe_mode(mode)
        found = model(**call(architecture))
    for name in ("logits", "last_hidden_state", "pooler_output"):
        if name in expected:
            error = (found[name] - expected[name]).abs().max() / expected[name].abs().max()
            assert 0 < error < BOUND, name


def test_text_from_ciphertexts():
    model = get_encrypted_model(tiny("llama"), LINEAR)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    prefix = public_prefix_cache(model, torch.tensor([1, 20, 30]))
    beams = model.generate(**padded(), num_beams=2, **options)
    behind = prefix.generate(model, **padded(), **options)
    model.set_fhe_mode("execute")
    assert torch.equal(model.generate(**padded(), num_beams=2, **options), beams)
    assert torch.equal(prefix.generate(model, **padded(), **options), behind)


@pytest.mark.parametrize("mode", ["execute", "simulate"])
def test_gradients_from_ciphertexts(mode):
    model = get_encrypted_model(tiny("gpt2"), LINEAR)
    ids, gradients = torch.tensor([[5, 9, 17]]), []
    for each in ("disable", mode):
        model.set_fhe_mode(each)
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=embeddings, labels=ids).loss.backward()
        gradients.append(embeddings.grad.numpy())
    error = np.abs(gradients[1] - gradients[0]).max() / np.abs(gradients[0]).max()
    assert 0 < error < BOUND
