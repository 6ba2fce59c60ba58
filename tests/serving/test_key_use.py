"""A key belongs to one server and model, and serves a number of texts."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from cipherlm.progress import silent
from cipherlm.serving import key_choice, keystore
from cipherlm.serving.key_choice import KeyChoice
from cipherlm.serving.key_use import BUDGET, USE_NAME, KeyUse, Use, server_identity
from cipherlm.serving.keystore import DamagedKeysError, KeyMaterial, KeyStoreError
from tests.serving import small

MODEL = {"scheme": "ckks", "name": "tiny", "parameters": {"log_n": 14}, "fingerprint": "f" * 64}
OTHER = {**MODEL, "fingerprint": "e" * 64}
HERE, THERE = "https://a:443", "https://b:443"


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("CIPHERLM_HOME", str(tmp_path))
    made = []

    def generate_keys(description, progress):
        made.append(description)
        return KeyMaterial(b"secret %d" % len(made), {"public": lambda file: file.write(b"public")})

    monkeypatch.setattr(key_choice, "generate_keys", generate_keys)
    return tmp_path


class Told(list):
    __call__ = list.append


def take(server=HERE, name=None, bundle=MODEL, described=MODEL, budget=BUDGET, told=None):
    tell = Told() if told is None else told
    return KeyChoice(name, bundle, described, server, lambda: None, silent, tell, budget).take()


@pytest.mark.parametrize("name", [None, "work"])
def test_keys_belong_to_one_server(home, name):
    first = take(name=name)
    assert take(name=name).secret() == first.secret()
    # The address can change its spelling, and the bundle is remembered.
    assert take(name=name, bundle=None).secret() == first.secret()
    if name:
        with pytest.raises(KeyStoreError, match="belong to https://a:443"):
            take(THERE, name)
    else:
        told = Told()
        assert take(THERE, bundle=None, told=told).secret() != first.secret()
        assert "'tiny-ffffffff' belong to another server" in told[0]
        assert keystore.names() == ["tiny-ffffffff", "tiny-ffffffff-2"]
        assert take(THERE).name == "tiny-ffffffff-2"
    assert take(name=name).name == first.name


def test_keys_belong_to_one_model(home):
    first = take(name="work")
    with pytest.raises(KeyStoreError, match="and the model there"):
        take(name="work", bundle=OTHER, described=OTHER)
    assert take(bundle=OTHER, described=OTHER).secret() != first.secret()


@pytest.mark.parametrize("name", [None, "work"])
def test_keys_are_spent(home, name):
    keys, told = take(name=name), Told()
    for _ in range(2):
        assert KeyUse(keys.directory).spend(1, 2)
    assert not KeyUse(keys.directory).spend(1, 2)
    assert take(name=name, budget=3).name == keys.name
    new = take(name=name, bundle=None, budget=2, told=told)
    assert new.secret() != keys.secret()
    assert new.name == f"{keys.name}-2"
    assert "have served 2 texts" in told[0]
    assert "a bit of a key" in told[0]
    assert take(name=name, budget=2, told=told).name == new.name
    assert len(told) == 1


def test_without_a_bundle_there_is_nothing_to_make_them_from(home):
    with pytest.raises(KeyStoreError, match="give --bundle"):
        take(bundle=None)


def test_every_text_counts_once(tmp_path):
    use = KeyUse(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        spent = list(pool.map(lambda _: use.spend(1, 20), range(40)))
    assert sum(spent) == 20
    assert use.read() == Use(None, None, 20)
    assert use.bind(HERE, "m")
    assert not use.bind(THERE, "m")
    assert use.read() == Use(HERE, "m", 20)
    assert (tmp_path / USE_NAME).stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "text", ["", "[]", '{"texts": -1}', '{"texts": "1"}', '{"more": 1}', '{"server": 1}']
)
def test_a_damaged_count_is_no_fresh_one(home, text):
    keys = take(name="work")
    (keys.directory / USE_NAME).write_text(text)
    with pytest.raises(DamagedKeysError, match=USE_NAME):
        take(name="work")
    assert take().secret() != keys.secret()


@pytest.mark.parametrize(
    ("url", "same"),
    [("http://LOCALHOST:8470/", True), ("http://[::1]:8470", True), ("http://127.0.0.1:8471", False),
     ("https://127.0.0.1:8470", False), ("http://example.org:8470", False)],
)  # fmt: skip
def test_servers_are_told_by_their_address(url, same):
    assert (server_identity(url) == server_identity("http://127.0.0.1:8470")) is same
    assert server_identity("https://Example.org") == server_identity("https://example.org:443/")


@pytest.mark.slow
def test_a_model_in_use_changes_its_keys(tmp_path, monkeypatch):
    """With real keys: the third text of a budget of two goes on under new ones, at the same server."""
    with small.serving("mlp", tmp_path) as (url, _):
        monkeypatch.setenv("CIPHERLM_HOME", str(tmp_path / "home"))
        told = Told()
        bundle = small.exported("mlp") / "client"
        with small.RemoteModel.connect(url, bundle=bundle, key_budget=2, tell=told) as model:
            for count in (1, 2, 3):
                assert small.generate(model, count=1) == small.continuation(count=1)
                assert len(keystore.names()) == (2 if count == 3 else 1)
            model.generate(torch.tensor([[5, 6]]), max_new_tokens=1, num_return_sequences=2, do_sample=True)
        first, second = (keystore.keys_directory() / name / USE_NAME for name in keystore.names())
        assert [json.loads(path.read_text())["texts"] for path in (first, second)] == [2, 3]
        assert len(told) == 1
