"""One client's products: keys first, then requests that are answered in their order. See docs/protocol.md."""

import asyncio
import time
from asyncio import create_task, to_thread
from collections import deque
from contextlib import suppress
from typing import cast

from fastapi import WebSocket

from cipherlm.errors import Refused
from cipherlm.serving import protocol
from cipherlm.serving.computation import HostedProducts, Products, WorkerLost
from cipherlm.serving.conversation import Conversation
from cipherlm.serving.failures import Failure, broken
from cipherlm.serving.linear import IN_FLIGHT
from cipherlm.serving.logs import log, log_exception
from cipherlm.serving.protocol import PRODUCTS_CLIENT_MESSAGES, Multiply, ProtocolError, pack, unpack
from cipherlm.serving.scheduler import Full, Job
from cipherlm.serving.service import Service, shutting_down


class ProductsSession(Conversation):
    """A client's keys, and its requests: one is computed, the others wait for it.

    So each client has one job with the scheduler at a time, whatever it asks for.
    """

    def __init__(self, service: Service, socket: WebSocket, owner: str) -> None:
        super().__init__(service, socket, owner)
        self._connecting: asyncio.Task[None] | None = None
        self._products: Products | None = None
        self._requests: deque[Multiply] = deque()
        self._job: Job | None = None
        self._began = 0.0
        self._deadline: asyncio.TimerHandle | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._last_id = -1
        self._answered = 0

    @property
    def _greeting_seconds(self) -> float:
        return self._limits.upload_seconds  # keys come with it

    @property
    def _busy(self) -> bool:
        return self._job is not None

    def _cancel(self) -> None:
        self._requests.clear()
        if self._job is not None and self._service.scheduler.cancel(self._job):
            self._job = None
            self._idle.set()

    # What the client says.

    def _said(self, data: bytes) -> None:
        message = unpack(data, PRODUCTS_CLIENT_MESSAGES)
        if isinstance(message, protocol.Connect):
            self._connect(message)
        elif isinstance(message, protocol.Close):
            self._over.set()
        elif self._products is None:
            raise ProtocolError(f'"{message.type}" before the answer to "connect"')
        else:
            self._ask(message)

    def _connect(self, message: protocol.Connect) -> None:
        description = self._service.description
        if self._connecting is not None:
            raise ProtocolError('"connect" comes once')
        if message.protocol != protocol.VERSION:
            raise ProtocolError(f"this server speaks version {protocol.VERSION} of the protocol")
        if (message.model, message.plan) != (description["fingerprint"], description["plan"]):
            raise Failure(protocol.UNKNOWN_MODEL, "this server has another model: ask it for /v1/model")
        if len(message.blob) > description["key_bytes"]:
            raise Failure(protocol.TOO_LARGE, "more keys than this model needs")
        self._service.admit(self.owner)
        self._wait_no_more()
        self._connecting = create_task(self._open(message.blob))

    def _ask(self, request: Multiply) -> None:
        if request.id <= self._last_id:
            raise ProtocolError("the ids of requests must increase")
        self._last_id = request.id
        if len(self._requests) + self._busy >= IN_FLIGHT:
            raise ProtocolError(f"more than {IN_FLIGHT} requests that are not answered")
        self._requests.append(request)
        self._wait_no_more()
        if not self._busy:
            self._next()

    def _next(self) -> None:
        """Have the next request computed, or wait for one."""
        if self._ending:  # what has not begun, the client asks for again
            self._fail(shutting_down())
            return
        while self._requests and not self._over.is_set():
            request = self._requests.popleft()
            try:
                self._service.check_budget(self.owner)
                self._begin(request)
            except Full:
                self._refuse(request, Failure(protocol.BUSY, "the queue is full", retry=True))
            except Failure as failure:
                self._refuse(request, failure)
            else:
                return
        self._wait(self._limits.idle_seconds, self._late, "nothing was asked for")

    def _begin(self, request: Multiply) -> None:
        products = self._products
        assert products is not None

        def work(_job: Job) -> None:
            outcome = self._computed(products, request)
            with suppress(RuntimeError):  # the loop is closed: nobody is left to hear
                self._loop.call_soon_threadsafe(self._end, *outcome)

        self._began = time.monotonic()
        self._idle.clear()
        try:
            self._job = self._service.scheduler.submit(self.owner, work)
        except Full:
            self._idle.set()
            raise
        self._service.budget.spend(self.owner)
        self._deadline = self._loop.call_later(
            self._limits.evaluation_seconds, self._happen, self._late, "the queue was too long to multiply"
        )

    # What comes of it.

    def _end(self, outcome: str, message: bytes) -> None:
        self._job = None
        self._idle.set()
        if self._deadline is not None:
            self._deadline.cancel()
        self._service.metrics.evaluations.labels(outcome).inc()
        self._service.metrics.seconds.observe(time.monotonic() - self._began)
        if self._over.is_set():
            return
        self._answered += 1
        self._outbox.put_nowait(message)
        self._happen(self._next)

    def _refuse(self, request: Multiply, failure: Failure) -> None:
        self._service.metrics.evaluations.labels(failure.code).inc()
        self._outbox.put_nowait(_packed_failure(request, failure))

    def _opened(self) -> None:
        description = self._service.description
        limits = {
            "max_rows": description["max_rows"],
            "in_flight": IN_FLIGHT,
            "message_bytes": description["message_bytes"],
            "idle_seconds": int(self._limits.idle_seconds),
        }
        self._send(protocol.Connected(self.id, limits))
        log("products opened", session=self.id, owner=self.owner)
        self._next()

    async def _open(self, keys: bytes) -> None:
        model = cast("HostedProducts", self._service.model)  # or there were no route to this
        try:
            async with self._service.loading:
                self._products = await to_thread(model.connect, keys)
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
        if self._deadline is not None:
            self._deadline.cancel()
        if self._connecting is None:
            return
        await self._connecting
        await self._idle.wait()
        if self._products is not None:
            try:
                await to_thread(self._products.close)
            except Exception as error:
                log_exception("products did not close", error, session=self.id)
        self._service.dismiss(self.owner)
        log("products ended", session=self.id, owner=self.owner, answered=self._answered)

    # From here on in another thread.

    def _computed(self, products: Products, request: Multiply) -> tuple[str, bytes]:
        try:
            blobs = products.multiply(request.group, request.transposed, request.rows, request.blobs)
            return "ok", pack(protocol.Result(request.id, blobs))
        except WorkerLost as error:
            failure = Failure(protocol.BUSY, str(error), retry=True)
        except Refused as error:
            failure = Failure(protocol.BAD_REQUEST, str(error))
        except Exception as error:
            reference = log_exception("product broke", error)
            failure = broken("the server could not multiply", reference)
        return failure.code, _packed_failure(request, failure)


def _packed_failure(request: Multiply, failure: Failure) -> bytes:
    return pack(
        protocol.error(
            failure.code,
            failure.message,
            retry=failure.retry,
            id=request.id,
            retry_after=failure.retry_after,
        )
    )
