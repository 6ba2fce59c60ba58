"""Linear layers from the command line: export, serve, generate, and OpenAI's API."""

import json

import pytest
from fastapi.testclient import TestClient

from cipherlm import EncryptionConfig, get_encrypted_model
from cipherlm.cli import main
from cipherlm.serving.proxy import create_proxy
from cipherlm.serving.remote_linear import RemoteLinearModel
from linear.architectures import tiny
from linear.bundles import exported, tokenizer
from linear.test_serving import serving


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    tiny("llama").save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def clear_text(prompt, count):
    """What the clear model says, with embeddings in half precision, as clients have them."""
    ids, model = tokenizer()(prompt, return_tensors="pt")["input_ids"], tiny("llama")
    for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
        embedding.weight.data = embedding.weight.data.half().float()
    return tokenizer().decode(model.generate(ids, max_new_tokens=count, do_sample=False)[0])


@pytest.mark.parametrize("options", [["--target-modules", "linear"]])
def test_from_export_to_text(saved, tmp_path, capsys, options):
    root = tmp_path / "out"
    assert main(["export", str(saved), str(root), *options, "--prefix", "w9 w8", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["scheme"] == "ckks"
    assert len(told["modules"]) == 8
    with serving(root) as (url, _):
        server = ["--server", url, "--bundle", str(root / "client")]
        assert main(["generate", *server, "w20 w21", "--max-new-tokens", "3", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert f"w9 w8 {result['text']}" == clear_text("w9 w8 w20 w21", 3)
    assert len(result["token_seconds"]) == 3
    # Two tokens of the prompt, then one at a time; the prefix costs nothing.
    assert result["traffic"]["exchanges"] == 3 * 8
    assert result["traffic"]["connections"] == 1


def test_a_model_that_was_saved_encrypted(tmp_path, capsys):
    config = EncryptionConfig(["q_proj", "v_proj"], scheme="ckks")
    get_encrypted_model(tiny("llama"), config).save_pretrained(tmp_path / "saved")
    tokenizer().save_pretrained(tmp_path / "saved")
    assert main(["export", str(tmp_path / "saved"), str(tmp_path / "out"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["modules"] == [f"model.layers.{index}.self_attn.q_proj" for index in range(2)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target-modules", "linear", "--context", "8"], "context means nothing"),
        (["--target-modules", "attn"], "no linear layer 'attn'"),
        (["--system", "nothing", "--target-modules", "linear"], "does not begin with the system prompt"),
    ],
)
def test_options_that_cannot_be(saved, tmp_path, capsys, arguments, words):
    assert main(["export", str(saved), str(tmp_path / "out"), *arguments]) != 0
    assert words in capsys.readouterr().err


def test_what_is_for_linear_layers_only(tmp_path, capsys):
    assert main(["export", "tiny", str(tmp_path / "out"), "--prefix", "x"]) == 2
    assert "add --target-modules linear" in capsys.readouterr().err
    assert main(["export", "tiny", str(tmp_path / "out"), "--system", "x"]) == 2
    assert "--system is for models with a chat template" in capsys.readouterr().err


def test_stored_keys_are_for_other_placements(capsys):
    bundle = str(exported() / "client")
    server = ["--server", "http://127.0.0.1:1", "--bundle", bundle]
    assert main(["generate", *server, "--keys", "mine", "w30"]) == 2
    assert "--keys is about stored keys" in capsys.readouterr().err
    assert main(["keygen", "--bundle", bundle]) != 0
    assert "made for each run" in capsys.readouterr().err


def test_a_server_of_linear_layers_without_the_bundle(capsys):
    with serving() as (url, _):
        assert main(["generate", "--server", url, "w30"]) == 1
    assert "give the client's bundle" in capsys.readouterr().err


def test_openai_programs():
    with serving() as (url, _), RemoteLinearModel.connect(url, bundle=exported() / "client") as model:
        app = create_proxy(model, model.tokenizer, name="small", context_length=model.context_length)
        with TestClient(app, base_url="http://127.0.0.1") as client:
            asked = {"model": "small", "prompt": "w20 w21", "max_tokens": 3, "temperature": 0}
            answer = client.post("/v1/completions", json=asked).json()
            message = {"role": "user", "content": "w20"}
            chat = {"model": "small", "messages": [message], "max_tokens": 3, "temperature": 0}
            reply = client.post("/v1/chat/completions", json=chat).json()
    assert f"w20 w21 {answer['choices'][0]['text'].strip()}" == clear_text("w20 w21", 3)
    assert reply["usage"]["completion_tokens"] in (1, 2, 3)  # it may end
