"""What a model costs before anything of it is computed: seconds, memory, keys, traffic.

The operations of an evaluation are counted by running it without ciphertexts (:mod:`cipherlm.cli.counting`),
and what an operation takes is measured on this machine (:mod:`cipherlm.cli.machine`). Of the model, only
shapes are needed, and the ranges that polynomials are fitted to.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cipherlm.cli.bench_tally import Figures, Tally
from cipherlm.cli.counting import (
    CountingEvaluator,
    CountingSession,
    HollowCiphertext,
    HollowTransformation,
    Sizes,
    kept_bytes,
    outline,
)
from cipherlm.cli.inspect_choices import Functions, functions_dict, functions_of
from cipherlm.cli.line import Line
from cipherlm.cli.machine import Machine
from cipherlm.engine import Evaluator, SecretKey
from cipherlm.linear.client import LinearClient
from cipherlm.linear.plan import make_plan
from cipherlm.linear.products import LinearGroup
from cipherlm.linear.server import encode
from cipherlm.nn.module import Linear
from cipherlm.nn.ranges import Interval
from cipherlm.schemes.ckks.geometry import Geometry
from cipherlm.schemes.ckks.session import GC_PERCENT
from cipherlm.serving.linear import IN_FLIGHT, MAX_ROWS

TYPICAL: dict[str, Interval] = {
    "squares": (1.0, 20.0),
    "scores": (-20.0, 25.0),
    "means": (-6.0, 6.0),
    "inputs": (-12.0, 10.0),
}
"""Ranges of a trained model, by what they are of, where its own are not known."""

RANDOM: dict[str, Interval] = {
    "squares": (0.6, 3.3),
    "scores": (-5.5, 5.0),
    "means": (-4.2, 3.5),
    "inputs": (-6.0, 6.0),
}
"""Those of random weights of GPT-2's size, which ``cipherlm bench model --geometry gpt2`` has."""

_PRODUCT = "product"

WEIGHT_BYTES = 8
"""A server's clear weights are in double precision."""


@dataclass(frozen=True)
class Pass:
    """What goes through a model at once, as a user meets it.

    ``server_seconds`` and ``client_seconds`` are calculated from counts, ``line_seconds`` from bytes and
    round trips; ``seconds`` is their sum.
    """

    tokens: int
    server_seconds: float
    client_seconds: float
    line_seconds: float
    round_trips: int
    up_bytes: int
    down_bytes: int

    @property
    def seconds(self) -> float:
        """What all takes, one after the other."""
        return self.server_seconds + self.client_seconds + self.line_seconds

    def to_dict(self) -> Figures:
        """Return all of it, for JSON."""
        return {"seconds": self.seconds, **asdict(self)}


@dataclass(frozen=True)
class Keys:
    """What a client makes once, and sends."""

    count: int
    sent_bytes: int
    make_seconds: float
    upload_seconds: float


@dataclass(frozen=True)
class Estimate:
    """What a model costs. ``first_token`` is the one right behind the prompt, ``next_token`` one after it."""

    prompt: Pass
    first_token: Pass
    next_token: Pass
    keys: Keys
    server_memory_bytes: int
    client_memory_bytes: int
    functions: Functions = field(default_factory=dict)
    """How the functions of a whole model are computed in these passes, by name."""

    def to_dict(self) -> Figures:
        """Return all of it, for JSON."""
        return {
            **{name: getattr(self, name).to_dict() for name in ("prompt", "first_token", "next_token")},
            "keys": asdict(self.keys),
            "server_memory_bytes": self.server_memory_bytes,
            "client_memory_bytes": self.client_memory_bytes,
            "polynomials": functions_dict(self.functions),
        }


@dataclass(frozen=True)
class WholeShape:
    """A model whose blocks are all at the server: blocks without weights, ranges, and how they are packed.

    ``own_bytes`` are the client's own weights in memory, and ``name`` is that of the list of blocks.
    """

    blocks: Any
    geometry: Geometry
    ranges: Mapping[str, Interval]
    own_bytes: int
    name: str = "blocks"


@dataclass(frozen=True)
class LinearShape:
    """A model whose linear layers are at the server: how often there is a product of ``(rows, columns)``."""

    products: Mapping[tuple[int, int], int]
    own_bytes: int


def same_ranges(blocks: Any, ranges: Mapping[str, Interval]) -> dict[str, Interval]:
    """Return ranges by name, where all functions of a kind have the same."""
    return {name: ranges[name.rpartition(".")[2]] for name in blocks.range_names}


def estimate_whole(
    shape: WholeShape, prompt_tokens: int, machine: Machine, cores: int, line: Line
) -> Estimate:
    """Estimate a whole model on CKKS. Raises ``ValueError`` for ranges that no polynomial serves."""
    geometry, start = shape.geometry, shape.geometry.prefix
    if start + prompt_tokens + 2 > geometry.context:
        raise ValueError(
            f"{start} public tokens, {prompt_tokens} of a prompt and two more do not fit a context of "
            f"{geometry.context} tokens"
        )
    module = outline(shape.blocks, shape.ranges, geometry.heads, geometry.head_dim, start, geometry.context)
    sizes = Sizes(geometry)
    session = CountingSession(geometry, module, sizes)
    behind = start + prompt_tokens
    chunks = [(start, prompt_tokens), (behind, 1), (behind + 1, 1)]
    for position, count in chunks:  # what is encoded once does not count
        session.evaluate(count, position)
    passes = []
    for position, count in chunks:
        parts = []
        for place, tokens in sizes.client.passes(position, count):
            kind = "whole/token" if geometry.is_alone(place, tokens) else "whole/chunk"
            parts.append((kind, session.evaluate(tokens, place)))
        passes.append(_pass(count, parts, geometry, machine, cores, line))
    prompt, first, following = passes
    levels = geometry.rotations
    top = geometry.parameters.max_level
    figures = Counter([*levels.values(), top, top])  # with those for conjugation and for products
    per_level = {level: machine.key_figures(geometry, level) for level in figures}

    def total(what: str) -> float:
        return sum(number * per_level[level][what] for level, number in figures.items())

    keys = _keys(len(levels), total("sent"), total("seconds"), line)
    weights = sum(layer.weight.size + layer.bias.size for _, layer in module.module.named(Linear))
    held = kept_bytes(session.encodings, module) + session.cached_bytes() + total("expanded")
    session.close()
    return Estimate(
        prompt,
        first,
        following,
        keys,
        round(held * (1 + GC_PERCENT / 100)) + weights * WEIGHT_BYTES,
        round(total("made")) + shape.own_bytes,
        functions_of(shape.name, module.module),
    )


def _pass(
    tokens: int,
    parts: Sequence[tuple[str, Tally]],
    geometry: Geometry,
    machine: Machine,
    cores: int,
    line: Line,
) -> Pass:
    server = client = 0.0
    together = Tally()
    for kind, tally in parts:
        core = machine.core_seconds(geometry.parameters, tally.primitives)
        server += machine.server_seconds(kind, core, cores)
        for (name, level), count in tally.primitives.items():
            if name == "mask":
                client += count * machine.refresh_seconds(geometry, level)
            elif name == "rerandomization":
                client += count * (
                    machine.encrypt_seconds(geometry) + machine.decrypt_seconds(geometry, level)
                )
        together.add(tally)
    trips, up, down = together.round_trips + len(parts), together.up_bytes, together.down_bytes
    return Pass(tokens, server, client, line.seconds(trips, up + down), trips, up, down)


def _keys(count: int, sent: float, seconds: float, line: Line) -> Keys:
    return Keys(count, round(sent), seconds, line.seconds(1, sent))


def estimate_linear(
    shape: LinearShape,
    prompt_tokens: int,
    machine: Machine,
    cores: int,
    line: Line,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Estimate:
    """Estimate linear layers on CKKS. ``report`` hears how many shapes of how many are planned."""
    random = np.random.default_rng(0)
    products: list[tuple[int, _Product]] = []
    for done, ((rows, columns), number) in enumerate(shape.products.items()):
        report(done, len(shape.products))
        weights = random.normal(0, 0.02, (rows, columns)).astype(np.float32)
        products.append((number, _Product(weights)))
    parameters = products[0][1].plan.parameters
    rotations = frozenset[int]().union(*(product.plan.rotations for _, product in products))
    key = SecretKey.generate(parameters)
    began = time.perf_counter()
    keys = key.evaluation_keys(rotations, relinearization=False)
    made_seconds, sent = time.perf_counter() - began, len(keys.to_bytes())
    prompt, token = (_linear_pass(products, count, machine, cores, line) for count in (prompt_tokens, 1))
    matrices = sum(number * product.matrices.nbytes for number, product in products)
    keys.expand()
    return Estimate(
        prompt,
        token,
        token,
        _keys(len(rotations), sent, made_seconds, line),
        matrices + keys.nbytes,
        sent + shape.own_bytes,
    )


class _Product:
    """A product with a matrix (rows, columns), of which the diagonals need not be encoded."""

    def __init__(self, weights: NDArray[np.float32]) -> None:
        rows, columns = weights.shape
        self.plan = make_plan([LinearGroup(_PRODUCT, (_PRODUCT,), columns, (rows,))], {_PRODUCT: weights})
        self.matrices = encode(self.plan, self.plan.of(_PRODUCT), weights, HollowTransformation)
        self._columns = columns
        self._evaluator = CountingEvaluator(self.plan.parameters)

    def count(self, rows: int) -> Tally:
        """Return what a product of so many vectors takes."""
        tally = self._evaluator.tally = Tally()
        group = self.plan.of(_PRODUCT)
        hollow = HollowCiphertext(self.plan.parameters, 0, group.input_scale)
        self.matrices.multiply(self._evaluator, [[hollow] * group.packing.inputs] * rows)
        up, down = self._bytes
        tally.input_bytes = rows * group.packing.inputs * up
        tally.output_bytes = rows * group.packing.outputs * down
        return tally

    @cached_property
    def _bytes(self) -> tuple[int, int]:
        """The bytes of one ciphertext of an input, and of an output: rounded as the plan says."""
        group, client = self.plan.of(_PRODUCT), LinearClient(self.plan)
        ((sent, *_),), _ = client.encrypt(_PRODUCT, np.ones((1, self._columns)))
        output = Evaluator(self.plan.parameters).add(sent, sent)  # no longer half a seed
        output.round(group.first, group.second)
        return len(sent.to_bytes()), len(output.to_bytes())


def _linear_pass(
    products: Sequence[tuple[int, _Product]], tokens: int, machine: Machine, cores: int, line: Line
) -> Pass:
    server = client = 0.0
    trips, together, per = 0, Tally(), machine.linear_seconds()
    exchanges = [min(MAX_ROWS, tokens - first) for first in range(0, tokens, MAX_ROWS)]
    for number, product in products:
        packing = product.plan.of(_PRODUCT).packing
        for rows in exchanges:
            tally = product.count(rows)
            core = number * machine.core_seconds(product.plan.parameters, tally.primitives)
            server += machine.server_seconds(f"linear/{'token' if rows == 1 else 'chunk'}", core, cores)
            inputs, outputs = number * rows * packing.inputs, number * rows * packing.outputs
            server += inputs * per["read"] + outputs * per["write"]
            client += inputs * per["in"] + outputs * per["out"]
            together.input_bytes += number * tally.input_bytes
            together.output_bytes += number * tally.output_bytes
        # Several exchanges of a product are on their way at a time.
        trips += number * -(-len(exchanges) // IN_FLIGHT)
    up, down = together.up_bytes, together.down_bytes
    return Pass(tokens, server, client, line.seconds(trips, up + down), trips, up, down)
