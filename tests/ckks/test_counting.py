"""Operations that are counted without ciphertexts are those of a real evaluation."""

from __future__ import annotations

import numpy as np
import pytest

from cipherlm.cli.bench_ckks import MeasuredSession
from cipherlm.cli.bench_tally import MeasuredEvaluator
from cipherlm.cli.counting import (
    CountingEvaluator,
    CountingSession,
    HollowCiphertext,
    HollowTransformation,
    kept_bytes,
    outline,
)
from cipherlm.cli.estimate import RANDOM, TYPICAL, same_ranges
from cipherlm.engine import Ciphertext, Parameters
from cipherlm.linear.client import LinearClient
from cipherlm.linear.plan import make_plan
from cipherlm.linear.products import LinearGroup
from cipherlm.linear.server import LinearServer, encode
from cipherlm.models.architecture import architecture_of
from cipherlm.nn.tensor import Prefix
from cipherlm.schemes.ckks.geometry import Geometry
from cipherlm.schemes.ckks.session import Hosted

from .models import filled

CONTEXT = 16
COUNTED = (
    "primitives",
    "calls",
    "refreshes",
    "round_trips",
    "input_bytes",
    "output_bytes",
    "refresh_up_bytes",
    "refresh_down_bytes",
)
GPT2 = {"n_embd": 8, "n_head": 2, "n_inner": 24, "n_layer": 1, "n_positions": CONTEXT}
LLAMA = {
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}


@pytest.mark.parametrize(
    ("model_type", "config", "ranges", "prefix"),
    [("gpt2", GPT2, RANDOM, 0), pytest.param("llama", LLAMA, TYPICAL, 3, marks=pytest.mark.slow)],
)
def test_counts_are_those_of_a_real_evaluation(model_type, config, ranges, prefix):
    """Two tokens side by side, two more, and two alone; with llama, rotary positions and a prefix apart."""
    architecture, random = architecture_of(model_type), np.random.default_rng(5)
    args = architecture.args.of(config)
    model = filled(architecture.model(args), random)
    geometry = Geometry(
        2, 4, 2, prefix, CONTEXT, width=args.width, inner=args.inner, rotary=args.rope is not None
    )
    ranges = same_ranges(model, ranges)
    before = Prefix(*random.normal(size=(2, 2, prefix, 4))) if prefix else None
    module = Hosted(model.fitted(ranges, CONTEXT), [before])
    real = MeasuredSession(geometry, module)
    shape = outline(architecture.model(args), ranges, 2, 4, prefix, CONTEXT)
    counting = CountingSession(geometry, shape)
    hidden = random.normal(size=(6, args.width))
    for first, last in ((0, 2), (2, 4), (4, 5), (5, 6)):
        _, measured = real.evaluate(hidden[first:last], prefix + first)
        counted = counting.evaluate(last - first, prefix + first)
        for name in COUNTED:
            assert getattr(counted, name) == getattr(measured, name), name
        assert counted.rotations > 0
    assert kept_bytes(counting.encodings, shape) == kept_bytes(real.encodings, module)
    counting.close()


def test_the_counts_of_a_product_are_those_of_a_real_one():
    """Two inputs and three outputs in ciphertexts, for one vector and for several."""
    group = LinearGroup("x", ("x",), 4200, (1200,))
    weights = np.random.default_rng(2).normal(0, 0.02, (1200, 4200)).astype(np.float32)
    plan = make_plan([group], {"x": weights})
    packing = plan.of("x").packing
    assert packing.inputs > 1
    assert packing.outputs > 1
    hollow = encode(plan, plan.of("x"), weights, HollowTransformation)
    server, client = LinearServer.build(plan, {"x": weights}), LinearClient(plan)
    assert hollow.nbytes == server.nbytes
    measured = MeasuredEvaluator(plan.parameters, client.evaluation_keys())
    counting = CountingEvaluator(plan.parameters)
    for rows in (1, 3):
        inputs, _ = client.encrypt("x", np.ones((rows, 4200)))
        server.multiply(measured, "x", inputs)
        nothing = HollowCiphertext(plan.parameters, 0, plan.of("x").input_scale)
        hollow.multiply(counting, [[nothing] * packing.inputs] * rows)
        assert counting.tally.primitives == measured.tally.primitives
        assert counting.tally.calls == measured.tally.calls


def test_hollow_ciphertexts_have_no_native_object():
    hollow = HollowCiphertext(Parameters.preset(12), 1, 2.0**28)
    assert isinstance(hollow, Ciphertext)
    with pytest.raises(AttributeError):
        hollow.to_bytes()
    with pytest.raises(ValueError, match="no level below 0"):
        CountingEvaluator(hollow.parameters).rescale(HollowCiphertext(hollow.parameters, 0, 1.0))
    with pytest.raises(ValueError, match="below level 1"):
        CountingEvaluator(hollow.parameters).drop_level(HollowCiphertext(hollow.parameters, 0, 1.0), 1)
