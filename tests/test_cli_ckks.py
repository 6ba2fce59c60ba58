"""The verbs with --scheme ckks, on clear numbers."""

import json
import subprocess
import sys

import pytest
import torch

from cipherlm import EncryptionConfig, get_encrypted_model, load_model, load_tokenizer
from cipherlm.cli import main
from cipherlm.cli.ckks import joined, summary
from cipherlm.evaluation.texts import calibration_sentences
from cipherlm.models.summary import read_summary

CKKS = ("--scheme", "ckks", "--context", "24")


@pytest.fixture
def few(tmp_path) -> tuple[str, str]:
    """Options that calibrate on some of the sentences only."""
    path = tmp_path / "calibration.txt"
    path.write_text("\n".join(calibration_sentences()[:12]))
    return ("--calibration", str(path))


def run_json(capsys, *arguments: str) -> dict:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def failure(capsys, *arguments: str, code: int = 1) -> str:
    """Run a command that must fail, and return its one line."""
    assert main(list(arguments)) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


def test_generate_writes_what_the_clear_model_does(capsys, few):
    texts = [
        run_json(capsys, "generate", "The old man", *CKKS, *few, "--mode", mode, *target)
        for mode, target in (
            ("clear", ()),
            ("disable", ()),
            ("simulate", ("--target-modules", "all")),
            ("disable", ("--block", "2")),
            ("disable", ("--target-modules", "attn,transformer.h.1.mlp")),
        )
    ]
    assert len({figures["text"] for figures in texts}) == 1
    assert texts[0]["text"].startswith("The old man ")
    assert texts[1]["prefix"] == [0]
    assert len(texts[1]["tokens"]) == len(texts[1]["token_seconds"]) == 4
    assert texts[2]["keygen_seconds"] is None


def test_generate_with_proposals(capsys, few):
    arguments = ("generate", "The old man and the old man", *CKKS, *few, "--max-new-tokens", "8", "--mode")
    plain = run_json(capsys, *arguments, "disable")
    assert (plain["passes"], plain["tokens_per_pass"]) == (8, 1)
    proposed = run_json(capsys, *arguments, "disable", "--prompt-lookup", "3")
    assert (proposed["text"], proposed["tokens"]) == (plain["text"], plain["tokens"])
    assert len(proposed["token_seconds"]) == 8
    assert proposed["passes"] <= 8
    assert proposed["tokens_per_pass"] == 8 / proposed["passes"]
    line = failure(capsys, "generate", "A", "--server", "http://x", "--prompt-lookup", "3", code=2)
    assert "add --reveal-length" in line
    line = failure(capsys, "generate", "A", "--scheme", "tfhe", "--prompt-lookup", "3", code=2)
    assert "TFHE keeps none" in line


def test_generate_prints_the_prompt_and_no_prefix(capsys, few):
    assert main(["generate", "The old man", *CKKS, *few, "--mode", "disable"]) == 0
    assert capsys.readouterr().out.startswith("The old man ")


def test_sampling(capsys, few):
    arguments = ("generate", "The", *CKKS, *few, "--sample", "--seed", "3", "--max-new-tokens", "6", "--mode")
    assert run_json(capsys, *arguments, "clear")["text"] == run_json(capsys, *arguments, "disable")["text"]


def test_a_saved_model(capsys, tmp_path):
    config = EncryptionConfig(["transformer.h.3"], scheme="ckks", context=16)
    model, tokenizer = get_encrypted_model(load_model("tiny"), config), load_tokenizer("tiny")
    model.calibrate(torch.arange(100, 250).reshape(10, 15))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    saved = ("--model", str(tmp_path))
    assert len(run_json(capsys, "generate", "The man", *saved, "--mode", "disable")["tokens"]) == 4
    assert run_json(capsys, "inspect", *saved)["modules"] == ["transformer.h.3"]
    figures = run_json(capsys, "evaluate", *saved, "--limit", "2")
    assert (figures["scheme"], figures["modules"]) == ("ckks", ["transformer.h.3"])
    assert "--scheme" in failure(capsys, "generate", "The", *saved, "--scheme", "ckks", code=2)


def test_joined():
    texts = joined([torch.tensor([[1, 2, 3]]), torch.tensor([[4, 5]])], 2)
    assert [text.tolist() for text in texts] == [[[1, 2]], [[3, 4]], [[5]]]


def test_inspect(capsys, few):
    figures = run_json(capsys, "inspect", *CKKS, *few)
    assert figures["modules"] == ["transformer.h"]
    assert (figures["ring_degree"], figures["security_bits"], figures["levels"]) == (16384, 128, 8)
    assert figures["modulus_bits"] <= 438
    assert not figures["post_quantum"]
    assert figures["rotation_keys"] > 10
    assert figures["ciphertext_bytes_token"] > 10**5
    ranges = figures["ranges"]["transformer.h"]
    names = ("ln_1.squares", "attn.softmax.scores", "attn.softmax.means", "ln_2.squares", "mlp.act.inputs")
    assert list(ranges) == [f"blocks.{block}.{name}" for block in range(4) for name in names]
    functions = figures["polynomials"]
    inner = ("ln_1", "attn.softmax", "ln_2", "mlp.act")
    assert list(functions) == [f"transformer.h.{block}.{name}" for block in range(4) for name in inner]
    for block in range(4):
        softmax = functions[f"transformer.h.{block}.attn.softmax"]
        assert [choice["keys"] for choice in softmax] == [8, 16, 24]  # up to the context
        for name in ("ln_1", "ln_2", "mlp.act"):
            (choice,) = functions[f"transformer.h.{block}.{name}"]
            (stage,) = choice["stages"]
            assert 0 < stage["error"] <= stage["tolerance"]
    assert figures["evaluation_key_bytes"] is None
    assert main(["inspect", *CKKS, *few]) == 0
    shown = capsys.readouterr().out
    assert "attn.softmax, 24 keys" in shown
    assert " + 1 Newton step " in shown
    assert "all blocks, as one" in shown
    assert "'<|endoftext|>', not encrypted" in shown
    assert "the last hidden states" in shown
    assert main(["inspect", *CKKS, *few, "--block", "1"]) == 0
    shown = capsys.readouterr().out
    assert "on the server      transformer.h.1" in shown
    assert [line.split()[:2] for line in shown.splitlines() if line.startswith("ln_")] == [
        ["ln_1", "1"],
        ["ln_2", "1"],
    ]
    assert "can fit that module" in shown


def test_inspect_loads_no_model():
    """A table of parameters takes no calibration, no keys, and not even the weights."""
    code = """
import sys
from cipherlm.cli import main
code = main(["inspect", "--scheme", "ckks", "--json"])
sys.exit(code or " ".join({"torch", "transformers", "concrete"} & set(sys.modules)) or 0)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    figures = json.loads(run.stdout)
    assert figures["modules"] == ["transformer.h"]
    assert figures["ranges"] is None


@pytest.mark.parametrize(
    ("targets", "settings"),
    [
        ("all", {}),
        (["transformer.h.2", "transformer.h.0.mlp", "transformer.h.0.attn"], {"context": 24}),
        (["transformer.h.3.mlp"], {"prefix": [5, 6], "tokens": 4}),
    ],
)
def test_a_summary_of_files_is_that_of_the_model(targets, settings):
    config = EncryptionConfig(targets, scheme="ckks", **settings)
    told = read_summary("tiny", config)
    assert told == summary(get_encrypted_model(load_model("tiny"), config), load_tokenizer("tiny"))


def test_a_summary_that_only_the_model_tells(tmp_path, capsys):
    """Other names, other files, other models: the model is loaded, or refused as always."""
    for targets in (
        "linear",
        "transformer.h.[01]",
        ["attn"],
        ["transformer.h.9"],
        ["transformer.h.0", "mlp"],
    ):
        assert read_summary("tiny", EncryptionConfig(targets, scheme="ckks")) is None
    config = EncryptionConfig("all", scheme="ckks")
    assert read_summary("gpt2", config) is None
    tiny = load_model("tiny")
    for changes in (
        {"activation_function": "prelu"},
        {"model_type": "llama"},
        {"n_head": 0},
        {"n_embd": "x"},
    ):
        (tmp_path / "config.json").write_text(json.dumps({**tiny.config.to_dict(), **changes}))
        assert read_summary(tmp_path, config) is None
    tiny.save_pretrained(tmp_path)
    assert read_summary(tmp_path, config) is None  # no tokenizer
    load_tokenizer("tiny").save_pretrained(tmp_path)
    assert read_summary(tmp_path, config) == read_summary("tiny", config)
    with pytest.raises(ValueError, match="context=999 is more than the 256 tokens"):
        read_summary(tmp_path, EncryptionConfig("all", scheme="ckks", context=999))
    assert run_json(capsys, "inspect", *CKKS, "--target-modules", "h.1.mlp")["modules"] == [
        "transformer.h.1.mlp"
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "x", *CKKS, "--heads", "0"], "--heads belongs to --scheme tfhe"),
        (["generate", "x", *CKKS, "--n-bits", "4"], "--n-bits belongs to --scheme tfhe"),
        (["generate", "x", "--scheme", "tfhe", "--context", "9"], "--context belongs to --scheme ckks"),
        (["generate", "x", *CKKS, "--tokens", "8"], "--context"),
        (["inspect", *CKKS, "--tokens", "8"], "--context"),
        (["evaluate", *CKKS, "--illustration"], "--illustration"),
        (["evaluate", *CKKS, "--plot", "x.png"], "--plot goes with --by-block"),
        (["evaluate", *CKKS, "--n-bits", "4"], "--n-bits belongs to --scheme tfhe"),
        (["evaluate", *CKKS, "--window", "4"], "--perplexity"),
        (["demo", "--block", "1"], "--block belongs to --scheme tfhe"),
        (["demo", "--heads", "1"], "--heads belongs to --scheme tfhe"),
    ],
)
def test_arguments_that_do_not_go_together(capsys, arguments, words):
    assert words in failure(capsys, *arguments, code=2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "x", *CKKS, "--max-new-tokens", "40"], "need --context 41 or more, not 24"),
        (["generate", "x", *CKKS, "--max-new-tokens", "4000"], "too long for this model"),
        (["generate", "x", *CKKS, "--block", "9"], "transformer.h.9"),
        (["generate", "", *CKKS], "prompt is empty"),
        (["demo", "--max-new-tokens", "100"], "--context"),
    ],
)
def test_a_run_that_fails_says_why_in_one_line(capsys, arguments, words):
    assert words in failure(capsys, *arguments)


@pytest.mark.slow
def test_demo(capsys):
    assert main(["demo", "--max-new-tokens", "2"]) == 0
    shown = capsys.readouterr().out
    (encrypted,) = (line.split(maxsplit=1)[1] for line in shown.splitlines() if line.startswith("encrypted "))
    (clear,) = (line.split(maxsplit=1)[1] for line in shown.splitlines() if line.startswith("clear "))
    assert encrypted == clear
    assert clear.startswith("The old man ")
    assert "sent once" in shown
    assert "the server learns" in shown


@pytest.mark.slow
def test_generate_on_ciphertexts(capsys):
    arguments = ("generate", "She", *CKKS, "--block", "0", "--max-new-tokens", "2")
    figures = run_json(capsys, *arguments)
    assert figures["text"] == run_json(capsys, *arguments, "--mode", "clear")["text"]
    assert figures["keygen_seconds"] > 0
    assert figures["traffic"]["keys"] > 10**6
    assert figures["traffic"]["refreshes"] > 0
