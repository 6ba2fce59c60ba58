"""Every architecture against its model in transformers, in the clear and on ciphertexts."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from cipherlm import EncryptionConfig
from cipherlm.models.architecture import MODULES, architecture_of
from cipherlm.models.geometry import geometry_of
from cipherlm.nn.blocks import calibrated
from cipherlm.nn.clear import ClearTensor
from cipherlm.nn.rotary import Rotary
from cipherlm.schemes.ckks.geometry import Geometry
from cipherlm.schemes.ckks.session import Hosted, InProcess, Server

from .models import Clear, behind

VOCABULARY, CONTEXT = 50, 40
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 27,
    "intermediate_size": 50,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}


def llama(**changes):
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, "tie_word_embeddings": True, **changes}))


def qwen2():
    """Biases for queries, keys and values, and heads as wide together as the hidden states."""
    return Qwen2ForCausalLM(Qwen2Config(**{**SIZES, "hidden_size": 30, "tie_word_embeddings": True}))


def mistral(**changes):
    return MistralForCausalLM(MistralConfig(**{**SIZES, "sliding_window": None, **changes}))


def gpt2():
    sizes = {"n_embd": 30, "n_head": 3, "n_layer": 2, "n_positions": 64, "vocab_size": VOCABULARY}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=None))


MODELS = {
    "llama": llama,
    "llama3 scaling": lambda: llama(rope_parameters=LLAMA3),
    "qwen2": qwen2,
    "untied": lambda: llama(
        tie_word_embeddings=False,
        num_hidden_layers=2,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters=YARN,
    ),
    "seven heads": lambda: llama(hidden_size=98, num_attention_heads=7, head_dim=20, intermediate_size=190),
    "mistral": mistral,
    "gpt2": gpt2,
}


@cache
def model(kind) -> Clear:
    """Return a model with random weights, large enough for attention to attend to something."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(7)
        made = MODELS[kind]()
        for name, weight in made.named_parameters():
            if weight.dim() == 1:
                is_gain = name.endswith("weight")
                weight.normal_(1.0 if is_gain else 0.0, 0.2)
            elif any(embedding in name for embedding in ("embed_tokens", "wte", "wpe")):
                weight.normal_()
            else:
                # GPT-2's layers have their inputs first.
                weight.normal_(std=weight.shape[0 if "c_" in name else 1] ** -0.5)
    return Clear(made)


def text(tokens, seed=0):
    return np.random.default_rng(seed).integers(0, VOCABULARY, tokens).tolist()


def largest(a, b):
    assert a.shape == b.shape
    return np.abs(a - b).max()


# In the clear


@pytest.mark.parametrize("name", MODELS)
def test_the_exact_module_is_the_model(name):
    """Blocks, and the logits behind them; transformers has parts of these in single precision."""
    clear, ids = model(name), text(30)
    before, after = clear.hidden_states(ids)
    exact = clear.exact
    got = exact(ClearTensor(clear.ready(before))).values
    assert largest(got, clear.ready(after)) < 1e-5
    assert np.abs(after).max() > 1
    assert largest(clear.logits(got), clear.clear_logits(ids)) < 1e-4


@pytest.mark.parametrize("prefix", [1, 5, 11])
@pytest.mark.parametrize("name", MODELS)
def test_the_exact_module_behind_a_prefix(name, prefix):
    clear, ids = model(name), text(20)
    before, after = map(clear.ready, clear.hidden_states(ids))
    found = clear.prefixes(ids[:prefix])
    assert [x.tokens for x in found] == [prefix] * clear.args.layers
    got = behind(clear.exact, before[prefix:], found, prefix)
    assert largest(got, after[prefix:]) < 1e-5
    # What a prefix does is not nothing.
    assert largest(behind(clear.exact, before[prefix:], [], prefix), after[prefix:]) > 0.1


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_parts_of_a_block(name):
    """Attention and the MLP alone, as the model has them: with normalised inputs."""
    clear, ids = model(name), text(9)
    architecture = clear.architecture
    for part in architecture.parts:
        name = f"{architecture.blocks}.0.{part}"
        target, met = clear.model.get_submodule(name), []

        def see(_, args, kwargs, output, met=met):
            hidden = next(iter([*args, *kwargs.values()]))
            output = output[0] if isinstance(output, tuple) else output
            met.extend((hidden[0].numpy(), output[0].numpy()))

        hook = target.register_forward_hook(see, with_kwargs=True)
        clear.clear_logits(ids)
        hook.remove()
        inputs, outputs = met
        assert not architecture.is_centred(name)
        assert largest(clear.module(name)(ClearTensor(inputs)).values, outputs) < 1e-5


def test_names_of_what_can_be_remote():
    for name in MODELS:
        clear = model(name)
        names = list(clear.architecture.names(clear.args.layers))
        assert len(names) == 1 + clear.args.layers * 3
        assert all(clear.architecture.make(name, clear.args).range_names for name in names)
        for wrong in ("lm_head", f"{names[0]}.0.nothing", f"{names[0]}.x", "0", f"{names[2]}.c_proj"):
            with pytest.raises(ValueError, match="is no module that can be remote"):
                clear.architecture.make(wrong, clear.args)


# On ciphertexts


def evaluated(keys, name, prefix, tokens, count, *, release_keys=False):
    """Return what ciphertexts give for so many tokens behind a prefix, and what transformers does."""
    clear, ids = model(name), text(prefix + count)
    before, after = map(clear.ready, clear.hidden_states(ids))
    found = clear.prefixes(ids[:prefix]) if prefix else [None] * clear.args.layers
    texts = [clear.embed(ids[:prefix] + text(12, seed)) for seed in range(1, 15)]
    ranges = calibrated(clear.exact, [x[prefix:] for x in [*texts, before]], found if prefix else [])
    hosted = Hosted(clear.exact.fitted(ranges, CONTEXT), found)
    args = clear.args
    geometry = Geometry(
        args.heads,
        args.head_dim,
        tokens,
        prefix,
        CONTEXT,
        width=args.width,
        inner=args.inner,
        rotary=args.rope is not None,
    )
    client = keys.client(geometry)
    session = InProcess(Server({"all": hosted}, geometry), client)
    if not release_keys:
        got = session.evaluate("all", before[prefix:], prefix)
    else:
        first = session.evaluate("all", before[prefix:-1], prefix)
        session.session.release_keys()
        with pytest.raises(RuntimeError, match="load them first"):
            _ = session.session.arithmetic.evaluator
        session.session.load_keys(client.evaluation_keys(), client.public_key())
        last = session.evaluate("all", before[-1:], prefix + count - 1)
        got = np.concatenate([first, last])
    session.session.close()
    return got, after[prefix:]


@pytest.mark.parametrize(
    ("name", "prefix", "tokens", "count", "bound"),
    [
        pytest.param("llama", 0, 4, 6, 2e-3, marks=pytest.mark.slow),  # a prompt, and two tokens behind it
        ("llama", 1, 4, 5, 2e-3),
        ("llama", 5, 4, 6, 2e-3),  # a prefix longer than what stands side by side
        ("llama3 scaling", 17, 4, 5, 2e-3),  # and one whose scores need two ciphertexts
        ("qwen2", 3, 4, 3, 2e-3),
        ("mistral", 11, 4, 5, 2e-3),
        ("untied", 5, 4, 5, 4e-3),
        ("seven heads", 5, 8, 4, 2e-3),
        pytest.param("seven heads", 11, 8, 9, 2e-3, marks=pytest.mark.slow),
        ("gpt2", 11, 4, 5, 4e-3),
    ],
)
def test_on_ciphertexts(keys, name, prefix, tokens, count, bound):
    got, want = evaluated(keys, name, prefix, tokens, count)
    assert largest(got, want) < bound
    assert np.abs(want).max() > 1


def test_keys_come_and_go_between_tokens(keys):
    """What a session remembers of a text outlasts the evaluation keys."""
    got, want = evaluated(keys, "llama", 1, 4, 5, release_keys=True)
    assert largest(got, want) < 2e-3


# Refusals


def config(**changes):
    return {**LlamaConfig(**SIZES).to_dict(), **changes}


def args_of(model_type, values):
    return architecture_of(model_type).args.of(values)


def test_attention_in_a_window_is_refused():
    message = "attention in a sliding window cannot be encrypted"
    with pytest.raises(ValueError, match=message):
        args_of("mistral", mistral(sliding_window=8).config.to_dict())
    windowed = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=0)
    with pytest.raises(ValueError, match=message):
        args_of("qwen2", windowed.to_dict())
    with pytest.raises(ValueError, match=message):
        args_of("qwen2", config(layer_types=["full_attention", "sliding_attention"]))
    # One that is named and not used is none.
    unused = Qwen2Config(**SIZES, use_sliding_window=False, sliding_window=8)
    assert args_of("qwen2", unused.to_dict()).heads == 3


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "proportional"])
def test_an_unknown_scaling_of_rope_is_refused(kind):
    parameters = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ValueError, match=f"the RoPE scaling '{kind}' is not there"):
        args_of("llama", config(rope_parameters=parameters))
    with pytest.raises(ValueError, match=f"the RoPE scaling '{kind}' is not there"):
        args_of("llama", {**config(rope_scaling={"type": kind, "factor": 2.0}), "rope_parameters": None})


def test_configurations_from_before_transformers_5():
    """The angles' base was a field of its own, and scalings had another name."""
    old = {**config(rope_theta=5e3), "rope_parameters": None}
    assert args_of("llama", old).rope == Rotary.of(10, 64, {"rope_theta": 5e3})
    old["rope_scaling"] = {"rope_type": "linear", "factor": 2.0}
    want = Rotary.of(10, 64, {"rope_theta": 5e3, "rope_type": "linear", "factor": 2.0})
    assert args_of("llama", old).rope == want


def test_cross_attention_is_refused():
    values = GPT2Config(n_embd=30, n_head=3, n_layer=1, add_cross_attention=True).to_dict()
    with pytest.raises(ValueError, match="cross-attention"):
        args_of("gpt2", values)


@pytest.mark.parametrize("name", ["bloom", "gpt_neox", None])
def test_an_unknown_architecture_is_refused(name):
    with pytest.raises(ValueError, match=f"cannot encrypt the architecture {name!r}; supported: gpt2, llama"):
        architecture_of(name)


@pytest.mark.parametrize("name", MODULES)
def test_an_activation_that_no_polynomial_serves_is_refused(name):
    values = config(hidden_act="prelu")
    if name == "gpt2":
        values = GPT2Config(n_embd=30, n_head=3, n_layer=1, activation_function="prelu").to_dict()
    architecture = architecture_of(name)
    args = architecture.args.of(values)
    with pytest.raises(ValueError, match="the activation 'prelu' cannot be computed on ciphertexts"):
        architecture.make(f"{architecture.blocks}.0.mlp", args)


@pytest.mark.parametrize(("prefix", "context"), [(40, 40), (64, 40), (5, 4)])
def test_a_prefix_without_room_behind_it_is_refused(prefix, context):
    message = f"a prefix of {prefix} tokens leaves no room in a context of {context}"
    with pytest.raises(ValueError, match=message):
        Geometry(3, 10, 4, prefix, context)
    with pytest.raises(ValueError, match=f"a prefix of {prefix} tokens leaves no room in context={context}"):
        EncryptionConfig("all", scheme="ckks", tokens=4, context=context, prefix=[1] * prefix)


def test_a_context_beyond_the_model_is_refused():
    settings = EncryptionConfig("all", scheme="ckks", tokens=4, context=65)
    with pytest.raises(ValueError, match="context=65 is more than the 64 tokens of the model"):
        geometry_of(settings, model("llama").args, [0])
