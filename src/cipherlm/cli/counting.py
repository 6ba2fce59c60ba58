"""The operations of an evaluation, counted without ciphertexts.

The real code of an evaluation runs over an evaluator whose ciphertexts have a level and a scale and no
coefficients. So it takes the same way through levels, refreshes and packings, and counts are those of a real
run; neither keys nor weights are needed, only shapes and ranges.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from cipherlm.cli.bench_tally import TalliedEncodings, TalliedEvaluator, Tally
from cipherlm.engine import (
    Chebyshev,
    Ciphertext,
    Evaluator,
    Held,
    LinearTransformation,
    Parameters,
    Plaintext,
    RefreshReply,
    RefreshRequest,
    SecretKey,
    Subring,
)
from cipherlm.engine.evaluator import Operand, is_number
from cipherlm.engine.linear import Storage
from cipherlm.nn.blocks import Blocks
from cipherlm.nn.module import Linear
from cipherlm.nn.ranges import Interval
from cipherlm.nn.tensor import Prefix
from cipherlm.schemes.ckks.arithmetic import Arithmetic, Encodings
from cipherlm.schemes.ckks.geometry import Geometry
from cipherlm.schemes.ckks.refresh import MASK_LEVEL, MaskedRefresh
from cipherlm.schemes.ckks.session import Client, Hosted, Server, Session

Float64 = NDArray[np.float64]

COEFFICIENT_BYTES = 8
"""Of a residue in memory."""
STORED_BYTES = {"int16": 2, "int32": 4}


class _Hollow:
    """What has a level and a scale, and nothing in it."""

    __slots__ = ()
    parameters: Parameters
    _level: int
    _scale: float

    @property
    def level(self) -> int:
        """See :class:`Ciphertext`."""
        return self._level

    @property
    def scale(self) -> float:
        """See :class:`Ciphertext`."""
        return self._scale


class HollowCiphertext(_Hollow, Ciphertext):
    """A ciphertext with a level and a scale, and nothing in it."""

    __slots__ = ("_level", "_scale")

    def __init__(self, parameters: Parameters, level: int, scale: float) -> None:
        # Not Ciphertext's: there is no native object, and whatever asks for one fails.
        if level < 0:
            raise ValueError("there is no level below 0")
        self.parameters, self._level, self._scale = parameters, level, scale

    @property
    def degree(self) -> int:
        """See :class:`Ciphertext`."""
        return 1

    def round(self, first: int, second: int = 0) -> None:
        """See :class:`Ciphertext`."""

    def become(self, level: int, scale: float) -> None:
        """Take a result in place."""
        self._level, self._scale = level, scale


class HollowPlaintext(_Hollow, Plaintext):
    """A plaintext with a level and a scale."""

    __slots__ = ("_level", "_scale")

    def __init__(self, parameters: Parameters, level: int, scale: float) -> None:
        self.parameters, self._level, self._scale = parameters, level, scale

    @property
    def nbytes(self) -> int:
        """The memory that the plaintext would take."""
        return (self._level + 1) * self.parameters.degree * COEFFICIENT_BYTES


class HollowTransformation(LinearTransformation):
    """A matrix that knows which diagonals it has, and what memory they would take."""

    __slots__ = ("_count", "_values")

    def __init__(
        self,
        parameters: Parameters,
        diagonals: Iterable[tuple[int, Any]],
        *,
        level: int,
        giant_step: int,
        storage: Any,
        scale: float | None = None,
        stages: tuple[int, int] | None = None,
    ) -> None:
        self.parameters, self.level, self.giant_step = parameters, level, giant_step
        self.storage, self.scale, self.stages = storage, scale, stages or (giant_step, parameters.slots)
        self._count, self._values, used = 0, 0, set()
        for rotation, vector in diagonals:
            used.add(rotation % parameters.slots)
            if np.any(vector):  # the engine keeps no others
                self._count += 1
                self._values += len(vector)
        self._split(used)

    @property
    def nbytes(self) -> int:
        """See :class:`LinearTransformation`."""
        return self._values * (self.parameters.degree // self.parameters.slots) * STORED_BYTES[self.storage]

    @property
    def diagonals(self) -> int:
        """See :class:`LinearTransformation`."""
        return self._count


@dataclass(frozen=True)
class _Request:
    """What a refresh asks for: ciphertexts at ``to_level``, divided by ``2^shift``."""

    held: Sequence[Held]
    to_level: int
    shift: int


@dataclass(frozen=True)
class _Kept:
    """What takes the masks off: the refreshed ciphertexts."""

    results: list[Ciphertext]
    subrings: Sequence[Subring]
    to_level: int


class HollowEvaluator(Evaluator):
    """What an :class:`~cipherlm.engine.Evaluator` does with levels and scales, and nothing else."""

    def _result(self, level: int, scale: float, out: Ciphertext | None = None) -> Ciphertext:
        if out is None:
            return HollowCiphertext(self.parameters, level, scale)
        cast(HollowCiphertext, out).become(level, scale)
        return out

    def add(self, a: Ciphertext, b: Operand, *, out: Ciphertext | None = None) -> Ciphertext:
        """See :class:`Evaluator`."""
        level = min(a.level, b.level) if isinstance(b, Ciphertext | Plaintext) else a.level
        return self._result(level, a.scale, out)

    def subtract(self, a: Ciphertext, b: Operand, *, out: Ciphertext | None = None) -> Ciphertext:
        """See :class:`Evaluator`."""
        return self.add(a, b, out=out)

    def multiply(
        self,
        a: Ciphertext,
        b: Operand,
        *,
        relinearize: bool = True,
        rescale: bool = True,
        out: Ciphertext | None = None,
    ) -> Ciphertext:
        """See :class:`Evaluator`."""
        level, last = a.level, float(self.parameters.q[a.level])
        if is_number(b):
            constant = complex(b)
            if constant == complex(round(constant.real), round(constant.imag)):
                return self._result(level, a.scale, out)
            scale = a.scale * last
        elif isinstance(b, Ciphertext | Plaintext):
            level, scale = min(level, b.level), a.scale * b.scale
        else:
            scale = a.scale * last
        result = self._result(level, scale, out)
        return self.rescale(result, out=result) if rescale else result

    def dot(
        self, a: Sequence[Ciphertext], b: Sequence[Ciphertext] | Sequence[Plaintext], *, rescale: bool = True
    ) -> Ciphertext:
        """See :class:`Evaluator`."""
        result = self._result(min(item.level for item in (*a, *b)), a[0].scale * b[0].scale)
        return self.rescale(result, out=result) if rescale else result

    def rescale(self, a: Ciphertext, *, out: Ciphertext | None = None) -> Ciphertext:
        """See :class:`Evaluator`."""
        return self._result(a.level - 1, a.scale / self.parameters.q[a.level], out)

    def drop_level(self, a: Ciphertext, level: int, *, out: Ciphertext | None = None) -> Ciphertext:
        """See :class:`Evaluator`. Raises ``ValueError`` for a higher level."""
        if level > a.level:
            raise ValueError(f"level {a.level} is below level {level}")
        return self._result(level, a.scale, out)

    def set_scale(self, a: Ciphertext, scale: float, *, out: Ciphertext | None = None) -> Ciphertext:
        """See :class:`Evaluator`."""
        return self._result(a.level, scale, out)

    def adjust_scale(self, a: Ciphertext, scale: float, *, out: Ciphertext | None = None) -> Ciphertext:
        """See :class:`Evaluator`."""
        return self._result(a.level - 1, scale, out)

    def rotate(self, a: Ciphertext, by: int, *, out: Ciphertext | None = None) -> Ciphertext:
        """See :class:`Evaluator`."""
        return self._result(a.level, a.scale, out)

    def rotate_hoisted(self, a: Ciphertext, by: Sequence[int]) -> list[Ciphertext]:
        """See :class:`Evaluator`."""
        return [self._result(a.level, a.scale) for _ in by]

    def conjugate(self, a: Ciphertext, *, out: Ciphertext | None = None) -> Ciphertext:
        """See :class:`Evaluator`."""
        return self._result(a.level, a.scale, out)

    def split(self, a: Ciphertext) -> tuple[Ciphertext, Ciphertext]:
        """See :class:`Evaluator`."""
        return self._result(a.level, a.scale), self._result(a.level, a.scale)

    def inner_sum(self, a: Ciphertext, step: int, count: int, *, out: Ciphertext | None = None) -> Ciphertext:
        """See :class:`Evaluator`."""
        return self._result(a.level, a.scale, out)

    def transform_many(
        self, inputs: Sequence[Ciphertext], matrices: Sequence[LinearTransformation]
    ) -> list[list[Ciphertext]]:
        """See :class:`Evaluator`."""
        return [[self._transformed(a, matrix) for a in inputs] for matrix in matrices]

    def _transformed(self, a: Ciphertext, matrix: LinearTransformation) -> Ciphertext:
        if matrix.scale is None:
            return self._result(matrix.level - 1, a.scale)
        return self._result(matrix.level, a.scale * matrix.scale)

    def polynomial(self, a: Ciphertext, polynomial: Chebyshev) -> Ciphertext:
        """See :class:`Evaluator`."""
        return self._result(a.level - polynomial.levels(self.parameters, a.scale), self.parameters.scale)

    def mask(self, inputs: Sequence[Ciphertext], public_key: Any, **options: Any) -> Any:
        """See :class:`Evaluator`."""
        to_level, shift = options["to_level"], options["shift"]
        held: Sequence[Held] = options["held"]
        subrings = list(itertools.chain.from_iterable(held))
        pairs = zip(inputs, held, strict=True)
        results = [self._result(to_level, a.scale / 2**shift) for a, some in pairs for _ in some]
        return _Request(held, to_level, shift), _Kept(results, subrings, to_level)

    def unmask(self, reply: Any, mask: Any) -> list[Ciphertext]:
        """See :class:`Evaluator`."""
        kept: _Kept = mask
        return kept.results

    def rerandomize(self, a: Ciphertext, public_key: Any, *, flood: int = 0) -> Ciphertext:
        """See :class:`Evaluator`."""
        return self._result(a.level, a.scale)


class CountingEvaluator(TalliedEvaluator, HollowEvaluator):
    """An evaluator whose calls are counted, and compute nothing."""


class _HollowEncodings(Encodings):
    """Encodings of clear numbers that have no coefficients."""

    def encode(self, slots: NDArray[Any], level: int, scale: float) -> Plaintext:
        """See :class:`Encodings`."""
        return HollowPlaintext(self.parameters, level, scale)

    def transformation(
        self,
        diagonals: Iterable[tuple[int, NDArray[Any]]],
        *,
        level: int,
        giant_step: int,
        scale: float | None = None,
        storage: Storage | None = None,
        stages: tuple[int, int] | None = None,
    ) -> LinearTransformation:
        """See :class:`Encodings`."""
        return HollowTransformation(
            self.parameters,
            diagonals,
            level=level,
            giant_step=giant_step,
            storage=storage or self.storage,
            scale=scale,
            stages=stages,
        )


class CountingEncodings(TalliedEncodings, _HollowEncodings):
    """Encodings that are counted, and have no coefficients."""


class Sizes:
    """The bytes of what the parties of a geometry send each other: they depend on its parameters alone."""

    def __init__(self, geometry: Geometry) -> None:
        self.client = Client.generate(geometry)
        self._parameters = geometry.parameters
        self._key: SecretKey = self.client.secret_key
        self._public_key = self._key.public_key()
        self._evaluator = Evaluator(self._parameters)
        self.output = cache(self._output)
        """Bytes of a result at a level."""
        self._one_request = cache(self._request)

    def _ciphertext(self, level: int) -> Ciphertext:
        return self._key.encrypt(np.zeros(1), level)

    def _output(self, level: int) -> int:
        return len(self._evaluator.rerandomize(self._ciphertext(level), self._public_key).to_bytes())

    def refresh(self, held: Sequence[Held], to_level: int, shift: int) -> tuple[int, int]:
        """Return the bytes of a request for ciphertexts that hold this, to a level, and of the reply."""
        total = frame = self._one_request((), to_level, shift)
        for some in held:
            one = self._one_request((tuple(some),), to_level, shift)
            total = total[0] + one[0] - frame[0], total[1] + one[1] - frame[1]
        return total

    def _request(self, held: tuple[Held, ...], to_level: int, shift: int) -> tuple[int, int]:
        request, _ = self._evaluator.mask(
            [self._ciphertext(MASK_LEVEL)] * len(held),
            self._public_key,
            level=MASK_LEVEL,
            to_level=to_level,
            shift=shift,
            held=held,
        )
        return len(request.to_bytes()), len(self._key.refresh(request).to_bytes())


class CountingSession:
    """A session of one module in which everything is counted and nothing is computed."""

    def __init__(self, geometry: Geometry, module: Hosted, sizes: Sizes | None = None) -> None:
        self.geometry, self._sizes = geometry, sizes or Sizes(geometry)
        self._evaluator = CountingEvaluator(geometry.parameters)
        server = Server({"all": module}, geometry)
        self.encodings = CountingEncodings(self._evaluator, geometry.layout, storage=server.storage)
        refresh = MaskedRefresh(self._evaluator, cast(Any, None), self._exchange)
        self._arithmetic = Arithmetic(self._evaluator, self.encodings, refresh)
        self._session = Session(server, self._arithmetic, cast(Any, None), self._exchange)

    def evaluate(self, count: int, start: int) -> Tally:
        """Return what so many tokens take, the first of them at position ``start``."""
        tally = self._evaluator.tally = Tally()
        self._arithmetic.refreshes = self._arithmetic.round_trips = 0
        for position, tokens in self._sizes.client.passes(start, count):
            self._pass(tokens, position)
        tally.refreshes, tally.round_trips = self._arithmetic.refreshes, self._arithmetic.round_trips
        return tally

    def _pass(self, count: int, start: int) -> None:
        sizes, tally = self._sizes, self._evaluator.tally
        sent = sizes.client.encrypt(np.zeros((count, self.geometry.layout.width)), start)
        tally.input_bytes += sum(len(part.to_bytes()) for part in sent)
        inputs = [HollowCiphertext(part.parameters, part.level, part.scale) for part in sent]
        outputs = self._session.evaluate("all", start, inputs, count)
        tally.output_bytes += sum(sizes.output(part.level) for part in outputs)

    def _exchange(self, request: RefreshRequest) -> RefreshReply:
        asked = cast(_Request, request)
        down, up = self._sizes.refresh(asked.held, asked.to_level, asked.shift)
        self._evaluator.tally.refresh_down_bytes += down
        self._evaluator.tally.refresh_up_bytes += up
        return cast(RefreshReply, None)  # which the evaluator does not look at

    def cached_bytes(self) -> int:
        """Return the memory of the keys and values of the text that was read."""
        tensors = {id(x): x for cache in self._session.caches("all") for x in cache.past}
        limbs: int = sum(2 * (part.level + 1) for x in tensors.values() for part in x.parts)
        return limbs * self.geometry.parameters.degree * COEFFICIENT_BYTES

    def close(self) -> None:
        """End the threads."""
        self._arithmetic.close()


def outline(
    blocks: Blocks, ranges: Mapping[str, Interval], heads: int, head_dim: int, prefix: int, context: int
) -> Hosted:
    """Return blocks of which only shapes and ranges are known, as a server has them.

    Their weights, and the keys and values of a public prefix of so many tokens, are nowhere zero, and shared
    by all blocks: a matrix has the diagonals that any weights of its shape have.
    """
    shared: dict[tuple[str, tuple[int, ...]], Linear] = {}
    others: dict[str, Linear] = {}
    for name, layer in blocks.named(Linear):
        inside = name.split(".", 2)[-1]  # behind "blocks" and the number
        ones = np.broadcast_to(1.0, layer.weight.shape), np.broadcast_to(1.0, layer.bias.shape)
        others[name] = shared.setdefault((inside, layer.weight.shape), Linear(*ones))
    fitted = blocks.replaced(others).fitted(ranges, context)
    before = None
    if prefix:
        keys, values = np.random.default_rng(0).normal(size=(2, heads, prefix, head_dim))
        before = Prefix(keys, values)
    return Hosted(fitted, [before] * len(blocks.blocks))


def kept_bytes(encodings: Encodings, module: Hosted) -> int:
    """Return the memory of a server's encoded weights and masks, as far as evaluations have needed them.

    Blocks share the weights of an :func:`outline`: each counts with matrices of its own. What is added to
    ciphertexts depends on their scales, which are of a block, and is all there.
    """
    owners: list[Linear | Prefix] = [layer for _, layer in cast(Blocks, module.module).named(Linear)]
    owners += [prefix for prefix in module.prefixes if prefix is not None]
    total = sum(map(_bytes, encodings.kept()))
    for owner, blocks in Counter(owners).items():
        for kept in encodings.layer(owner).kept():
            total += _bytes(kept) * (1 if isinstance(kept, Plaintext) else blocks)
    return total


def _bytes(kept: Any) -> int:
    return sum(map(_bytes, kept)) if isinstance(kept, list | tuple) else int(kept.nbytes)
