"""The benchmarks of encrypted layers say what they are asked to."""

from __future__ import annotations

import argparse
import json

import numpy as np
import pytest

from cipherlm.cli import bench_attention, main
from cipherlm.cli.bench_attention import TFHE_ONLY
from cipherlm.cli.bench_ckks import MeasuredSession
from cipherlm.cli.bench_primitives import NAMES, Primitives
from cipherlm.engine import Parameters
from cipherlm.nn.module import Linear, Module
from cipherlm.schemes.ckks.geometry import Geometry
from cipherlm.schemes.ckks.session import Hosted

FIGURES = {
    "ciphertext_bytes",
    "client_seconds",
    "compile_seconds",
    "execute_seconds",
    "evaluation_key_bytes",
    "levels",
    "max_abs_error",
    "peak_memory_bytes",
    "refresh_bytes",
    "refreshes",
    "rotation_keys",
    "rotations",
    "round_trips",
}

ATTENTION = ["attention", "--scheme", "ckks", "--geometry", "tiny", "--tokens", "4", "--heads", "4"]
BLOCK = ["block", "--geometry", "tiny", "--runs", "1"]


def figures(capsys, arguments):
    assert main(["bench", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_attention(capsys):
    got = figures(capsys, ATTENTION)
    assert set(got) >= FIGURES | set(TFHE_ONLY)
    assert (got["scheme"], got["heads"]) == ("ckks", 4)
    assert 3 <= got["round_trips"] <= got["refreshes"] <= 7
    assert got["rotations"] > 2 * got["rotation_keys"]
    assert got["max_abs_error"] < 1e-3 * got["max_abs_output"]


@pytest.mark.parametrize("heads", [[], ["--heads", "all"], ["--heads", "4"]])
@pytest.mark.parametrize("scheme", ["ckks", "tfhe"])
def test_all_heads_by_their_number_are_all_heads(monkeypatch, scheme, heads):
    parser = argparse.ArgumentParser()
    bench_attention.add_arguments(parser)
    options = parser.parse_args(["--scheme", scheme, "--geometry", "tiny", *heads])
    one = [0] if scheme == "tfhe" and not heads else None
    assert bench_attention._heads(options, bench_attention.GEOMETRIES["tiny"]) == one


def test_a_session_is_counted():
    """A linear layer on a prompt and on the token behind it."""
    random = np.random.default_rng(3)
    linear = Linear(random.normal(size=(8, 8)), random.normal(size=8))

    class Layer(Module):
        def __init__(self):
            self.linear = linear

        def __call__(self, x):
            return x @ self.linear

    geometry = Geometry(heads=2, head_dim=4, tokens=2, prefix=0, context=4)
    session = MeasuredSession(geometry, Hosted(Layer(), []))
    hidden = random.normal(size=(3, 8))
    session.evaluate(hidden, 0)  # matrices and biases are encoded in their first use
    got, both = session.evaluate(hidden, 0)
    assert np.abs(got - (hidden @ linear.weight + linear.bias)).max() < 1e-3
    assert (both.calls["transform_many"], both.calls["transform"], both.calls["rerandomize"]) == (1, 1, 2)
    assert (both.refreshes, both.round_trips, both.refresh_bytes) == (0, 0, 0)
    again, prompt = session.evaluate(hidden[:2], 0)
    assert np.abs(again - got[:2]).max() < 1e-3
    token = session.evaluate(hidden[2:], 2)[1]
    prompt.add(token)
    assert (prompt.primitives, prompt.calls) == (both.primitives, both.calls)
    assert prompt.input_bytes == both.up_bytes == 2 * token.up_bytes
    assert prompt.output_bytes == both.down_bytes
    assert prompt.rotations == both.rotations > token.rotations > 0


@pytest.mark.slow
def test_block(capsys):
    got = figures(capsys, [*BLOCK, "--prompt-tokens", "3", "--new-tokens", "1"])
    assert (got["blocks"], got["prompt_tokens"], got["prefix_tokens"]) == (1, 3, 1)
    assert got["max_abs_error"] < 1e-3 * got["max_abs_output"]
    prompt, token = got["prompt"], got["first_token"]
    assert got["next_tokens"] is None
    assert got["execute_seconds"] == prompt["seconds"] + token["seconds"]
    assert got["token_seconds"] == [token["seconds"]]
    assert max(prompt["max_abs_error"], *got["token_max_abs_errors"]) == got["max_abs_error"]
    for part in (prompt, token):
        assert part["round_trips"] <= part["refreshes"] < part["rotations"]
        # One ciphertext in, with a seed, one out, and what is refreshed.
        assert 6e5 < part["up_bytes"] + part["down_bytes"] - part["refresh_bytes"] < 9e5
        assert part["operations"]["mask"]["calls"] == part["round_trips"]
        assert 0 < part["client_seconds"] < part["seconds"]


@pytest.mark.slow
def test_a_prompt_that_goes_on_by_decoding(capsys):
    """Two tokens side by side, one of them public, and another one behind; then new ones."""
    more = [
        "--prompt-tokens",
        "2",
        "--new-tokens",
        "3",
        "--side-by-side",
        "2",
        "--context",
        "8",
        "--roofline",
    ]
    got = figures(capsys, [*BLOCK, *more])
    assert got["max_abs_error"] < 1e-3 * got["max_abs_output"]
    assert got["prompt"]["round_trips"] > got["first_token"]["round_trips"]
    assert (got["next_tokens"]["tokens"], len(got["token_seconds"])) == (2, 3)
    for part in (got["prompt"], got["first_token"], got["next_tokens"]):
        roofline = part["roofline"]
        assert sum(roofline["primitives"].values()) == pytest.approx(roofline["core_seconds"])
        assert roofline["seconds"] == pytest.approx(roofline["core_seconds"] / got["threads"])


def test_primitive_operations():
    primitives = Primitives(Parameters.preset(12), budget=0.0)
    assert all(0 <= primitives.seconds(name, 1) < 1 for name in (*NAMES, "polynomial_1"))
    assert set(primitives.table()) == {str(level + 1) for level in range(primitives.parameters.max_level)}
    with pytest.raises(ValueError, match="'nothing' is no primitive"):
        primitives.seconds("nothing", 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("attention --scheme ckks --heads 1", "--heads all"),
        ("attention --scheme ckks --heads 13", "12 heads"),
        ("attention --scheme ckks --n-bits 4", "--n-bits belongs to --scheme tfhe"),
        ("attention --scheme ckks --heads all --tokens 9", "do not fit"),
        ("block --geometry gpt2 --side-by-side 16", "do not fit"),
        ("block --geometry gpt2 --prompt-tokens 8 --new-tokens 57", "--context 64 has no room for 65"),
        ("model --geometry tiny --prompt-tokens 9999 --context 20000", "has text for"),
    ],
)
def test_mistakes(capsys, arguments, message):
    assert main(["bench", *arguments.split()]) != 0
    assert message in capsys.readouterr().err
