"""The benchmarks of encrypted layers say what they are asked to."""

from __future__ import annotations

import json

import pytest

from cipherlm.cli import main

FIGURES = {
    "execute_seconds",
    "evaluation_key_bytes",
    "levels",
    "max_abs_error",
    "peak_memory_bytes",
    "refresh_bytes",
    "refreshes",
    "rotation_keys",
    "rotations",
}


ATTENTION = ["attention", "--scheme", "ckks", "--geometry", "tiny", "--tokens", "4", "--heads", "all"]
MODEL = ["model", "--geometry", "tiny", "--blocks", "1", "--prompt-tokens", "3", "--runs", "1"]


def figures(capsys, arguments):
    assert main(["bench", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_attention(capsys):
    got = figures(capsys, ATTENTION)
    assert set(got) >= FIGURES
    assert (got["scheme"], got["heads"], got["refreshes"]) == ("ckks", 4, 3)
    assert got["rotations"] > 2 * got["rotation_keys"]
    assert got["max_abs_error"] < 1e-3 * got["max_abs_output"]


def test_model(capsys):
    got = figures(capsys, MODEL)
    assert set(got) >= FIGURES
    assert (got["blocks"], got["prompt_tokens"], got["prefix_tokens"]) == (1, 3, 1)
    assert got["max_abs_error"] < 1e-3 * got["max_abs_output"]
    assert got["refresh_bytes"] == got["refresh_up_bytes"] + got["refresh_down_bytes"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("attention --scheme ckks --heads 1", "--heads all"),
        ("model --geometry gpt2 --blocks 1 --prompt-tokens 9", "do not fit"),
    ],
)
def test_mistakes(capsys, arguments, message):
    assert main(["bench", *arguments.split()]) != 0
    assert message in capsys.readouterr().err
