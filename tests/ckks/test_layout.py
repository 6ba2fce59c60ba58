"""Packing, masks and sums over distances, on clear slots."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cipherlm.engine import Parameters
from cipherlm.nn.clear import ClearTensor
from cipherlm.nn.rotary import Rotary
from cipherlm.schemes.ckks.layout import Layout

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
    want = ClearTensor(query).scores(ClearTensor(key)).values
    padded = scores.reshape(-1, layout.tokens, layout.padded_heads, layout.tokens)
    for a, t in np.ndindex(layout.tokens, layout.tokens):
        seen = want[:, t, t - a] if a <= t else 0
        assert np.allclose(padded[:, a, : layout.heads, t], seen)

    [exponents] = (slots.reshape(padded.shape) for slots in layout.exponents(-9.0))
    clear = ClearTensor(want).exponents(1.0, -9.0).values - want
    for a, t in np.ndindex(layout.tokens, layout.tokens):
        assert np.allclose(exponents[:, a, : layout.heads, t], clear[:, t, t - a] if a <= t else -9.0)

    turned = [np.roll(scores, -k * layout.distance_step) for k in range(layout.tokens)]
    mixed = sum(w * v for w, v in zip(turned, shifted(slots[2], layout.value_masks()), strict=True))
    assert np.allclose(layout.unpack_heads(mixed, layout.tokens), np.tril(want) @ value)


turning = st.builds(
    Layout,
    st.just(SLOTS),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(1, 4),
    st.sampled_from([8, 10, 16, 20]),
    st.sampled_from([0, 9, 30]),
    st.just(0),
    st.integers(1, 100),
    st.just(True),
)


def rotary_of(layout):
    return Rotary.of(layout.head_dim, 512, {"rope_theta": 1e3, "rope_type": "yarn", "factor": 4.0})


def applied(diagonals, slots):
    return sum(diagonal * np.roll(slots, -step) for step, diagonal in diagonals)


@settings(max_examples=30, deadline=None)
@given(layout=turning, position=st.integers(0, 1000), seed=st.integers(0, 1000))
def test_rotary_factors(layout, position, seed):
    """One rotation exchanges the halves of heads, and two bring each to where the other is in decoding."""
    random, rotary, decoding = np.random.default_rng(seed), rotary_of(layout), layout.decoding
    values = random.normal(size=(layout.heads, layout.tokens, layout.head_dim))
    want = ClearTensor(values, position=position).rotary(rotary).values
    slots = layout.pack_heads(values)
    cosine, sine = layout.rotary_factors(rotary, position)
    turned = slots * cosine + np.roll(slots, -layout.half_turn) * sine
    assert np.allclose(turned, layout.pack_heads(want))
    slots = decoding.pack_heads(values[:, 0])
    moved = [slots, *(np.roll(slots, -step) for step in decoding.half_turns)]
    turned = sum(x * y for x, y in zip(moved, decoding.rotary_factors(rotary, position), strict=True))
    assert np.allclose(turned, decoding.pack_heads(want[:, 0]))


@settings(max_examples=20, deadline=None)
@given(layout=turning, position=st.integers(0, 1000), seed=st.integers(0, 1000))
def test_masks_rotate_keys_on_the_way(layout, position, seed):
    random, rotary = np.random.default_rng(seed), rotary_of(layout)
    key = random.normal(size=(layout.heads, layout.tokens, layout.head_dim))

    def masked(values, *more):
        sources = [layout.pack_heads(values)]
        sources += [np.roll(sources[0], -layout.half_turn)] * bool(more)
        moved = [np.roll(source, s) for source in sources for s in range(layout.tokens)]
        masks = layout.key_masks(*more)
        return [sum(m * x for m, x in zip(row, moved, strict=True)) for row in masks]

    want = masked(ClearTensor(key, position=position).rotary(rotary).values)
    assert np.allclose(masked(key, rotary, position), want)


@settings(max_examples=30, deadline=None)
@given(layout=turning, seed=st.integers(0, 1000))
def test_scores_and_sums_of_a_prefix(layout, seed):
    random, count = np.random.default_rng(seed), len(layout.feature_at)
    query, (keys, values) = (
        random.normal(size=(layout.heads, layout.tokens, layout.head_dim)),
        random.normal(size=(2, layout.heads, layout.prefix, layout.head_dim)),
    )
    want = query @ keys.swapaxes(1, 2) / np.sqrt(layout.head_dim)
    slots = layout.pack_heads(query)
    parts = [applied(layout.prefix_scores(keys, part), slots) for part in range(layout.prefix_parts)]
    shape = (-1, count, layout.padded_heads, layout.tokens)
    repetitions = [part.reshape(shape) for part in parts]
    assert all(np.allclose(part, part[0]) for part in repetitions)
    places = np.concatenate([part[0] for part in repetitions])[:, : layout.heads]
    assert np.allclose(places[: layout.prefix], want.transpose(2, 0, 1))
    assert not places[layout.prefix :].any()
    mixed = sum(applied(layout.prefix_values(values, index), part) for index, part in enumerate(parts))
    assert np.allclose(layout.unpack_heads(mixed, layout.tokens), want @ values)
    # Exponents are as for clear scores: -log of all that a query sees, the prefix among it.
    for index, part in enumerate(layout.exponents(-9.0)[1:]):
        part = part.reshape(shape)[:, :, : layout.heads]
        place = index * count + np.arange(count)
        seen = -np.log(layout.prefix + np.arange(layout.tokens) + 1.0)
        expected = np.where((place < layout.prefix)[:, None], seen, -9.0)
        assert np.allclose(part, expected[:, None])


@settings(max_examples=30, deadline=None)
@given(layout=turning, seed=st.integers(0, 1000))
def test_scores_and_sums_of_a_prefix_for_one_token(layout, seed):
    random, decoding = np.random.default_rng(seed), layout.decoding
    query = random.normal(size=(layout.heads, layout.head_dim))
    keys, values = random.normal(size=(2, layout.heads, layout.prefix, layout.head_dim))
    want = np.einsum("hd,hpd->hp", query, keys) / np.sqrt(layout.head_dim)
    shape = (layout.tokens, decoding.lower, layout.padded_heads, layout.tokens)
    slots = decoding.pack_heads(query)
    parts = [
        inner_sum(applied(decoding.prefix_scores(keys, part), slots), *decoding.features_of_head[0])
        * decoding.place_mask
        for part in range(decoding.prefix_parts)
    ]
    scores = [part.reshape(shape)[..., 0].swapaxes(0, 1) for part in parts]
    places = np.concatenate(scores).reshape(-1, layout.padded_heads)
    assert np.allclose(places[: layout.prefix, : layout.heads], want.T)
    assert not places[layout.prefix :, : layout.heads].any()
    mixed = sum(
        applied(decoding.prefix_values(values, index), inner_sum(part, *decoding.spreading[0]))
        for index, part in enumerate(parts)
    )
    mixed = inner_sum(mixed, *decoding.tokens_of_group)
    exists = decoding.pack_heads(np.ones_like(query))
    assert np.allclose(mixed * exists, decoding.pack_heads(np.einsum("hp,hpd->hd", want, values)))


def test_rotation_keys_of_gpt2():
    """30 rotations for a prompt of GPT-2's geometry, 55 with decoding; most of them at low levels."""
    layout = Layout(Parameters.preset(14).slots, tokens=8, heads=12, head_dim=64)
    for decoding, count, high, highest in ((False, 30, 10, 6), (True, 55, 23, 6)):
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


@settings(max_examples=30, deadline=None)
@given(layout=layouts, prefix=st.sampled_from([0, 5, 40]), own=st.integers(1, 30))
def test_every_slot_is_in_a_row_of_exponents(layout, prefix, own):
    """Also where there is no head: sums, and sums of squares, are those that a softmax is fitted for."""
    layout = replace(layout, prefix=prefix)
    blocks, distances, decoding = layout.blocks_of_head, layout.distances, layout.decoding
    first, *others = layout.exponents(-30.0)
    prompt = [([first], [distances]), (others, [blocks, distances])]
    chunk = [(layout.chunk.exponents(-30.0, own), [blocks, distances])]
    token = [(decoding.exponents(-30.0, own), [decoding.tokens_of_group, decoding.groups_of_part])]
    for packing, keys in ((prompt, layout.tokens), (chunk, own + layout.tokens), (token, own)):

        def total(power, packing=packing):
            whole = np.zeros(SLOTS)
            for shifts, sums in packing:
                part = sum((np.exp(power * shift) for shift in shifts), np.zeros(SLOTS))
                for step, count in sums:
                    part = inner_sum(part, step, count)
                whole += part
            return whole

        assert np.allclose(total(1), 1)
        assert total(2).min() > (1 - 1e-6) / (prefix + keys)
