"""Two processes that do the same have nothing random in common: no generator has a start of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from cipherlm.engine import Parameters, SecretKey

from .conftest import Client
from .distributions import assert_fresh, assert_unrelated
from .opener import Opener
from .zeros import encrypted, masked, rerandomised, telltale


def everything(secret_key: SecretKey) -> tuple[list[bytes], list[np.ndarray]]:
    """Return the seeds and the random polynomials, centred, of one thing of each kind."""
    client = Client(secret_key)
    opener, ring = client.opener, client.opener.q[0]
    plaintext = client.message(0)
    seeds, polynomials = [], [Opener(SecretKey.generate(client.parameters)).secret]

    def add(seed: bytes, error: np.ndarray) -> None:
        seeds.append(seed)
        polynomials.append(error)

    add(*opener.fresh(secret_key.encrypt(plaintext).to_bytes(), plaintext.to_bytes()))
    add(*opener.public_key(secret_key.public_key().to_bytes()))
    keys = secret_key.evaluation_keys([1], conjugation=True, level=0)
    for seed, [error] in zip(*opener.evaluation_keys(keys.to_bytes()), strict=True):
        add(seed, error)
    # With a multiple of P in place of the public key's first component, a zero's is as many times u.
    key = telltale(client, opener.p[0].prime << 18)
    zeros, masks = masked(client, key, 2, 0)
    flooded = rerandomised(client, key, 1, 0, flood=16)
    for [first], _ in zeros + encrypted(client, key, 1, 0) + flooded:
        total = ring.centred(ring.intt(ring.reduce(first)))
        factor = (total + (1 << 17)) >> 18
        polynomials.append(factor)
    polynomials.append(total - (factor << 18))  # the flooding
    polynomials += [ring.centred(ring.intt(ring.reduce(mask))) for [mask] in masks]
    return seeds, polynomials


PROGRAM = """
import sys
import numpy as np
from cipherlm.engine import Parameters, SecretKey
from {package}.test_processes import everything

with open(sys.argv[1], "rb") as file:
    secret_key = SecretKey.from_bytes(file.read(), Parameters.preset(12))
seeds, polynomials = everything(secret_key)
np.savez(sys.argv[2], seeds=np.frombuffer(b"".join(seeds), np.uint8), polynomials=np.stack(polynomials))
"""


def test_no_process_begins_where_another_began(tmp_path: Path):
    secret = tmp_path / "secret"
    secret.write_bytes(SecretKey.generate(Parameters.preset(12)).to_bytes())
    results = []
    for name in ("first.npz", "second.npz"):
        program = PROGRAM.format(package=__package__)
        command = [sys.executable, "-c", program, str(secret), str(tmp_path / name)]
        subprocess.run(command, check=True, cwd=Path(__file__).parents[1])
        results.append(np.load(tmp_path / name))
    assert_unrelated(np.concatenate([result["polynomials"] for result in results]))
    seeds = [row.tobytes() for result in results for row in result["seeds"].reshape(-1, 32)]
    assert_fresh(seeds)
