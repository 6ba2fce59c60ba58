import io
import json
import sys
from types import SimpleNamespace

import pytest

from cipherlm.cli import keygen, main, passphrase
from cipherlm.serving import client, keystore
from cipherlm.serving.keystore import KeyMaterial, KeySet

SECRET = b"the secret key"
DESCRIPTION = {"scheme": "ckks", "name": "tiny", "parameters": {"log_n": 14}, "fingerprint": "f" * 64}


class Bundles:
    """Makes keys at once, and remembers for what."""

    def __init__(self) -> None:
        self.made: list[dict] = []

    def client_description(self, bundle: str) -> dict:
        if bundle != "tiny.client":
            raise ValueError(f"{bundle} is not a client bundle")
        return DESCRIPTION

    def generate_keys(self, description, progress) -> KeyMaterial:
        self.made.append(description)
        with progress("evaluation keys"):
            return KeyMaterial(SECRET, {"evaluation": lambda file: file.write(bytes(5_000_000))})


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("CIPHERLM_HOME", str(tmp_path))
    monkeypatch.delenv("CIPHERLM_TOKEN", raising=False)
    monkeypatch.setattr(keystore, "_SCRYPT_COST", (14, 8, 1))
    return tmp_path


@pytest.fixture(autouse=True)
def bundles(monkeypatch):
    bundles = Bundles()
    monkeypatch.setattr(keygen, "_bundles", lambda: bundles)
    return bundles


def keygen_json(capsys, *arguments: str) -> dict:
    assert main(["keygen", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def failure(capsys, *arguments: str, code: int = 1) -> str:
    assert main(["keygen", *arguments]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


def test_keys_for_a_bundle(capsys, home, bundles):
    figures = keygen_json(capsys, "--bundle", "tiny.client")
    assert bundles.made == [DESCRIPTION]
    keys = KeySet.load(None, "default")
    assert keys.secret() == SECRET
    assert figures["directory"] == str(home / "keys" / "default")
    assert figures["files"]["evaluation"] == {
        "size": 5_000_000,
        "sha256": keys.fingerprints["evaluation"],
    }
    assert not figures["passphrase"]


def test_what_is_shown(capsys, home):
    assert main(["keygen", "--bundle", "tiny.client", "--name", "work"]) == 0
    shown = capsys.readouterr().out
    assert "work" in shown
    assert "5 MB" in shown
    assert "without a passphrase" in shown
    assert main(["keygen", "--list"]) == 0
    assert "work  ckks, for tiny, 5 MB, made 20" in capsys.readouterr().out


def test_keys_for_a_server(capsys, bundles, monkeypatch):
    asked = []

    class Connection:
        def __init__(self, url, **options):
            asked.append((url, options))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            asked.append("closed")

        def describe(self):
            return DESCRIPTION

    monkeypatch.setattr(client, "Connection", Connection)
    monkeypatch.setenv("CIPHERLM_TOKEN", "sesame")
    keygen_json(capsys, "--server", "https://example.org:8470", "--ca", "ca.pem")
    assert asked == [
        ("https://example.org:8470", {"token": "sesame", "verify": "ca.pem", "insecure_plain_http": False}),
        "closed",
    ]
    assert bundles.made == [DESCRIPTION]


def test_a_server_that_is_not_there_is_one_line(capsys, monkeypatch):
    original = client.Connection
    monkeypatch.setattr(client, "Connection", lambda *args, **kw: original(*args, **kw, patience=0))
    assert "refuses connections" in failure(capsys, "--server", "http://127.0.0.1:9")


def test_passphrase_from_a_file(capsys, home):
    (home / "phrase").write_text("correct horse\nnot this\n")
    figures = keygen_json(capsys, "--bundle", "tiny.client", "--passphrase-file", str(home / "phrase"))
    assert figures["passphrase"]
    assert KeySet.load(None, "default").secret("correct horse") == SECRET


@pytest.mark.parametrize(("content", "words"), [(b"", "empty"), (b"\nx", "empty"), (b"\xff\xfe", "UTF-8")])
def test_passphrase_files_that_hold_none(capsys, home, bundles, content, words):
    (home / "phrase").write_bytes(content)
    line = failure(capsys, "--bundle", "tiny.client", "--passphrase-file", str(home / "phrase"))
    assert words in line
    assert not bundles.made
    assert "No such file" in failure(capsys, "--bundle", "tiny.client", "--passphrase-file", "nothing")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("typed", "words"), [(["a", "a"], None), (["a", "b"], "differ"), (["", ""], "empty")]
)
def test_passphrase_from_the_terminal(capsys, monkeypatch, typed, words):
    monkeypatch.setattr(sys, "stdin", Terminal())
    answers = iter(typed)
    monkeypatch.setattr(passphrase, "getpass", SimpleNamespace(getpass=lambda prompt: next(answers)))
    arguments = ["--bundle", "tiny.client", "--ask-passphrase"]
    if words is None:
        assert keygen_json(capsys, *arguments)["passphrase"]
        assert KeySet.load(None, "default").secret("a") == SECRET
    else:
        assert words in failure(capsys, *arguments)
        assert keystore.names() == []


def test_no_terminal_to_ask_on(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\na\n"))
    assert "--passphrase-file" in failure(capsys, "--bundle", "tiny.client", "--ask-passphrase")


def test_a_taken_name_is_told_before_the_work(capsys, bundles):
    keygen_json(capsys, "--bundle", "tiny.client")
    assert "already" in failure(capsys, "--bundle", "tiny.client")
    assert "not a name" in failure(capsys, "--bundle", "tiny.client", "--name", "../x")
    assert "not a client bundle" in failure(capsys, "--bundle", "other", "--name", "x")
    assert len(bundles.made) == 1


def test_list_and_delete(capsys, home):
    assert main(["keygen", "--list"]) == 0
    assert "no keys in" in capsys.readouterr().out
    for name in ("b", "a"):
        keygen_json(capsys, "--bundle", "tiny.client", "--name", name)
    (home / "keys" / "a" / "keys.json").write_text("damaged")
    figures = keygen_json(capsys, "--list")
    assert list(figures["keys"]) == ["a", "b"]
    assert "damaged" in figures["keys"]["a"]["error"]
    assert figures["keys"]["b"]["scheme"] == "ckks"
    assert main(["keygen", "--list"]) == 0
    assert "a  unusable: " in capsys.readouterr().out
    assert keygen_json(capsys, "--delete", "a") == {"deleted": "a"}
    assert "no keys 'a'" in failure(capsys, "--delete", "a")
    assert keystore.names() == ["b"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--list", "--name", "x"], "--name"),
        (["--delete", "x", "--ask-passphrase"], "--ask-passphrase"),
        (["--bundle", "tiny.client", "--token", "x"], "--server"),
        (["--list", "--ca", "x"], "--server"),
    ],
)
def test_arguments_that_do_not_go_together(capsys, arguments, words):
    assert words in failure(capsys, *arguments, code=2)


@pytest.mark.parametrize("arguments", [[], ["--list", "--delete", "x"], ["--bundle", "x", "--server", "y"]])
def test_wrong_usage(capsys, arguments):
    assert main(["keygen", *arguments]) == 2
    assert "usage:" in capsys.readouterr().err


def test_no_secret_is_shown(capsys, home):
    (home / "phrase").write_text("correct horse")
    main(["keygen", "--bundle", "tiny.client", "--passphrase-file", str(home / "phrase")])
    main(["keygen", "--list"])
    captured = capsys.readouterr()
    assert "correct horse" not in captured.out + captured.err
    assert SECRET.decode() not in captured.out + captured.err + repr(Bundles().generate_keys({}, silent))


def silent(_step):
    return io.StringIO()
