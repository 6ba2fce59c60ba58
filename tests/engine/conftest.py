"""One client and server for each ring, made once."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from cipherlm.engine import EvaluationKeys, Evaluator, Parameters, PublicKey, SecretKey

ROTATIONS = (1, 2, 3, 4, 5, 8, 16, 24, 32, 64, 96, 100, -1)

# Stated bounds on the error of values of size at most 1, for the parameters below
# (scale 2^32 at ring degree 2^13): noise over scale with room for six deviations.
FRESH = 2**-20  # secret-key encryption
PUBLIC = 2**-16  # public-key encryption
PRODUCT = 2**-15  # one product, rotation or rescaling more
DEEP = 2**-12  # several of them


@dataclass
class Party:
    """A client with its server in one process."""

    parameters: Parameters
    secret_key: SecretKey
    public_key: PublicKey
    keys: EvaluationKeys
    evaluator: Evaluator
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(7))

    @classmethod
    def make(cls, parameters: Parameters, rotations: tuple[int, ...] = ROTATIONS) -> Party:
        secret_key = SecretKey.generate(parameters)
        keys = secret_key.evaluation_keys(rotations, conjugation=not parameters.real)
        return cls(parameters, secret_key, secret_key.public_key(), keys, Evaluator(parameters, keys))

    def values(self, size: float = 1.0, seed: int | None = None) -> np.ndarray:
        random = self.random if seed is None else np.random.default_rng(seed)
        real = random.uniform(-size, size, self.parameters.slots)
        if self.parameters.real:
            return real
        return (real + 1j * random.uniform(-size, size, self.parameters.slots)) / 2**0.5

    def error(self, ciphertext, expected) -> float:
        return float(np.abs(self.secret_key.decrypt(ciphertext) - expected).max())


@pytest.fixture(scope="session")
def party() -> Party:
    return Party.make(Parameters.preset(13))


@pytest.fixture(scope="session")
def real_party() -> Party:
    return Party.make(Parameters(13, [42, 32, 32, 32, 32], [46], 32, "conjugate_invariant"))


@pytest.fixture(params=["standard", "conjugate_invariant"])
def each(request, party, real_party) -> Party:
    return party if request.param == "standard" else real_party
