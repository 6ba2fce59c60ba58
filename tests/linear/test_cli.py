"""Linear layers on the command line, with both parties in this process."""

import json

import pytest

from cipherlm import EncryptionConfig, get_encrypted_model, load_model, load_tokenizer
from cipherlm.cli import main

LINEAR = ["--target-modules", "linear"]


def generated(capsys, *arguments) -> dict:
    assert main(["generate", "The old man", "--max-new-tokens", "2", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("mode", ["execute", "simulate", "clear"])
def test_generate(mode, capsys):
    tokenizer = load_tokenizer("tiny")
    ids = tokenizer("The old man", return_tensors="pt").input_ids
    expected = load_model("tiny").generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
    found = generated(capsys, *LINEAR, "--mode", mode)
    assert found["text"] == tokenizer.decode(expected[0])
    assert (found["layers"], found["products"]) == (16, 16)


def test_a_saved_model_and_names_of_layers(tmp_path, capsys):
    config = EncryptionConfig(["mlp.c_*"], scheme="ckks")
    get_encrypted_model(load_model("tiny"), config).save_pretrained(tmp_path)
    load_tokenizer("tiny").save_pretrained(tmp_path)
    assert generated(capsys, "--model", str(tmp_path))["layers"] == 8
    assert generated(capsys, "--target-modules", "c_attn", "--mode", "simulate")["layers"] == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "x", *LINEAR, "--context", "32"], "context means nothing"),
        (["generate", "x", *LINEAR, "--calibration", __file__], "linear layers need none"),
        (["generate", "x", *LINEAR, "--n-bits", "4"], "is for scheme='ckks'"),
        (["evaluate", *LINEAR, "--calibration", __file__], "linear layers need none"),
    ],
)
def test_what_does_not_go_with_linear_layers(arguments, message, capsys):
    code = main(arguments)
    error = capsys.readouterr().err
    assert code in (1, 2)
    assert message in error
