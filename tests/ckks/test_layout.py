"""Packing, masks and sums over distances, on clear slots."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cipherlm.engine import Parameters
from cipherlm.schemes.ckks.layout import Layout
from cipherlm.schemes.ckks.simulation import SimulatedTensor

SLOTS = 1024
layouts = st.builds(
    Layout,
    st.just(SLOTS),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(1, 4),
    st.integers(8, 20),
)


def inner_sum(slots, step, count):
    return sum(np.roll(slots, -i * step) for i in range(count))


@settings(max_examples=30, deadline=None)
@given(layout=layouts, features=st.integers(1, 300), seed=st.integers(0, 1000))
def test_packing_comes_back(layout, features, seed):
    random = np.random.default_rng(seed)
    start = random.integers(layout.tokens)
    tokens = layout.tokens - start
    hidden = random.normal(size=(tokens, features))
    packed = layout.pack(hidden, start)
    assert len(packed) == layout.chunks(features)
    assert all(len(slots) == SLOTS for slots in packed)
    assert np.array_equal(layout.unpack(packed, features, tokens, start), hidden)
    heads = random.normal(size=(layout.heads, tokens, layout.head_dim))
    assert np.array_equal(layout.unpack_heads(layout.pack_heads(heads, start), tokens, start), heads)
    turned = np.roll(packed[0], layout.period * layout.tokens)
    assert np.array_equal(turned, packed[0])


@settings(max_examples=30, deadline=None)
@given(layout=layouts, seed=st.integers(0, 1000))
def test_masks_make_centred_scores_and_sums_of_values(layout, seed):
    random = np.random.default_rng(seed)
    shape = (layout.heads, layout.tokens, layout.head_dim)
    query, key, value = random.normal(size=(3, *shape))
    slots = [layout.pack_heads(x) for x in (query, key, value)]

    def shifted(packed, masks):
        moved = [np.roll(packed, s) for s in range(layout.tokens)]
        return [sum(m * r for m, r in zip(row, moved, strict=True)) for row in masks]

    products = [slots[0] * masked for masked in shifted(slots[1], layout.key_masks())]
    total = sum(np.roll(product, -k * layout.distance_step) for k, product in enumerate(products))
    scores = inner_sum(total, *layout.blocks_of_head) / np.sqrt(layout.head_dim)
    want = SimulatedTensor(query).scores(SimulatedTensor(key)).values
    padded = scores.reshape(-1, layout.tokens, layout.padded_heads, layout.tokens)
    for a, t in np.ndindex(layout.tokens, layout.tokens):
        seen = want[:, t, t - a] if a <= t else 0
        assert np.allclose(padded[:, a, : layout.heads, t], seen)

    exponents = layout.exponents(-9.0).reshape(padded.shape)
    clear = SimulatedTensor(want).exponents(1.0, -9.0).values - want
    for a, t in np.ndindex(layout.tokens, layout.tokens):
        assert np.allclose(exponents[:, a, : layout.heads, t], clear[:, t, t - a] if a <= t else -9.0)

    turned = [np.roll(scores, -k * layout.distance_step) for k in range(layout.tokens)]
    mixed = sum(w * v for w, v in zip(turned, shifted(slots[2], layout.value_masks()), strict=True))
    assert np.allclose(layout.unpack_heads(mixed, layout.tokens), np.tril(want) @ value)


def test_rotation_keys_of_gpt2():
    """72 rotations for a prompt of GPT-2's geometry, 115 with decoding; most of them at low levels."""
    layout = Layout(Parameters.preset(14).slots, tokens=8, heads=12, head_dim=64)
    for decoding, count, high, highest in ((False, 72, 10, 3), (True, 115, 17, 6)):
        levels = layout.rotations(8, decoding=decoding).values()
        assert len(levels) == count
        assert sum(level > 4 for level in levels) == high
        assert sum(level == 8 for level in levels) == highest


def test_mistakes():
    for tokens, heads, head_dim, message in (
        (3, 2, 8, "power of two"),
        (16, 2, 8, "heads of 8"),
        (8, 12, 64, "do not fit"),
    ):
        with pytest.raises(ValueError, match=message):
            Layout(SLOTS, tokens, heads, head_dim)
