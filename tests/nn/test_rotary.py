"""Rotary positions are those of transformers, with every scaling that is there."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from cipherlm.nn.clear import ClearTensor
from cipherlm.nn.rotary import Rotary

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
SCALINGS = [
    {"rope_type": "default", "rope_theta": 10000.0},
    {"rope_type": "default", "rope_theta": 500000.0},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, **LLAMA3},
    {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 32.0,
        **LLAMA3,
        "high_freq_factor": 2.5,
        "original_max_position_embeddings": 128,
    },
    {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64},
    {"rope_type": "yarn", "rope_theta": 1000000.0, "factor": 16.0, "original_max_position_embeddings": 32},
    {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 32,
        "attention_factor": 1.25,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
    },
    {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 32,
        "mscale": 0.9,
        "mscale_all_dim": 0.4,
        "truncate": False,
    },
]
POSITIONS = 256


def config(parameters, head_dim=20):
    return LlamaConfig(
        hidden_size=3 * head_dim,
        num_attention_heads=3,
        head_dim=head_dim,
        max_position_embeddings=POSITIONS,
        rope_parameters=dict(parameters),
    )


@pytest.mark.parametrize("parameters", SCALINGS)
@pytest.mark.parametrize("head_dim", [10, 64])
def test_frequencies_are_those_of_transformers(parameters, head_dim):
    rotary = Rotary.of(head_dim, POSITIONS, parameters)
    default = LlamaRotaryEmbedding.compute_default_rope_parameters
    of = ROPE_INIT_FUNCTIONS.get(parameters["rope_type"], default)
    frequencies, factor = of(config(parameters, head_dim))
    assert np.allclose(rotary.frequencies, frequencies.numpy(), rtol=1e-6, atol=0)
    assert rotary.factor == pytest.approx(factor, rel=1e-12)
    assert Rotary.from_dict(asdict(rotary)) == rotary
    if parameters["rope_type"] in ("llama3", "yarn"):
        # Fast ones stay, slow ones are stretched: these tests are of something.
        plain = np.array(Rotary.of(head_dim, POSITIONS, {**parameters, "rope_type": "default"}).frequencies)
        stretch = plain / rotary.frequencies
        assert stretch[0] == pytest.approx(1)
        assert stretch[-1] == pytest.approx(parameters["factor"])


@pytest.mark.parametrize("parameters", SCALINGS)
def test_rotation_is_that_of_transformers(parameters):
    """Of queries and of keys, from a position in the middle of a text on."""
    random, position, head_dim = np.random.default_rng(4), 37, 20
    query, key = random.normal(size=(2, 3, 6, head_dim))
    q, k = (torch.from_numpy(x)[None] for x in (query, key))
    cosine, sine = LlamaRotaryEmbedding(config(parameters))(q, torch.arange(position, position + 6)[None])
    rotary = Rotary.of(head_dim, POSITIONS, parameters)
    for clear, want in zip((query, key), apply_rotary_pos_emb(q, k, cosine, sine), strict=True):
        got = ClearTensor(clear, position=position).rotary(rotary).values
        # transformers has angles in single precision.
        assert np.abs(got - want[0].numpy()).max() < 5e-5


@settings(max_examples=30, deadline=None)
@given(shift=st.integers(0, 1000), seed=st.integers(0, 1000))
def test_scores_depend_on_distances_only(shift, seed):
    random = np.random.default_rng(seed)
    rotary = Rotary.of(8, POSITIONS, SCALINGS[0])
    query, key = random.normal(size=(2, 2, 5, 8))

    def scores(position):
        q, k = (ClearTensor(x, position=position).rotary(rotary) for x in (query, key))
        return q.scores(k).values

    assert np.abs(scores(shift) - scores(0)).max() < 1e-9


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "proportional", "none such"])
def test_other_scalings_are_refused(kind):
    with pytest.raises(
        ValueError, match=f"the RoPE scaling '{kind}' is not there; these are: default, linear"
    ):
        Rotary.of(20, POSITIONS, {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(ValueError, match=f"'{kind}'"):  # as configurations had it before
        Rotary.of(20, POSITIONS, {"type": kind, "rope_theta": 1e4, "factor": 2.0})


def test_a_part_of_a_head_is_refused():
    plain = SCALINGS[0]
    with pytest.raises(ValueError, match="on a part of a head's features, or on an odd number"):
        Rotary.of(21, POSITIONS, plain)
    with pytest.raises(ValueError, match="on a part of a head's features"):
        Rotary.of(20, POSITIONS, {**plain, "partial_rotary_factor": 0.5})
    assert Rotary.of(20, POSITIONS, {**plain, "partial_rotary_factor": 1.0}) == Rotary.of(
        20, POSITIONS, plain
    )
