"""Chunks of a long prompt side by side, layer by layer.

Each chunk is computed in a thread of its own, by the same code as one alone. They meet where something is
cheaper for all of them at once: at matrices, whose diagonals are transformed once for all chunks, and at
refreshes, which share round trips and ciphertexts. A chunk waits for those before it where it needs their
keys and values.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar, cast

from cipherlm.engine import Ciphertext, LinearTransformation, threads
from cipherlm.nn.blocks import Report, evaluate
from cipherlm.nn.module import Module
from cipherlm.nn.tensor import Cache, T
from cipherlm.schemes.ckks.arithmetic import Arithmetic, Scaled
from cipherlm.schemes.ckks.ciphertext_tensor import CiphertextTensor
from cipherlm.schemes.ckks.evaluator import Evaluator

A = TypeVar("A")
B = TypeVar("B")
R = TypeVar("R")

Chunk = Callable[[Arithmetic], CiphertextTensor]
"""What makes the tensor of a chunk that is to be computed with some arithmetic."""


def evaluate_together(
    arithmetic: Arithmetic, module: Module, chunks: Sequence[Chunk], caches: Sequence[Cache], report: Report
) -> tuple[list[CiphertextTensor], list[Cache]]:
    """Return a module's outputs for chunks, each behind the one before it, and the caches behind the last.

    ``caches`` are those before the first chunk, one for each attention layer.
    """
    links = [[_Link(cache.prefix, cache.past) for cache in caches]]
    for _ in chunks[1:]:
        links.append([_Link(before.prefix, before=before) for before in links[-1]])
    last = len(chunks) - 1

    def computed(index: int, own: Arithmetic) -> CiphertextTensor:
        # The last chunk ends a block when all others have passed its last matrix.
        heard = report if index == last else None
        return evaluate(module, chunks[index](own), links[index], heard)

    meeting = Meeting(arithmetic, len(chunks))
    results = meeting.run([partial(computed, index) for index in range(len(chunks))])
    return results, [Cache(link.prefix, link.past) for link in links[-1]]


class _Link(Cache):
    """The cache of one layer as one chunk sees it: behind that of the chunk before."""

    def __init__(self, prefix: Any, past: Any = None, before: _Link | None = None) -> None:
        super().__init__(prefix)
        self._first, self._before = past, before

    def extend(self, key: T, value: T) -> tuple[Any, Any]:
        """See :class:`Cache`; waits for the keys and values of the chunk before."""
        arithmetic, before = cast(CiphertextTensor, key).arithmetic, self._before
        if before is not None:
            arithmetic.wait(lambda: before.past is not None)
        past = self._first if before is None else before.past
        self.past = key.with_past(value, past, self.prefix)
        arithmetic.changed()
        return cast(tuple[Any, Any], self.past)


@dataclass(eq=False)
class _Call:
    """What a chunk asks for, together with all those that ask for the same ``kind`` of thing."""

    chunk: int
    kind: tuple[Any, ...]
    inputs: Sequence[Any]
    answer: Callable[[Sequence[_Call]], None] = field(repr=False)
    outputs: list[Ciphertext] | None = None


@dataclass(eq=False)
class _Waiter:
    """A chunk that waits for something to be there."""

    until: Callable[[], bool]
    woken: bool = False


class Meeting:
    """Where chunks meet that are computed side by side.

    Nothing is done for all of them before each either is here or waits for another. Then one kind of refresh
    is answered, that of most chunks, so that the few others are caught up with; and a matrix where all chunks
    are at it. As many of them compute at a time as there are cores.
    """

    def __init__(self, arithmetic: Arithmetic, chunks: int) -> None:
        self._arithmetic = arithmetic
        self._changed = threading.Condition()
        self._cores = threading.Semaphore(threads())
        self._unfinished = self._awake = chunks
        self._calls: list[_Call] = []
        self._waiters: list[_Waiter] = []
        self._failure: BaseException | None = None

    def run(self, chunks: Sequence[Callable[[Arithmetic], R]]) -> list[R]:
        """Return what each chunk's function makes of its arithmetic. Raises what the first to fail does."""
        results: dict[int, R] = {}
        # Daemons: native code must not keep a process that was told to end.
        workers = [
            threading.Thread(target=self._compute, args=(index, chunk, results), daemon=True)
            for index, chunk in enumerate(chunks)
        ]
        try:
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        except BaseException as error:  # there is no room for a thread, or an interrupt from the keyboard
            self._fail(error)
            for worker in workers:
                if worker.ident is not None:
                    worker.join()
        # Whatever failed, its ciphertexts and keys go when the caller lets go of the error.
        failure, self._failure = self._failure, None
        self._calls, self._waiters = [], []
        try:
            if failure is not None:
                raise failure
        finally:
            del failure
        return [results[index] for index in range(len(chunks))]

    def _compute(self, index: int, chunk: Callable[[Arithmetic], R], results: dict[int, R]) -> None:
        try:
            with self._cores:
                if self._failure is None:
                    results[index] = chunk(_Beside(self._arithmetic, self, index))
        except BaseException as error:
            self._fail(error)
        finally:
            with self._changed:
                self._unfinished -= 1
                self._awake -= 1
                self._changed.notify_all()

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()

    def ask(self, call: _Call) -> list[Ciphertext]:
        """Return the outputs of a call, once it was answered with others of its kind."""
        self._cores.release()
        try:
            with self._changed:
                self._calls.append(call)
                self._awake -= 1
            while True:
                with self._changed:
                    self._changed.wait_for(
                        lambda: self._failure or call.outputs is not None or not self._awake
                    )
                    if self._failure:
                        raise CancelledError  # another chunk has failed
                    if call.outputs is not None:
                        return call.outputs
                    together = self._next()
                together[0].answer(together)
                with self._changed:
                    self._changed.notify_all()
        finally:
            self._cores.acquire()

    def _next(self) -> list[_Call]:
        """Take the calls that are to be answered now: whoever takes them answers."""
        kinds: dict[tuple[Any, ...], list[_Call]] = {}
        for call in sorted(self._calls, key=lambda call: call.chunk):
            kinds.setdefault(call.kind, []).append(call)
        refreshes = [calls for calls in kinds.values() if calls[0].kind[0] == _REFRESH]
        if refreshes:
            together = max(refreshes, key=len)
        else:
            together = max(kinds.values(), key=len)
            if len(together) != self._unfinished:
                raise RuntimeError(_CIRCLE)
        self._calls = [call for call in self._calls if call not in together]
        self._awake += len(together)
        return together

    def wait(self, until: Callable[[], bool]) -> None:
        """Return when something is there: others call :meth:`changed` then."""
        waiter = _Waiter(until)
        with self._changed:
            if until():
                return
            self._waiters.append(waiter)
            self._awake -= 1
            self._changed.notify_all()
        self._cores.release()
        try:
            with self._changed:
                self._changed.wait_for(
                    lambda: waiter.woken or self._failure or not (self._awake or self._calls)
                )
                if not waiter.woken:
                    raise CancelledError if self._failure else RuntimeError(_CIRCLE)
        finally:
            self._cores.acquire()

    def changed(self) -> None:
        """Wake those whose wait is over."""
        with self._changed:
            for waiter in self._waiters:
                waiter.woken = waiter.until()
                self._awake += waiter.woken
            self._waiters = [waiter for waiter in self._waiters if not waiter.woken]
            self._changed.notify_all()


_MATRICES, _REFRESH = "matrices", "refresh"
_CIRCLE = "chunks of one text wait for one another, or for different matrices"


class _Beside(Arithmetic):
    """What the tensors of one chunk compute with beside those of others."""

    alone = False

    def __init__(self, whole: Arithmetic, meeting: Meeting, chunk: int) -> None:
        # Not Arithmetic's: keys, threads and counts are those of the whole.
        self.encodings, self.parameters = whole.encodings, whole.parameters
        self._whole, self._meeting, self._chunk = whole, meeting, chunk

    @property
    def evaluator(self) -> Evaluator:
        """See :class:`Arithmetic`."""
        return self._whole.evaluator

    def each(self, function: Callable[[A], B], items: Iterable[A]) -> list[B]:
        """See :class:`Arithmetic`."""
        return self._whole.each(function, items)

    def wait(self, until: Callable[[], bool]) -> None:
        """See :class:`Arithmetic`."""
        self._meeting.wait(until)

    def changed(self) -> None:
        """See :class:`Arithmetic`."""
        self._meeting.changed()

    def transformed(
        self, ciphertext: Ciphertext, matrices: Sequence[LinearTransformation]
    ) -> list[Ciphertext]:
        """See :class:`Arithmetic`."""

        def answer(calls: Sequence[_Call]) -> None:
            inputs = [source for call in calls for source in call.inputs]
            rows = self.evaluator.transform_many(inputs, matrices)
            for call, outputs in zip(calls, zip(*rows, strict=True), strict=True):
                call.outputs = list(outputs)

        return self._ask((_MATRICES, id(matrices)), [ciphertext], answer)

    def refresh_together(
        self, real: Sequence[Scaled], others: Sequence[Ciphertext], level: int, shift: int
    ) -> tuple[list[Ciphertext], list[Ciphertext]]:
        """See :class:`Arithmetic`."""

        def answer(calls: Sequence[_Call]) -> None:
            every = [item for call in calls for item in call.inputs]
            parts, wholes = self._whole.refresh_together(
                [item for item in every if isinstance(item, Scaled)],
                [item for item in every if not isinstance(item, Scaled)],
                level,
                shift,
            )
            rest = iter(parts), iter(wholes)
            for call in calls:
                call.outputs = [next(rest[0 if isinstance(item, Scaled) else 1]) for item in call.inputs]

        fresh = self._ask((_REFRESH, level, shift), [*real, *others], answer)
        return fresh[: len(real)], fresh[len(real) :]

    def _ask(
        self, kind: tuple[Any, ...], inputs: Sequence[Any], answer: Callable[[Sequence[_Call]], None]
    ) -> list[Ciphertext]:
        return self._meeting.ask(_Call(self._chunk, kind, inputs, answer))
