"""Measure the linear layers of a model on ciphertexts: one token, and several at once.

Client and server meet in one process, and what they exchange is written to bytes and read back. With --rtt
and --mbit these bytes really take as long as on such a line; what HTTP adds is not in the figures. Weights
and inputs are random, of the geometry's shapes. Passes go through all layers of all blocks, client and server
one after the other, as a token does. The fastest pass is reported: as a whole, and for each layer the mean
over the blocks. The peer is Concrete ML's encrypted linear layer, as published.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cipherlm.cli.bench_ckks import memory_figures
from cipherlm.cli.bench_tally import Figures
from cipherlm.cli.common import positive_integer
from cipherlm.cli.line import Line, add_line_options, line_figures, line_of
from cipherlm.engine import Ciphertext, Evaluator
from cipherlm.linear.client import LinearClient
from cipherlm.linear.plan import Plan, make_plan
from cipherlm.linear.products import LinearGroup
from cipherlm.linear.server import LinearServer, Row
from cipherlm.progress import TerminalProgress

EXAMPLES = """\
examples:
  cipherlm bench linear --geometry gpt2
  cipherlm bench linear --geometry smollm2 --json
  cipherlm bench linear --geometry llama-1b --blocks 1 --tokens 8 --json
"""

GEOMETRIES: dict[str, tuple[int, dict[str, tuple[int, int]]]] = {
    "gpt2": (12, {"qkv": (2304, 768), "proj": (768, 768), "fc": (3072, 768), "down": (768, 3072)}),
    "smollm2": (30, {"qkv": (960, 576), "proj": (576, 576), "gate+up": (3072, 576), "down": (576, 1536)}),
    "llama-1b": (
        16,
        {"qkv": (3072, 2048), "proj": (2048, 2048), "gate+up": (16384, 2048), "down": (2048, 8192)},
    ),
}
"""The blocks of a model, and the products (rows, columns) of one."""

PEER_LAYER = (2304, 768)
PEER_SECONDS = {"token": 21.9, "tokens_8": 166.0}
"""Concrete ML's encrypted layer of 768 x 2304, published for a CPU: one token, and eight."""

Float64 = NDArray[np.float64]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmark's arguments."""
    parser.add_argument(
        "--geometry", choices=tuple(GEOMETRIES), default="gpt2", help="whose shapes (default: gpt2)"
    )
    parser.add_argument(
        "--blocks", type=positive_integer, metavar="K", help="measure K blocks only (default: all)"
    )
    parser.add_argument(
        "--tokens", type=positive_integer, default=8, metavar="N", help="tokens at once (default: 8)"
    )
    add_line_options(parser)
    parser.add_argument("--repeat", type=positive_integer, default=3, metavar="R", help="passes (default: 3)")


def run(options: argparse.Namespace) -> Figures:
    """Measure, and return the figures."""
    blocks, shapes = GEOMETRIES[options.geometry]
    blocks = min(blocks, options.blocks or blocks)
    progress, random = TerminalProgress(), np.random.default_rng(0)
    groups = {name: LinearGroup(name, (name,), columns, (rows,)) for name, (rows, columns) in shapes.items()}

    def weights() -> dict[str, NDArray[np.float32]]:
        return {name: random.normal(0, 0.02, shape).astype(np.float32) for name, shape in shapes.items()}

    with progress("planning"):
        first = weights()
        plan = make_plan(list(groups.values()), first)
    servers = []
    start = time.perf_counter()
    for block in range(blocks):
        with progress(f"encoding block {block + 1} of {blocks}"):
            # The plan depends on the size of weights only, which is the same everywhere.
            servers.append(LinearServer.build(plan, first if block == 0 else weights()))
    encode_seconds = time.perf_counter() - start
    with progress("making keys"):
        start = time.perf_counter()
        client = LinearClient(plan)
        keys = client.evaluation_keys()
        keys_seconds = time.perf_counter() - start
    parties = _Parties(client, Evaluator(plan.parameters, keys), line_of(options))
    counts = sorted({1, options.tokens})
    layers: Figures = {
        name: {"shape": list(shape), "diagonals": plan.of(name).packing.diagonals}
        for name, shape in shapes.items()
    }
    totals: Figures = {}
    for count in counts:
        inputs = {name: random.normal(size=(count, shape[1])) for name, shape in shapes.items()}
        passes = []
        for number in range(options.repeat):
            with progress(f"pass {number + 1} of {options.repeat}, {count} at once"):
                passes.append(
                    [{name: parties.measure(s, name, inputs[name]) for name in shapes} for s in servers]
                )
        fastest = min(
            passes, key=lambda each: _seconds(_sum(block[name] for block in each for name in shapes))
        )
        for name in shapes:
            summed = _sum(block[name] for block in fastest)
            layers[name][_tokens(count)] = {key: value / blocks for key, value in summed.items()}
        total = _sum(block[name] for block in fastest for name in shapes)
        totals[f"all_{_tokens(count)}"] = {"seconds": _seconds(total), **total}
    for name, shape in shapes.items():
        x = random.normal(size=(options.tokens, shape[1]))
        layers[name]["relative_error"] = _error(parties, servers[0], name, x, first[name])
    values = sum(rows * columns for rows, columns in shapes.values())
    figures: Figures = {
        "geometry": options.geometry,
        "blocks": blocks,
        "line": line_figures(options),
        "parameters": repr(plan.parameters),
        "layers": layers,
        **totals,
        "encode_seconds": encode_seconds,
        "keys_seconds": keys_seconds,
        "keys_bytes": len(keys.to_bytes()),
        "keys": len(plan.rotations),
        "matrices_bytes": sum(server.nbytes for server in servers),
        "bytes_a_weight": servers[0].nbytes / values,
        **memory_figures(),
    }
    if PEER_LAYER in shapes.values():
        figures["peer"] = _peer(layers, shapes)
    return figures


class _Parties:
    """A client and what the server has of it."""

    def __init__(self, client: LinearClient, evaluator: Evaluator, line: Line | None) -> None:
        self.client, self.evaluator, self._line = client, evaluator, line
        self.plan: Plan = client.plan

    def measure(self, server: LinearServer, name: str, x: Float64) -> Figures:
        """Run one product and return its seconds and bytes."""
        clock = _Clock()
        (rows, norms), encrypt = clock(lambda: self.client.encrypt(name, x))
        sent, write = clock(lambda: _written(rows))
        carried = self._carry(sent)
        received, read = clock(lambda: self._read(sent))
        outputs, multiply = clock(lambda: server.multiply(self.evaluator, name, received))
        answer, write_back = clock(lambda: _written(outputs))
        carried += self._carry(answer)
        results, read_back = clock(lambda: self._read(answer))
        _, decrypt = clock(lambda: self.client.decrypt(name, results, norms))
        return {
            "client_seconds": encrypt + write + read_back + decrypt,
            "server_seconds": read + multiply + write_back,
            "line_seconds": carried,
            "sent_bytes": sum(len(data) for row in sent for data in row),
            "received_bytes": sum(len(data) for row in answer for data in row),
        }

    def _carry(self, rows: list[list[bytes]]) -> float:
        return 0.0 if self._line is None else self._line.carry(sum(len(data) for row in rows for data in row))

    def _read(self, rows: list[list[bytes]]) -> list[Row]:
        return [[Ciphertext.from_bytes(data, self.plan.parameters) for data in row] for row in rows]


class _Clock:
    """Calls and times."""

    def __call__(self, call: Callable[[], Any]) -> tuple[Any, float]:
        start = time.perf_counter()
        result = call()
        return result, time.perf_counter() - start


def _written(rows: list[Row]) -> list[list[bytes]]:
    return [[ciphertext.to_bytes() for ciphertext in row] for row in rows]


def _tokens(count: int) -> str:
    return "token" if count == 1 else f"tokens_{count}"


def _sum(runs: Iterable[Figures]) -> Figures:
    """Add up the seconds and bytes of several products."""
    runs = list(runs)
    return {name: sum(run[name] for run in runs) for name in runs[0]}


def _seconds(run: Figures) -> float:
    """Return what both parties took, one after the other, and the line between them."""
    return float(run["client_seconds"] + run["server_seconds"] + run["line_seconds"])


def _error(
    parties: _Parties, server: LinearServer, name: str, x: Float64, weights: NDArray[np.float32]
) -> float:
    """Return the root mean square of the error, relative to that of the product."""
    rows, norms = parties.client.encrypt(name, x)
    product = parties.client.decrypt(name, server.multiply(parties.evaluator, name, rows), norms)
    exact = x @ weights.T.astype(np.float64)
    return float(np.sqrt(np.mean((product - exact) ** 2) / np.mean(exact**2)))


def _peer(layers: Figures, shapes: dict[str, tuple[int, int]]) -> Figures:
    """Set the layer that the peer has published beside ours."""
    name = next(name for name, shape in shapes.items() if shape == PEER_LAYER)
    figures: Figures = {"layer": name}
    for tokens, seconds in PEER_SECONDS.items():
        if tokens in layers[name]:
            own = layers[name][tokens]["client_seconds"] + layers[name][tokens]["server_seconds"]
            figures[tokens] = {"published_seconds": seconds, "times_faster": seconds / own}
    return figures
