"""A model that computes nothing, a server for it on a loopback port, and clients that speak by hand."""

import hashlib
import io
import json
import logging
import struct
import threading
import time
from contextlib import contextmanager

import httpx
import pytest
from websockets.sync.client import connect

from cipherlm.errors import Refused
from cipherlm.serving.auth import Tokens
from cipherlm.serving.computation import Cancelled
from cipherlm.serving.keys import KeyStore
from cipherlm.serving.logs import log_to
from cipherlm.serving.run import create_server, running
from cipherlm.serving.service import Limits, Service

MEGABYTE = 1 << 20
FINGERPRINT = "ab" * 32


class FakeModel:
    """Evaluates nothing: bytes come back reversed, refreshed, late or not at all."""

    def __init__(self):
        self.description = {
            "scheme": "fake",
            "name": "fake",
            "modules": ["reverse", "refresh", "gate", "ticket", "stuck", "break", "stumble", "refuse"],
            "parameters": {},
            "fingerprint": FINGERPRINT,
            "keys": {"evaluation": 20 * MEGABYTE, "public": MEGABYTE},
            "max_tokens": 16,
            "message_bytes": MEGABYTE,
        }
        self.open_sessions = 0
        self.order = []  # of evaluations, by the first bytes of their input
        self.cancelled = 0
        self.mistakes = []
        self.releases = 0
        self.gate = threading.Event()
        self.tickets = threading.Semaphore(0)
        self.lock = threading.Lock()

    def open(self, keys):
        content = keys["evaluation"].read_bytes()
        if content.startswith(b"damaged"):
            raise Refused("the evaluation keys are damaged")
        if content.startswith(b"unforeseen"):
            raise ValueError("PAYLOAD in an exception")
        if content.startswith(b"explosive"):
            raise RuntimeError("PAYLOAD in an exception")
        with self.lock:
            self.open_sessions += 1
        return FakeComputation(self)


class FakeComputation:
    def __init__(self, model):
        self.model = model
        self.closed = False
        self.running = False

    def evaluate(self, module, start, count, inputs, exchange, report):
        if self.closed or self.running:
            self.model.mistakes.append("evaluated when closed or running")
        self.running = True
        with self.model.lock:
            self.model.order.append(bytes(inputs[0][:8]) if inputs else b"")
        try:
            return getattr(self, module)(count, inputs, exchange, report)
        except Cancelled:
            self.model.cancelled += 1
            raise
        finally:
            self.running = False

    def reverse(self, count, inputs, exchange, report):
        report(1, 1)
        return [blob[::-1] for blob in inputs]

    def refresh(self, count, inputs, exchange, report):
        outputs = []
        for block in range(count):
            outputs.append(exchange(b"refresh " + inputs[0]))
            report(block + 1, count)
        return outputs

    def gate(self, count, inputs, exchange, report):
        while not self.model.gate.wait(0.005):
            report(0, 1)
        return inputs

    def ticket(self, count, inputs, exchange, report):
        while not self.model.tickets.acquire(timeout=0.005):
            report(0, 1)
        return inputs

    def stuck(self, count, inputs, exchange, report):
        self.model.gate.wait()
        return inputs

    def break_(self, *_):
        raise RuntimeError("PAYLOAD in an exception")

    def stumble(self, *_):
        raise ValueError("PAYLOAD in an exception")

    def refuse(self, *_):
        raise Refused("inputs of another shape")

    def release_keys(self):
        if self.closed or self.running:
            self.model.mistakes.append("let go of keys when closed or running")
        self.model.releases += 1

    def close(self):
        if self.closed or self.running:
            self.model.mistakes.append("closed when closed or running")
        self.closed = True
        with self.model.lock:
            self.model.open_sessions -= 1


setattr(FakeComputation, "break", FakeComputation.break_)


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def frame(header, *blobs):
    text = json.dumps({"blobs": [len(blob) for blob in blobs], **header}).encode()
    return struct.pack("<I", len(text)) + text + b"".join(blobs)


def parse(data):
    length = struct.unpack_from("<I", data)[0]
    header = json.loads(data[4 : 4 + length])
    blobs, offset = [], 4 + length
    for size in header.pop("blobs"):
        blobs.append(data[offset : offset + size])
        offset += size
    assert offset == len(data)
    return header, blobs


class Client:
    """One WebSocket, spoken to message by message."""

    def __init__(self, socket):
        self.socket = socket
        self.id = 0

    def send(self, header, *blobs):
        self.socket.send(frame(header, *blobs))

    def receive(self, timeout=20):
        """Return the next message that is not just news, and its blobs."""
        while True:
            header, blobs = parse(self.socket.recv(timeout))
            if header["type"] not in ("queued", "progress"):
                return header, blobs

    def open(self, opened_keys, **changes):
        self.send({"type": "open", "protocol": 1, "model": FINGERPRINT, "keys": opened_keys, **changes})
        return self.receive()[0]

    def ask(self, module, *blobs, start=0, count=1):
        self.id += 1
        self.send(
            {"type": "evaluate", "id": self.id, "module": module, "start": start, "count": count}, *blobs
        )
        return self.id

    def answer(self, refresh, blob):
        self.send({"type": "refreshed", "id": refresh["id"], "round": refresh["round"]}, blob)

    def closed(self):
        """Return the code with which the server closes, after whatever else it says."""
        try:
            while True:
                self.socket.recv(20)
        except TimeoutError:
            raise
        except Exception:
            return self.socket.close_code


class Harness:
    """A running server and what one knows of it from inside."""

    def __init__(self, server, service, model, url):
        self.server = server
        self.service = service
        self.model = model
        self.url = url

    def http(self, token=None, **options):
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=20, verify=False, **options)

    def put(self, content, kind="evaluation", token=None):
        """Upload a key and return its fingerprint."""
        with self.http(token) as http:
            announced = http.post(
                "/v1/keys", json={"kind": kind, "size": len(content), "sha256": sha256(content)}
            )
            assert announced.status_code == 200, announced.text
            state = announced.json()
            while not state["complete"]:
                state = patch(http, content, state["received"]).raise_for_status().json()
        return sha256(content)

    def keys(self, tag=b"", token=None):
        return {
            "evaluation": self.put(b"evaluation key " + tag, token=token),
            "public": self.put(b"public key " + tag, "public", token=token),
        }

    @contextmanager
    def socket(self, token=None, **options):
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        url = self.url.replace("http", "ws", 1) + "/v1/session"
        with connect(url, additional_headers=headers, max_size=None, **options) as socket:
            yield Client(socket)

    @contextmanager
    def session(self, tag=b"", token=None):
        keys = self.keys(tag, token)
        with self.socket(token) as client:
            assert client.open(keys)["type"] == "opened"
            yield client

    def serves(self, token=None):
        """Assert that a new client is served, and that nothing of earlier ones is left."""
        with self.session(b"another", token) as client:
            client.ask("reverse", b"abc")
            header, blobs = client.receive()
            assert (header["type"], blobs) == ("result", [b"cba"])
            client.send({"type": "close"})
            assert client.closed() == 1000
        eventually(lambda: self.service.sessions == 0 and self.model.open_sessions == 0)
        eventually(lambda: not self.service.conversations)
        assert self.service.scheduler.waiting == 0
        eventually(lambda: self.service.scheduler.running == 0)
        assert not self.model.mistakes


def patch(http, content, offset, size=8 * MEGABYTE, checksum=None):
    chunk = content[offset : offset + size]
    headers = {"Upload-Offset": str(offset), "Upload-Checksum": f"sha256 {checksum or sha256(chunk)}"}
    return http.patch(f"/v1/keys/{sha256(content)}", content=chunk, headers=headers)


def eventually(condition, seconds=20):
    """Wait for what another thread is about to do. A limit, not a measurement."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.005)


@contextmanager
def serving(directory, *, tokens=(), budget=100 * MEGABYTE, tls=None, page=None, origins=(), **limits):
    model = FakeModel()
    store = KeyStore(directory, model.description["keys"], budget)
    service = Service(model, store, Tokens(tokens), Limits(**limits))
    certfile, keyfile = tls or (None, None)
    server = create_server(
        service, port=0, certfile=certfile, keyfile=keyfile, page=page, allowed_origins=origins
    )
    with running(server) as url:
        try:
            yield Harness(server, service, model, url)
        finally:
            model.gate.set()


@pytest.fixture
def start(tmp_path):
    """Return a function that starts a server of its own for a test: ``with start(**limits) as harness``."""
    return lambda **options: serving(options.pop("directory", tmp_path), **options)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("data"), head_seconds=5) as harness:
        yield harness


@pytest.fixture
def harness(shared):
    """A server that the tests of a module share. Each must leave it serving, and free of what it did."""
    shared.model.gate.clear()
    yield shared
    shared.model.gate.set()
    shared.serves()


@pytest.fixture
def logged():
    """What the server logs meanwhile."""
    names = ("cipherlm.serving", "uvicorn", "asyncio")
    before = [(logging.getLogger(name), vars(logging.getLogger(name)).copy()) for name in names]
    stream = io.StringIO()
    log_to(stream)
    yield stream
    for logger, attributes in before:
        vars(logger).update(attributes)


def entries(logged, event):
    """Return what was logged of an event."""
    lines = [json.loads(line) for line in logged.getvalue().splitlines()]
    return [line for line in lines if line.get("event") == event]
