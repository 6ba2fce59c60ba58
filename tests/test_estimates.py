"""What a model costs, before anything of it is computed."""

from __future__ import annotations

import argparse
import json
import re
import time

import pytest

from cipherlm.cli import main
from cipherlm.cli.estimate import (
    RANDOM,
    Estimate,
    LinearShape,
    WholeShape,
    estimate_linear,
    estimate_whole,
    same_ranges,
)
from cipherlm.cli.inspect_choices import table
from cipherlm.cli.line import Line, duration, rate
from cipherlm.cli.machine import Machine
from cipherlm.engine import Parameters, threads
from cipherlm.models.architecture import architecture_of
from cipherlm.nn.fitted import Choice
from cipherlm.nn.norms import FittedNorm
from cipherlm.schemes.ckks.geometry import Geometry

NO_LINE = Line()


class Clockwork(Machine):
    """A machine on which every operation takes a millisecond of a core."""

    def core_seconds(self, parameters, primitives):
        return sum(primitives.values()) / 1000

    def server_seconds(self, kind, core_seconds, cores):
        return core_seconds / cores

    def encrypt_seconds(self, geometry):
        return 1.0

    def decrypt_seconds(self, geometry, level):
        return 2.0

    def refresh_seconds(self, geometry, level):
        return 0.5

    def key_figures(self, geometry, level):
        return {"seconds": 1.0, "sent": 1e6, "made": 2e6, "expanded": 4e6}

    def linear_seconds(self):
        return {"in": 1.0, "out": 10.0, "read": 100.0, "write": 1000.0}


def whole(blocks: int = 2, prompt: int = 2, line: Line = NO_LINE, cores: int = 1) -> Estimate:
    config = {"n_embd": 8, "n_head": 2, "n_inner": 24, "n_layer": blocks, "n_positions": 16}
    architecture = architecture_of("gpt2")
    model = architecture.model(architecture.args.of(config))
    geometry = Geometry(2, 4, 2, 0, 16, width=8, inner=24)
    shape = WholeShape(model, geometry, same_ranges(model, RANDOM), 1000)
    return estimate_whole(shape, prompt, Clockwork(), cores, line)


def linear(prompt: int = 2, line: Line = NO_LINE, products: int = 3) -> Estimate:
    return estimate_linear(LinearShape({(40, 30): products}, 1000), prompt, Clockwork(), 1, line)


@pytest.mark.parametrize(
    ("text", "seconds"), [("50ms", 0.05), ("0.05s", 0.05), (" 1.5 S", 1.5), (".5s", 0.5), ("0ms", 0.0)]
)
def test_times_have_a_unit(text, seconds):
    assert duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("text", "mbit"), [("100", 100), ("100mbit", 100), ("1 Gbit", 1000), ("500kbit", 0.5), ("2.5", 2.5)]
)
def test_rates_are_in_mbit(text, mbit):
    assert rate(text) == pytest.approx(mbit)


@pytest.mark.parametrize("text", ["50", "", "ms", "-1ms", "1e3s", "5 minutes", "nan s", "50msms"])
def test_what_is_no_time(text):
    with pytest.raises(argparse.ArgumentTypeError, match="give a unit, as in 50ms"):
        duration(text)


@pytest.mark.parametrize("text", ["0", "", "fast", "-5", "100 MB", "inf", "0gbit"])
def test_what_is_no_rate(text):
    with pytest.raises(argparse.ArgumentTypeError, match="use Mbit/s, as in 100"):
        rate(text)


def test_a_line_takes_its_time():
    line = Line(rtt=0.004, mbit=8)
    assert line.seconds(3, 2_000_000) == pytest.approx(0.012 + 2.0)
    began = time.perf_counter()
    waited = line.carry(3000)
    assert 0.005 <= waited <= time.perf_counter() - began
    assert Line().seconds(100, 10**9) == 0


@pytest.mark.parametrize("estimate", [whole, linear])
def test_the_parts_of_an_estimate_add_up(estimate):
    here, away = estimate(), estimate(line=Line(rtt=0.1, mbit=10))
    for name in ("prompt", "first_token", "next_token"):
        near, far = getattr(here, name), getattr(away, name)
        assert near.line_seconds == 0
        assert far.line_seconds == pytest.approx(
            0.1 * far.round_trips + (far.up_bytes + far.down_bytes) * 8 / 10e6
        )
        assert far.seconds == far.server_seconds + far.client_seconds + far.line_seconds
        assert far.seconds == pytest.approx(near.seconds + far.line_seconds)
        assert far.to_dict()["seconds"] == far.seconds
    assert away.keys.upload_seconds == pytest.approx(0.1 + away.keys.sent_bytes * 8 / 10e6)
    assert json.loads(json.dumps(away.to_dict())) == away.to_dict()


def test_a_whole_model_s_client_works_for_every_ciphertext():
    found = whole()
    # The round trips of refreshes, and the one that begins and ends a pass.
    assert found.prompt.round_trips > 2 * found.prompt.tokens
    assert found.prompt.client_seconds % 0.5 == 0
    assert found.prompt.client_seconds >= 3.0 + 0.5 * (found.prompt.round_trips - 1)
    # Keys for rotations, one for conjugation and one for products.
    assert found.keys.sent_bytes == (found.keys.count + 2) * 10**6
    assert found.client_memory_bytes == (found.keys.count + 2) * 2 * 10**6 + 1000
    assert found.server_memory_bytes > (found.keys.count + 2) * 4 * 10**6


def test_a_whole_model_grows_with_its_blocks_and_its_prompt():
    one, two, long = whole(blocks=1), whole(blocks=2), whole(blocks=1, prompt=4)
    assert two.next_token.round_trips - 1 == 2 * (one.next_token.round_trips - 1)
    assert two.prompt.server_seconds == pytest.approx(2 * one.prompt.server_seconds, rel=0.02)
    assert two.keys == one.keys
    assert two.server_memory_bytes > one.server_memory_bytes
    # Two tokens go side by side, and two behind them: with what is kept of the first, but not token by token.
    # Ciphertexts of both chunks share refreshes, which are nearly all that takes time here.
    assert long.prompt.tokens == 4
    assert 1.5 * one.prompt.seconds < long.prompt.seconds < one.prompt.seconds + 2 * one.next_token.seconds
    assert whole(cores=2).prompt.server_seconds == pytest.approx(two.prompt.server_seconds / 2)
    with pytest.raises(ValueError, match="do not fit a context of 16"):
        whole(prompt=15)


def test_linear_layers_grow_with_products_and_tokens():
    one, many = linear(products=1), linear(products=30)
    assert (one.next_token.round_trips, many.next_token.round_trips) == (1, 30)
    assert many.next_token.client_seconds == pytest.approx(30 * 11.0)
    assert 30 * 1100.0 < many.next_token.server_seconds < 30 * 1101.0
    assert many.prompt.up_bytes == 30 * one.prompt.up_bytes == 60 * one.next_token.up_bytes
    assert many.keys == one.keys or many.keys.sent_bytes == one.keys.sent_bytes
    # Sixteen vectors in an exchange, and four exchanges on their way at a time.
    assert linear(prompt=64, products=1).prompt.round_trips == 1
    assert linear(prompt=65, products=1).prompt.round_trips == 2


def test_cores_share_what_can_be_shared():
    machine = Machine()
    machine._values = {"overheads/whole": {"chunk": [1.2, 0.3], "token": [1.0, 0.0]}}
    assert [machine.server_seconds("whole/chunk", 10.0, cores) for cores in (1, 3)] == [12.0, 6.0]
    assert machine.server_seconds("whole/token", 10.0, 10) == 1.0


def test_what_was_measured_is_kept(monkeypatch):
    parameters = Parameters.preset(12)
    machine = Machine.here()
    took = machine.core_seconds(parameters, {("addition", 1): 10, ("product", 1): 0})
    assert 0 < took < 1
    machine.save()
    again = Machine.here()
    assert again.core_seconds(parameters, {("addition", 1): 20}) == pytest.approx(2 * took)
    assert Machine.here(again=True)._values == {}
    monkeypatch.setattr("cipherlm.cli.machine._processor", lambda: "another")
    assert Machine.here()._values == {}


def test_a_busy_machine_s_overheads_are_not_kept(monkeypatch):
    monkeypatch.setattr(Machine, "_is_busy", lambda self: True)
    machine = Machine()
    assert machine.server_seconds("whole/token", 1.0, 4) > 1 / 4
    assert (machine.overheads, machine._values) == ("usual", {})


def test_blocks_that_compute_alike_are_on_one_line():
    narrow, wide = ((fitted(high),) for high in (3.0, 300.0))
    functions = {f"h.{block}.norm": wide if block in (1, 5) else narrow for block in range(7)}
    lines = table({**functions, "h.0.other": narrow}).splitlines()
    assert [re.split(r"  +", line)[:3] for line in lines[2:]] == [
        ["norm", "0, 2-4, 6", "inverse root 15"],
        ["norm", "1, 5", "inverse root 63 + 1 Newton step"],
        ["other", "0", "inverse root 15"],
    ]
    (choice,) = wide
    assert lines[3].split()[-3:] == [
        str(choice.levels),
        f"{choice.stages[0].error:.1e}",
        f"{choice.stages[0].error / 1e-4:.0%}",
    ]


def fitted(high: float) -> Choice:
    (choice,) = FittedNorm.fit((1.0, high), 1e-5).choices()
    return choice


def test_the_linear_layers_of_a_model(capsys):
    """From the command line, with a machine that is really measured."""
    arguments = ["--placement", "linear", "--rtt", "50ms", "--mbit", "100mbit", "--json"]
    assert main(["inspect", "tiny", *arguments, "--prompt-tokens", "5"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["model"], said["placement"], said["server_cores"]) == ("tiny", "linear", threads())
    # Four products in each of four blocks.
    assert said["next_token"]["round_trips"] == 16
    assert said["prompt"]["tokens"] == 5
    assert said["prompt"]["up_bytes"] == 5 * said["next_token"]["up_bytes"]
    assert said["next_token"]["line_seconds"] > 16 * 0.05
    assert 0 < said["next_token"]["server_seconds"] < 5
    assert main(["inspect", "--model", "tiny", *arguments[:-1]]) == 0
    assert "calculated" in capsys.readouterr().out


def test_a_whole_model_from_its_configuration(capsys, monkeypatch):
    monkeypatch.setattr("cipherlm.cli.inspect_costs.Machine", Clockwork)
    assert main(["inspect", "--placement", "whole", "--server-cores", "4", "--json", "--context", "32"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["ranges"].startswith("typical of trained models")
    assert said["prompt"]["round_trips"] > 4 * 5
    assert said["keys"]["count"] == 50
    # A prompt of 8 tokens behind one, and two more: the sizes of softmax that these passes met.
    softmax = said["polynomials"]["transformer.h.3.attn.softmax"]
    assert [choice["keys"] for choice in softmax] == [8, 16]
    assert all(choice["keys"] <= choice["places"] for choice in softmax)
    for name, (choice,) in ((n, c) for n, c in said["polynomials"].items() if not n.endswith("softmax")):
        assert choice["levels"] > 4, name
    assert main(["inspect", "tiny", "--placement", "whole", "--context", "32", "--prompt-tokens", "40"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "1 public tokens, 40 of a prompt and two more do not fit a context of 32 tokens" in line


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("--rtt 50ms", 2, "--rtt is for estimates: add --placement whole or linear"),
        ("--remeasure", 2, "--remeasure is for estimates"),
        ("--placement linear --rtt 50", 2, "'50' is not a time: give a unit, as in 50ms or 0.05s"),
        ("--placement linear --mbit 0", 2, "'0' is not a rate: use Mbit/s, as in 100 or 100mbit"),
        ("--placement linear --server-cores 0", 2, "not a whole number of at least 1"),
        ("--placement here", 2, "invalid choice: 'here'"),
        ("--placement whole --geometry llama-1b", 2, "--geometry llama-1b is for --placement linear"),
        ("--placement whole --target-modules transformer.h.0", 2, "is for all blocks"),
        ("--placement whole --scheme tfhe", 2, "--placement is for --scheme ckks"),
        ("--placement whole ./nowhere", 1, "no model './nowhere'"),
    ],
)
def test_mistakes(capsys, arguments, code, message):
    assert main(["inspect", *arguments.split()]) == code
    errors = capsys.readouterr().err
    assert message in errors
    assert "Traceback" not in errors
