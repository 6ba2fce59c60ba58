"""Prompts longer than a ciphertext, and drafts, on ciphertexts behind the interface of transformers."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer

from cipherlm import EncryptionConfig, get_encrypted_model
from cipherlm.linear.prefix import cache_name
from cipherlm.models.architecture import architecture_of
from cipherlm.models.eagle import DraftHead

VOCABULARY, PROMPT = 60, 22
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


@pytest.mark.parametrize("kind", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_a_long_prompt_goes_in_chunks(kind):
    encrypted, ids, cache = model(kind), prompt(kind), DynamicCache()
    with torch.no_grad():
        want = clear_model(kind)(ids).logits
        trips = encrypted.placement.traffic.refreshes
        got = encrypted(ids[:, :-1], past_key_values=cache).logits
        # Three evaluations, of some thirteen round trips each.
        assert encrypted.placement.traffic.refreshes - trips < 60
        last = encrypted(ids[:, -1:], past_key_values=cache).logits
    assert (torch.cat([got, last], dim=1) - want).abs().max() < 0.01 * want.abs().max()


class Counting(BaseStreamer):
    def __init__(self) -> None:
        self.passes = -1  # the prompt comes first

    def put(self, value):
        self.passes += 1

    def end(self):
        """Nothing is held back."""


def assistant(kind, noise):
    """Return the clear model with noise on its weights: one that is right now and then."""
    made = clear_model(kind)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(4)
        for weight in made.parameters():
            weight += noise * torch.randn_like(weight)
    made.generation_config.assistant_confidence_threshold = 0.0
    return made


def drafted(kind, mode, tokens, new, **drafts):
    """Generate with drafts as without, and return how many passes that took."""
    encrypted, ids, counted = model(kind), prompt(kind, tokens), Counting()
    options = {"max_new_tokens": new, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    want = clear_model(kind).generate(ids, **options)
    encrypted.set_fhe_mode(mode)
    try:
        got = encrypted.generate(ids, streamer=counted, **drafts, **options)
    finally:
        encrypted.set_fhe_mode("execute")
    assert torch.equal(got, want)
    return counted.passes


def head(kind, seed=5):
    """Return a draft head that has learned nothing."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 1}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return DraftHead(LlamaConfig(**COMMON, **sizes, max_position_embeddings=64))


class Oracle(DraftHead):
    """A head that knows the clear model, and is right in so many of ten drafts."""

    def __init__(self, kind, right=10):
        super().__init__(head(kind).config)
        self.clear, self.right, self.calls, self.worthwhile = clear_model(kind), right, 0, 0.0
        self.base, self.first = architecture_of(kind), PREFIXES[kind][0]

    def forward(self, features, embeddings):
        self.calls += 1
        table = self.clear.get_submodule(self.base.embedding).weight
        ids = torch.cdist(embeddings[0], table).argmin(-1)
        true = self.clear(torch.cat([ids.new_tensor([self.first]), ids])[None], output_hidden_states=True)
        following = true.hidden_states[-1][:, 1:]
        # What came from evaluations is what the clear model has, up to the error of the arithmetic.
        known = min(features.shape[1], following.shape[1]) - 8
        assert (features[:, 1:known] - following[:, : known - 1]).abs().max() < 0.05 * following.abs().max()
        return following if self.calls % 10 < self.right else -following


@pytest.mark.parametrize("kind", PREFIXES)
def test_a_head_reads_last_hidden_states(kind):
    """Drafts begin behind the prompt's pass. What a head gets wrong is taken back, and changes no text."""
    passes = [drafted(kind, "simulate", 9, 16, assistant_model=Oracle(kind, right)) for right in (10, 6, 0)]
    assert passes[0] == 3  # the prompt's, and two of eight tokens
    assert passes[0] < passes[1] < passes[2] == 16
    assert drafted(kind, "simulate", 9, 16, assistant_model=head(kind)) > 8


def test_a_head_that_expects_little_proposes_nothing():
    oracle = Oracle("gpt2")
    oracle.worthwhile = 7.1
    assert drafted("gpt2", "simulate", 9, 6, assistant_model=oracle) == 6
    assert oracle.calls > 0


def test_a_head_in_a_conversation():
    """A cache that is kept has hidden states of the turn before."""
    encrypted, cache = model("gpt2"), DynamicCache()
    encrypted.set_fhe_mode("simulate")
    ids, oracle = prompt("gpt2", 9), Oracle("gpt2")
    for _turn in range(2):
        options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        want = clear_model("gpt2").generate(ids, **options)
        got = encrypted.generate(ids, assistant_model=oracle, **{cache_name(encrypted): cache}, **options)
        assert torch.equal(got, want)
        ids = torch.cat([got, ids.new_tensor([[7, 8, 9]])], dim=1)
    encrypted.set_fhe_mode("execute")
    assert oracle.calls > 4


def test_sampling_with_a_head_keeps_the_distribution():
    """A token of a draft stays if it is the one that was drawn."""
    encrypted, ids, drawn = model("gpt2"), prompt("gpt2", 9), []
    encrypted.set_fhe_mode("disable")
    for drafts in ({}, {"assistant_model": Oracle("gpt2")}):
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "do_sample": True, "top_k": 2}
        with torch.random.fork_rng():
            torch.manual_seed(11)
            texts = [tuple(encrypted.generate(ids, **drafts, **options)[0, -3:].tolist()) for _ in range(60)]
        drawn.append(texts)
    encrypted.set_fhe_mode("execute")
    for place in range(3):
        counts = [{text[: place + 1] for text in texts} for texts in drawn]
        common = max(counts[0] | counts[1], key=lambda start: sum(t[: place + 1] == start for t in drawn[0]))
        shares = [sum(t[: place + 1] == common for t in texts) / len(texts) for texts in drawn]
        assert abs(shares[0] - shares[1]) < 0.3


def test_a_head_needs_the_whole_model():
    encrypted = get_encrypted_model(clear_model("gpt2"), EncryptionConfig("transformer.h.0", scheme="ckks"))
    encrypted.calibrate([torch.arange(1, 30)])
    with pytest.raises(ValueError, match="all blocks encrypted"):
        encrypted.generate(prompt("gpt2", 9), max_new_tokens=3, assistant_model=head("gpt2"))


def test_a_head_on_ciphertexts():
    assert drafted("gpt2", "execute", 10, 7, assistant_model=Oracle("gpt2")) == 2


@pytest.mark.parametrize("kind", PREFIXES)
def test_drafts_change_no_text(kind):
    """A good assistant saves passes, a bad one none; no draft is longer than what one pass verifies."""
    assert drafted(kind, "simulate", 9, 16, prompt_lookup_num_tokens=20) <= 16
    passes = {}
    for noise in (0.0, 0.04, 1.0):
        made = assistant(kind, noise)
        config = made.generation_config
        config.num_assistant_tokens, config.num_assistant_tokens_schedule = 30, "heuristic"
        passes[noise] = drafted(kind, "simulate", 9, 16, assistant_model=made)
        assert (config.num_assistant_tokens, config.num_assistant_tokens_schedule) == (30, "heuristic")
    assert passes[0.0] == 2  # seven drafts and a token more in each
    assert 2 < passes[0.04] < passes[1.0]


@pytest.mark.slow
def test_drafts_on_ciphertexts():
    assert 2 <= drafted("gpt2", "execute", 10, 8, assistant_model=assistant("gpt2", 0.04)) <= 5


@pytest.mark.parametrize("cuts", [CUTS[:4], pytest.param(CUTS[4:], marks=pytest.mark.slow)])
def test_a_cache_that_was_cut_back(cuts):
    """The server goes on from there, whatever it has more."""
    encrypted, ids, cache = model("gpt2"), prompt("gpt2", 24), DynamicCache()
    with torch.no_grad():
        want = clear_model("gpt2")(ids).logits
        encrypted(ids[:, :15], past_key_values=cache)
        for cut, end in cuts:
            cache.crop(cut - cache.get_seq_length())
            trips = encrypted.placement.traffic.refreshes
            got = encrypted(ids[:, cut:end], past_key_values=cache).logits
            assert (got - want[:, cut:end]).abs().max() < 0.01 * want.abs().max()
            assert encrypted.placement.traffic.refreshes - trips < 20
