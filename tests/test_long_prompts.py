"""Prompts longer than a ciphertext, on ciphertexts behind the interface of transformers."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from cipherlm import EncryptionConfig, get_encrypted_model

VOCABULARY, PROMPT, NEW = 60, 22, 5
COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": None, "initializer_range": 0.5}
CUTS = ((12, 14), (12, 19), (17, 18), (18, 20), (5, 7), (7, 8), (8, 9), (7, 8), (6, 13), (10, 11), (9, 12))
"""Where a text is cut, and where it goes on to: by chunks and by single tokens, behind either."""
PREFIXES = {"gpt2": [0], "llama": list(range(10))}


def clear_model(kind):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        if kind == "gpt2":
            sizes = {"n_embd": 32, "n_head": 2, "n_layer": 1, "n_positions": 64}
            return GPT2LMHeadModel(GPT2Config(**COMMON, **sizes)).eval()
        sizes = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
        }
        return LlamaForCausalLM(LlamaConfig(**COMMON, **sizes)).eval()


@cache
def model(kind):
    """The model with all blocks encrypted: behind a short prefix, and behind one that is kept apart."""
    made = get_encrypted_model(
        clear_model(kind),
        EncryptionConfig("all", scheme="ckks", tokens=8, context=48, prefix=PREFIXES[kind]),
    )
    generator = torch.Generator().manual_seed(2)
    made.calibrate([torch.randint(1, VOCABULARY, (30,), generator=generator) for _ in range(30)])
    made.set_fhe_mode("execute")
    return made


def prompt(kind, tokens=PROMPT):
    ids = torch.randint(1, VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(8))
    return model(kind).with_prefix(ids)


@pytest.mark.parametrize("kind", PREFIXES)
def test_a_long_prompt_goes_in_chunks(kind):
    encrypted, ids = model(kind), prompt(kind)
    with torch.no_grad():
        want = clear_model(kind)(ids).logits
        trips = encrypted.placement.traffic.refreshes
        got = encrypted(ids).logits
    assert (got - want).abs().max() < 0.01 * want.abs().max()
    # Three evaluations, of some thirteen round trips each.
    assert encrypted.placement.traffic.refreshes - trips < 60


@pytest.mark.parametrize("kind", PREFIXES)
def test_greedy_texts_behind_a_long_prompt(kind):
    encrypted, ids = model(kind), prompt(kind)
    options = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    want = clear_model(kind).generate(ids, **options)
    assert torch.equal(encrypted.generate(ids, **options), want)


def test_a_cache_that_was_cut_back():
    """The server goes on from there, whatever it has more."""
    encrypted, ids, cache = model("gpt2"), prompt("gpt2", 24), DynamicCache()
    with torch.no_grad():
        want = clear_model("gpt2")(ids).logits
        encrypted(ids[:, :15], past_key_values=cache)
        for cut, end in CUTS:
            cache.crop(cut - cache.get_seq_length())
            trips = encrypted.placement.traffic.refreshes
            got = encrypted(ids[:, cut:end], past_key_values=cache).logits
            assert (got - want[:, cut:end]).abs().max() < 0.01 * want.abs().max()
            assert encrypted.placement.traffic.refreshes - trips < 20
