"""The client's end of one session: a WebSocket, from its opening to its end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress

from websockets.exceptions import (
    ConnectionClosed,
    InvalidHandshake,
    InvalidStatus,
    WebSocketException,
)
from websockets.sync.client import ClientConnection, connect

from cipherlm.progress import Detail
from cipherlm.serving import protocol
from cipherlm.serving.computation import Report
from cipherlm.serving.errors import ConnectionFailed, RemoteError, ServerError, SessionLost, TimedOut
from cipherlm.serving.transport import (
    Address,
    asks_too_much,
    json_object,
    nonsense,
    refusal,
    server_error,
    timed_out,
    unreachable,
)

_UNREAD_FRAMES = 1
"""Messages of a server that are taken before the client asks for them."""
_CLOSE_SECONDS = 2.0
# Where the session has ended but nothing was wrong with what was asked of it.
_SESSION_OVER = {protocol.SHUTTING_DOWN, protocol.TIMEOUT, protocol.BUSY}

# At its level DEBUG, websockets logs the headers of the handshake, the token among them.
_logger = logging.getLogger("cipherlm.serving.websocket")
_logger.setLevel(logging.INFO)

_Answer = protocol.Opened | protocol.Queued | protocol.Progress | protocol.Refresh | protocol.Result


class ClientSession:
    """One WebSocket, from its opening to its end.

    Messages have at most ``limit`` bytes, an evaluation at most ``rounds`` refreshes. ``timeout`` and
    ``evaluation_timeout`` are seconds without a word from the server. Raises what :class:`Connection` does.
    """

    def __init__(
        self,
        address: Address,
        limit: int,
        rounds: int,
        timeout: float,
        evaluation_timeout: float,
        doing: str,
    ) -> None:
        self._address = address
        self._limit = limit
        self._rounds = rounds
        self._timeout = timeout
        self._evaluation_timeout = evaluation_timeout
        self._id = 0
        self._unfinished: int | None = None
        self.begun = False
        """Whether the server has begun any evaluation."""
        self.over = False
        """Whether the connection is of no more use."""
        with ExitStack() as stack:
            self._socket = stack.enter_context(connected(address, "session", limit, timeout, doing))
            # A server that stops reading must not hold up a message for ever.
            self._socket.socket.settimeout(evaluation_timeout)
            self._stack = stack.pop_all()

    def open(self, model: str, keys: Mapping[str, str]) -> None:
        """Open it with uploaded keys, ``{kind: SHA-256}``."""
        doing = "opening a session"
        try:
            self._send(self._packed(protocol.Open(protocol.VERSION, model, dict(keys))))
            # The server reads the keys first, which takes time.
            if not isinstance(self._receive(doing, self._evaluation_timeout), protocol.Opened):
                raise self._misunderstood(doing)
        except SessionLost as error:
            raise ConnectionFailed(f"{doing}: {self._address.http} ended the connection") from error

    def evaluate(
        self,
        module: str,
        start: int,
        count: int,
        inputs: Sequence[bytes],
        refresh: Callable[[bytes], bytes],
        report: Report | None,
        show: Detail,
    ) -> list[bytes]:
        """See :meth:`Connection.evaluate <cipherlm.serving.client.Connection.evaluate>`; once, as it is."""
        doing = f"evaluating {module}"
        self._await_unfinished()
        self._id += 1
        request = self._packed(protocol.Evaluate(self._id, module, start, count, list(inputs)))
        rounds = 0
        self._unfinished = self._id
        try:
            self._send(request)
            while True:
                message = self._receive(doing, self._evaluation_timeout)
                if isinstance(message, protocol.Opened) or message.id != self._id:
                    raise self._misunderstood(doing)
                if isinstance(message, protocol.Queued):
                    show(f"{message.position} before in the queue")
                    continue
                self.begun = True
                if isinstance(message, protocol.Progress):
                    show(f"block {message.done} of {message.total}")
                    if report is not None:
                        report(message.done, message.total)
                elif isinstance(message, protocol.Refresh):
                    if message.round != rounds:
                        raise self._misunderstood(doing)
                    if rounds == self._rounds:
                        self.over = True
                        raise asks_too_much(self._address, doing, f"more than {rounds} refreshes")
                    rounds += 1
                    reply = protocol.Refreshed(self._id, message.round, refresh(message.blob))
                    self._send(self._packed(reply))
                else:
                    self._unfinished = None
                    return list(message.blobs)
        except BaseException:
            self._cancel()
            raise

    def close(self) -> None:
        """Say goodbye if anybody listens."""
        if not self.over:
            self.over = True
            with suppress(WebSocketException, OSError):
                self._socket.send(protocol.pack(protocol.Close()))
        self._stack.close()

    def _cancel(self) -> None:
        """Tell the server that nobody waits any more; its last word is read before the next evaluation."""
        if self._unfinished is not None and not self.over:
            with suppress(RemoteError):
                self._send(protocol.pack(protocol.Cancel(self._unfinished)))

    def _await_unfinished(self) -> None:
        doing = "waiting for the end of a cancelled evaluation"
        while self._unfinished is not None:
            try:
                message = self._receive(doing, self._timeout)
            except TimedOut as error:
                raise SessionLost(f"{error}: open the session again") from error
            except ServerError:
                if self.over:
                    raise
                continue
            if isinstance(message, protocol.Result) and message.id == self._unfinished:
                self._unfinished = None

    def _packed(self, message: protocol.ClientMessage) -> bytes:
        data = protocol.pack(message)
        if len(data) > self._limit:
            raise ValueError(f"a message of {len(data)} bytes; the server takes {self._limit} at most")
        return data

    def _send(self, data: bytes) -> None:
        try:
            self._socket.send(data)
        except (ConnectionClosed, OSError) as error:
            raise self._lost(error) from error
        except BaseException:
            self.over = True  # half a message is on its way: nothing can follow it
            raise

    def _receive(self, doing: str, timeout: float) -> _Answer:
        try:
            data = self._socket.recv(timeout=timeout)
        except TimeoutError as error:
            self.over = True
            raise timed_out(self._address, doing, timeout) from error
        except (ConnectionClosed, OSError) as error:
            raise self._lost(error) from error
        try:
            if isinstance(data, str):
                raise protocol.ProtocolError("a text")
            message = protocol.unpack(data, protocol.SERVER_MESSAGES)
        except protocol.ProtocolError as error:
            raise self._misunderstood(doing) from error
        if isinstance(message, protocol.Error):
            raise self._failure(message, doing)
        return message

    def _failure(self, message: protocol.Error, doing: str) -> RemoteError:
        error = server_error(
            message.code, message.message, doing, retry=message.retry, retry_after=message.retry_after
        )
        if message.id is not None and message.id == self._unfinished:
            self._unfinished = None
            if message.code != protocol.SHUTTING_DOWN:
                return error
        self.over = True
        if message.code in _SESSION_OVER and self._id:
            return SessionLost(f"{error}: open a session again")
        return error

    def _misunderstood(self, doing: str) -> ServerError:
        self.over = True
        return nonsense(self._address, doing)

    def _lost(self, error: Exception) -> SessionLost:
        self.over = True
        why = " ".join(str(error).split())[:200]
        return SessionLost(f"the session with {self._address.http} broke off ({why}): open it again")


@contextmanager
def connected(
    address: Address, path: str, limit: int, timeout: float, doing: str
) -> Iterator[ClientConnection]:
    """Open a WebSocket of the server's for the block. Raises :class:`ConnectionFailed` and its like."""
    with ExitStack() as stack:
        try:
            socket = stack.enter_context(
                connect(
                    f"{address.websocket}/v1/{path}",
                    ssl=address.ssl,
                    additional_headers=address.headers,
                    proxy=None if address.loopback else True,
                    compression=None,  # ciphertexts do not get smaller
                    open_timeout=timeout,
                    close_timeout=_CLOSE_SECONDS,
                    max_size=limit,
                    max_queue=_UNREAD_FRAMES,
                    logger=_logger,
                )
            )
        except InvalidStatus as error:
            answer = json_object(bytes(error.response.body or b""))
            raise refusal(address, doing, error.response.status_code, answer) from error
        except TimeoutError as error:
            raise timed_out(address, doing, timeout) from error
        except (OSError, InvalidHandshake, WebSocketException, EOFError) as error:
            raise unreachable(address, doing, error) from error
        yield socket
