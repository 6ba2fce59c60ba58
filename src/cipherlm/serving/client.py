"""The client's connection to a server: keys go up once, then ciphertexts go back and forth.

It moves bytes and holds no key; the caller encrypts, decrypts and answers refreshes.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO
from urllib.parse import quote

from cipherlm.progress import Detail, Progress, detailed, silent
from cipherlm.serving import protocol
from cipherlm.serving.bounds import UNKNOWN, Bounds
from cipherlm.serving.client_session import ClientSession
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
    may_pass,
    nonsense,
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
_MAX_SETBACKS = 3
_PIECE = 1 << 20


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
        self._session: ClientSession | None = None
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

    def _open(self, description: Mapping[str, Any], keys: Mapping[str, str]) -> ClientSession:
        doing = "opening a session"
        size = min(description["message_bytes"], self.bounds.message_bytes)
        limit, rounds = protocol.message_limit({"message_bytes": size}), self.bounds.rounds
        session = ClientSession(self._address, limit, rounds, self._timeout, self._evaluation_timeout, doing)
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

    def _current(self) -> ClientSession:
        if self._keys is None:
            raise RuntimeError("no session was opened yet: call open() first")
        if self._session is None:
            raise SessionLost(f"the session with {self.url} is over: open it again")
        return self._session

    def _end(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()


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
