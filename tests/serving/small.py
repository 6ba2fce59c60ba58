"""A GPT-2 of one block and width 32, its bundles, keys, servers and clients, made once for all tests."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import scratch
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from cipherlm import EncryptionConfig, RemoteModel, get_encrypted_model, load_tokenizer
from cipherlm.engine import SecretKey
from cipherlm.progress import silent
from cipherlm.schemes.ckks.geometry import Geometry
from cipherlm.schemes.ckks.session import Client
from cipherlm.serving import bundle as bundles
from cipherlm.serving.computation import HostedModel
from cipherlm.serving.key_use import USE_NAME
from cipherlm.serving.keys import KeyStore
from cipherlm.serving.keystore import KeySet
from cipherlm.serving.run import create_server, running
from cipherlm.serving.service import Limits, Service

WIDTH, TOKENS, CONTEXT = 32, 4, 12
TARGETS: dict[str, str | list[str]] = {
    "all": "all",
    "block": "transformer.h.0",
    "attention": "transformer.h.0.attn",
    "mlp": "transformer.h.0.mlp",
    "hybrid": ["transformer.h.0.attn", "transformer.h.0.mlp"],
}
PROMPT = "The old man looked"
GEOMETRY = Geometry(heads=2, head_dim=WIDTH // 2, tokens=TOKENS, prefix=1, context=CONTEXT)


def tokenizer():
    return load_tokenizer("tiny")


def clear_model() -> GPT2LMHeadModel:
    """The same weights in every call; large enough that tokens differ clearly in their logits."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = GPT2Config(
            vocab_size=4096, n_positions=64, n_embd=WIDTH, n_layer=1, n_head=2,
            bos_token_id=0, eos_token_id=0, initializer_range=0.3,
        )  # fmt: skip
        model = GPT2LMHeadModel(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1 and "ln" in name:
                    parameter.mul_(1 + 0.2 * torch.rand(parameter.shape))
                if name.endswith("bias"):
                    parameter.normal_(std=0.1)
    return model.eval()


@cache
def encrypted_model(placement: str, tokens: int = TOKENS):
    """The model with a placement, calibrated on random text. Tests share it: leave it as it was."""
    model = get_encrypted_model(
        clear_model(),
        EncryptionConfig(TARGETS[placement], scheme="ckks", tokens=tokens, context=CONTEXT),
    )
    generator = torch.Generator().manual_seed(2)
    model.compile([torch.randint(1, 4096, (10,), generator=generator) for _ in range(20)])
    return model


def prompt_ids(text: str = PROMPT) -> torch.Tensor:
    return tokenizer()(text, return_tensors="pt").input_ids


@cache
def continuation(text: str = PROMPT, count: int = 2) -> list[int]:
    """The clear model's greedy text: the new ids."""
    ids = torch.cat([torch.tensor([[0]]), prompt_ids(text)], 1)
    with torch.inference_mode():
        return clear_model().generate(ids, max_new_tokens=count, do_sample=False)[0, ids.shape[1] :].tolist()


@cache
def _base() -> Path:
    return scratch.directory("small")


@cache
def exported(placement: str, tokens: int = TOKENS) -> Path:
    """The directory with the bundles `server` and `client`."""
    directory = _base() / f"{placement}-{tokens}"
    bundles.export(encrypted_model(placement, tokens), directory, tokenizer(), name=f"small {placement}")
    return directory


@cache
def hosted(placement: str) -> HostedModel:
    return bundles.load_hosted_model(exported(placement) / "server")


def home() -> Path:
    return _base() / "home"


def keys(name: str = "one") -> KeySet:
    """A key set in the home directory; all placements have the same geometry, so it fits them all."""
    return _keys(name)


@cache
def _keys(name: str) -> KeySet:
    description = bundles.client_description(exported("all") / "client")
    material = bundles.generate_keys(description, silent)
    return KeySet.create(home() / "keys", name, description, material.secret, material.public)


def party(name: str = "one") -> Client:
    return Client(SecretKey.from_bytes(keys(name).secret(), GEOMETRY.parameters), GEOMETRY)


def paths(name: str = "one") -> dict[str, Path]:
    return {kind: keys(name).path(kind) for kind in ("evaluation", "public")}


@pytest.fixture(autouse=True)
def at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients find the keys of this module. To be imported by test modules."""
    monkeypatch.setenv("CIPHERLM_HOME", str(home()))


def unused(name: str = "one") -> str:
    """Let keys belong to no server: those of these tests come and go. Return their name."""
    (keys(name).directory / USE_NAME).unlink(missing_ok=True)
    return name


def connect(url: str, placement: str, name: str = "one", **options) -> RemoteModel:
    unused(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CIPHERLM_HOME", str(home()))
        return RemoteModel.connect(url, bundle=exported(placement) / "client", keys=name, **options)


def generate(model: RemoteModel, text: str = PROMPT, count: int = 2) -> list[int]:
    """The new ids of a greedy text."""
    ids = prompt_ids(text)
    return model.generate(ids, max_new_tokens=count, do_sample=False)[0, ids.shape[1] :].tolist()


@contextmanager
def serving(placement: str, directory: Path, port: int = 0, **limits) -> Iterator[tuple[str, Service]]:
    """A server in a thread of this process: its URL, and what it knows of itself."""
    model = hosted(placement)
    service = Service(model, KeyStore(directory, model.description["keys"], 1 << 30), None, Limits(**limits))
    with running(create_server(service, port=port)) as url:
        yield url, service


@dataclass
class Process:
    """A server in a process of its own, with nothing of the client's around it."""

    process: subprocess.Popen[bytes]
    url: str
    directory: Path

    @property
    def log(self) -> bytes:
        return (self.directory / "stderr").read_bytes() + (self.directory / "stdout").read_bytes()

    def files(self) -> dict[str, bytes]:
        """All that it has written."""
        every = (path for path in self.directory.rglob("*") if path.is_file())
        return {str(path.relative_to(self.directory)): path.read_bytes() for path in every}


_LAUNCH = "import sys; from cipherlm.cli import main; sys.exit(main(sys.argv[1:]))"


@contextmanager
def process(
    placement: str, directory: Path, *options: str, launch: str = _LAUNCH, port: int = 0
) -> Iterator[Process]:
    """``cipherlm serve``; the temporary files, home and logs of the process are all in the directory."""
    places = {name: directory / name for name in ("data", "tmp", "home")}
    for place in places.values():
        place.mkdir(exist_ok=True)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("CIPHERLM")},
        "HOME": str(places["home"]),
        "XDG_CACHE_HOME": str(places["home"]),
        "TMPDIR": str(places["tmp"]),
    }
    command = [
        sys.executable,
        "-c",
        launch,
        "serve",
        str(exported(placement) / "server"),
        "--port",
        str(port),
    ]
    command += ["--data-dir", str(places["data"]), *options]
    with (directory / "stdout").open("ab") as out, (directory / "stderr").open("ab") as err:
        begin = err.tell()
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment)
    try:
        yield Process(child, _url(child, directory / "stderr", begin), directory)
    finally:
        child.terminate()
        try:
            child.wait(60)
        finally:
            child.kill()
            child.wait()


def _url(child: subprocess.Popen[bytes], log: Path, begin: int) -> str:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for line in log.read_bytes()[begin:].splitlines():
            with suppress(ValueError):
                entry = json.loads(line)
                if entry.get("event") == "serving":
                    return str(entry["url"])
        if child.poll() is not None:
            break
        time.sleep(0.05)
    raise AssertionError(f"the server did not start: {log.read_text()[-2000:]}")


class Recorder:
    """A TCP proxy that writes down all that passes; WebSocket frames of clients are masked on the way."""

    def __init__(self, url: str) -> None:
        host, _, port = url.removeprefix("http://").rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.streams: list[tuple[bytearray, bytearray]] = []
        """By connection, from client to server and back."""
        self.connections: list[tuple[socket.socket, socket.socket]] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
                up, down = bytearray(), bytearray()
                self.streams.append((up, down))
                self.connections.append((near, far))
                for source, sink, record in ((near, far, up), (far, near, down)):
                    threading.Thread(target=self._pump, args=(source, sink, record), daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket, record: bytearray) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 18):
                record += data
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """Break all connections."""
        for pair in self.connections:
            for end in pair:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # or it would accept one more
        self._listener.close()
        self.cut()

    def traffic(self) -> dict[str, bytes]:
        """All streams as they were on the wire, and WebSocket messages without their masks."""
        found = {}
        for number, (up, down) in enumerate(self.streams):
            found[f"{number} up"], found[f"{number} down"] = bytes(up), bytes(down)
            for way, stream in (("up", bytes(up)), ("down", bytes(down))):
                head, separator, rest = stream.partition(b"\r\n\r\n")
                if separator and b"websocket" in head.lower():
                    found[f"{number} {way} messages"] = b"".join(websocket_payloads(rest))
        return found


def websocket_payloads(data: bytes) -> Iterator[bytes]:
    """Yield the payloads of WebSocket frames (RFC 6455), unmasked."""
    at = 0
    while at + 2 <= len(data):
        masked, size = data[at + 1] >> 7, data[at + 1] & 127
        at += 2
        if size >= 126:
            width = 2 if size == 126 else 8
            size = int.from_bytes(data[at : at + width], "big")
            at += width
        key = data[at : at + 4] if masked else bytes(4)
        at += 4 * masked
        payload = data[at : at + size]
        at += size
        if masked:
            repeated = (key * (len(payload) // 4 + 1))[: len(payload)]
            number = int.from_bytes(payload, "little") ^ int.from_bytes(repeated, "little")
            payload = number.to_bytes(len(payload), "little")
        yield payload


def _varied(string: bytes) -> int | None:
    """Return where the first three different bytes in a row begin, if there are any."""
    return next((at for at in range(len(string) - 2) if len(set(string[at : at + 3])) == 3), None)


@dataclass
class Needles:
    """Byte strings that must not be found, by what they are."""

    items: dict[str, list[bytes]] = field(default_factory=dict)

    def add(self, name: str, *strings: bytes) -> None:
        assert all(len(string) >= 8 for string in strings), name  # shorter ones are found by chance
        self.items.setdefault(name, []).extend(strings)

    def found(self, haystacks: Mapping[str, bytes] | Sequence[bytes]) -> set[str]:
        """The names of what is in any of the haystacks."""
        values = haystacks.values() if isinstance(haystacks, Mapping) else haystacks
        named = [(string, name) for name, strings in self.items.items() for string in strings]
        # Long values are searched for three different bytes of each string: zeros are at too many places.
        places = {string: _varied(string) for string, _ in named}
        plain = [(string, name) for string, name in named if places[string] is None]
        by_bytes: dict[bytes, list[tuple[bytes, int, str]]] = {}
        for string, name in named:
            if (place := places[string]) is not None:
                by_bytes.setdefault(string[place : place + 3], []).append((string, place, name))
        wanted = np.zeros(1 << 24, bool)
        wanted[[int.from_bytes(three, "little") for three in by_bytes]] = True
        found: set[str] = set()
        for value in values:
            if len(value) < 1 << 20:
                found |= {name for string, name in named if string in value}
                continue
            found |= {name for string, name in plain if string in value}
            for begin in range(0, len(value), 1 << 22):
                piece = np.frombuffer(value, np.uint8, min((1 << 22) + 2, len(value) - begin), begin)
                three = piece[:-2].astype(np.uint32)
                three |= piece[1:-1].astype(np.uint32) << 8
                three |= piece[2:].astype(np.uint32) << 16
                for at in (begin + np.flatnonzero(wanted[three])).tolist():
                    for string, place, name in by_bytes[value[at : at + 3]]:
                        if at >= place and value.startswith(string, at - place):
                            found.add(name)
        return found
