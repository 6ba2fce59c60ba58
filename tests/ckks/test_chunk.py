"""Chunks of tokens at any position behind others, and texts that are taken back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cipherlm.models.gpt2 import Args, Attention, Block
from cipherlm.nn.clear import ClearTensor
from cipherlm.nn.rotary import Rotary
from cipherlm.nn.tensor import Cache, Prefix
from cipherlm.schemes.ckks.layout import Layout

from .conftest import Parties
from .models import behind, filled

RANDOM = np.random.default_rng(23)
ROTARY = Rotary.of(10, 512, {"rope_theta": 1e4})
SLOTS = 1024
layouts = st.builds(
    Layout,
    st.just(SLOTS),
    st.sampled_from([2, 4, 8]),
    st.integers(1, 4),
    st.integers(8, 20),
)


def largest(a, b):
    assert a.shape == b.shape
    return np.abs(a - b).max()


def applied(layout, masks, slots):
    """Return what masks and the turns in front of them make of slots."""
    far = np.roll(slots, -layout.tokens)
    moved = (np.roll(far if turn > 0 else slots, -layout.chunk.rotation(turn)) for turn, _ in masks)
    return sum(mask * source for (_, mask), source in zip(masks, moved, strict=True))


def applied_back(layout, masks, parts):
    """Return what masks of several parts and the turns behind them make of these."""
    total = np.zeros(SLOTS)
    for column in zip(*masks, strict=True):
        turn = column[0][0]
        masked = sum(mask * part for (_, mask), part in zip(column, parts, strict=True))
        turned = np.roll(masked, -layout.chunk.rotation(turn))
        total += np.roll(turned, -layout.tokens) if turn > 0 else turned
    return total


def inner_sum(slots, step, count):
    return sum(np.roll(slots, -i * step) for i in range(count))


@settings(max_examples=30, deadline=None)
@given(layout=layouts, before=st.integers(1, 30), seed=st.integers(0, 1000))
def test_masks_make_scores_of_all_pairs_and_sums_of_values(layout, before, seed):
    random, chunk, tokens = np.random.default_rng(seed), layout.chunk, layout.tokens
    count = chunk.groups(before) + 1
    shape = (layout.heads, tokens, layout.head_dim)
    query = random.normal(size=shape)
    key, value = random.normal(size=(2, count, *shape))
    queries = [
        np.roll(applied(layout, list(chunk.query_masks(k)), layout.pack_heads(query)), -k * step)
        for k, step in [(k, layout.distance_step) for k in range(tokens)]
    ]
    sums = []
    for group in key:
        slots = layout.pack_heads(group)
        product = sum(q * np.roll(slots, -k * layout.distance_step) for k, q in enumerate(queries))
        sums.append(inner_sum(product, *layout.blocks_of_head))
    parts = [sums[i : i + chunk.blocks] for i in range(0, count, chunk.blocks)]
    assert len(parts) == chunk.parts(before)
    scores = [
        applied_back(layout, [list(chunk.place_masks(block)) for block in range(len(part))], part)
        for part in parts
    ]

    # What query t makes of key (t - a) of a group, at its place.
    products = np.einsum("htf,ghsf->ghts", query, key)
    shape = (-1, tokens, layout.padded_heads, tokens)
    placed = np.zeros((len(parts) * chunk.blocks, *shape[1:]))
    shifts = np.concatenate(
        [
            np.asarray(part)[: chunk.keys_per_part * layout.padded_heads * tokens].reshape(shape)
            for part in chunk.exponents(-9.0, before)
        ]
    )
    for a, t in np.ndindex(tokens, tokens):
        placed[:count, a, : layout.heads, t] = products[:, :, t, (t - a) % tokens]
        for group in range(len(placed)):
            own = group == count - 1
            seen = t >= a if own else group * tokens + (t - a) % tokens < before and group < count
            shift = -np.log(before + t + 1) if seen else -9.0
            assert np.allclose(shifts[group, a, : layout.heads, t], shift)
    each = np.split(placed, len(parts))
    for part, want in zip(scores, each, strict=True):
        assert np.allclose(part, layout.repeated(want))

    total = np.zeros(SLOTS)
    weighted = [np.zeros(SLOTS) for _ in range(tokens)]
    for index, group in enumerate(value):
        part, block = divmod(index, chunk.blocks)
        weights = applied(layout, list(chunk.weight_masks(block)), scores[part])
        weights = inner_sum(weights, *layout.blocks_of_head)
        for k in range(tokens):
            weighted[k] += np.roll(weights, -k * layout.distance_step) * layout.pack_heads(group)
    total = applied_back(layout, [list(chunk.sum_masks(k)) for k in range(tokens)], weighted)
    want = np.einsum("ghts,ghsf->htf", products, value)
    assert np.allclose(layout.unpack_heads(total, tokens), want)


@pytest.mark.parametrize(("tokens", "heads", "head_dim"), [(4, 3, 10), (8, 12, 64), (16, 4, 32)])
def test_transposition_back(tokens, heads, head_dim):
    layout = Layout(8192, tokens, heads, head_dim)
    slots = layout.pack_heads(RANDOM.normal(size=(heads, tokens, head_dim)))

    def moved(terms, x):
        return sum(mask * np.roll(x, -step) for step, mask in terms)

    there = moved(layout.decoding.transposition(tokens), slots)
    assert np.allclose(moved(layout.decoding.transposition_back(), there), slots)
    order = layout.decoding.repeated_order
    assert np.all(there.reshape(tokens, -1)[:, order < 0] == 0)


class Text:
    """Queries, keys and values of one text, on ciphertexts and on clear numbers."""

    def __init__(self, parties, prefix, rotary, random, tokens=24) -> None:
        self.parties, self.prefix, self.rotary = parties, prefix, rotary
        self.query, self.key, self.value = random.normal(size=(3, 3, tokens, 10))
        self.before = prefix.tokens if prefix else 0
        self.past = None

    def turned(self, tensor):
        return tensor.rotary(self.rotary) if self.rotary else tensor

    def attended(self, start, count):
        """Return scores of some tokens against all up to them, and keys and values, on ciphertexts."""
        at = self.before + start
        rows = slice(start, start + count)
        if start == 0:
            query, key, value = (
                self.parties.encrypt_heads(x[:, rows], at) for x in (self.query, self.key, self.value)
            )
        elif count == 1:
            query = self.parties.encrypt_token_heads(self.query[:, start], at)
            pair = (self.key + 1j * self.value)[:, start]
            key = value = self.parties.encrypt_token_heads(pair, at, past=True)
        else:
            query, key, value = (
                self.parties.encrypt_chunk_heads(x[:, rows], at) for x in (self.query, self.key, self.value)
            )
        key, value = self.past = self.turned(key).with_past(value, self.past, self.prefix)
        return self.turned(query).scores(key), value

    def clear(self, start, count):
        """Return scores (heads, queries, keys) and values of the same tokens on clear numbers."""
        keys = self.turned(ClearTensor(self.key[:, : start + count], position=self.before))
        keys, values = keys.with_past(ClearTensor(self.value[:, : start + count]), None, self.prefix)
        rows = ClearTensor(self.query[:, start : start + count], position=self.before + start)
        return self.turned(rows).scores(keys), values


def score_slots(layout, scores, count, before):
    """Return where the scores (heads, queries, keys) of a chunk are, those of a prefix last."""
    chunk, tokens, own = layout.chunk, layout.tokens, layout.chunk.groups(before)
    groups = np.zeros((chunk.parts(before) * chunk.blocks, tokens, layout.padded_heads, tokens))
    for a, t in np.ndindex(tokens, count):
        for group in range(own + 1):
            key = group * tokens + (t - a) % tokens if group < own else before + t - a
            if (key < before) if group < own else (t >= a):
                groups[group, a, : layout.heads, t] = scores[:, t, layout.prefix + key]
    parts = np.zeros((layout.prefix_parts * chunk.keys_per_part, layout.padded_heads, tokens))
    parts[: layout.prefix, : layout.heads, :count] = scores[:, :, : layout.prefix].transpose(2, 0, 1)
    both = np.concatenate([groups.reshape(-1, *parts.shape[1:]), parts])
    return [layout.repeated(part) for part in np.split(both, len(both) // chunk.keys_per_part)]


@settings(max_examples=8, deadline=None)
@given(
    rotary=st.sampled_from([None, ROTARY]),
    prefix_tokens=st.sampled_from([0, 4, 5, 17]),
    passes=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3)), min_size=1, max_size=4),
    count=st.integers(2, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_scores_and_sums_of_a_chunk(turning, rotary, prefix_tokens, passes, count, seed):
    """Behind a prompt and passes of one token or of several, some of which are taken back."""
    random, parties = np.random.default_rng(seed), turning.behind(prefix_tokens)
    layout = parties.layout
    prefix = Prefix(*random.normal(size=(2, 3, prefix_tokens, 10))) if prefix_tokens else None
    text, position = Text(parties, prefix, rotary, random), 0
    for tokens, taken_back in passes:
        text.attended(position, tokens)
        position += tokens if tokens == 1 or position == 0 else max(1, tokens - taken_back)
    scores, values = text.attended(position, count)
    clear, clear_values = text.clear(position, count)
    want = score_slots(layout, clear.values, count, position)
    assert len(scores.parts) == len(want)
    for part, slots in zip(scores.parts, want, strict=True):
        got = parties.secret_key.decrypt(part).real
        shape = (-1, layout.chunk.keys_per_part, layout.padded_heads, layout.tokens)
        # Zero where no query sees a key: what else lies there could be of any size.
        assert np.abs(got - slots).reshape(shape)[:, :, :3, :count].max() < 3e-5

    # Scores as they are, for weights.
    weights = scores._with(parties.secret_key.encrypt(slots, 8) for slots in want)
    mixed, total = weights.mix(values)
    clear_mixed, clear_total = clear.mix(clear_values)
    scale = np.abs(clear.values).sum(axis=-1).max()
    mixed, total = (replace(x, tokens=count) for x in (mixed, total))
    assert largest(parties.decrypt_heads(mixed), clear_mixed.values) < 4e-6 * scale
    sums = np.broadcast_to(clear_total.values, clear_mixed.values.shape)
    assert largest(parties.decrypt_heads(total), sums) < 4e-6 * scale


@pytest.mark.parametrize("prefix_tokens", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_block_after_block_of_chunks(small, prefix_tokens):
    """A prompt in chunks, drafts of which a part is kept, and tokens one by one: as if all at once."""
    width = small.layout.width
    block = filled(Block(Args(width, 3, 120, 1, 64, 1e-5, "gelu_new"), 0), RANDOM)
    prefix = Prefix(*RANDOM.normal(size=(2, 3, prefix_tokens, 10))) if prefix_tokens else None
    hidden = RANDOM.normal(size=(15, width))
    want = behind(block, hidden, [prefix], prefix_tokens)
    fitted = block.fitted(block.ranges, 16)
    cache, first = Cache(prefix), 4 - prefix_tokens
    got = [*small.decrypt(fitted(small.encrypt(hidden[:first], prefix_tokens), cache))]
    for offered, kept in [(4, 4), (3, 1), (1, 1), (4, 2), (3, 3)]:
        start = len(got)
        rows = hidden[start : start + offered].copy()
        rows[kept:] += 1  # drafts that are wrong
        if offered == 1:
            got.append(
                small.decrypt_token(fitted(small.encrypt_token(rows[0], prefix_tokens + start), cache))
            )
        else:
            chunk = fitted(small.encrypt_chunk(rows, prefix_tokens + start), cache)
            got += [*small.decrypt(chunk)[:kept]]
    assert len(got) == 15 - prefix_tokens
    assert largest(np.array(got), want[: len(got)]) < 2e-3
    for start, count in ((7, 2), (4, 1), (5, 3)):  # back to what chunks, and to what single tokens brought
        if count == 1:
            token = small.encrypt_token(hidden[start], prefix_tokens + start)
            again = small.decrypt_token(fitted(token, cache))[None]
        else:
            chunk = small.encrypt_chunk(hidden[start : start + count], prefix_tokens + start)
            again = small.decrypt(fitted(chunk, cache))
        assert largest(again, want[start : start + count]) < 2e-3
    with pytest.raises(ValueError, match=f"{9 + prefix_tokens} tokens are to stay, of {8 + prefix_tokens}"):
        fitted(small.encrypt_chunk(hidden[:2], prefix_tokens + 9), cache)


@pytest.mark.slow
def test_scores_in_several_ciphertexts():
    """More keys than one ciphertext has places for, with heads that leave it few."""
    parties = Parties.make(tokens=16, heads=16, head_dim=16)
    width = parties.layout.width
    clear = filled(Attention(Args(width, 16, 4 * width, 1, 64, 1e-5, "gelu_new"), 0), RANDOM)
    hidden = RANDOM.normal(size=(35, width))
    want = clear(ClearTensor(hidden)).values
    fitted = clear.fitted(clear.ranges, 64)
    cache = Cache()
    got = [*parties.decrypt(fitted(parties.encrypt(hidden[:16]), cache))]
    for start in (16, 32):
        got += [*parties.decrypt(fitted(parties.encrypt_chunk(hidden[start : start + 16], start), cache))]
    assert parties.layout.chunk.blocks == 1
    assert largest(np.array(got), want) < 1e-3
