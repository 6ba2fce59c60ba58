"""What this machine takes for the operations that evaluations consist of: measured once, and kept.

A figure is measured when it is first asked for. All of one model take less than a minute on two cores. They
are kept in the user's cache directory, for this processor, number of cores and build of the engine.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from platformdirs import user_cache_path

from cipherlm import __version__
from cipherlm.cli.bench_ckks import MeasuredSession
from cipherlm.cli.bench_primitives import Primitive, Primitives
from cipherlm.cli.bench_tally import MeasuredEvaluator, Tally
from cipherlm.engine import Ciphertext, Parameters, RefreshRequest, SecretKey, threads
from cipherlm.engine._native import LIBRARY
from cipherlm.linear.client import LinearClient
from cipherlm.linear.plan import make_plan
from cipherlm.linear.products import LinearGroup
from cipherlm.linear.server import LinearServer, Row
from cipherlm.progress import Progress, silent
from cipherlm.schemes.ckks.geometry import Geometry
from cipherlm.schemes.ckks.layout import ATTENTION_LEVEL
from cipherlm.schemes.ckks.refresh import MASK_LEVEL

VERSION = 1
BUDGET = 0.04
"""Seconds for each primitive operation: it is run three times at least."""
RUNS = 3
USUAL = {
    "whole": {"chunk": (1.3, 0.1), "token": (1.4, 0.2)},
    "linear": {"chunk": (1.2, 0.22), "token": (1.5, 0.31)},
}
"""Overheads on two quiet cores (see :meth:`Machine.server_seconds`), for machines that are busy."""
SERIAL = 0.25
"""The share of work that further cores do not make faster, where a single one cannot tell: assumed."""
BUSY = 0.85
"""The share of its cores that a process gets on a quiet machine, at least."""

_GROUP = LinearGroup("sample", ("sample",), 768, (1536,))
_COPIES = 16
"""Of the matrix of a sample: together they are larger than what a processor keeps near."""
ROWS = 8


class Machine:
    """Seconds of single operations, by name, and what evaluations take beside them."""

    def __init__(self, path: Path | None = None, progress: Progress = silent) -> None:
        self._path, self._progress = path, progress
        self.measured = time.strftime("%Y-%m-%d")
        self.overheads = "measured"
        """Whether what evaluations take beside their operations was measured, or is what is usual."""
        self._values: dict[str, Any] = {}
        self._primitives: dict[str, Primitives] = {}

    @classmethod
    def here(cls, progress: Progress = silent, *, again: bool = False) -> Machine:
        """Return what is known of this machine; ``again`` forgets it."""
        machine = cls(user_cache_path("cipherlm") / "machine.json", progress)
        if not again:
            machine._read()
        return machine

    @cached_property
    def about(self) -> dict[str, Any]:
        """What figures are valid for."""
        return {
            "version": VERSION,
            "cipherlm": __version__,
            "engine": hashlib.sha256(LIBRARY.read_bytes()).hexdigest()[:16],
            "processor": _processor(),
            "threads": threads(),
        }

    def _read(self) -> None:
        assert self._path is not None
        with suppress(OSError, ValueError, KeyError, TypeError):
            known = json.loads(self._path.read_text(encoding="utf-8"))
            if known["about"] == self.about and isinstance(known["values"], dict):
                self._values, self.measured = known["values"], str(known["measured"])

    def save(self) -> None:
        """Keep what was measured. A directory that cannot be written makes the next time slower."""
        if self._path is None:
            return
        whole = {"about": self.about, "measured": self.measured, "values": self._values}
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")

    def _value(self, name: str, measure: Callable[[], Any]) -> Any:
        if name not in self._values:
            self._values[name] = measure()
        return self._values[name]

    def core_seconds(self, parameters: Parameters, primitives: Mapping[Primitive, float]) -> float:
        """Return what primitive operations take on one core, by themselves."""
        ring = f"2^{parameters.log_degree} {parameters.ring}"
        source = self._primitives.setdefault(ring, Primitives(parameters, BUDGET))

        def one(name: str, level: int) -> float:
            key = f"{ring}/{name}/{level}"
            return float(self._value(key, lambda: source.seconds(name, level)))

        return sum(count * one(*primitive) for primitive, count in primitives.items() if count)

    def server_seconds(self, kind: str, core_seconds: float, cores: int) -> float:
        """Return what a server with so many cores takes for operations of so many core seconds.

        ``kind`` is a placement, ``"whole"`` or ``"linear"``, with ``"/chunk"`` or ``"/token"``. Overheads of
        it, measured on a sample, are the processor time over that of the operations, and what of that cores
        do not share (Amdahl's law), from which other numbers of cores are extrapolated.
        """
        placement, _, size = kind.partition("/")
        work, alone = self._overheads(placement)[size]
        return core_seconds * (alone + (work - alone) / cores)

    def _overheads(self, placement: str) -> Mapping[str, tuple[float, float]]:
        """Return the overheads of a placement: measured, if the machine is quiet before and after."""
        name = f"overheads/{placement}"
        if name not in self._values and not self._is_busy():
            sample = {"whole": self._sample_block, "linear": self._sample_product}[placement]()
            if not self._is_busy():
                self._values[name] = sample
        if name not in self._values:
            self.overheads = "usual"
        found: Mapping[str, tuple[float, float]] = self._values.get(name, USUAL[placement])
        return found

    def _is_busy(self) -> bool:
        """Say whether other work shares the machine, so that clocks tell nothing."""
        if self.overheads == "usual":  # it was a moment ago
            return True
        count = threads()

        def spin(_: int) -> None:
            hashlib.pbkdf2_hmac("sha256", b"", b"", 400_000)  # without the interpreter's lock

        began, processor = time.perf_counter(), time.process_time()
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(spin, range(count)))
        wall = time.perf_counter() - began
        return (time.process_time() - processor) / wall < BUSY * count

    def _sample_block(self) -> dict[str, tuple[float, float]]:
        """Run a block of GPT-2's size for real: a prompt, and further tokens."""
        from cipherlm.cli.bench_model import SIDE_BY_SIDE, random_model

        tokens = SIDE_BY_SIDE + 4
        with self._progress("measuring a block"):
            subject = random_model(1, tokens, np.random.default_rng(0))
            args = subject.args
            geometry = Geometry(
                args.heads, args.head_dim, SIDE_BY_SIDE, 0, 64, width=args.width, inner=args.inner
            )
            session = MeasuredSession(geometry, subject.hosted(64))

            def text(last: int) -> list[Tally]:
                starts = [(0, SIDE_BY_SIDE), *((i, i + 1) for i in range(SIDE_BY_SIDE, last))]
                return [session.evaluate(subject.hidden[a:b], a)[1] for a, b in starts]

            text(SIDE_BY_SIDE + 1)  # encodes the weights
            runs = [text(tokens) for _ in range(RUNS)]
        parts = {"chunk": [run[0] for run in runs], "token": [tally for run in runs for tally in run[2:]]}
        return {name: self._overhead(geometry.parameters, tallies) for name, tallies in parts.items()}

    def _overhead(self, parameters: Parameters, tallies: list[Tally]) -> tuple[float, float]:
        core, count = self.core_seconds(parameters, tallies[0].primitives), threads()
        wall = min(tally.server_seconds for tally in tallies) / core
        work = min(tally.cpu_seconds - tally.client_seconds for tally in tallies) / core
        alone = (count * wall - work) / (count - 1) if count > 1 else SERIAL * work
        return work, max(0.0, alone)

    def _sample_product(self) -> dict[str, tuple[float, float]]:
        """Run one product for real, of one vector and of several."""
        found: dict[str, tuple[float, float]] = {}
        with self._progress("measuring a product"):
            sample = _Product(_COPIES)
            for name, count in (("token", 1), ("chunk", ROWS)):
                tallies = []
                for _ in range(RUNS):
                    tally = sample.evaluator.tally = Tally()
                    for server in sample.servers:  # what the parties do between takes their place in caches
                        rows = sample.read(_written(sample.encrypt(count)))
                        began, processor = time.perf_counter(), time.process_time()
                        server.multiply(sample.evaluator, _GROUP.name, rows)
                        tally.seconds += time.perf_counter() - began
                        tally.cpu_seconds += time.process_time() - processor
                    tallies.append(tally)
                found[name] = self._overhead(sample.plan.parameters, tallies)
        return found

    def encrypt_seconds(self, geometry: Geometry) -> float:
        """Return what a client takes for the ciphertext of hidden states, as bytes."""
        key = self._key(geometry.parameters)
        zeros = np.zeros(geometry.parameters.slots)
        return self._clock("client/encrypt", lambda: key.encrypt(zeros, ATTENTION_LEVEL).to_bytes())

    def decrypt_seconds(self, geometry: Geometry, level: int) -> float:
        """Return what a client takes for the bytes of a result."""
        parameters = geometry.parameters
        key = self._key(parameters)
        data = key.encrypt(np.zeros(parameters.slots), level).to_bytes()
        return self._clock(
            f"client/decrypt/{level}", lambda: key.decrypt(Ciphertext.from_bytes(data, parameters))
        )

    def refresh_seconds(self, geometry: Geometry, level: int) -> float:
        """Return what a client takes to refresh a ciphertext to a level, from bytes to bytes."""
        name = f"client/refresh/{level}"
        if name not in self._values:
            primitives = Primitives(geometry.parameters)
            request = primitives.request(MASK_LEVEL, level).to_bytes()
            self._clock(
                name,
                lambda: primitives.secret_key.refresh(
                    RefreshRequest.from_bytes(request, geometry.parameters)
                ).to_bytes(),
            )
        return float(self._values[name])

    def key_figures(self, geometry: Geometry, level: int) -> dict[str, float]:
        """Return seconds and bytes of one key that serves up to a level: sent, as made, and expanded.

        Many are made at a time.
        """

        def measure() -> dict[str, float]:
            key = self._key(geometry.parameters)
            many = dict.fromkeys(range(1, 4 * threads() + 1), level)
            began = time.perf_counter()
            key.evaluation_keys(many, relinearization=False)
            seconds = (time.perf_counter() - began) / len(many)
            keys = key.evaluation_keys({1: level}, relinearization=False)
            figures = {"seconds": seconds, "sent": len(keys.to_bytes()), "made": keys.nbytes}
            keys.expand()
            return {**figures, "expanded": keys.nbytes}

        figures: dict[str, float] = self._value(f"key/{level}", measure)
        return figures

    def linear_seconds(self) -> dict[str, float]:
        """Return what ciphertexts of linear layers take beside the products, each.

        The client encrypts one ``in`` and decrypts one ``out``, bytes written and read with it; the server
        reads one (``read``) and writes one (``write``).
        """

        def measure() -> dict[str, float]:
            sample = _Product()
            rows = sample.encrypt(ROWS)
            outputs = sample.servers[0].multiply(sample.evaluator, _GROUP.name, rows)
            sent, answer = _written(rows), _written(outputs)
            inputs, results = sum(map(len, rows)), sum(map(len, outputs))
            x, norms = np.ones((ROWS, _GROUP.in_features)), np.ones(ROWS)

            def receive() -> None:
                sample.client.decrypt(_GROUP.name, sample.read(answer), norms)

            return {
                "in": _fastest(lambda: _written(sample.client.encrypt(_GROUP.name, x)[0])) / inputs,
                "out": _fastest(receive) / results,
                "read": _fastest(lambda: sample.read(sent)) / inputs,
                "write": _fastest(lambda: _written(outputs)) / results,
            }

        figures: dict[str, float] = self._value("linear", measure)
        return figures

    def _key(self, parameters: Parameters) -> SecretKey:
        ring = f"2^{parameters.log_degree} {parameters.ring}"
        return self._primitives.setdefault(ring, Primitives(parameters, BUDGET)).secret_key

    def _clock(self, name: str, call: Callable[[], Any]) -> float:
        return float(self._value(name, lambda: _fastest(call)))


class _Product:
    """A product with random weights, and both of its parties; of the server some copies."""

    def __init__(self, copies: int = 1) -> None:
        weights = {_GROUP.name: np.random.default_rng(0).normal(0, 0.02, (_GROUP.rows, _GROUP.in_features))}
        self.plan = make_plan([_GROUP], weights)
        self.servers = [LinearServer.build(self.plan, weights) for _ in range(copies)]
        self.client = LinearClient(self.plan)
        self.evaluator = MeasuredEvaluator(self.plan.parameters, self.client.evaluation_keys())

    def encrypt(self, count: int) -> list[Row]:
        return self.client.encrypt(_GROUP.name, np.ones((count, _GROUP.in_features)))[0]

    def read(self, rows: list[list[bytes]]) -> list[Row]:
        return [[Ciphertext.from_bytes(part, self.plan.parameters) for part in row] for row in rows]


def _written(rows: list[Row]) -> list[list[bytes]]:
    return [[part.to_bytes() for part in row] for row in rows]


def _fastest(call: Callable[[], Any]) -> float:
    """Return the seconds on the clock of the fastest of some calls."""
    times: list[float] = []
    while len(times) < 5 or sum(times) < 4 * BUDGET:
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


def _processor() -> str:
    """Return the name of the processor."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
