"""The engine in WebAssembly and Python's make and read the same bytes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cipherlm.engine import (
    Ciphertext,
    EvaluationKeys,
    Evaluator,
    Parameters,
    PublicKey,
    RefreshReply,
    SecretKey,
)
from tests.page.conftest import run_script

LEVEL = 4
ROTATIONS = {1: 4, 512: 8, -3: 2}


class Exchange:
    """Python's half of the files, and what the script in WebAssembly made of them."""

    def __init__(self, node: list[str], module: Path, directory: Path, parameters: Parameters) -> None:
        self.directory, self.parameters = directory, parameters
        self.values = np.random.default_rng(7).normal(scale=4, size=parameters.slots)
        self.secret_key = SecretKey.generate(parameters)
        keys = self.secret_key.evaluation_keys(ROTATIONS, conjugation=True)
        self.evaluator = Evaluator(parameters, keys)
        self.ciphertext = self.evaluator.multiply(self.secret_key.encrypt(self.values, LEVEL), 1.0)
        self.request, self.mask = self.evaluator.mask(
            [self.ciphertext, self.ciphertext], self.secret_key.public_key(), level=1, to_level=5, shift=8
        )
        self.requests = [[0, parameters.max_level], *([g, lvl] for g, lvl in keys.galois_levels.items())]
        task = {
            "parameters": json.dumps(parameters.to_dict(), separators=(",", ":")),
            "requests": self.requests,
            "level": LEVEL,
            "reply_bytes": self.request.reply_bytes,
        }
        self.write("task.json", json.dumps(task).encode())
        self.write("values", self.values.tobytes())
        self.write("secret", self.secret_key.to_bytes())
        self.write("ciphertext", self.ciphertext.to_bytes())
        self.write("request", self.request.to_bytes())
        self.told: dict[str, Any] = json.loads(run_script(node, "engine.mjs", module.parent, directory))

    def write(self, name: str, data: bytes) -> None:
        (self.directory / name).write_bytes(data)

    def read(self, name: str) -> bytes:
        return (self.directory / name).read_bytes()

    def numbers(self, name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        return np.frombuffer(self.read(name))


@pytest.fixture(scope="module", params=[False, True], ids=["usual", "post-quantum"])
def exchange(
    request: pytest.FixtureRequest,
    node: list[str],
    engine_module: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Exchange:
    parameters = Parameters.preset(14, post_quantum=request.param)
    return Exchange(node, engine_module, tmp_path_factory.mktemp("exchange"), parameters)


def test_reads_a_secret_key_and_writes_the_same_bytes(exchange: Exchange) -> None:
    assert exchange.read("same-secret") == exchange.read("secret")
    assert exchange.told["key"] == exchange.secret_key.fingerprint


def test_decrypts_to_the_same_numbers(exchange: Exchange) -> None:
    """Not to the last bit: compilers may round a product and a sum at once."""
    expected = exchange.secret_key.decrypt(exchange.ciphertext).real
    np.testing.assert_allclose(exchange.numbers("decrypted"), expected, rtol=0, atol=1e-12)
    assert abs(expected - exchange.values).max() < 1e-3


def test_answers_refreshes(exchange: Exchange) -> None:
    reply = RefreshReply.from_bytes(exchange.read("reply"), exchange.parameters)
    assert len(exchange.read("reply")) == len(exchange.secret_key.refresh(exchange.request).to_bytes())
    for fresh in exchange.evaluator.unmask(reply, exchange.mask):
        assert fresh.level == 5
        assert abs(exchange.secret_key.decrypt(fresh).real - exchange.values).max() < 1e-3


def test_python_reads_what_it_encrypts(exchange: Exchange) -> None:
    secret_key = SecretKey.from_bytes(exchange.read("own-secret"), exchange.parameters)
    assert secret_key.to_bytes() == exchange.read("own-secret")
    ciphertext = Ciphertext.from_bytes(exchange.read("own-ciphertext"), exchange.parameters)
    assert ciphertext.seeded
    assert (ciphertext.level, ciphertext.scale) == (LEVEL, exchange.parameters.scale)
    assert ciphertext.key_fingerprint == secret_key.fingerprint != exchange.secret_key.fingerprint
    decrypted = secret_key.decrypt(ciphertext).real
    assert 0 < abs(decrypted - exchange.values).max() < 1e-3
    np.testing.assert_allclose(exchange.numbers("own-decrypted"), decrypted, rtol=0, atol=1e-12)
    assert len(exchange.read("own-ciphertext")) == len(secret_key.encrypt(exchange.values, LEVEL).to_bytes())


def test_python_computes_with_its_keys(exchange: Exchange) -> None:
    """Made one by one and put together, they are what Python writes itself."""
    data = exchange.read("own-evaluation")
    assert exchange.told["sha256"] == hashlib.sha256(data).hexdigest()
    keys = EvaluationKeys.from_bytes(data, exchange.parameters)
    assert keys.to_bytes() == data
    assert keys.relinearization_level == exchange.parameters.max_level
    assert [[0, exchange.parameters.max_level], *map(list, keys.galois_levels.items())] == exchange.requests
    secret_key = SecretKey.from_bytes(exchange.read("own-secret"), exchange.parameters)
    evaluator = Evaluator(exchange.parameters, keys)
    ciphertext = Ciphertext.from_bytes(exchange.read("own-ciphertext"), exchange.parameters)
    rotated = secret_key.decrypt(evaluator.rotate(ciphertext, 1)).real
    assert abs(rotated - np.roll(exchange.values, -1)).max() < 1e-3
    squared = secret_key.decrypt(evaluator.square(evaluator.conjugate(ciphertext))).real
    assert abs(squared - exchange.values**2).max() < 1e-2
    public = PublicKey.from_bytes(exchange.read("own-public"), exchange.parameters)
    assert public.fingerprint == secret_key.fingerprint
    assert abs(secret_key.decrypt(public.encrypt(exchange.values)).real - exchange.values).max() < 1e-3
    request, mask = evaluator.mask([ciphertext], public, level=1, to_level=6)
    (fresh,) = evaluator.unmask(secret_key.refresh(request), mask)
    assert abs(secret_key.decrypt(fresh).real - exchange.values).max() < 1e-3


def test_refuses_what_it_should(exchange: Exchange) -> None:
    """With an error of the engine each, and none of these with a fault of its own."""
    refusals = exchange.told["refusals"]
    kinds = {what: refusal and refusal[0] for what, refusal in refusals.items()}
    assert kinds == {
        "another key": "K",
        "damaged": "D",
        "truncated": "D",
        "longer": "D",
        "another type": "D",
        "too much": "V",
        "another's refresh": "K",
        "damaged secret": "D",
        "insecure": "S",
        "not finite": "V",
        "no such key": "V",
        "too few arguments": "V",
        "no bytes": "V",
    }
