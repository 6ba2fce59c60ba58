"""Measure what sessions take of a server's memory, with one block of GPT-2's size and random weights.

    python benchmarks/sessions.py

Prints megabytes of resident memory, and of the engine's heap, after each step.
"""

import gc
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from cipherlm.cli.bench_model import random_model
from cipherlm.engine import EvaluationKeys, collect, memory
from cipherlm.schemes.ckks.geometry import Geometry
from cipherlm.schemes.ckks.session import Client, Server, Session

CONTEXT = 64


def resident(field: str = "VmRSS") -> float:
    """Return megabytes that Linux tells of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e6


def main() -> int:
    """Open two sessions, close one, evaluate in the other, and release its keys."""
    steps: dict[str, dict[str, float]] = {}

    def note(step: str) -> None:
        gc.collect()
        collect()
        steps[step] = {"resident": resident(), "heap": memory().heap / 1e6}

    subject = random_model(1, 16, np.random.default_rng(0))
    subject = replace(subject, prefix=subject.hidden[:1])
    geometry = Geometry(subject.args.heads, subject.args.head_dim, prefix=1, context=CONTEXT)
    server = Server({"all": subject.hosted(CONTEXT)}, geometry)
    clients = [Client.generate(geometry) for _ in range(2)]
    note("no session")

    def opened(client: Client) -> Session:
        keys = EvaluationKeys.from_bytes(client.evaluation_keys().to_bytes(), geometry.parameters)
        return server.open(keys, client.public_key(), client.refresh)

    session = opened(clients[0])
    note("one session")
    other = opened(clients[1])
    note("two sessions")
    other.close()
    del other
    note("one again")

    def evaluate(start: int, count: int) -> None:
        rows = subject.hidden[start - 1 : start - 1 + count]
        session.evaluate("all", start, clients[0].encrypt(rows, start), count)

    evaluate(1, 7)
    note("prefill of 7 tokens")
    evaluate(8, 1)
    evaluate(9, 1)
    note("two decoded tokens")
    session.release_keys()
    note("keys released")
    steps["peak"] = {"resident": resident("VmHWM")}
    json.dump(
        {name: {key: round(value) for key, value in step.items()} for name, step in steps.items()}, sys.stdout
    )
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
