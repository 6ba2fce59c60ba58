"""What any conversation over a WebSocket is: messages in, messages out, times, and an end.

What happens (a message, a timer, news of a computation) is a call of one of the methods in the loop. None of
them waits, so each runs alone and nothing needs a lock.
"""

import asyncio
import secrets
from abc import ABC, abstractmethod
from asyncio import Queue, TimerHandle, create_task, wait_for
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from fastapi import WebSocket, WebSocketDisconnect

from cipherlm.serving import protocol
from cipherlm.serving.failures import Failure, broken
from cipherlm.serving.logs import log, log_exception
from cipherlm.serving.protocol import ProtocolError, message_limit, pack
from cipherlm.serving.service import FAREWELL_SECONDS, Service, shutting_down

_MOST_UNSENT = 64
"""A client that asks on without taking so many answers is none."""
_CLOSED = 1000
_POLICY_VIOLATION = 1008
_SERVICE_RESTART = 1012


class Conversation(ABC):
    """A conversation over one WebSocket, from its acceptance to its end."""

    def __init__(self, service: Service, socket: WebSocket, owner: str) -> None:
        self.id = secrets.token_hex(8)
        self._service = service
        self._limits = service.limits
        self._socket = socket
        self.owner = owner
        self._loop = asyncio.get_running_loop()
        self._outbox: Queue[bytes | None] = Queue()
        self._over = asyncio.Event()
        self._connected = True
        self._ending = False
        self._close_code = _CLOSED
        self._timer: TimerHandle | None = None

    async def run(self) -> None:
        """Serve the client until the session is over, then let go of all that it held."""
        self._service.conversations.add(self)
        reader, writer = create_task(self._read()), create_task(self._write())
        self._wait(self._greeting_seconds, self._late, "no greeting came")
        try:
            await self._over.wait()
        finally:
            self._wait_no_more()
            self._cancel()
            reader.cancel()
            await self._part(writer)
            self._service.conversations.discard(self)
            await self._let_go()

    def end(self, *, at_once: bool) -> None:
        """End because the server does; what is computed may finish unless ``at_once``."""
        self._ending = True
        if at_once or not self._busy:
            self._fail(shutting_down())

    @property
    def _greeting_seconds(self) -> float:
        """How long the client's first message may take."""
        return self._limits.head_seconds

    @property
    @abstractmethod
    def _busy(self) -> bool:
        """Whether something is computed for the client."""

    @abstractmethod
    def _said(self, data: bytes) -> None:
        """Take a message. Raises :class:`Failure` and :class:`ProtocolError`."""

    @abstractmethod
    def _cancel(self) -> None:
        """Cancel what is computed: nobody waits for it any more."""

    @abstractmethod
    async def _let_go(self) -> None:
        """Give back memory, keys and place, when no thread uses them any more."""

    def _received(self, data: bytes | None) -> None:
        if self._outbox.qsize() > _MOST_UNSENT:
            raise ProtocolError("messages from a client that does not take the answers")
        if data is None:
            raise ProtocolError("a text message; messages are binary")
        self._service.metrics.bytes.labels("in").inc(len(data))
        if len(data) > message_limit(self._service.description):
            raise Failure(protocol.TOO_LARGE, "a message larger than this model's are")
        self._said(data)

    def _gone(self) -> None:
        self._connected = False
        self._over.set()

    def _late(self, what: str) -> None:
        raise Failure(protocol.TIMEOUT, f"{what} in time", retry=True)

    def _fail(self, failure: Failure) -> None:
        """Tell the client why its session ends, and end it."""
        if self._over.is_set():
            return
        log("session failed", session=self.id, owner=self.owner, code=failure.code)
        self._send(protocol.error(failure.code, failure.message, retry=failure.retry))
        self._close_code = _SERVICE_RESTART if failure.code == protocol.SHUTTING_DOWN else _POLICY_VIOLATION
        self._over.set()

    def _wait(self, seconds: float, then: Callable[..., None], *arguments: Any) -> None:
        """Call ``then`` unless the client does what is waited for within ``seconds``."""
        self._wait_no_more()
        if not self._over.is_set():
            self._timer = self._loop.call_later(seconds, self._happen, then, *arguments)

    def _wait_no_more(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _happen(self, function: Callable[..., None], *arguments: Any) -> None:
        try:
            function(*arguments)
        except Failure as failure:
            self._fail(failure)
        except ProtocolError as error:
            self._fail(Failure(protocol.PROTOCOL, str(error)))

    def _send(self, message: protocol.ServerMessage | protocol.ProductsServerMessage) -> None:
        self._outbox.put_nowait(pack(message))

    async def _read(self) -> None:
        try:
            while not self._over.is_set():
                event = await self._socket.receive()
                if event["type"] == "websocket.disconnect":
                    self._gone()
                else:
                    self._happen(self._received, event.get("bytes"))
        except Exception as error:
            reference = log_exception("session broke", error, session=self.id)
            self._fail(broken("the server could not go on", reference))

    async def _write(self) -> None:
        while (data := await self._outbox.get()) is not None:
            try:
                await wait_for(self._socket.send_bytes(data), self._limits.reply_seconds)
            except (WebSocketDisconnect, RuntimeError, OSError, asyncio.TimeoutError):
                self._gone()
                return
            self._service.metrics.bytes.labels("out").inc(len(data))

    async def _part(self, writer: "asyncio.Task[None]") -> None:
        """Send what is left to send and close the connection, if somebody is there."""
        self._outbox.put_nowait(None)
        if self._connected:
            await asyncio.wait({writer}, timeout=FAREWELL_SECONDS)
            with suppress(RuntimeError, OSError, WebSocketDisconnect, asyncio.TimeoutError):
                await wait_for(self._socket.close(self._close_code), FAREWELL_SECONDS)
        writer.cancel()
