"""A layout names every rotation that an evaluation needs, whatever the sizes of a model are."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cipherlm.cli import bench_tally
from cipherlm.cli.counting import CountingSession, outline
from cipherlm.cli.estimate import RANDOM, TYPICAL, same_ranges
from cipherlm.engine import inner_sum_rotations
from cipherlm.models.architecture import architecture_of
from cipherlm.schemes.ckks.geometry import Geometry

SLOTS, CONTEXT = 8192, 64
NARROW = {"squares": (0.8, 1.5), "scores": (-3.0, 3.0), "means": (-1.0, 1.0), "inputs": (-2.0, 2.0)}


@pytest.fixture
def rotations(monkeypatch):
    """Every rotation of a counted evaluation, and its level."""
    seen: set[tuple[int, int]] = set()
    of = {
        "rotate": lambda a, by, **_: [(a.level, by)],
        "rotate_hoisted": lambda a, by: [(a.level, one) for one in by],
        "inner_sum": lambda a, step, count, **_: [(a.level, by) for by in inner_sum_rotations(step, count)],
        "unmask": lambda _, mask: [
            (mask.to_level, by)
            for subring in mask.subrings
            for by in inner_sum_rotations(SLOTS // subring.copies, subring.copies)
        ],
        "transform": lambda _, matrix: [(matrix.level, by) for by in matrix.rotations],
        "transform_many": lambda _, matrices: [(m.level, by) for m in matrices for by in m.rotations],
    }
    for name, parts in of.items():
        counted = bench_tally._PARTS[name]

        def noted(*arguments, parts=parts, counted=counted, **options):
            seen.update(parts(*arguments, **options))
            return counted(*arguments, **options)

        monkeypatch.setitem(bench_tally._PARTS, name, noted)
    return seen


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    llama=st.booleans(),
    heads=st.integers(1, 6),
    half=st.integers(3, 12),
    wider=st.floats(0.5, 4),
    tokens=st.sampled_from([4, 8]),
    prefix=st.sampled_from([0, 1, 5, 9, 24]),
    ranges=st.sampled_from([NARROW, RANDOM, TYPICAL]),
)
@example(llama=True, heads=3, half=5, wider=5 / 3, tokens=8, prefix=15, ranges=NARROW)
def test_every_rotation_has_a_key(rotations, llama, heads, half, wider, tokens, prefix, ranges):
    """For a prompt, tokens alone, a chunk behind them and another token."""
    width = 2 * half * heads
    inner = max(1, int(width * wider))
    architecture = architecture_of("llama" if llama else "gpt2")
    args = (
        {
            "hidden_size": width,
            "num_attention_heads": heads,
            "num_key_value_heads": 1,
            "intermediate_size": inner,
            "num_hidden_layers": 1,
            "max_position_embeddings": CONTEXT,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
        }
        if llama
        else {"n_embd": width, "n_head": heads, "n_inner": inner, "n_layer": 1, "n_positions": CONTEXT}
    )
    blocks = architecture.model(architecture.args.of(args))
    geometry = Geometry(heads, 2 * half, tokens, prefix, CONTEXT, width=width, inner=inner, rotary=llama)
    module = outline(blocks, same_ranges(blocks, ranges), heads, 2 * half, prefix, CONTEXT)
    session = CountingSession(geometry, module)
    rotations.clear()
    position = prefix
    for count in (2, 1, 1, 3, 1, 1):
        session.evaluate(count, position)
        position += count
    slots = geometry.parameters.slots
    lacking = {
        (level, by % slots)
        for level, by in rotations
        if by % slots and level > geometry.rotations.get(by % slots, -1)
    }
    assert not lacking
