"""What goes wrong between a client and a server, with real keys and ciphertexts.

Each ends in a clear error or in a completed request, and the server serves on.
"""

from __future__ import annotations

import errno
import shutil
import threading
from pathlib import Path

import pytest
import torch

from cipherlm import RemoteModel
from cipherlm.engine import RefreshRequest
from cipherlm.serving import keys as keystore
from cipherlm.serving.bundle import BundleError
from cipherlm.serving.client import Connection, ServerError, SessionLost, WrongModel
from cipherlm.serving.errors import ConnectionFailed, RemoteError

from . import small
from .conftest import eventually
from .small import at_home  # noqa: F401

MLP = "transformer.h.0.mlp"


def serves(url: str) -> None:
    """A text comes out right."""
    with small.connect(url, "mlp") as model:
        assert small.generate(model, count=1) == small.continuation(count=1)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with small.serving("mlp", tmp_path_factory.mktemp("data")) as (url, service):
        yield url, service


def test_damaged_ciphertexts_over_the_network(server):
    """Inputs and refresh replies: an error for this request, and the same session goes on."""
    url, service = server
    party = small.party()
    parameters = party.geometry.parameters

    def refresh(request: bytes) -> bytes:
        return party.refresh(RefreshRequest.from_bytes(request, parameters)).to_bytes()

    [ciphertext] = party.encrypt(torch.ones(2, small.WIDTH).numpy(), 1)
    frame = ciphertext.to_bytes()
    flipped = frame[:5000] + bytes([frame[5000] ^ 1]) + frame[5001:]
    serves(url)  # the keys are there now
    with Connection(url) as connection:
        connection.open(small.keys().fingerprints)
        for inputs, start, count, message in (
            ([frame[:-1]], 1, 2, r"truncated|bytes"),
            ([flipped], 1, 2, "checksum"),
            ([b""], 1, 2, "truncated"),
            ([], 1, 2, "not in 0"),
            ([frame], 4, 1, "expected"),
            ([frame], 1, 4, "do not go together"),
            ([frame], 1, 0, "1 to 12 tokens"),
            ([frame], 12, 1, "1 to 12 tokens"),
            ([frame], 0, 2, "where 1 was expected"),
        ):
            with pytest.raises(ServerError, match=message) as caught:
                connection.evaluate(MLP, start, count, inputs, refresh)
            assert caught.value.code == "bad_request"
        for change, message in (
            (lambda reply: reply[:-1], r"truncated|bytes"),
            (lambda reply: reply[:5000] + bytes([reply[5000] ^ 1]) + reply[5001:], "checksum"),
            (lambda reply: b"", "truncated"),
            (lambda reply: frame, "frame of type"),
        ):
            with pytest.raises(ServerError, match=message) as caught:
                connection.evaluate(MLP, 1, 2, [frame], lambda request, c=change: c(refresh(request)))
            assert caught.value.code == "bad_request"
        assert len(connection.evaluate(MLP, 1, 2, [frame], refresh)) == 1
    eventually(lambda: service.sessions == 0)
    serves(url)


def test_damaged_keys_over_the_network(server):
    """They arrive as they were sent, since their SHA-256 is right; opening a session refuses them."""
    url, service = server
    content = small.paths()["public"].read_bytes()
    with Connection(url) as connection:
        good = connection.upload("evaluation", small.paths()["evaluation"])
        for data in (content[:-1], content[:9000] + bytes([content[9000] ^ 1]) + content[9001:], b"nothing"):
            with pytest.raises(ServerError) as caught:
                connection.open({"evaluation": good, "public": connection.upload("public", data)})
            assert caught.value.code == "bad_keys"
        stranger = small.party("two").public_key().to_bytes()
        with pytest.raises(ServerError, match="different secret keys"):
            connection.open({"evaluation": good, "public": connection.upload("public", stranger)})
        with pytest.raises(ServerError, match="keys first"):
            connection.open({"evaluation": "00" * 32, "public": "00" * 32})
    eventually(lambda: service.sessions == 0)
    serves(url)


def test_another_model_s_bundle(server):
    url, _ = server
    with pytest.raises(WrongModel, match="hosts the model"):
        small.connect(url, "attention")


def test_a_bundle_of_another_version(server, tmp_path):
    url, _ = server
    directory = Path(shutil.copytree(small.exported("mlp") / "client", tmp_path / "client"))
    text = (directory / "bundle.json").read_text()
    (directory / "bundle.json").write_text(text.replace('"version": 1', '"version": 2', 1))
    with pytest.raises(BundleError, match="export the model again"):
        RemoteModel.connect(url, bundle=directory, keys=small.unused())


def test_a_full_disk_at_key_upload(tmp_path, monkeypatch):
    """The client hears of it; when there is room again, the same call goes through."""
    plain, full = keystore._write, threading.Event()
    full.set()

    def write(path, offset, chunk):
        if full.is_set() and offset > 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(path, offset, chunk)

    monkeypatch.setattr(keystore, "_write", write)
    with small.serving("mlp", tmp_path) as (url, _):
        with Connection(url, patience=1) as connection, pytest.raises(ServerError, match="disk is full"):
            connection.upload("evaluation", small.paths()["evaluation"])
        full.clear()
        serves(url)


def test_a_server_that_restarts_while_it_generates(tmp_path):
    """The client sends the text again, and the text comes out as if nothing had been."""
    expected = small.continuation(count=2)
    with small.serving("mlp", tmp_path) as (url, _):
        port = int(url.rpartition(":")[2])
        model = small.connect(url, "mlp")
        first = small.generate(model, count=1)
        ids = torch.cat([small.prompt_ids(), torch.tensor([first])], 1)
    # Its session, with what it remembered, is gone; its keys are on disk.
    with small.serving("mlp", tmp_path, port) as (url, _), model:
        assert model.generate(ids, max_new_tokens=1, do_sample=False)[0, -1].item() == expected[1]


@pytest.mark.slow
def test_a_server_that_is_killed_while_it_generates(tmp_path):
    """A process that is killed in the middle of a pass, and started again."""
    with small.process("all", tmp_path) as server:
        port = int(server.url.rpartition(":")[2])
        model = small.connect(server.url, "all")
        assert small.generate(model, count=1) == small.continuation(count=1)
        ids = torch.cat([small.prompt_ids(), torch.tensor([small.continuation(count=1)])], 1)
        killer = threading.Timer(0.7, server.process.kill)
        killer.start()
        results: list[int] = []

        def go_on() -> None:
            results.append(model.generate(ids, max_new_tokens=1, do_sample=False)[0, -1].item())

        thread = threading.Thread(target=go_on)
        thread.start()
        server.process.wait()
        with small.process("all", tmp_path, port=port):
            thread.join()
            model.close()
    assert results == [small.continuation(count=2)[1]]


@pytest.mark.slow
def test_a_server_that_is_killed_in_a_key_upload(tmp_path):
    """What had arrived is not sent again."""
    content = small.paths()["evaluation"].read_bytes()
    with small.process("mlp", tmp_path) as server:
        port = int(server.url.rpartition(":")[2])
        recorder = small.Recorder(server.url)

        def upload() -> None:
            with Connection(recorder.url, patience=0.1) as connection, pytest.raises(RemoteError):
                connection.upload("evaluation", content)

        thread = threading.Thread(target=upload)
        thread.start()
        eventually(lambda: sum(len(up) for up, _ in recorder.streams) > len(content) // 3, 60)
        server.process.kill()
        thread.join()
        recorder.close()
    with small.process("mlp", tmp_path, port=port) as server:
        recorder = small.Recorder(server.url)
        with Connection(recorder.url) as connection:
            connection.upload("evaluation", content)
        assert sum(len(up) for up, _ in recorder.streams) < 0.9 * len(content)
        recorder.close()
        serves(server.url)


def test_a_connection_that_breaks_in_a_pass(tmp_path):
    """Nothing was remembered: it is mended quietly. Where the server is gone, that is said."""
    with small.serving("mlp", tmp_path) as (url, service):
        recorder = small.Recorder(url)
        with small.connect(recorder.url, "mlp") as model:
            ids = small.prompt_ids()
            small.generate(model, count=1)
            recorder.cut()
            more = torch.cat([ids, torch.tensor([small.continuation(count=1)])], 1)
            assert model.generate(more, max_new_tokens=1, do_sample=False)[0, -1] == small.continuation()[1]
            recorder.close()
            eventually(lambda: service.sessions == 0)
            model._connection._patience = 0.2
            with pytest.raises((ConnectionFailed, SessionLost)):
                model.generate(more, max_new_tokens=3, do_sample=False)
        serves(url)
