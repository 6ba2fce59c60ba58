"""Measure the CKKS engine: operations at every ring degree, key sizes, linear layers, levels, the binding.

``primitives`` are the operations that encrypted models consist of, at each level of the ring degree that
models have. The binding is compared with ``go test -bench`` where there are a Go toolchain and the engine's
source.

Every figure is the fastest of several runs. ``seconds`` is the time on the clock, ``cpu_seconds`` that of all
threads together: on a machine that does other work too, the second is the steadier one.
"""

import argparse
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cipherlm import engine
from cipherlm.cli.bench_primitives import Primitives
from cipherlm.engine import (
    Ciphertext,
    EvaluationKeys,
    Evaluator,
    LinearTransformation,
    Parameters,
    Plaintext,
    SecretKey,
    folded,
    paired,
)
from cipherlm.engine import _native as native
from cipherlm.schemes.ckks.arithmetic import PLAIN_SHIFT

EXAMPLES = """\
examples:
  cipherlm bench engine --json
  cipherlm bench engine --degrees 14 --json
  cipherlm bench engine --degrees 14 --only linear --level 1 2 4 --json
  cipherlm bench engine --degrees 14 --only primitives --json
  cipherlm bench engine --only binding --json
"""

PARTS = ("operations", "linear", "primitives", "binding")
MODEL_DEGREE = 14
GO_SOURCE = Path(__file__).parents[3] / "engine"
BINDING_ROUNDS = 5
BABY_STEPS = 32
TOKENS = 8

Figures = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmark's arguments."""
    parser.add_argument(
        "--degrees",
        type=int,
        nargs="+",
        choices=sorted(engine.PRESETS),
        default=[13, 14, 15, 16],
        metavar="LOG",
        help="log2 of the ring degrees (default: 13 14 15 16)",
    )
    parser.add_argument(
        "--only", choices=PARTS, nargs="+", default=list(PARTS), help="measure only these (default: all)"
    )
    parser.add_argument(
        "--level",
        type=int,
        nargs="+",
        default=[1, 2],
        metavar="L",
        help="levels of the linear layers' inputs (default: 1 2)",
    )
    parser.add_argument(
        "--storage",
        choices=("int16", "int32", "residues"),
        nargs="+",
        default=["int32"],
        help="how the linear layers' diagonals are kept (default: int32)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads (default: the number of cores)")
    parser.add_argument("--budget", type=float, default=1.0, metavar="S", help="seconds for each figure")


def run(options: argparse.Namespace) -> Figures:
    """Measure and return the figures: nested for JSON, flat for a table."""
    if options.threads:
        engine.set_threads(options.threads)
    figures: Figures = {"threads": engine.threads()}
    if "operations" in options.only:
        figures["rings"] = {str(log): _ring(log, options.budget) for log in options.degrees}
    if "linear" in options.only:
        figures["linear"] = [
            _linear(log, outputs, level, storage, options.budget)
            for log in options.degrees
            for outputs in (768, 2304)
            for storage in options.storage
            for level in options.level
            if outputs == 768 or log == MODEL_DEGREE
        ]
    if "primitives" in options.only and MODEL_DEGREE in options.degrees:
        figures["primitives"] = Primitives(Parameters.preset(MODEL_DEGREE), options.budget / 5).table()
    if "binding" in options.only:
        figures["binding"] = _binding()
    return figures if getattr(options, "json", True) else dict(_flat(figures))


def _flat(figures: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    items = figures.items() if isinstance(figures, dict) else enumerate(figures)
    for key, value in items:
        path = f"{name}.{key}" if name else str(key)
        if isinstance(value, dict | list):
            yield from _flat(value, path)
        else:
            yield path, value


def _fastest(
    operation: Callable[[], Any], budget: float, least: int = 3, *, background: bool = False
) -> Figures:
    """Return the least time on the clock and the least processor time of some runs.

    Where an operation goes on in the ``background``, its processor time is the mean.
    """
    operation()
    walls: list[float] = []
    processors: list[float] = []
    end = time.perf_counter() + budget
    while len(walls) < least or (time.perf_counter() < end and len(walls) < 1000):
        wall, processor = time.perf_counter(), time.process_time()
        operation()
        walls.append(time.perf_counter() - wall)
        processors.append(time.process_time() - processor)
    processor = sum(processors) / len(processors) if background else min(processors)
    return {"seconds": min(walls), "cpu_seconds": processor}


def _ring(log_degree: int, budget: float) -> Figures:
    """Measure the operations at one ring degree, at its highest level."""
    p = Parameters.preset(log_degree)
    random = np.random.default_rng(0)
    x = random.uniform(-1, 1, p.slots)
    start = time.perf_counter()
    secret_key = SecretKey.generate(p)
    public_key = secret_key.public_key()
    rotations = list(range(1, 9))
    keys = secret_key.evaluation_keys(rotations)
    evaluator = Evaluator(p, keys)
    keygen = time.perf_counter() - start
    ct, top = secret_key.encrypt(x), p.max_level
    plain = Plaintext.encode(p, x, scale=float(p.q[top]))
    hoisted = _fastest(lambda: evaluator.rotate_hoisted(ct, rotations), budget)
    return {
        "parameters": p.to_dict() | {"log_qp": p.log_qp, "max_level": top, "slots": p.slots},
        "keygen_9_keys": {"seconds": keygen},
        "rotation": _fastest(lambda: evaluator.rotate(ct, 1), budget),
        "hoisted_rotation": {name: value / len(rotations) for name, value in hoisted.items()},
        "multiplication": _fastest(lambda: evaluator.multiply(ct, ct), budget),
        "plaintext_multiplication": _fastest(lambda: evaluator.multiply(ct, plain), budget),
        "addition": _fastest(lambda: evaluator.add(ct, ct), budget),
        "encode": _fastest(lambda: Plaintext.encode(p, x), budget),
        "encrypt_secret": _fastest(lambda: secret_key.encrypt(plain), budget),
        "encrypt_public": _fastest(lambda: public_key.encrypt(plain), budget),
        "decrypt_and_decode": _fastest(lambda: secret_key.decrypt(ct), budget),
        "refresh": _refresh(evaluator, secret_key, ct, budget),
        "bytes": _sizes(secret_key, ct, keys),
    }


def _refresh(evaluator: Evaluator, secret_key: SecretKey, ct: Ciphertext, budget: float) -> Figures:
    public_key = secret_key.public_key()
    mask = partial(evaluator.mask, [ct], public_key, level=1, shift=PLAIN_SHIFT)
    request, _ = mask()
    reply = secret_key.refresh(request)

    def unmask() -> float:
        fresh = mask()[1]
        secret_key.refresh(request)  # meanwhile the server makes ready to unmask
        start = time.perf_counter()
        evaluator.unmask(reply, fresh)
        return time.perf_counter() - start

    return {
        "mask": _fastest(mask, budget, background=True),
        "client": _fastest(lambda: secret_key.refresh(request), budget, background=True),
        "unmask": {"seconds": min(unmask() for _ in range(5))},
        "down_bytes": len(request.to_bytes()),
        "up_bytes": len(reply.to_bytes()),
    }


def _sizes(secret_key: SecretKey, ct: Ciphertext, keys: EvaluationKeys) -> Figures:
    galois = secret_key.evaluation_keys([1], relinearization=False)
    low = secret_key.evaluation_keys({1: 1}, relinearization=False)
    compressed, compressed_low = galois.nbytes, low.nbytes
    galois.expand()
    low.expand()
    whole = ct.copy()
    Evaluator(secret_key.parameters).add(whole, whole, out=whole)
    return {
        "galois_key_memory": galois.nbytes,
        "galois_key_compressed_memory": compressed,
        "galois_key_wire": len(galois.to_bytes()),
        "galois_key_level_1_memory": low.nbytes,
        "galois_key_level_1_compressed_memory": compressed_low,
        "galois_key_level_1_wire": len(low.to_bytes()),
        "public_key_wire": len(secret_key.public_key().to_bytes()),
        "ciphertext_memory": ct.nbytes,
        "ciphertext_fresh_wire": len(ct.to_bytes()),
        "ciphertext_wire": len(whole.to_bytes()),
        "ciphertext_level_1_wire": len(Evaluator(secret_key.parameters).drop_level(whole, 1).to_bytes()),
        "nine_keys_memory": keys.nbytes,
    }


def _padded(matrix: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    result = np.zeros((size, size))
    result[: matrix.shape[0], : matrix.shape[1]] = matrix
    return result


def _linear(log_degree: int, outputs: int, level: int, storage: Any, budget: float) -> Figures:
    """Measure 8 encrypted tokens of 768 features times a clear matrix, every step from input to output.

    Feature f of token t is in slot ``f * inner + t``. Real matrices go two at a time, as one complex matrix,
    and an odd one as half as many diagonals. Rings of fewer slots hold fewer tokens in each ciphertext.
    """
    p, size = Parameters.preset(log_degree), 1024
    inner = p.slots // size
    random = np.random.default_rng(0)
    weights = [random.normal(0, 0.1, (768, 768)) for _ in range(outputs // 768)]
    start = time.perf_counter()
    real = [_padded(matrix, size) for matrix in weights]
    complex_ones = [paired(real[i], real[i + 1]) for i in range(0, len(real) - 1, 2)]
    complex_ones += [folded(real[-1])] if len(real) % 2 else []
    matrices = [
        LinearTransformation.from_matrix(
            p, matrix, level=level, inner=inner, baby_steps=BABY_STEPS, storage=storage
        )
        for matrix in complex_ones
    ]
    encode = time.perf_counter() - start
    half = size // 2 * inner
    rotations = frozenset({half}).union(*(matrix.rotations for matrix in matrices))
    secret_key = SecretKey.generate(p)
    keys = secret_key.evaluation_keys(rotations, conjugation=True, relinearization=False, level=level)
    evaluator = Evaluator(p, keys)
    tokens = random.normal(0, 1, (TOKENS, 768))
    inputs = []
    for group in range(0, TOKENS, inner):
        slots = np.zeros((size, inner))
        part = tokens[group : group + inner]
        slots[:768, : len(part)] = part.T
        inputs.append(secret_key.encrypt(slots.ravel(), level))

    def layer() -> list[list[Ciphertext]]:
        results: list[list[Ciphertext]] = []
        for matrix, row in zip(complex_ones, evaluator.transform_many(inputs, matrices), strict=True):
            parts = [evaluator.split(item) for item in row]
            if matrix is complex_ones[-1] and len(real) % 2:
                results.append([evaluator.add(a, evaluator.rotate(b, half)) for a, b in parts])
            else:
                results += [[a for a, _ in parts], [b for _, b in parts]]
        return results

    largest, error = 0.0, 0.0
    for matrix, row in zip(weights, layer(), strict=True):
        got = np.hstack([secret_key.decrypt(item).real.reshape(size, inner)[:768] for item in row])
        expected = matrix @ tokens.T
        error = max(error, float(np.abs(got[:, :TOKENS] - expected).max()))
        largest = max(largest, float(np.abs(expected).max()))
    return {
        "log_degree": log_degree,
        "shape": [TOKENS, 768, outputs],
        "level": level,
        "storage": storage,
        "ciphertexts": len(inputs),
        "diagonals": sum(matrix.diagonals for matrix in matrices),
        **_fastest(layer, budget),
        "error": error,
        "largest_output": largest,
        "matrix_bytes": sum(matrix.nbytes for matrix in matrices),
        "keys_bytes": keys.nbytes,
        "encode_seconds": encode,
    }


def _binding() -> Figures:
    """Compare loops in Python with the same loops in Go, taking turns, on one thread."""
    figures: Figures = {"call": _fastest(lambda: native.call("cl_nothing"), 0.1)}
    threads = engine.threads()
    engine.set_threads(1)
    try:
        operations = _binding_operations()
        go = _go_benchmark()
        python: dict[str, float] = {}
        in_go: dict[str, float] = {}
        for _ in range(BINDING_ROUNDS):
            for name, operation in operations.items():
                seconds = _average(operation)
                python[name] = min(seconds, python.get(name, seconds))
            for name, seconds in go():
                in_go[name] = min(seconds, in_go.get(name, seconds))
    finally:
        engine.set_threads(threads)
    for name, seconds in python.items():
        figures[name] = {"python_seconds": seconds}
        if name in in_go:
            figures[name]["go_seconds"] = in_go[name]
            figures[name]["overhead_percent"] = 100 * (seconds / in_go[name] - 1)
    return figures


def _binding_operations() -> dict[str, Callable[[], Any]]:
    p = Parameters.preset(14)
    x = np.random.default_rng(0).uniform(-1, 1, p.slots)
    secret_key = SecretKey.generate(p)
    evaluator = Evaluator(p, secret_key.evaluation_keys([1]))
    ct, plain = secret_key.encrypt(x), Plaintext.encode(p, x, scale=float(p.q[p.max_level]))
    return {
        "rotation": lambda: evaluator.rotate(ct, 1),
        "multiplication": lambda: evaluator.multiply(ct, ct),
        "plaintext_multiplication": lambda: evaluator.multiply(ct, plain),
        "addition": lambda: evaluator.add(ct, ct),
    }


def _average(operation: Callable[[], Any], least: float = 0.3) -> float:
    """Return the processor time of one run in a loop of ``least`` seconds, as Go's benchmarks do."""
    operation()
    runs, start = 0, time.process_time()
    while (taken := time.process_time() - start) < least:
        operation()
        runs += 1
    return taken / runs


def _go_benchmark() -> Callable[[], Iterator[tuple[str, float]]]:
    """Return what runs ``go test -bench`` once; nothing where there is no Go or no source."""
    go = shutil.which("go")
    if go is None or not (GO_SOURCE / "go.mod").exists():
        return lambda: iter(())
    directory = Path(tempfile.mkdtemp(prefix="cipherlm-bench-"))
    binary = directory / "engine.test"
    subprocess.run([go, "test", "-c", "-o", str(binary), "./core"], cwd=GO_SOURCE, check=True)

    def once() -> Iterator[tuple[str, float]]:
        command = [
            str(binary),
            "-test.run",
            "^$",
            "-test.bench",
            "^BenchmarkBinding$",
            "-test.benchtime",
            "300ms",
        ]
        output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=directory).stdout
        for name, nanoseconds in re.findall(
            r"^BenchmarkBinding/(\w+)-\d+.*?([\d.]+) cpu-ns/op", output, re.M
        ):
            yield name, float(nanoseconds) / 1e9

    return once
