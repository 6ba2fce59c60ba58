"""One client's session: what may be said when.

What happens to a session (a message, a timer, news of an evaluation) is a call of one of its methods in the
loop. None of them waits, so each runs alone and nothing needs a lock.
"""

import asyncio
import time
from asyncio import create_task, to_thread
from typing import cast

from fastapi import WebSocket

from cipherlm.errors import Refused
from cipherlm.serving import protocol
from cipherlm.serving.computation import Computation, HostedModel, WorkerLost
from cipherlm.serving.conversation import Conversation
from cipherlm.serving.evaluations import Evaluation
from cipherlm.serving.failures import Failure, broken
from cipherlm.serving.keys import Lease
from cipherlm.serving.logs import log, log_exception
from cipherlm.serving.protocol import CLIENT_MESSAGES, ProtocolError, unpack
from cipherlm.serving.scheduler import Full
from cipherlm.serving.service import Service, shutting_down

_UNSENT_NEWS = 8
"""Where so many messages wait to be sent, progress is left out."""


class Session(Conversation):
    """A session over one WebSocket: keys that were uploaded, one evaluation at a time."""

    def __init__(self, service: Service, socket: WebSocket, owner: str) -> None:
        super().__init__(service, socket, owner)
        self._lease: Lease | None = None
        self._loading: asyncio.Task[None] | None = None
        self._computation: Computation | None = None
        self._evaluation: Evaluation | None = None
        self._key_timer: asyncio.TimerHandle | None = None
        self._releasing: asyncio.Task[None] | None = None
        self._last_id = -1

    @property
    def _busy(self) -> bool:
        return self._evaluation is not None

    def _cancel(self) -> None:
        if self._evaluation is not None:
            self._evaluation.cancel(Failure(protocol.CANCELLED, "the session is over"))

    # What the client says.

    def _said(self, data: bytes) -> None:
        message = unpack(data, CLIENT_MESSAGES)
        if isinstance(message, protocol.Open):
            self._open(message)
        elif isinstance(message, protocol.Close):
            self._over.set()
        elif self._computation is None:
            raise ProtocolError(f'"{message.type}" before the session is open')
        elif isinstance(message, protocol.Evaluate):
            self._evaluate(message, self._computation)
        elif message.id > self._last_id:
            raise ProtocolError(f'"{message.type}" for an evaluation that there was not')
        # What comes for an evaluation that has ended has crossed its end.
        elif self._evaluation is not None and message.id == self._last_id:
            if isinstance(message, protocol.Refreshed):
                self._evaluation.answer(message.round, message.blob)
                self._wait_no_more()
            else:
                self._evaluation.cancel(Failure(protocol.CANCELLED, "cancelled by the client"))

    def _open(self, message: protocol.Open) -> None:
        description = self._service.description
        if self._lease is not None:
            raise ProtocolError("the session is open already")
        if message.protocol != protocol.VERSION:
            raise ProtocolError(f"this server speaks version {protocol.VERSION} of the protocol")
        if message.model != description["fingerprint"]:
            raise Failure(protocol.UNKNOWN_MODEL, "this server has another model: ask it for /v1/model")
        if message.keys.keys() != description["keys"].keys():
            kinds = ", ".join(description["keys"])
            raise Failure(protocol.BAD_REQUEST, f"a session needs keys of exactly these kinds: {kinds}")
        assert self._service.keys is not None  # as all models that have sessions need some
        lease = self._service.keys.lease(self.owner, message.keys)
        try:
            self._service.admit(self.owner)
        except Failure:
            lease.release()
            raise
        self._lease = lease
        self._wait_no_more()
        self._loading = create_task(self._load(lease))

    def _evaluate(self, request: protocol.Evaluate, computation: Computation) -> None:
        if self._evaluation is not None:
            raise ProtocolError("an evaluation before the last one has ended")
        if request.id <= self._last_id:
            raise ProtocolError("the ids of evaluations must increase")
        self._last_id = request.id
        evaluation = Evaluation(computation, request, self)
        try:
            self._check(request)
            self._service.check_budget(self.owner)
            # Before it starts: it may end before the next line.
            self._evaluation = evaluation
            evaluation.start(self._service.scheduler, self.owner)
            # Each ciphertext of a pass could have been an evaluation of its own.
            self._service.budget.spend(self.owner, max(1, len(request.blobs)))
        except (Failure, Full) as error:
            self._evaluation = None
            failure = (
                error
                if isinstance(error, Failure)
                else Failure(protocol.BUSY, "the queue is full", retry=True)
            )
            self._service.metrics.evaluations.labels(failure.code).inc()
            self._send(
                protocol.error(
                    failure.code,
                    failure.message,
                    retry=failure.retry,
                    id=request.id,
                    retry_after=failure.retry_after,
                )
            )
            self._become_idle()
            return
        self._wait_no_more()
        late = Failure(protocol.TIMEOUT, "the evaluation took longer than it may", retry=True)
        evaluation.deadline = self._loop.call_later(self._limits.evaluation_seconds, evaluation.cancel, late)
        log("evaluation queued", session=self.id, id=request.id, module=request.module, tokens=request.count)

    def _check(self, request: protocol.Evaluate) -> None:
        if request.module not in self._service.description["modules"]:
            raise Failure(protocol.BAD_REQUEST, "the model has no such module")
        most = self._service.description["max_tokens"]
        if request.count < 1 or request.start + request.count > most:
            raise Failure(protocol.BAD_REQUEST, f"a text has 1 to {most} tokens here")

    def _wait_no_more(self) -> None:
        super()._wait_no_more()
        if self._key_timer is not None:
            self._key_timer.cancel()
            self._key_timer = None

    # What evaluations tell.

    def moved(self, evaluation: Evaluation, position: int) -> None:
        """Tell the client its place in the queue."""
        self._tell(evaluation, protocol.Queued(evaluation.request.id, position))

    def progressed(self, evaluation: Evaluation, done: int, total: int) -> None:
        """Tell the client how far its evaluation is."""
        self._tell(evaluation, protocol.Progress(evaluation.request.id, done, total))

    def asked(self, evaluation: Evaluation, round: int, request: bytes) -> None:
        """Ask the client to refresh, and give it a time."""
        self._service.metrics.refreshes.inc()
        self._send(protocol.Refresh(evaluation.request.id, round, request))
        late = Failure(protocol.TIMEOUT, "the answer to a refresh did not come in time", retry=True)
        self._wait(self._limits.reply_seconds, evaluation.cancel, late)

    def evaluated(self, evaluation: Evaluation, outcome: str, message: bytes) -> None:
        """Send what came of an evaluation, and wait for the next."""
        seconds = time.monotonic() - evaluation.began
        self._service.metrics.evaluations.labels(outcome).inc()
        self._service.metrics.seconds.observe(seconds)
        log(
            "evaluation ended",
            session=self.id,
            id=evaluation.request.id,
            outcome=outcome,
            seconds=round(seconds, 3),
        )
        if evaluation.deadline is not None:
            evaluation.deadline.cancel()
        self._evaluation = None
        if self._over.is_set():
            return
        self._outbox.put_nowait(message)
        if self._ending:
            self._fail(shutting_down())
        elif outcome == protocol.SHUTTING_DOWN:
            self._fail(Failure(outcome, "what the session remembered is lost: open another one", retry=True))
        else:
            self._become_idle()

    def _tell(self, evaluation: Evaluation, news: protocol.Queued | protocol.Progress) -> None:
        # A client that does not even take what was sent before needs no more of it.
        if evaluation is self._evaluation and self._outbox.qsize() < _UNSENT_NEWS:
            self._send(news)

    # The rest of what happens.

    def _opened(self) -> None:
        numbers = {
            "message_bytes": self._service.description["message_bytes"],
            "max_tokens": self._service.description["max_tokens"],
            "idle_seconds": int(self._limits.idle_seconds),
            "reply_seconds": int(self._limits.reply_seconds),
            "evaluation_seconds": int(self._limits.evaluation_seconds),
        }
        self._send(protocol.Opened(self.id, numbers))
        log("session opened", session=self.id, owner=self.owner)
        self._become_idle()

    def _become_idle(self) -> None:
        self._wait(self._limits.idle_seconds, self._late, "nothing was asked for")
        self._key_timer = self._loop.call_later(self._limits.keys_seconds, self._release_keys)

    def _release_keys(self) -> None:
        if self._computation is not None and not self._over.is_set():
            self._releasing = create_task(to_thread(self._computation.release_keys))

    async def _load(self, lease: Lease) -> None:
        try:
            async with self._service.loading:
                model = cast("HostedModel", self._service.model)  # or there were no route to this
                self._computation = await to_thread(model.open, lease.paths)
        except Refused as error:
            self._fail(Failure(protocol.BAD_KEYS, str(error)))
        except WorkerLost as error:
            self._fail(Failure(protocol.BUSY, str(error), retry=True))
        except Exception as error:
            reference = log_exception("keys could not be opened", error, session=self.id)
            self._fail(broken("the server could not open these keys", reference))
        else:
            if not self._over.is_set():
                self._opened()

    async def _let_go(self) -> None:
        """Give back memory, keys and place, when no thread uses them any more."""
        if self._loading is not None:
            await self._loading
        if self._evaluation is not None:
            await self._evaluation.ended.wait()
        self._wait_no_more()
        if self._releasing is not None:
            await asyncio.wait({self._releasing})
        if self._computation is not None:
            try:
                await to_thread(self._computation.close)
            except Exception as error:
                log_exception("a session did not close", error, session=self.id)
        if self._lease is not None:
            self._lease.release()
            self._service.dismiss(self.owner)
            log("session ended", session=self.id, owner=self.owner)
