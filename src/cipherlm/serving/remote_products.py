"""Products that a server computes: keys go up as the connection opens, then ciphertexts go back and forth."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from types import TracebackType

import numpy as np
from numpy.typing import NDArray
from websockets.exceptions import ConnectionClosed, WebSocketException

from cipherlm.engine import Ciphertext, EngineError
from cipherlm.linear.client import LinearClient
from cipherlm.linear.plan import Plan
from cipherlm.linear.server import load_plan
from cipherlm.models.length import bounded
from cipherlm.serving import protocol
from cipherlm.serving.bundle import Bundle, BundleError
from cipherlm.serving.client_session import connected
from cipherlm.serving.errors import ConnectionFailed, RemoteError, ServerError, SessionLost, WrongModel
from cipherlm.serving.linear import IN_FLIGHT, MAX_ROWS, exchange_bytes, key_bytes
from cipherlm.serving.transport import (
    Address,
    Backoff,
    may_pass,
    nonsense,
    server_error,
    timed_out,
)

Float64 = NDArray[np.float64]

_ATTEMPTS = 3
"""How often an exchange is sent: it may be what ends connections."""


@dataclass
class Traffic:
    """Bytes to the server and back, those of keys, and how many exchanges and connections there were."""

    to_server: int = 0
    to_client: int = 0
    keys: int = 0
    exchanges: int = 0
    connections: int = 0


@dataclass(frozen=True)
class _Exchange:
    """A request that can be sent again, and what its answer is decrypted with."""

    group: str
    transposed: bool
    norms: Float64
    blobs: list[bytes]


def _unheard() -> None:
    pass


class RemoteProducts:
    """Multiplies by the weights of a server's linear layers; see ``Products`` in :mod:`cipherlm.linear`.

    - ``url``, ``token``, ``verify``, ``insecure_plain_http``: as :class:`~cipherlm.serving.client.Connection`
      takes them.
    - ``bundle``: the client's, loaded or not: it says what the server is asked for and what it may answer.
    - ``timeout``: seconds for an answer. ``patience``: seconds to try again after failures that may pass.

    A secret key is made here and is never stored. Connects when it is first needed, and again after a lost
    connection or a restart of the server, with the same keys; what was lost is asked for again. Threads take
    turns. Raises :class:`~cipherlm.serving.errors.RemoteError` and its subclasses, ``BundleError``, and
    ``ValueError`` for an address that is none.
    """

    def __init__(
        self,
        url: str,
        bundle: str | os.PathLike[str] | Bundle,
        *,
        token: str | None = None,
        verify: str | os.PathLike[str] | bool = True,
        insecure_plain_http: bool = False,
        timeout: float = 120.0,
        patience: float = 60.0,
    ) -> None:
        self._address = Address(url, token, verify, insecure_plain_http=insecure_plain_http)
        bundle = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle, "client")
        self.plan = bundle_plan(bundle)
        self._fingerprint = str(bundle.about["fingerprint"])
        self._timeout, self._patience = timeout, patience
        self._lock = threading.Lock()
        self._connection: _Connection | None = None
        self._closed = False
        self.traffic = Traffic()
        self.on_product: Callable[[], None] = _unheard
        """Called before each product."""
        self.renew_keys()

    @property
    def url(self) -> str:
        """The server's address."""
        return self._address.http

    def renew_keys(self) -> None:
        """Make other keys, and connect with them when that is needed next."""
        with self._lock:
            self._drop()
            self._client = LinearClient(self.plan)
            self._keys = self._client.evaluation_keys().to_bytes()

    def connect(self) -> None:
        """Connect now. Raises :class:`WrongModel` if the server's weights are not the bundle's."""
        with self._lock:
            self._connected(Backoff(self._patience))

    def product(self, group: str, x: Float64, *, transposed: bool = False) -> Float64:
        """Return x @ W.T, or x @ W, as ``Products`` says.

        Many rows are several exchanges, some of which are on their way at a time. What no model's product can
        be is bounded, so that nothing that a server has made up keeps a client from asking for the next one.
        """
        self.on_product()
        with self._lock:
            exchanges = self._exchanges(group, x, transposed)
            results = [
                self._decrypted(group, transposed, norms, blobs) for norms, blobs in self._answers(exchanges)
            ]
        return bounded(np.concatenate(results)) if results else np.zeros((0, self._rows(group, transposed)))

    def close(self) -> None:
        """End the connection, for good."""
        self._closed = True
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def __enter__(self) -> RemoteProducts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"RemoteProducts({self.url!r})"

    def _rows(self, group: str, transposed: bool) -> int:
        return self.plan.of(group, transposed).packing.rows

    def _exchanges(self, group: str, x: Float64, transposed: bool) -> Iterator[_Exchange]:
        """Encrypt rows, as many at a time as an exchange has, when the exchange is wanted."""
        self.plan.of(group, transposed)
        for start in range(0, len(x), MAX_ROWS):
            rows, norms = self._client.encrypt(group, x[start : start + MAX_ROWS], transposed=transposed)
            yield _Exchange(group, transposed, norms, [part.to_bytes() for row in rows for part in row])

    def _answers(self, exchanges: Iterator[_Exchange]) -> Iterator[tuple[Float64, Sequence[bytes]]]:
        """Yield norms and the server's ciphertexts of every exchange, in their order.

        What follows is encrypted and sent while the server computes.
        """
        waiting: list[_Exchange] = []  # asked for, not answered
        sent = 0  # how many of them on this connection
        failures, backoff = 0, Backoff(self._patience)
        more = True
        while more or waiting:
            try:
                connection = self._connected(backoff)
                while sent < len(waiting):
                    connection.ask(waiting[sent])
                    sent += 1
                while more and len(waiting) < IN_FLIGHT:
                    following = next(exchanges, None)
                    if following is None:
                        more = False
                    else:
                        waiting.append(following)
                        connection.ask(following)
                        sent += 1
                if not waiting:
                    return
                blobs = connection.answer(waiting[0])
            except (SessionLost, ConnectionFailed, ServerError) as failure:
                self._drop()
                sent, failures = 0, failures + 1
                passes = isinstance(failure, SessionLost) or may_pass(failure)
                if self._closed or not passes or failures >= _ATTEMPTS or not backoff.wait():
                    raise
                continue
            except BaseException:  # Ctrl-C, perhaps amid a message
                self._drop()
                raise
            failures, backoff = 0, Backoff(self._patience)
            exchange, sent = waiting.pop(0), sent - 1
            self.traffic.exchanges += 1
            self.traffic.to_server += sum(map(len, exchange.blobs))
            self.traffic.to_client += sum(map(len, blobs))
            yield exchange.norms, blobs

    def _decrypted(self, group: str, transposed: bool, norms: Float64, blobs: Sequence[bytes]) -> Float64:
        width = self.plan.of(group, transposed).packing.outputs
        try:
            parts = [Ciphertext.from_bytes(blob, self.plan.parameters) for blob in blobs]
            rows = [parts[start : start + width] for start in range(0, len(parts), width)]
            return self._client.decrypt(group, rows, norms, transposed=transposed)
        except EngineError as error:
            raise RemoteError(f"the server sent no result that can be decrypted: {error}") from error

    def _connected(self, backoff: Backoff) -> _Connection:
        if self._closed:
            raise RemoteError(f"the connection to {self.url} is closed")
        while self._connection is None:
            try:
                connection = _Connection(self._address, self.plan, self._timeout)
                try:
                    connection.open(self._fingerprint, self._keys)
                except BaseException:
                    connection.close()
                    raise
                self._connection = connection
                self.traffic.connections += 1
                self.traffic.keys += len(self._keys)
            except (ConnectionFailed, ServerError) as failure:
                if not (may_pass(failure) and backoff.wait()):
                    raise
        return self._connection

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


class _Connection:
    """One WebSocket, from its opening to its end."""

    def __init__(self, address: Address, plan: Plan, timeout: float) -> None:
        self._address, self._plan, self._timeout = address, plan, timeout
        self._first = self._next = 0
        """Ids: of the first request that is not answered, and of the next."""
        # What the client knows that a server may say, whatever that says itself.
        limit = protocol.message_limit({"message_bytes": max(key_bytes(plan), exchange_bytes(plan))})
        with ExitStack() as stack:
            doing = "connecting"
            self._socket = stack.enter_context(connected(address, "products", limit, timeout, doing))
            self._socket.socket.settimeout(timeout)  # for a server that stops reading
            self._stack = stack.pop_all()

    def open(self, fingerprint: str, keys: bytes) -> None:
        doing = "sending keys"
        self._send(protocol.Connect(protocol.VERSION, fingerprint, self._plan.digest, keys))
        try:
            message = self._receive(doing)
        except SessionLost as error:
            raise ConnectionFailed(f"{doing}: {self._address.http} ended the connection") from error
        except ServerError as error:
            if error.code == protocol.UNKNOWN_MODEL:
                raise WrongModel(
                    f"{self._address.http} has other weights or another plan: use the client bundle that was "
                    "exported with the server's"
                ) from error
            raise
        if not isinstance(message, protocol.Connected):
            raise nonsense(self._address, doing)

    def ask(self, exchange: _Exchange) -> None:
        rows = len(exchange.norms)
        self._send(protocol.Multiply(self._next, exchange.group, exchange.transposed, rows, exchange.blobs))
        self._next += 1

    def answer(self, exchange: _Exchange) -> Sequence[bytes]:
        """Return the answer to the first request that has none yet."""
        doing = f"multiplying by {exchange.group}"
        message = self._receive(doing)
        outputs = self._plan.of(exchange.group, exchange.transposed).packing.outputs
        if (
            not isinstance(message, protocol.Result)
            or message.id != self._first
            or len(message.blobs) != outputs * len(exchange.norms)
        ):
            raise nonsense(self._address, doing)
        self._first += 1
        return message.blobs

    def close(self) -> None:
        """Say goodbye if anybody listens."""
        with suppress(WebSocketException, OSError):
            self._socket.send(protocol.pack(protocol.Close()))
        self._stack.close()

    def _send(self, message: protocol.ProductsClientMessage) -> None:
        try:
            self._socket.send(protocol.pack(message))
        except (ConnectionClosed, OSError) as error:
            raise self._lost(error) from error

    def _receive(self, doing: str) -> protocol.ProductsServerMessage:
        try:
            data = self._socket.recv(timeout=self._timeout)
        except TimeoutError as error:
            raise timed_out(self._address, doing, self._timeout) from error
        except (ConnectionClosed, OSError) as error:
            raise self._lost(error) from error
        try:
            if isinstance(data, str):
                raise protocol.ProtocolError("a text")
            message = protocol.unpack(data, protocol.PRODUCTS_SERVER_MESSAGES)
        except protocol.ProtocolError as error:
            raise nonsense(self._address, doing) from error
        if isinstance(message, protocol.Error):
            raise server_error(
                message.code, message.message, doing, retry=message.retry, retry_after=message.retry_after
            )
        return message

    def _lost(self, error: Exception) -> SessionLost:
        why = " ".join(str(error).split())[:200]
        return SessionLost(f"the connection to {self._address.http} broke off ({why})")


def bundle_plan(bundle: Bundle) -> Plan:
    """Return the plan in a client's bundle. Raises ``BundleError`` if it has none, or a damaged one."""
    if not bundle.is_linear:
        raise BundleError(f"{bundle.directory} is no bundle of linear layers")
    try:
        plan = load_plan(bundle.directory)
        if plan.digest != bundle.about["description"]["plan"]:
            raise ValueError("its plan is not the one that was exported")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{bundle.directory} is damaged: {error}") from error
    return plan
