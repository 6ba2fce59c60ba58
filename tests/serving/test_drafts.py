"""A draft in the client's bundle: the same texts with it, and refusals of what does not fit."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig

from cipherlm import RemoteModel
from cipherlm.cli import main
from cipherlm.models.drafts import load_draft
from cipherlm.models.eagle import CONFIG_NAME, WEIGHTS_NAME, DraftHead
from cipherlm.serving import bundle as bundles
from cipherlm.serving.bundle import BUNDLE_NAME, BundleError

from . import small
from .small import at_home  # noqa: F401

NEW_TOKENS = 5


def head(**sizes: int) -> DraftHead:
    """A head that has learned nothing."""
    common = {
        "vocab_size": 4096,
        "hidden_size": small.WIDTH,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
    }
    with torch.random.fork_rng():
        torch.manual_seed(6)
        return DraftHead(LlamaConfig(**{**common, "intermediate_size": 40, **sizes}))


def causal(vocabulary: int = 4096) -> GPT2LMHeadModel:
    """A model that has learned nothing."""
    config = GPT2Config(
        vocab_size=vocabulary, n_embd=8, n_layer=1, n_head=1, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config).eval()


def made(kind: str) -> DraftHead | GPT2LMHeadModel:
    """A head, or the clear model itself, which is always right."""
    return head() if kind == "head" else small.clear_model()


@cache
def exported(kind: str) -> Path:
    """The directory with the bundles of the small model and a draft."""
    directory = small.exported("all").with_name(f"with-{kind}")
    made(kind).save_pretrained(directory.with_name(f"draft-{kind}"))
    draft = load_draft(directory.with_name(f"draft-{kind}"), small.clear_model().config)
    bundles.export(small.encrypted_model("all"), directory, small.tokenizer(), name="small all", draft=draft)
    return directory


def connect(url: str, bundle: Path) -> RemoteModel:
    return RemoteModel.connect(url, bundle=bundle, keys=small.unused())


@pytest.mark.parametrize("kind", ["head", pytest.param("model", marks=pytest.mark.slow)])
def test_a_text_with_the_bundle_s_draft(kind, tmp_path):
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "reveal_length": True}
    ids = small.prompt_ids()
    assert not list((exported(kind) / "server").rglob("draft*"))
    with small.serving("all", tmp_path) as (url, _), connect(url, exported(kind) / "client") as model:
        assert type(model.draft).__name__ == type(made(kind)).__name__
        text = model.generate(ids, assistant_model=model.draft, **options)
        with pytest.raises(ValueError, match="reveal_length=True"):
            model.generate(ids, max_new_tokens=1, assistant_model=model.draft)
    assert text[0, ids.shape[1] :].tolist() == small.continuation(count=NEW_TOKENS)


def test_a_head_comes_back_as_it_was(tmp_path):
    """But for the rounding to half precision."""
    before = head()
    before.save_pretrained(tmp_path)
    after = load_draft(tmp_path, small.clear_model().config)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG_NAME, WEIGHTS_NAME]
    x = torch.randn(2, 1, 6, small.WIDTH, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (before(*x) - after(*x)).abs().max() < 1e-2 * before(*x).abs().max()


def resealed(directory: Path) -> Path:
    """Let the sums of a bundle be those of the files there."""
    about = json.loads((directory / BUNDLE_NAME).read_text())
    for name in about["files"]:
        about["files"][name] = hashlib.sha256((directory / name).read_bytes()).hexdigest()
    (directory / BUNDLE_NAME).write_text(json.dumps(about))
    return directory


def not_a_number(directory: Path) -> None:
    state = load_file(directory / WEIGHTS_NAME)
    state["joined.weight"][3, 4] = float("nan")
    save_file(state, directory / WEIGHTS_NAME)


def one_less(directory: Path) -> None:
    state = load_file(directory / WEIGHTS_NAME)
    del state["joined.weight"]
    save_file(state, directory / WEIGHTS_NAME)


DAMAGES = {
    "no JSON": (lambda d: (d / CONFIG_NAME).write_text("{"), f"{CONFIG_NAME} is damaged"),
    "a wrong number": (
        lambda d: (d / CONFIG_NAME).write_text((d / CONFIG_NAME).read_text().replace("40", '"x"')),
        f"{CONFIG_NAME} is damaged",
    ),
    "another shape": (
        lambda d: (d / CONFIG_NAME).write_text((d / CONFIG_NAME).read_text().replace("40", "48")),
        f"{WEIGHTS_NAME} is damaged",
    ),
    "no tensors": (lambda d: (d / WEIGHTS_NAME).write_bytes(b"\0" * 40), f"{WEIGHTS_NAME} is damaged"),
    "no weights": (lambda d: (d / WEIGHTS_NAME).unlink(), f"{WEIGHTS_NAME} is damaged"),
    "not a number": (not_a_number, "a weight is not a number"),
    "a weight less": (one_less, f"{WEIGHTS_NAME} is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_head(damage, tmp_path):
    head().save_pretrained(tmp_path)
    change, message = DAMAGES[damage]
    change(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_draft(tmp_path, small.clear_model().config)


@pytest.mark.parametrize(
    ("draft", "message"),
    [
        (lambda: head(vocab_size=4095), "vocab_size is 4095, and the model's is 4096"),
        (lambda: head(hidden_size=16), "hidden_size is 16, and the model's is 32"),
        (lambda: causal(4000), "vocab_size is 4000, and the model's is 4096"),
    ],
)
def test_a_draft_of_another_model(draft, message, tmp_path, capsys):
    draft().save_pretrained(tmp_path / "draft")
    with pytest.raises(ValueError, match=message):
        load_draft(tmp_path / "draft", small.clear_model().config)
    small.clear_model().save_pretrained(tmp_path / "model")
    small.tokenizer().save_pretrained(tmp_path / "model")
    arguments = ["export", str(tmp_path / "model"), str(tmp_path / "out"), "--draft", str(tmp_path / "draft")]
    assert main(arguments) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_bundle_whose_draft_is_damaged(tmp_path):
    """The sums of its files tell; where they were made anew, what the draft is for does."""
    bundles.export(small.encrypted_model("all"), tmp_path / "out", small.tokenizer(), name="x", draft=head())
    client = tmp_path / "out" / "client"
    head(hidden_size=16).save_pretrained(client / "draft")
    with pytest.raises(BundleError, match=f"{CONFIG_NAME} is missing or damaged"):
        bundles.Bundle.load(client, "client")
    with (
        small.serving("all", tmp_path) as (url, _),
        connect(url, resealed(client)) as model,
        pytest.raises(BundleError, match="hidden_size is 16"),
    ):
        _ = model.draft


def test_the_verbs(tmp_path, capsys):
    asked = ["generate", small.PROMPT, "--max-new-tokens", str(NEW_TOKENS), "--json"]
    clear = small.tokenizer().decode([*small.prompt_ids()[0], *small.continuation(count=NEW_TOKENS)])
    bundles_of = [str(exported("model") / "client"), str(small.exported("all") / "client")]
    with small.serving("all", tmp_path) as (url, _):
        capsys.readouterr()  # what making them has printed
        server = ["--server", url, "--keys", small.unused(), "--reveal-length", "--draft", "--bundle"]
        assert main([*asked, *server, bundles_of[0]]) == 0
        figures = json.loads(capsys.readouterr().out)
        assert figures["text"] == clear
        assert figures["passes"] < NEW_TOKENS
        for verb in (asked, ["chat", "Hello"], ["proxy"]):
            assert main([*verb, *server, bundles_of[1]]) == 2
            assert "has no draft. The model's owner adds one" in capsys.readouterr().err


@pytest.mark.parametrize("verb", [["generate", "A"], ["chat", "A"], ["proxy"]])
def test_drafts_and_hidden_lengths(verb, capsys):
    assert main([*verb, "--server", "http://127.0.0.1:1", "--draft"]) == 2
    assert "--draft shows the server how many proposals are right" in capsys.readouterr().err
    assert main([*verb, "--server", "http://127.0.0.1:1", "--draft", "--prompt-lookup", "3"]) == 2
    assert "not allowed with" in capsys.readouterr().err


def test_draft_without_a_server(capsys):
    for verb in ("generate", "chat"):
        assert main([verb, "A", "--draft"]) == 2
        assert "--draft goes with --server" in capsys.readouterr().err
    assert main(["export", "tiny", "nowhere", "--target-modules", "linear", "--draft", "tiny"]) == 2
    assert "--draft is for blocks on ciphertexts" in capsys.readouterr().err
