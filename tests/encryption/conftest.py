"""One client for each preset, whose encryptions are opened."""

from __future__ import annotations

from functools import cache, cached_property

import numpy as np
import pytest

from cipherlm.engine import Parameters, Plaintext, SecretKey
from cipherlm.engine.parameters import POST_QUANTUM_PRESETS, PRESETS
from cipherlm.linear.plan import Plan

from .frames import HEADER
from .opener import Opener

# Every preset there is, a new one by itself. The smallest and the models' own are quick enough for every run.
FAST = {(12, False), (14, False)}
CLIENTS = [
    pytest.param(
        (degree, post_quantum),
        marks=() if (degree, post_quantum) in FAST else pytest.mark.slow,
        id=f"{degree}{'-post-quantum' * post_quantum}",
    )
    for post_quantum, presets in ((False, PRESETS), (True, POST_QUANTUM_PRESETS))
    for degree in presets
]
SAMPLES = 3 << 14  # coefficients for one test of their distribution


class Client:
    """A secret key, and what opens its encryptions."""

    def __init__(self, secret_key: SecretKey) -> None:
        self.parameters = parameters = secret_key.parameters
        self.secret_key = secret_key
        self.opener = Opener(secret_key)
        self.count = SAMPLES // parameters.degree + 2  # polynomials
        self.random = np.random.default_rng(1)

    def message(self, level: int) -> Plaintext:
        return Plaintext.encode(self.parameters, self.random.normal(size=self.parameters.slots), level)

    @cached_property
    def public_header(self) -> bytes:
        return self.secret_key.public_key().to_bytes()[:HEADER]

    @cached_property
    def fresh(self) -> tuple[list[bytes], np.ndarray]:
        """Seeds and errors (count, N) of fresh encryptions: of one message, from the highest level down."""
        seeds, errors, top = [], [], self.parameters.max_level
        for i in range(self.count):
            level = top - i * top // (self.count - 1)
            plaintext = Plaintext.encode(self.parameters, np.arange(8), level)
            ciphertext = self.secret_key.encrypt(plaintext)
            seed, error = self.opener.fresh(ciphertext.to_bytes(), plaintext.to_bytes())
            seeds.append(seed)
            errors.append(error)
        return seeds, np.stack(errors)


@cache
def client_of(parameters: Parameters) -> Client:
    return Client(SecretKey.generate(parameters))


@pytest.fixture(scope="session", params=CLIENTS)
def client(request: pytest.FixtureRequest) -> Client:
    degree, post_quantum = request.param
    return client_of(Parameters.preset(degree, post_quantum=post_quantum))


@pytest.fixture(scope="session", params=[*CLIENTS, "linear"])
def any_client(request: pytest.FixtureRequest) -> Client:
    """A client of a preset or of linear layers, which need fresh ciphertexts and Galois keys only."""
    if request.param == "linear":
        return client_of(Plan({}, {}, {}).parameters)
    degree, post_quantum = request.param
    return client_of(Parameters.preset(degree, post_quantum=post_quantum))
