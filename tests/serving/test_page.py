"""The page's files: what is in them, and for which models and servers there is a page."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path

import pytest

from cipherlm.cli import main
from cipherlm.serving import page as pages
from cipherlm.serving.bundle import Bundle
from cipherlm.serving.ckks import EVALUATION, _check_complete
from cipherlm.serving.page import PageError, compose, evaluation_keys_of, plan_of

from . import small

SERVER = "https://llm.example.org:8470"
INDEX = """<head><!--policy-->
<script type="module" crossorigin src="./assets/main-1.js"></script>
<link rel="stylesheet" crossorigin href="./assets/style-1.css"></head>"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Something in place of the program, which these tests are not about."""
    static = tmp_path / "static"
    (static / "assets").mkdir(parents=True)
    (static / "index.html").write_text(INDEX)
    for name in ("main-1.js", "style-1.css", "engine-1.wasm"):
        (static / "assets" / name).write_bytes(name.encode() * 100)
    (static / "assets" / "engine-1.wasm.gz").write_bytes(b"compressed")
    monkeypatch.setattr(pages, "STATIC", static)
    return static


def client_bundle(placement: str = "all") -> Bundle:
    return Bundle.load(small.exported(placement) / "client", "client")


def sha384(data: bytes) -> str:
    return "sha384-" + base64.b64encode(hashlib.sha384(data).digest()).decode()


def test_the_digest_stands_for_every_file(
    program: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, bundle = tmp_path / "out", small.exported("all") / "client"
    capsys.readouterr()
    assert main(["page", str(bundle), str(out), "--server", SERVER, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    index = (out / "index.html").read_bytes()
    assert said["sha256"] == hashlib.sha256(index).hexdigest()
    links = dict(re.findall(rb'(?:src|href)="\./(assets/[^"]+)" integrity="([^"]+)"', index))
    assert {name.decode() for name in links} == {"assets/main-1.js", "assets/style-1.css"}
    for name, integrity in links.items():
        assert integrity.decode() == sha384((out / name.decode()).read_bytes())
    text = (out / "page.json").read_bytes()
    assert f'name="cipherlm-plan" content="{sha384(text)}"'.encode() in index
    plan = json.loads(text)
    assert plan["assets"] == {
        f"assets/{name}": sha384((out / "assets" / name).read_bytes())
        for name in ("engine-1.wasm", "main-1.js", "style-1.css")
    }
    for name, about in plan["files"].items():
        data = (out / "model" / name).read_bytes()
        assert about == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    every = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert every == {
        "index.html",
        "page.json",
        *plan["assets"],
        "assets/engine-1.wasm.gz",
        *(f"model/{name}" for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json")),
    }


def test_a_page_talks_to_the_named_servers_only(program: Path) -> None:
    page = compose(client_bundle(), [SERVER + "/", "http://127.0.0.1:8470"])
    assert f"connect-src 'self' {SERVER} wss://llm.example.org:8470 http://127.0.0.1:8470 ws:" in page.policy
    index = page.files["index.html"]
    assert isinstance(index, bytes)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', index.decode())
    assert policy is not None
    assert f"{policy[1]}; frame-ancestors 'none'" == page.policy
    for word in ("unsafe-inline", "'unsafe-eval'", "*", "https:;", "https: "):
        assert word not in page.policy
    assert "https: wss:" in compose(client_bundle(), [], any_server=True).policy
    assert "connect-src 'self';" in compose(client_bundle()).policy


def test_the_plan_is_the_model_s(program: Path) -> None:
    plan = plan_of(client_bundle())
    geometry = small.GEOMETRY
    assert plan["parameters"] == geometry.parameters.to_dict()
    assert plan["layout"] == {
        "slots": 8192, "period": geometry.layout.period, "tokens": small.TOKENS, "first": 1,
        "width": small.WIDTH, "level": 4,
    }  # fmt: skip
    assert (plan["prefix"], plan["context"], plan["module"]) == ([0], small.CONTEXT, "transformer.h")
    assert plan["model"]["norm"]["epsilon"] == 1e-5
    assert (plan["text"]["end"], plan["text"]["template"]) == ([0], None)
    assert plan["text"]["tokens"]["eos_token"] == "<|endoftext|>"


def test_the_plan_s_keys_are_what_the_server_wants() -> None:
    keys = dict(evaluation_keys_of(small.GEOMETRY))
    relinearisation = keys.pop(0)

    class Held:
        galois_levels = keys
        relinearization_level = relinearisation

    _check_complete(Held(), small.GEOMETRY)  # type: ignore[arg-type]
    assert keys.keys() == small.party().evaluation_keys().galois_levels.keys()
    assert client_bundle().about["description"]["keys"][EVALUATION] > 0


@pytest.mark.parametrize("placement", ["block", "attention", "hybrid"])
def test_there_is_no_page_for_modules(program: Path, placement: str) -> None:
    with pytest.raises(PageError, match="a page is for whole models"):
        compose(client_bundle(placement))


@pytest.mark.parametrize(
    ("server", "why"),
    [
        ("http://llm.example.org", "https:// only"),
        ("llm.example.org", "not the address of a server"),
        ("https://", "not the address"),
        ("https://a:b@c", "not the address"),
        ("https://a/?token=1", "not the address"),
        ("javascript:alert(1)", "not the address"),
    ],
)
def test_servers_have_addresses(program: Path, server: str, why: str) -> None:
    with pytest.raises(PageError, match=why):
        compose(client_bundle(), [server])


def test_an_installation_without_the_page_says_so(
    program: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (program / "index.html").unlink()
    bundle = small.exported("all")
    for command in (
        ["page", str(bundle / "client"), str(tmp_path / "out"), "--server", SERVER],
        ["serve", str(bundle / "server"), "--page"],
    ):
        assert main(command) == 1
        assert "this installation has no page: it was built without Node.js" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_page_has_servers_and_a_new_directory(
    program: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = small.exported("all")
    assert main(["page", str(bundle / "client"), str(tmp_path / "out")]) == 2
    assert "name the server with the model" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert main(["page", str(bundle / "client"), str(tmp_path / "full"), "--server", SERVER]) == 1
    assert "not empty" in capsys.readouterr().err
    other = small.exported("block") / "client"
    assert main(["serve", str(bundle / "server"), "--page", str(other)]) == 2
    assert "another model" in capsys.readouterr().err
