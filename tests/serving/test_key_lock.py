"""Clients that start at once on a machine without keys: one makes them, the others wait and use them."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from cipherlm.progress import silent
from cipherlm.serving import key_choice, keystore, remote
from cipherlm.serving.bundle import BundleError
from cipherlm.serving.key_lock import making_keys
from cipherlm.serving.keystore import KeyMaterial, KeySet, KeyStoreError

MODEL = {"scheme": "ckks", "name": "tiny", "parameters": {"log_n": 14}, "fingerprint": "f" * 64}
WAITING = "waiting for keys that another process makes"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("CIPHERLM_HOME", str(tmp_path))
    return tmp_path


class Told:
    """A progress that remembers its steps."""

    def __init__(self) -> None:
        self.steps: list[str] = []

    @contextmanager
    def __call__(self, label, total=None):
        self.steps.append(label)
        yield lambda *_: None


def choice(name, bundle, progress):
    def unheard(text):
        raise AssertionError(text)

    return key_choice.KeyChoice(name, bundle, MODEL, "https://a:443", lambda: None, progress, unheard)


@pytest.mark.parametrize("name", [None, "work"])
def test_clients_that_start_at_once_share_keys(monkeypatch, name):
    made = []

    def generate_keys(description, progress):
        made.append(description)
        while told.steps.count(WAITING) < 3:
            time.sleep(0.01)
        return KeyMaterial(b"secret %d" % len(made), {"public": lambda file: file.write(b"public")})

    monkeypatch.setattr(key_choice, "generate_keys", generate_keys)
    bundle, told = {**MODEL, "bundle": "/out/client"}, Told()
    with ThreadPoolExecutor(4) as clients:
        found = list(clients.map(lambda _: choice(name, bundle, told).take(), range(4)))
    assert len(made) == 1
    assert {keys.secret() for keys in found} == {b"secret 1"}
    assert keystore.names() == [name or "tiny-ffffffff"]
    assert sorted(told.steps) == ["making keys", "storing keys", *[WAITING] * 3]


def test_a_process_that_dies_keeps_nobody_waiting():
    code = """
import time
from cipherlm.progress import silent
from cipherlm.serving.key_lock import making_keys
with making_keys(silent):
    print("held", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        told = Told()

        def wait() -> float:
            with making_keys(told):
                return time.monotonic()

        with ThreadPoolExecutor(1) as client:
            free = client.submit(wait)
            while not told.steps:
                time.sleep(0.01)
            assert told.steps == [WAITING]
            assert not free.done()
            killed = time.monotonic()
            other.kill()
            assert free.result(timeout=30) >= killed


def test_the_lock_is_no_key_set_and_private(home):
    with making_keys(silent):
        pass
    (lock,) = (home / "keys").iterdir()
    assert keystore.names() == []
    assert (home / "keys").stat().st_mode & 0o077 == 0
    assert lock.stat().st_mode & 0o077 == 0


def test_a_missing_bundle_names_its_option():
    """Where there are no keys, and where there are keys but of another model of these parameters."""
    with pytest.raises(KeyStoreError, match=r"no keys for this model yet.* give --bundle DIR, or bundle= in"):
        choice(None, None, silent).take()
    KeySet.create(None, "work", MODEL, b"secret", {})
    keys = choice(None, None, silent).take()
    with pytest.raises(BundleError, match="give --bundle DIR"):
        remote._bundle_of(keys, None, MODEL)
