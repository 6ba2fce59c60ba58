"""What an evaluation of CKKS takes: seconds, bytes, calls of the engine, and what those consist of."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import wraps
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cipherlm.cli.bench_primitives import Primitive, Primitives
from cipherlm.engine import (
    Ciphertext,
    EvaluationKeys,
    Evaluator,
    LinearTransformation,
    Parameters,
    Plaintext,
    inner_sum_rotations,
    threads,
)
from cipherlm.engine.linear import Storage
from cipherlm.schemes.ckks.arithmetic import Encodings
from cipherlm.schemes.ckks.layout import Layout

Figures = dict[str, Any]
Part = tuple[str, int, float]

_ROTATIONS = ("rotation", "hoisted_rotation")


@dataclass
class Tally:
    """What an evaluation took: seconds, bytes, calls of the engine and what they consist of.

    ``seconds`` go from the client's hidden states to its results, ``cpu_seconds`` are those of all cores.
    ``line_seconds`` of them bytes were on their way, where a line is between the parties.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    chunks: list[Figures] = field(default_factory=list)
    """Tokens, seconds and processor seconds of each evaluation."""
    encrypt_seconds: float = 0.0
    refresh_seconds: float = 0.0
    decrypt_seconds: float = 0.0
    line_seconds: float = 0.0
    refreshes: int = 0
    round_trips: int = 0
    input_bytes: int = 0
    output_bytes: int = 0
    refresh_up_bytes: int = 0
    refresh_down_bytes: int = 0
    calls: dict[str, int] = field(default_factory=dict)
    call_seconds: dict[str, float] = field(default_factory=dict)
    primitives: dict[Primitive, float] = field(default_factory=dict)

    def add(self, other: Tally) -> None:
        """Take another evaluation in."""
        for item in fields(self):
            own, theirs = getattr(self, item.name), getattr(other, item.name)
            if isinstance(own, dict):
                _add(own, theirs)
            else:
                setattr(self, item.name, own + theirs)

    def count(self, name: str, seconds: float, primitives: Mapping[Primitive, float]) -> None:
        """Take in one call of the engine."""
        _add(self.calls, {name: 1})
        _add(self.call_seconds, {name: seconds})
        _add(self.primitives, primitives)

    @property
    def client_seconds(self) -> float:
        """The client's part, bytes read and written included."""
        return self.encrypt_seconds + self.refresh_seconds + self.decrypt_seconds

    @property
    def server_seconds(self) -> float:
        """The server's part, bytes read and written included."""
        return self.seconds - self.client_seconds - self.line_seconds

    @property
    def up_bytes(self) -> int:
        """All that the client sends, but for keys."""
        return self.input_bytes + self.refresh_up_bytes

    @property
    def down_bytes(self) -> int:
        """All that the server sends."""
        return self.output_bytes + self.refresh_down_bytes

    @property
    def refresh_bytes(self) -> int:
        """What refreshes take, in both directions."""
        return self.refresh_up_bytes + self.refresh_down_bytes

    @property
    def rotations(self) -> int:
        """The number of rotations and conjugations, also those inside of matrices and sums."""
        return round(sum(n for (name, _), n in self.primitives.items() if name in _ROTATIONS))

    def figures(self, tokens: int, *, each: bool = False) -> Figures:
        """Return everything of so many tokens, or the average of ``each``."""
        share = 1 / tokens if each else 1

        def count(value: int) -> float:
            return value * share if each else value

        ordered = sorted(self.call_seconds, key=self.call_seconds.__getitem__, reverse=True)
        return {
            "tokens": tokens,
            "seconds": self.seconds * share,
            "cpu_seconds": self.cpu_seconds * share,
            "client_seconds": self.client_seconds * share,
            "line_seconds": self.line_seconds * share,
            "chunks": self.chunks,
            "refreshes": count(self.refreshes),
            "round_trips": count(self.round_trips),
            "up_bytes": round(count(self.up_bytes)),
            "down_bytes": round(count(self.down_bytes)),
            "refresh_bytes": round(count(self.refresh_bytes)),
            "rotations": count(self.rotations),
            "operations": {
                name: {"calls": count(self.calls[name]), "seconds": self.call_seconds[name] * share}
                for name in ordered
            },
        }

    def roofline(self, primitives: Primitives, tokens: int = 1) -> Figures:
        """Return what the server's primitive operations take by themselves, over all cores.

        ``ratio`` is what the server took over that, on the clock, and ``cpu_ratio`` the processor time of
        both parties over that of the operations. Averages for so many tokens.
        """
        parts: dict[str, float] = {}
        for (name, level), count in self.primitives.items():
            parts[name] = parts.get(name, 0.0) + count * primitives.seconds(name, level)
        core_seconds = sum(parts.values())
        seconds = core_seconds / threads()
        return {
            "core_seconds": core_seconds / tokens,
            "seconds": seconds / tokens,
            "ratio": self.server_seconds / seconds,
            "cpu_ratio": self.cpu_seconds / core_seconds,
            "primitives": {
                name: parts[name] / tokens for name in sorted(parts, key=parts.__getitem__, reverse=True)
            },
        }


def _add(own: dict[Any, Any], theirs: Mapping[Any, Any]) -> None:
    for key, value in theirs.items():
        own[key] = own.get(key, 0) + value


class TalliedEvaluator(Evaluator):
    """An evaluator that takes every call from outside it into its ``tally``.

    It stands before another one: what computes is the class behind it.
    """

    def __init__(self, parameters: Parameters, keys: EvaluationKeys | None = None) -> None:
        super().__init__(parameters, keys)
        self.tally = Tally()
        self._lock = threading.Lock()
        self._inside = threading.local()

    def measure(self, name: str, parts: Iterable[Part], call: Callable[[], Any]) -> Any:
        """Return the result of a call, which consists of these parts, and take it into the tally."""
        self._inside.a_call = True
        primitives: dict[Primitive, float] = {}
        for what, level, count in parts:
            _add(primitives, {(what, level): count})
        began = time.perf_counter()
        try:
            return call()
        finally:
            taken = time.perf_counter() - began
            self._inside.a_call = False
            with self._lock:
                self.tally.count(name, taken, primitives)


class MeasuredEvaluator(TalliedEvaluator):
    """An evaluator whose calls are counted and timed."""


class TalliedEncodings(Encodings):
    """Encodings that go into an evaluator's tally. Those that are kept are counted when they are made."""

    def __init__(self, evaluator: TalliedEvaluator, layout: Layout, *, storage: Storage) -> None:
        super().__init__(evaluator.parameters, layout, storage=storage)
        self._evaluator = evaluator

    def encode(self, slots: NDArray[Any], level: int, scale: float) -> Plaintext:
        """See :class:`Encodings`."""
        encode = super().encode
        parts = [("encoding", level, 1)]
        plaintext: Plaintext = self._evaluator.measure("encode", parts, lambda: encode(slots, level, scale))
        return plaintext


def _product(a: Ciphertext, b: Any, **_: Any) -> Iterable[Part]:
    if isinstance(b, Ciphertext):
        yield "product", min(a.level, b.level), 1
    elif isinstance(b, Plaintext | np.ndarray):
        yield "plaintext_product", a.level, 1
        yield "rescaling", a.level, 1
    else:
        yield "addition", a.level, 1


def _dot(a: Sequence[Ciphertext], b: Sequence[Any], rescale: bool = True) -> Iterable[Part]:
    level = min(item.level for item in (*a, *b))
    if isinstance(b[0], Ciphertext):
        yield "product", level, 1
        yield "further_product", level, len(a) - 1
    else:
        yield "plaintext_product", level, len(a)
        if rescale:
            yield "rescaling", level, 1


_COEFFICIENT_BYTES = {"int16": 2, "int32": 4}


def _matrices(inputs: Sequence[Ciphertext], matrices: Sequence[LinearTransformation]) -> Iterable[Part]:
    """Yield what matrices consist of: the baby steps of an input are shared by all of them."""
    level, count = matrices[0].level, len(inputs)
    babies = frozenset[int]().union(*(m.baby_steps for m in matrices))
    yield "hoisted_rotation", level, count * len(babies - {0})
    yield "rotation", level, count * sum(len(m.giant_steps - {0}) for m in matrices)
    # A diagonal that repeats takes so much less memory and work. Further inputs share the work on it.
    whole = sum(m.nbytes / _COEFFICIENT_BYTES[m.storage] for m in matrices) / matrices[0].parameters.degree
    yield "diagonal", level, whole
    yield "further_diagonal", level, (count - 1) * whole
    yield "rescaling", level, count * sum(m.scale is None for m in matrices)


_PARTS: dict[str, Callable[..., Iterable[Part]]] = {
    "rotate": lambda a, _by, **_: [("rotation", a.level, 1)],
    "conjugate": lambda a, **_: [("rotation", a.level, 1)],
    "split": lambda a: [("rotation", a.level, 1), ("addition", a.level, 2)],
    "rotate_hoisted": lambda a, by: [("hoisted_rotation", a.level, len(by))],
    "inner_sum": lambda a, step, count, **_: [
        ("rotation", a.level, len(inner_sum_rotations(step, count))),
    ],
    "transform": lambda a, matrix: _matrices([a], [matrix]),
    "transform_many": _matrices,
    "add": lambda a, _b, **_: [("addition", a.level, 1)],
    "subtract": lambda a, _b, **_: [("addition", a.level, 1)],
    "multiply": _product,
    "dot": _dot,
    "rescale": lambda a, **_: [("rescaling", a.level, 1)],
    "adjust_scale": lambda a, _scale, **_: [("rescaling", a.level, 1)],
    "drop_level": lambda _a, _level, **_: [],
    "polynomial": lambda a, polynomial: [(f"polynomial_{polynomial.degree}", a.level, 1)],
    "mask": lambda inputs, _key, **options: [("mask", options["to_level"], len(inputs))],
    "unmask": lambda _reply, mask: [
        ("rotation", mask.to_level, sum(subring.rotations for subring in mask.subrings))
    ],
    "rerandomize": lambda a, _key, **_: [("rerandomization", a.level, 1)],
}


def _tallied(name: str) -> Callable[..., Any]:
    @wraps(getattr(Evaluator, name))
    def method(self: TalliedEvaluator, *arguments: Any, **options: Any) -> Any:
        original = getattr(super(TalliedEvaluator, self), name)
        if getattr(self._inside, "a_call", False):
            return original(*arguments, **options)
        parts = _PARTS[name](*arguments, **options)
        return self.measure(name, parts, lambda: original(*arguments, **options))

    return method


for _name in _PARTS:
    setattr(TalliedEvaluator, _name, _tallied(_name))
