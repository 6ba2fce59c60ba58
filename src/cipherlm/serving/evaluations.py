"""One evaluate call, between the loop that talks to clients and the thread that computes."""

import asyncio
import time
from asyncio import TimerHandle
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Protocol

from cipherlm.errors import Refused
from cipherlm.serving import protocol
from cipherlm.serving.computation import Cancelled, Computation, WorkerLost
from cipherlm.serving.failures import Failure, broken
from cipherlm.serving.logs import log_exception
from cipherlm.serving.protocol import ProtocolError, pack
from cipherlm.serving.scheduler import Job, Scheduler


class Listener(Protocol):
    """Who hears of an evaluation, always in the loop."""

    def moved(self, evaluation: "Evaluation", position: int) -> None:
        """So many are before it in the queue now."""

    def progressed(self, evaluation: "Evaluation", done: int, total: int) -> None:
        """So many of its blocks are done."""

    def asked(self, evaluation: "Evaluation", round: int, request: bytes) -> None:
        """The client is to answer ``request``, see :meth:`Evaluation.answer`."""

    def evaluated(self, evaluation: "Evaluation", outcome: str, message: bytes) -> None:
        """It is over: "ok" or an error's code, and the message to send."""


class Evaluation:
    """An evaluation that is queued, runs or has ended. The public methods belong to the loop.

    ``ended`` is done when no thread works on it any more.
    """

    def __init__(self, computation: Computation, request: protocol.Evaluate, listener: Listener) -> None:
        self.request = request
        self.began = time.monotonic()
        self.deadline: TimerHandle | None = None
        self.ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._computation = computation
        self._listener = listener
        self._scheduler: Scheduler | None = None
        self._job: Job | None = None
        self._reason: Failure | None = None
        self._round = 0
        self._reply: Future[bytes] | None = None

    def start(self, scheduler: Scheduler, owner: str) -> None:
        """Queue it. Raises :class:`~cipherlm.serving.scheduler.Full`."""
        self._scheduler = scheduler
        self._job = scheduler.submit(owner, self._work, self._moved)

    def answer(self, round: int, blob: bytes) -> None:
        """Take the client's answer to a refresh. Raises :class:`ProtocolError` if nobody asked for it."""
        if self._reason is not None:
            return  # it crossed the news that the evaluation is cancelled
        if self._reply is None or round != self._round:
            raise ProtocolError("an answer to a refresh that was not asked for")
        reply, self._reply = self._reply, None
        self._round += 1
        reply.set_result(blob)

    def cancel(self, reason: Failure) -> None:
        """Have it end: at once if it waits, else when its thread looks up. The first reason counts."""
        if self._reason is not None:
            return
        self._reason = reason
        if self._reply is not None:
            self._reply.set_exception(Cancelled())
            self._reply = None
        if self._scheduler is not None and self._job is not None and self._scheduler.cancel(self._job):
            self._end(*self._failed(reason))

    def _ask(self, request: bytes, reply: "Future[bytes]") -> None:
        if self._reason is not None:
            reply.set_exception(Cancelled())
            return
        self._reply = reply
        self._listener.asked(self, self._round, request)

    def _end(self, outcome: str, message: bytes) -> None:
        self.ended.set()
        self._listener.evaluated(self, outcome, message)

    # From here on in other threads.

    def _work(self, job: Job) -> None:
        request = self.request

        def exchange(question: bytes) -> bytes:
            self._look_up()
            reply: Future[bytes] = Future()
            self._in_loop(self._ask, question, reply)
            with job.paused():
                return reply.result()

        try:
            self._look_up()
            blobs = self._computation.evaluate(
                request.module, request.start, request.count, request.blobs, exchange, self._report
            )
            outcome = "ok", _packed(request.id, blobs)
        except Cancelled:
            outcome = self._failed(self._reason or Failure(protocol.CANCELLED, "the evaluation gave up"))
        except WorkerLost as error:
            outcome = self._failed(Failure(protocol.SHUTTING_DOWN, str(error), retry=True))
        except Refused as error:
            outcome = self._failed(Failure(protocol.BAD_REQUEST, str(error)))
        except Exception as error:
            reference = log_exception("evaluation broke", error)
            outcome = self._failed(broken("the server could not evaluate this", reference))
        self._in_loop(self._end, *outcome)

    def _report(self, done: int, total: int) -> None:
        self._look_up()
        self._in_loop(self._listener.progressed, self, int(done), int(total))

    def _moved(self, position: int) -> None:
        self._in_loop(self._listener.moved, self, position)

    def _look_up(self) -> None:
        if self._reason is not None:
            raise Cancelled

    def _in_loop(self, function: Callable[..., None], *arguments: Any) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody is left to hear
            self._loop.call_soon_threadsafe(function, *arguments)

    def _failed(self, failure: Failure) -> tuple[str, bytes]:
        error = protocol.error(failure.code, failure.message, retry=failure.retry, id=self.request.id)
        return failure.code, pack(error)


def _packed(id: int, blobs: list[bytes]) -> bytes:
    """Return the result as a message; one that does not fit is a fault of ours, not of the client."""
    try:
        return pack(protocol.Result(id, blobs))
    except ProtocolError as error:
        raise RuntimeError("a result that no message can carry") from error
