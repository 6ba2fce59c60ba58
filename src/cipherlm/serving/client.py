"""The client's connection to a server: keys go up once, then ciphertexts go back and forth.

It moves bytes and holds no key; the caller encrypts, decrypts and answers refreshes.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO
from urllib.parse import quote

from websockets.exceptions import (
    ConnectionClosed,
    InvalidHandshake,
    InvalidStatus,
    WebSocketException,
)
from websockets.sync.client import ClientConnection, connect

from cipherlm.progress import Detail, Progress, detailed, silent
from cipherlm.serving import protocol
from cipherlm.serving.bounds import UNKNOWN, Bounds
from cipherlm.serving.computation import Report
from cipherlm.serving.errors import (
    ConnectionFailed,
    InsecureConnection,
    RemoteError,
    ServerError,
    SessionLost,
    TimedOut,
    WrongModel,
)
from cipherlm.serving.transport import (
    Address,
    Backoff,
    Requests,
    asks_too_much,
    json_object,
    may_pass,
    nonsense,
    refusal,
    server_error,
    timed_out,
    unreachable,
)

__all__ = [
    "Connection",
    "ConnectionFailed",
    "InsecureConnection",
    "RemoteError",
    "ServerError",
    "SessionLost",
    "TimedOut",
    "WrongModel",
]

Source = str | os.PathLike[str] | bytes | bytearray | memoryview

UPLOAD_BYTES = 4 << 20
"""What is sent again at most when an upload breaks; not above ``protocol.CHUNK_BYTES``."""
_UNREAD_FRAMES = 1
"""Messages of a server that are taken before the client asks for them."""
_MAX_SETBACKS = 3
_PIECE = 1 << 20
_CLOSE_SECONDS = 2.0
# Where the session has ended but nothing was wrong with what was asked of it.
_SESSION_OVER = {protocol.SHUTTING_DOWN, protocol.TIMEOUT, protocol.BUSY}

# At its level DEBUG, websockets logs the headers of the handshake, the token among them.
_logger = logging.getLogger("cipherlm.serving.websocket")
_logger.setLevel(logging.INFO)

_Answer = protocol.Opened | protocol.Queued | protocol.Progress | protocol.Refresh | protocol.Result


class Connection:
    """A connection to one server with one client's keys, used by one thread at a time.

    - ``url``: such as ``https://example.org:8470``. Plain HTTP to another machine is refused, with or without
      a token, unless ``insecure_plain_http``: whoever is on the way could be the server.
    - ``verify``: True, a file or directory of certificates to trust, or False to trust any certificate, which
      does not go with a ``token``.
    - ``model``: the model's fingerprint that is expected; any model if it is None.
    - ``timeout``: seconds for a short answer. ``evaluation_timeout``: seconds without a word from the server
      while it reads keys or evaluates. ``patience``: seconds to try again after failures that may pass.
    - ``bounds``: what the server may ask for; from the next session on, if it is changed.
    - ``progress`` shows uploads and evaluations; it is an attribute and may be changed.

    Raises :class:`RemoteError` and its subclasses, here and everywhere; :class:`ValueError` for an address or
    a token that is none.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        verify: str | os.PathLike[str] | bool = True,
        insecure_plain_http: bool = False,
        model: str | None = None,
        timeout: float = 60.0,
        evaluation_timeout: float = 1800.0,
        patience: float = 60.0,
        bounds: Bounds = UNKNOWN,
        progress: Progress = silent,
    ) -> None:
        self._address = Address(url, token, verify, insecure_plain_http=insecure_plain_http)
        self._expected = model
        self._timeout = timeout
        self._evaluation_timeout = evaluation_timeout
        self._patience = patience
        self.bounds = bounds
        self.progress = progress
        self._requests = Requests(self._address, timeout, patience)
        self._description: dict[str, Any] | None = None
        self._keys: dict[str, str] | None = None
        self._session: _Session | None = None
        self._closed = False

    @property
    def url(self) -> str:
        """The server's address."""
        return self._address.http

    def describe(self) -> dict[str, Any]:
        """Return the description of the server's model; asked for once.

        Raises :class:`WrongModel` if its fingerprint is not the expected one. The fingerprint is what the
        server says of itself; who the server is, TLS says.
        """
        if self._description is None:
            doing = "asking for the model"
            description = self._requests.send("GET", "/v1/model", doing)
            fingerprint, size = description.get("fingerprint"), description.get("message_bytes")
            if not isinstance(fingerprint, str) or type(size) is not int or size < 0:
                raise nonsense(self._address, doing)
            if self._expected is not None and fingerprint != self._expected:
                raise WrongModel(
                    f"{self.url} hosts the model {_printed(fingerprint)}, not {_printed(self._expected)}: "
                    "use the client bundle that was exported with the server's"
                )
            self._description = description
        return dict(self._description)

    def upload(self, kind: str, source: Source, *, sha256: str | None = None) -> str:
        """Give the server keys of a kind, unless it has them; return their SHA-256.

        ``source`` is a file's path or the bytes. ``sha256`` saves reading it once more to compute it. An
        upload that was broken off, by whichever side, goes on where it stopped.
        """
        doing = f"uploading {kind} keys"
        with _opened(source) as file, detailed(self.progress, doing) as show:
            size = file.seek(0, io.SEEK_END)
            fingerprint = sha256 or _digest(file)
            self._upload(file, size, {"kind": kind, "size": size, "sha256": fingerprint}, doing, show)
        return fingerprint

    def forget(self, fingerprint: str) -> None:
        """Have the server delete keys. Keys that it does not have are no error."""
        try:
            self._requests.send("DELETE", _keys_path(fingerprint), "deleting keys")
        except ServerError as error:
            if error.status != 404:
                raise

    def open(self, keys: Mapping[str, str]) -> None:
        """Open a session with uploaded keys, ``{kind: SHA-256}``; one that is open is closed first.

        Raises :class:`ServerError` with the code "unknown_keys" where they have to be uploaded (again), and
        :class:`RemoteError` after :meth:`close`.
        """
        if self._closed:  # perhaps by another thread, as a process ends amid an evaluation
            raise RemoteError(f"the connection to {self.url} is closed")
        self._end()
        self._keys = dict(keys)
        description = self.describe()
        backoff = Backoff(self._patience)
        while True:
            try:
                self._session = self._open(description, self._keys)
                return
            except (ConnectionFailed, ServerError) as failure:
                if not (may_pass(failure) and backoff.wait()):
                    raise

    def reopen(self) -> None:
        """Open a new session with the keys of the last one; it remembers nothing of that."""
        if self._keys is None:
            raise RuntimeError("no session was opened yet: call open() first")
        self.open(self._keys)

    def evaluate(
        self,
        module: str,
        start: int,
        count: int,
        inputs: Sequence[bytes],
        refresh: Callable[[bytes], bytes],
        report: Report | None = None,
    ) -> list[bytes]:
        """Return what a module makes of the ciphertexts of ``count`` tokens from position ``start`` on.

        ``refresh`` answers the server's refresh requests; ``report`` is told of blocks done, (k, n). Whatever
        either raises, and Ctrl-C, cancels the evaluation and comes through; the session stays usable.

        Raises :class:`SessionLost` when the session has ended and had something to remember; without that,
        a broken connection is mended quietly. A server with a full queue is asked again.
        """
        with detailed(self.progress, f"evaluating {module}") as show:
            backoff, sent_again = Backoff(self._patience), False
            while True:
                session = self._current()
                try:
                    return session.evaluate(module, start, count, inputs, refresh, report, show)
                except SessionLost:
                    # Safe: the session had nothing to remember. Once only, for this may be what ends it.
                    if session.begun or sent_again or not backoff.wait():
                        raise
                    sent_again = True
                    show("connecting again")
                    self.reopen()
                except ServerError as failure:
                    full = failure.code == protocol.BUSY and failure.retry and not session.over
                    if full:
                        show("the server is busy")
                    if not (full and backoff.wait()):
                        raise
                finally:
                    if session.over and self._session is session:
                        self._end()

    def close(self) -> None:
        """End the session and close everything, for good."""
        self._closed = True
        self._end()
        self._requests.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Connection({self.url!r})"

    def _upload(
        self, file: BinaryIO, size: int, announced: Mapping[str, Any], doing: str, show: Detail
    ) -> None:
        received, complete = self._announce(announced, doing)
        backoff, setbacks = Backoff(self._patience), 0
        while not complete:
            show(f"{received / 1e6:.1f} of {size / 1e6:.1f} MB")
            before = received
            try:
                received, complete = self._send_piece(file, received, announced["sha256"], doing)
                if received <= before and not complete:
                    raise nonsense(self._address, doing)
                backoff = Backoff(self._patience)
            except (ConnectionFailed, ServerError) as failure:
                # What the server has forgotten, has more of, or got damaged can be sent again.
                status = failure.status if isinstance(failure, ServerError) else None
                if status == 422 and _digest(file) != announced["sha256"]:
                    raise RemoteError(f"{doing}: they are not what they were: generate new keys") from failure
                again = may_pass(failure) or status in (404, 409, 422)
                if not again or setbacks == _MAX_SETBACKS or not backoff.wait():
                    raise
                received, complete = self._announce(announced, doing)
                setbacks += status == 422 or received < before

    def _announce(self, announced: Mapping[str, Any], doing: str) -> tuple[int, bool]:
        answer = self._requests.send("POST", "/v1/keys", doing, json=announced)
        return self._received(answer, announced["size"], doing)

    def _send_piece(self, file: BinaryIO, offset: int, sha256: str, doing: str) -> tuple[int, bool]:
        size = file.seek(0, io.SEEK_END)
        file.seek(offset)
        piece = file.read(UPLOAD_BYTES)
        headers = {
            "Upload-Offset": str(offset),
            "Upload-Checksum": f"sha256 {hashlib.sha256(piece).hexdigest()}",
            "Content-Type": "application/octet-stream",
        }
        path = _keys_path(sha256)
        answer = self._requests.send("PATCH", path, doing, again=False, content=piece, headers=headers)
        return self._received(answer, size, doing)

    def _received(self, answer: Mapping[str, Any], size: int, doing: str) -> tuple[int, bool]:
        received, complete = answer.get("received"), answer.get("complete")
        if type(received) is not int or type(complete) is not bool or not 0 <= received <= size:
            raise nonsense(self._address, doing)
        return received, complete

    def _open(self, description: Mapping[str, Any], keys: Mapping[str, str]) -> _Session:
        doing = "opening a session"
        size = min(description["message_bytes"], self.bounds.message_bytes)
        limit, rounds = protocol.message_limit({"message_bytes": size}), self.bounds.rounds
        session = _Session(self._address, limit, rounds, self._timeout, self._evaluation_timeout, doing)
        try:
            session.open(str(description["fingerprint"]), keys)
        except ServerError as error:
            session.close()
            if error.code == protocol.UNKNOWN_MODEL:
                raise WrongModel(f"{self.url} hosts another model now: connect again") from error
            raise
        except BaseException:
            session.close()
            raise
        return session

    def _current(self) -> _Session:
        if self._keys is None:
            raise RuntimeError("no session was opened yet: call open() first")
        if self._session is None:
            raise SessionLost(f"the session with {self.url} is over: open it again")
        return self._session

    def _end(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()


class _Session:
    """One WebSocket, from its opening to its end."""

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
            self._socket = stack.enter_context(_connected(address, limit, timeout, doing))
            # A server that stops reading must not hold up a message for ever.
            self._socket.socket.settimeout(evaluation_timeout)
            self._stack = stack.pop_all()

    def open(self, model: str, keys: Mapping[str, str]) -> None:
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
def _connected(address: Address, limit: int, timeout: float, doing: str) -> Iterator[ClientConnection]:
    with ExitStack() as stack:
        try:
            socket = stack.enter_context(
                connect(
                    f"{address.websocket}/v1/session",
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


@contextmanager
def _opened(source: Source) -> Iterator[BinaryIO]:
    if isinstance(source, (str, os.PathLike)):
        with Path(source).open("rb") as file:
            yield file
    else:
        yield io.BytesIO(source)


def _digest(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    file.seek(0)
    while piece := file.read(_PIECE):
        digest.update(piece)
    return digest.hexdigest()


def _keys_path(fingerprint: str) -> str:
    return f"/v1/keys/{quote(fingerprint, safe='')}"


def _printed(fingerprint: str) -> str:
    return ascii(fingerprint[:16]).strip("'")
