import argparse
import json
import os
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import pytest

import cipherlm.cli as cli
from cipherlm import EncryptionConfig
from cipherlm.cli import VERBS, CommandError, bench_attention, main
from cipherlm.cli.common import encryption_config, heads_argument, heads_label, human_bytes, human_seconds
from cipherlm.cli.evaluate import bits_argument


def run_json(capsys, *arguments: str) -> dict:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def failure(capsys, *arguments: str, code: int = 1) -> str:
    """Run a command that must fail, and return its one line."""
    assert main(list(arguments)) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("cipherlm: ")
    return line


# The frame


def test_help_lists_the_verbs(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {verb} " in shown for verb in VERBS)


def test_help_is_light():
    code = "import sys; from cipherlm.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_shows_an_example(capsys, verb):
    assert main([verb, "--help"]) == 0
    assert f"\n  cipherlm {verb}" in capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"cipherlm {cli.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["generate"],
        ["generate", "x", "--n-bits", "four"],
        ["generate", "x", "--heads", "first"],
        ["generate", "x", "--max-new-tokens", "0"],
        ["generate", "x", "--block", "0", "--target-modules", "transformer.h.0.attn"],
        ["evaluate", "--n-bits", "8..2"],
        ["bench"],
        ["bench", "attention", "--geometry", "huge"],
    ],
)
def test_wrong_usage_is_exit_code_2(capsys, arguments):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "usage:" in captured.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "x", "--mode", "clear", "--top-k", "3"], "--sample"),
        (["evaluate", "--prompt", "x"], "--illustration"),
        (["evaluate", "--window", "4"], "--perplexity"),
        (["evaluate", "--illustration", "--plot", "x.png"], "--plot"),
        (["evaluate", "--illustration", "--heads", "0", "--heads", "1"], "one set"),
        (["inspect", "--cache", "--keys"], "--keys"),
        (["bench", "attention", "--block", "1"], "--weights"),
    ],
)
def test_arguments_that_do_not_go_together(capsys, arguments, words):
    assert words in failure(capsys, *arguments, code=2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "x", "--model", "./nothing-here"], "no such directory"),
        (["generate", "x", "--mode", "disable", "--block", "9"], "transformer.h.9"),
        (["generate", "x", "--mode", "disable", "--heads", "7"], "head"),
        (["generate", "x", "--mode", "disable", "--heads", "0,0"], "twice"),
        (["generate", "x", "--mode", "disable", "--n-bits", "9"], "2"),
        (["generate", "", "--mode", "disable"], "prompt is empty"),
        (["generate", "x", "--mode", "clear", "--max-new-tokens", "1000"], "too long"),
        (["generate", "x y z", "--tokens", "2"], "--tokens"),
        (["generate", "x", "--mode", "disable", "--calibration", "nothing.txt"], "no such file"),
        (["evaluate", "--perplexity", "nothing.txt"], "no such file"),
        (["evaluate", "--n-bits", "1"], "2"),
        (["bench", "attention", "--geometry", "tiny", "--heads", "5"], "4 heads"),
        (["bench", "attention", "--weights", "nothing.safetensors"], "no such file"),
    ],
)
def test_a_run_that_fails_says_why_in_one_line(capsys, arguments, words):
    assert words in failure(capsys, *arguments)


@pytest.mark.parametrize("scheme", ["tfhe", "ckks"])
@pytest.mark.parametrize(
    "command",
    ["generate x --model MODEL", "inspect --model MODEL", "evaluate --model MODEL", "export MODEL OUT"],
)
def test_a_model_without_a_tokenizer_is_told_before_anything_runs(
    capsys, monkeypatch, tmp_path, command, scheme
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.GPT2LMHeadModel.from_pretrained", None)
    tiny = files("cipherlm.models").joinpath("tiny")
    Path("MODEL").mkdir()
    for name in ("config.json", "model.safetensors"):
        Path("MODEL", name).write_bytes(tiny.joinpath(name).read_bytes())
    error = failure(capsys, *command.split(), "--scheme", scheme)
    assert "no tokenizer with the model 'MODEL': looked for tokenizer.json, vocab.json with" in error


def test_debug_shows_the_traceback(monkeypatch):
    with pytest.raises(FileNotFoundError):
        main(["generate", "x", "--model", "./nothing-here", "--debug"])
    monkeypatch.setenv("CIPHERLM_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        main(["generate", "x", "--model", "./nothing-here"])


def fake_verb(monkeypatch, run) -> None:
    module = SimpleNamespace(__doc__="Fake.", EXAMPLES="", add_arguments=lambda parser: None, run=run)
    monkeypatch.setitem(sys.modules, "cipherlm.cli.demo", module)


def raising(error: BaseException):
    def run(options):
        raise error

    return run


def test_an_unexpected_error_is_named(capsys, monkeypatch):
    fake_verb(monkeypatch, raising(KeyError("a\nb")))
    assert failure(capsys, "demo") == r"cipherlm: KeyError: 'a\nb' (--debug shows where)"


def test_a_message_of_several_lines_becomes_one(capsys, monkeypatch):
    fake_verb(monkeypatch, raising(ValueError("one\n  two")))
    assert failure(capsys, "demo") == "cipherlm: one two"


def test_an_interrupt_is_130(capsys, monkeypatch):
    fake_verb(monkeypatch, raising(KeyboardInterrupt()))
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "cipherlm: interrupted\n"


def test_a_reader_that_leaves_is_no_error():
    command = [sys.executable, "-m", "cipherlm.cli", "inspect", "--cache"]
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 141
    assert done.stderr == ""


def test_arguments_and_units():
    assert heads_argument("0,2") == [0, 2]
    assert heads_argument("all") is None
    assert heads_label(None) == "all heads"
    assert heads_label([1]) == "head 1"
    assert heads_label([0, 2]) == "heads 0,2"
    assert bits_argument("4") == [4]
    assert bits_argument("2..4") == bits_argument("2-4") == [2, 3, 4]
    assert bits_argument("7,2..3,7") == [7, 2, 3]
    assert [human_bytes(n) for n in (999, 1_650_000, 1_650_000_000)] == ["999 bytes", "1.65 MB", "1.65 GB"]
    assert [human_seconds(s) for s in (0.0123, 13.04, 578.2)] == ["12 ms", "13.0 s", "578 s"]


# generate


def test_generate_in_the_clear(capsys):
    assert main(["generate", "The old man", "--mode", "clear", "--max-new-tokens", "3"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("The old man")
    assert len(captured.out) > len("The old man\n")
    assert captured.err == ""


def test_generate_quantised(capsys):
    arguments = ("generate", "The old man", "--mode", "disable", "--n-bits", "8", "--max-new-tokens", "3")
    figures = run_json(capsys, *arguments)
    assert figures["text"] == figures["prompt"] + "".join(figures["tokens"])
    assert len(figures["tokens"]) == len(figures["token_seconds"]) == 3
    assert main(list(arguments)) == 0
    assert capsys.readouterr().out == figures["text"] + "\n"


def test_sampling_follows_the_seed(capsys):
    def text(seed: str) -> str:
        sample = ("--sample", "--temperature", "2.0", "--seed", seed)
        return run_json(capsys, "generate", "The", "--mode", "clear", "--max-new-tokens", "8", *sample)[
            "text"
        ]

    assert text("1") == text("1")
    assert len({text("1"), text("2"), text("3")}) > 1


def test_generate_from_a_saved_encrypted_model(capsys, tmp_path):
    import torch

    from cipherlm import EncryptionConfig, get_encrypted_model, load_model, load_tokenizer

    model = get_encrypted_model(
        load_model("tiny"), EncryptionConfig(["transformer.h.1.attn"], heads=[2], n_bits=3)
    )
    model.calibrate(torch.arange(100, 140).reshape(4, 10))
    model.save_pretrained(tmp_path)
    load_tokenizer("tiny").save_pretrained(tmp_path)
    saved = (
        "generate",
        "The old man",
        "--model",
        str(tmp_path),
        "--mode",
        "disable",
        "--max-new-tokens",
        "2",
    )
    assert len(run_json(capsys, *saved)["tokens"]) == 2
    assert "--n-bits" in failure(capsys, *saved, "--n-bits", "4", code=2)


# evaluate


def test_evaluate_prints_a_table(capsys):
    arguments = [
        "evaluate",
        "--n-bits",
        "2,8",
        "--heads",
        "0",
        "--heads",
        "all",
        "--limit",
        "6",
        "--tokens",
        "8",
    ]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    rows = [line.split() for line in captured.out.splitlines()[4:]]
    assert [row[:3] for row in rows] == [
        ["head", "0", "2"],
        ["head", "0", "8"],
        ["all", "heads", "2"],
        ["all", "heads", "8"],
    ]
    assert captured.err == ""


def test_evaluate_as_json_with_perplexity_and_plot(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    text, plot = tmp_path / "text.txt", tmp_path / "plot.png"
    text.write_text("The old man looked at the sea, and then he went back to the house.")
    figures = run_json(
        capsys, "evaluate", "--heads", "0", "--n-bits", "2,8", "--limit", "8", "--tokens", "10",
        "--perplexity", str(text), "--plot", str(plot),
    )  # fmt: skip
    assert figures["sentences"] == 8
    assert figures["positions"] <= 80
    coarse, fine = figures["results"]
    assert coarse["top1"] <= fine["top1"] <= fine["top5"] <= fine["top10"] <= 1
    assert fine["top1"] > 0.9
    assert fine["perplexity"] == pytest.approx(figures["clear_perplexity"], rel=0.05)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_evaluate_on_other_texts(capsys, tmp_path):
    sentences, calibration = tmp_path / "sentences.txt", tmp_path / "calibration.txt"
    sentences.write_text("The dog slept by the door.\n")
    calibration.write_text("The cat sat on the wall.\nThe boy ran home.\n")
    figures = run_json(
        capsys, "evaluate", "--heads", "0", "--n-bits", "8",
        "--sentences", str(sentences), "--calibration", str(calibration),
    )  # fmt: skip
    assert (figures["sentences"], figures["calibration_sentences"]) == (1, 2)


def test_a_plot_that_cannot_be_written_fails_first(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    assert "cannot write the plot" in failure(capsys, "evaluate", "--plot", str(tmp_path / "plot.xyz"))


def test_illustration(capsys):
    clear, enough, too_few = run_json(capsys, "evaluate", "--illustration")["texts"]
    assert clear["text"].startswith("Cryptography is a ")
    assert enough == {"n_bits": 8, "text": clear["text"], "same": True}
    assert not too_few["same"]
    assert too_few["text"] != clear["text"]
    assert too_few["text"].startswith("Cryptography is a ")


# The published bar, on the whole of what is measured


@pytest.mark.parametrize(("heads", "bits", "least"), [("0", "4", 0.96), ("all", "7", 0.93)])
def test_agreement_on_the_embedded_model(capsys, heads, bits, least):
    (row,) = run_json(capsys, "evaluate", "--heads", heads, "--n-bits", bits)["results"]
    assert row["top1"] >= least
    assert row["top10"] >= 0.99


# Defaults


@pytest.mark.parametrize(
    ("options", "scheme", "targets"),
    [
        ("", "ckks", "all"),
        ("--block 2", "ckks", ["transformer.h.2"]),
        ("--context 24", "ckks", "all"),
        ("--heads 0", "tfhe", ["transformer.h.0.attn"]),
        ("--heads all", "tfhe", ["transformer.h.0.attn"]),
        ("--n-bits 4 --block 2", "tfhe", ["transformer.h.2.attn"]),
        ("--p-error 0.001", "tfhe", ["transformer.h.0.attn"]),
        ("--tokens 8", "tfhe", ["transformer.h.0.attn"]),
        ("--scheme tfhe", "tfhe", ["transformer.h.0.attn"]),
        ("--scheme ckks --heads all", "ckks", "all"),
    ],
)
@pytest.mark.parametrize("verb", ["generate", "inspect", "export"])
def test_the_whole_model_on_ckks_unless_an_option_is_about_tfhe(monkeypatch, verb, options, scheme, targets):
    configs = []

    def configured(given, *_):
        configs.append(encryption_config(given))
        raise CommandError("seen")

    monkeypatch.setattr("cipherlm.cli.common.configured", configured)
    monkeypatch.setattr("cipherlm.cli.inspect.configured", configured)
    needed = {"generate": ["x"], "inspect": [], "export": ["tiny", "somewhere-new"]}[verb]
    assert main([verb, *needed, *options.split()]) == 1
    (config,) = configs
    assert (config.scheme, config.target_modules) == (scheme, targets)


def test_benchmarks_and_evaluations_have_the_same_default(monkeypatch):
    configs = []

    def configured(given, *_):
        configs.append(encryption_config(given))
        raise CommandError("seen")

    monkeypatch.setattr("cipherlm.cli.evaluate_setup.configured", configured)
    for heads in ([], ["--scheme", "ckks", "--heads", "all"]):
        assert main(["evaluate", *heads]) == 1
    assert configs == [EncryptionConfig()] * 2
    parser = argparse.ArgumentParser()
    bench_attention.add_arguments(parser)
    geometry = bench_attention.GEOMETRIES["gpt2"]
    for options, scheme in (
        ("", "ckks"),
        ("--heads 12", "ckks"),
        ("--heads 1", "tfhe"),
        ("--n-bits 4", "tfhe"),
    ):
        assert bench_attention._scheme(parser.parse_args(options.split()), geometry) == scheme


# Without the extra


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "The old man", "--scheme", "tfhe"),
        ("inspect", "--tokens", "3"),
        ("bench", "attention", "--scheme", "tfhe", "--geometry", "tiny", "--tokens", "2"),
    ],
)
def test_tfhe_without_concrete_says_what_to_install(capsys, monkeypatch, arguments):
    monkeypatch.setitem(sys.modules, "concrete", None)
    assert 'pip install "cipherlm[tfhe]"' in failure(capsys, *arguments)
