"""Random damage over the wire, in sessions with real ciphertexts, while another client works. Slow.

The server must not fail inside, must not stop, and must not give anything of one session to another.
"""

from __future__ import annotations

import random
import threading
import time

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from cipherlm.engine import RefreshRequest
from cipherlm.serving import protocol
from cipherlm.serving.client import Connection

from . import small
from .conftest import eventually, frame
from .small import at_home  # noqa: F401

pytestmark = pytest.mark.slow

MLP = "transformer.h.0.mlp"
SECONDS = 150


class Fuzzer:
    """A client that knows the protocol and has keys, and gets something wrong now and then."""

    def __init__(self, url: str, seed: int) -> None:
        self.url = url.replace("http", "ws", 1) + "/v1/session"
        self.model = small.hosted("mlp").description["fingerprint"]
        self.random = random.Random(seed)
        self.party = small.party("two")
        self.parameters = self.party.geometry.parameters
        self.sessions = self.evaluations = self.damages = 0
        self.codes: dict[str, int] = {}

    def damaged(self, data: bytes) -> bytes:
        """Return the bytes with one or a few changes, of a kind chosen at random."""
        self.damages += 1
        pick = self.random
        at = pick.randrange(len(data)) if data else 0
        kind = pick.randrange(8)
        if kind == 0:
            return data[:at]
        if kind == 1:
            return data + pick.randbytes(pick.randrange(1, 5000))
        if kind == 2:
            return data[:at] + pick.randbytes(pick.randrange(1, 100)) + data[at:]
        if kind == 3:
            return data[:at] + data[at + pick.randrange(1, 100) :]
        if kind == 4:
            return pick.randbytes(pick.randrange(0, 3000))
        changed = bytearray(data)
        for _ in range(pick.choice([1, 1, 1, 10, 1000])):
            # Headers are where damage is interesting.
            limit = len(data) if pick.random() < 0.5 else min(len(data), 300)
            if limit:
                changed[pick.randrange(limit)] = pick.randrange(256)
        return bytes(changed)

    def maybe(self, data: bytes, chance: float) -> bytes:
        return self.damaged(data) if self.random.random() < chance else data

    def session(self) -> None:
        """Open a session and evaluate until something ends it."""
        self.sessions += 1
        pick = self.random
        with connect(self.url, max_size=None, compression=None) as socket:
            keys = dict(small.keys("two").fingerprints)
            if pick.random() < 0.1:
                keys["public"] = pick.choice(["0" * 64, keys["evaluation"], "", "x" * 2000])
            socket.send(
                self.maybe(frame({"type": "open", "protocol": 1, "model": self.model, "keys": keys}), 0.05)
            )
            if pick.random() < 0.95:  # else the first request comes too early
                message = protocol.unpack(socket.recv(60), protocol.SERVER_MESSAGES)
                if isinstance(message, protocol.Error):
                    self.codes[message.code] = self.codes.get(message.code, 0) + 1
                    return
            for number in range(1, pick.randrange(2, 6)):
                [ciphertext] = self.party.encrypt(np.zeros((2, small.WIDTH)), 1)
                blobs = [self.maybe(ciphertext.to_bytes(), 0.3)] * pick.choice([1, 1, 1, 1, 0, 2])
                module = pick.choice([MLP] * 8 + ["", "transformer.h.0.attn", "x" * 500])
                start = pick.choice([1] * 8 + [0, 4, 11, 12, 2**53 - 1])
                count = pick.choice([2] * 8 + [0, 4, 10**6])
                request = frame(
                    {"type": "evaluate", "id": number, "module": module, "start": start, "count": count},
                    *blobs,
                )
                socket.send(self.maybe(request, 0.1))
                if pick.random() < 0.1:
                    socket.send(frame({"type": "cancel", "id": number}))
                if not self.answered(socket, number):
                    return

    def answered(self, socket, number: int) -> bool:
        """Answer until the evaluation has ended; return whether the session goes on."""
        pick = self.random
        while True:
            message = protocol.unpack(socket.recv(60), protocol.SERVER_MESSAGES)
            if isinstance(message, protocol.Error):
                self.codes[message.code] = self.codes.get(message.code, 0) + 1
                if message.id is None:
                    return False
                if message.id == number:
                    return True
            elif isinstance(message, protocol.Result):
                self.evaluations += 1
                self.codes["ok"] = self.codes.get("ok", 0) + 1
                return True
            elif isinstance(message, protocol.Refresh):
                if pick.random() < 0.05:
                    return False  # gone without a word
                request = RefreshRequest.from_bytes(message.blob, self.parameters)
                reply = self.maybe(self.party.refresh(request).to_bytes(), 0.3)
                turn = message.round if pick.random() < 0.95 else message.round + 1
                socket.send(
                    self.maybe(frame({"type": "refreshed", "id": message.id, "round": turn}, reply), 0.1)
                )


@pytest.mark.parametrize("seed", [1])
def test_damage_over_the_wire(tmp_path, seed):
    with small.serving("mlp", tmp_path, reply_seconds=5, head_seconds=5) as (url, service):
        with small.connect(url, "mlp", "two"):
            pass
        fuzzer, done = Fuzzer(url, seed), threading.Event()
        neighbour: list[list[int]] = []

        def work() -> None:
            with small.connect(url, "mlp", "one") as model:
                texts = ["The old man looked", "A young dog ran"]
                while not done.is_set():
                    text = texts[len(neighbour) % 2]
                    neighbour.append(small.generate(model, text, 1))
                    expected = small.continuation(text, 1)
                    if neighbour[-1] != expected:
                        return

        thread = threading.Thread(target=work)
        thread.start()
        end = time.monotonic() + SECONDS
        try:
            while time.monotonic() < end and thread.is_alive():
                try:
                    fuzzer.session()
                except (ConnectionClosed, TimeoutError):
                    fuzzer.codes["closed"] = fuzzer.codes.get("closed", 0) + 1
        finally:
            done.set()
            thread.join()
        # The neighbour had the right text each time.
        texts = [small.continuation("The old man looked", 1), small.continuation("A young dog ran", 1)]
        assert len(neighbour) > 3
        assert all(result == texts[i % 2] for i, result in enumerate(neighbour))
        # There was damage of every kind, and what was whole was evaluated.
        assert fuzzer.sessions > 5
        assert fuzzer.damages > 20
        assert {"ok", "bad_request", "protocol"} <= set(fuzzer.codes), fuzzer.codes
        assert "internal" not in fuzzer.codes, fuzzer.codes
        eventually(lambda: service.sessions == 0 and not service.conversations, 60)
        with Connection(url) as connection:
            connection.open(small.keys("two").fingerprints)
        with small.connect(url, "mlp") as model:
            assert small.generate(model, count=1) == small.continuation(count=1)
