"""The server as a process: uvicorn, with TLS, impatient with the slow, patient with what runs at its end."""

import asyncio
import threading
import time
from asyncio import TimerHandle, Transport
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import socket
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from cipherlm.serving.app import create_app
from cipherlm.serving.auth import is_loopback
from cipherlm.serving.logs import log, log_exception
from cipherlm.serving.protocol import DEFAULT_PORT, message_limit
from cipherlm.serving.service import FAREWELL_SECONDS, Service

if TYPE_CHECKING:
    from cipherlm.serving.page import Page

_SLACK_BYTES = 1 << 20
"""Up to here the answer to a message that is too large is an error; beyond, it is a close (1009)."""
_PING_SECONDS = 30.0
_PONG_SECONDS = 60.0


class Server(uvicorn.Server):
    """Serves until a signal ends it (SIGTERM, SIGINT) or ``should_exit`` is set."""

    def __init__(self, service: Service, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._service = service

    @property
    def url(self) -> str:
        """Where the server is, once it has started."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        scheme = "https" if self.config.is_ssl else "http"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"

    async def startup(self, sockets: list[socket] | None = None) -> None:
        """Listen."""
        asyncio.get_running_loop().set_exception_handler(_log_stray)
        await super().startup(sockets)
        if self.started:
            log("serving", url=self.url, model=self._service.description["fingerprint"])

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        """Refuse what is new, let end what runs, then close."""
        for server in self.servers:
            server.close()
        await self._service.drain()
        await super().shutdown(sockets)
        log("ended")


def create_server(
    service: Service,
    host: str = "127.0.0.1",
    port: int = DEFAULT_PORT,
    *,
    certfile: Path | None = None,
    keyfile: Path | None = None,
    insecure_plain_http: bool = False,
    page: "Page | None" = None,
    allowed_origins: Collection[str] = (),
) -> Server:
    """Return a server that ``run()`` starts, with a ``page`` where one is given.

    Web pages of ``allowed_origins`` may talk to it, and its own.

    Raises :class:`ValueError` where others could reach it without a token, or without TLS unless
    ``insecure_plain_http``, and for half a certificate.
    """
    if not service.tokens and not is_loopback(host):
        raise ValueError(f"{host} can be reached from other machines: a server there needs a token")
    if (certfile is None) != (keyfile is None):
        raise ValueError("TLS needs a certificate and its key")
    if certfile is None and not insecure_plain_http and not is_loopback(host):
        raise ValueError(
            f"{host} can be reached from other machines, and anybody on the way could answer in its name: "
            "give certfile and keyfile for TLS, or insecure_plain_http=True"
        )
    limits = service.limits

    class Protocol(_ImpatientProtocol):
        connection_limit = limits.connections
        head_seconds = limits.head_seconds

    config = uvicorn.Config(
        create_app(service, host, page=page, allowed_origins=allowed_origins),
        host=host,
        port=port,
        http=Protocol,
        ws="websockets-sansio",
        ws_max_size=message_limit(service.description) + _SLACK_BYTES,
        ws_ping_interval=_PING_SECONDS,
        ws_ping_timeout=_PONG_SECONDS,
        ws_per_message_deflate=False,  # ciphertexts do not shrink
        ssl_certfile=certfile,
        ssl_keyfile=keyfile,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(FAREWELL_SECONDS),
    )
    return Server(service, config)


@contextmanager
def running(server: Server) -> Iterator[str]:
    """Run a server in a thread of this process, and yield its URL."""
    thread = threading.Thread(target=server.run, name="server", daemon=True)
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise RuntimeError("the server did not start")
            time.sleep(0.005)
        yield server.url
    finally:
        server.should_exit = True
        thread.join()


class _ImpatientProtocol(H11Protocol):
    """HTTP that limits how many connections there are and how long each may take to ask for something.

    uvicorn waits for the head of a request for ever.
    """

    connection_limit: int
    head_seconds: float
    _head_timer: TimerHandle | None = None

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.connection_limit:
            log("connection refused", connections=len(self.connections) - 1)
            transport.close()
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._head_timer is not None:
            self._head_timer.cancel()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._expect_head()

    def _expect_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
        self._head_timer = self.loop.call_later(self.head_seconds, self._close_unless_asked)

    def _close_unless_asked(self) -> None:
        upgraded = self.transport.get_protocol() is not self
        if not upgraded and (self.cycle is None or self.cycle.response_complete):
            self.transport.close()


def _log_stray(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    # asyncio's own handler would print the arguments of callbacks, and they may be a client's.
    error = context.get("exception")
    if isinstance(error, Exception):
        log_exception("callback broke", error)
