"""The server's routes: HTTP for all that is short, a WebSocket for a session. See docs/protocol.md."""

import hashlib
import json
import re
import time
from asyncio import CancelledError, TimeoutError, create_task, to_thread, wait, wait_for
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, FastAPI, Request, Response, WebSocket
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from cipherlm import __version__
from cipherlm.serving import browsers, protocol
from cipherlm.serving.conversation import Conversation
from cipherlm.serving.failures import Failure, broken
from cipherlm.serving.hosts import LOOPBACK_HOSTS, host_allowed, in_url
from cipherlm.serving.keys import KeyStore
from cipherlm.serving.logs import log, log_exception
from cipherlm.serving.products_session import ProductsSession
from cipherlm.serving.service import Service, shutting_down
from cipherlm.serving.sessions import Session

if TYPE_CHECKING:
    from cipherlm.serving.page import Page

_STATUS = {
    protocol.UNAUTHORIZED: 401,
    protocol.PROTOCOL: 400,
    protocol.BAD_REQUEST: 400,
    protocol.UNKNOWN_KEYS: 404,
    protocol.BAD_KEYS: 422,
    protocol.TOO_LARGE: 413,
    protocol.CONFLICT: 409,
    protocol.STORAGE: 507,
    protocol.BUSY: 503,
    protocol.RATE_LIMITED: 429,
    protocol.TIMEOUT: 408,
    protocol.INTERNAL: 500,
    protocol.SHUTTING_DOWN: 503,
}
_BODY_BYTES = 64 * 1024
"""Of a request that is no chunk."""
_CHECKSUM = re.compile(r"sha256 ([0-9a-f]{64})")

_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Scope]]
_Send = Callable[[_Scope], Awaitable[None]]


def create_app(
    service: Service,
    host: str = "127.0.0.1",
    *,
    page: "Page | None" = None,
    allowed_origins: Collection[str] = (),
) -> FastAPI:
    """Return the ASGI application that serves a model on an address of this machine.

    ``page`` is served too. Pages of ``allowed_origins`` may talk to the server, and no other ones.
    """
    app = FastAPI(title="CipherLM", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)

    def owner_of(request: Request) -> str:
        owner = service.tokens.owner(request.headers.get("authorization"))
        if owner is None:
            raise _no_token()
        return owner

    Owner = Annotated[str, Depends(owner_of)]

    @app.get("/v1/health")
    async def health() -> Response:
        status = "shutting_down" if service.draining else "ok"
        return JSONResponse({"status": status, "version": __version__, "protocol": protocol.VERSION})

    @app.get("/v1/model")
    async def model(owner: Owner) -> Response:
        return JSONResponse(service.description)

    @app.get("/metrics")
    async def metrics(owner: Owner) -> Response:
        return Response(service.metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def converse(socket: WebSocket, kind: type[Conversation]) -> None:
        owner = service.tokens.owner(browsers.authorization(socket.headers))
        if owner is None:
            await _deny(socket, _answer(_no_token()))
            return
        try:
            service.greet(owner)
        except Failure as failure:
            await _deny(socket, _answer(failure))
        else:
            conversation = kind(service, socket, owner)
            offered = browsers.SUBPROTOCOL in browsers.subprotocols(socket.headers)
            await socket.accept(browsers.SUBPROTOCOL if offered else None)
            await conversation.run()

    if service.keys is None:

        @app.websocket("/v1/products")
        async def products(socket: WebSocket) -> None:
            await converse(socket, ProductsSession)
    else:
        _add_keys(app, service, service.keys, owner_of)

        @app.websocket("/v1/session")
        async def session(socket: WebSocket) -> None:
            await converse(socket, Session)

    @app.exception_handler(Failure)
    async def failed(request: Request, failure: Failure) -> Response:
        return _answer(failure)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        return _answer(Failure(protocol.BAD_REQUEST, str(error.detail)), error.status_code)

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return _answer(Failure(protocol.BAD_REQUEST, "the body was cut off", retry=True))

    # Where there are tokens, a web page has none, and a server's names are not known.
    allowed_hosts = None if service.tokens else {*LOOPBACK_HOSTS, in_url(host)}
    origins = browsers.Origins(allowed_origins, own=page is not None)
    app.add_middleware(_Watch, service=service, allowed_hosts=allowed_hosts, origins=origins)
    if page is not None:
        from cipherlm.serving.page_routes import add_page

        add_page(app, page)
    return app


def _add_keys(app: FastAPI, service: Service, keys: KeyStore, owner_of: Callable[[Request], str]) -> None:
    """Add the routes for keys that are uploaded before a session."""
    Owner = Annotated[str, Depends(owner_of)]

    @app.get("/v1/keys/{fingerprint}")
    async def key_status(owner: Owner, fingerprint: str) -> Response:
        return JSONResponse(keys.status(owner, fingerprint))

    @app.post("/v1/keys")
    async def announce_key(owner: Owner, request: Request) -> Response:
        body = await _body(service, request, _BODY_BYTES, service.limits.head_seconds)
        kind, size, fingerprint = _announcement(body)
        return JSONResponse(await to_thread(keys.announce, owner, kind, size, fingerprint))

    @app.patch("/v1/keys/{fingerprint}")
    async def append_chunk(owner: Owner, fingerprint: str, request: Request) -> Response:
        offset, checksum = _chunk_headers(request)
        keys.status(owner, fingerprint)  # before 8 MiB come for nothing
        limits = service.limits
        with service.uploading(owner):
            chunk = await _body(
                service, request, protocol.CHUNK_BYTES, limits.upload_seconds, limits.upload_idle_seconds
            )
            if await to_thread(_sha256, chunk) != checksum:
                raise Failure(protocol.BAD_KEYS, "a chunk that does not have its checksum", retry=True)
            status = await to_thread(keys.append, owner, fingerprint, offset, chunk)
        if status["complete"]:
            log("key uploaded", owner=owner, key=fingerprint[:12], bytes=status["size"])
        return JSONResponse(status)

    @app.delete("/v1/keys/{fingerprint}")
    async def delete_key(owner: Owner, fingerprint: str) -> Response:
        await to_thread(keys.delete, owner, fingerprint)
        return Response(status_code=204)


class _Watch:
    """Counts requests, keeps browsers out, and answers in our own form when something breaks."""

    def __init__(
        self,
        app: Callable[[_Scope, _Receive, _Send], Awaitable[None]],
        service: Service,
        allowed_hosts: Collection[str] | None,
        origins: browsers.Origins,
    ) -> None:
        self._app = app
        self._service = service
        self._allowed_hosts = allowed_hosts
        self._origins = origins

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        status = 0
        began = time.monotonic()
        headers = Headers(scope=scope)
        for_page = self._origins.answer_headers(headers)

        async def watch(message: _Scope) -> None:
            nonlocal status
            if message["type"] == "websocket.accept":
                status = 101
            if message["type"] == "http.response.start" and for_page:
                MutableHeaders(scope=message).update(for_page)
            status = message.get("status", status)
            await send(message)

        app: Callable[[_Scope, _Receive, _Send], Awaitable[None]] = self._app
        preflight = self._origins.preflight_headers(headers)
        if self._is_refused(headers, scope["scheme"]):
            app = _refuse_browser
        elif preflight is not None and scope["type"] == "http" and scope["method"] == "OPTIONS":
            app = Response(status_code=204, headers=preflight)
        try:
            await app(scope, receive, watch)
        except Exception as error:
            reference = log_exception("request broke", error)
            if scope["type"] == "http" and not status:
                await _answer(broken("the server broke", reference))(scope, receive, watch)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            method = scope.get("method", "WEBSOCKET")
            method = (
                method
                if method in ("GET", "HEAD", "OPTIONS", "POST", "PATCH", "DELETE", "WEBSOCKET")
                else "other"
            )
            self._service.metrics.requests.labels(method, route, str(status)).inc()
            if status >= 400:
                seconds = round(time.monotonic() - began, 3)
                log("request refused", method=method, route=route, status=status, seconds=seconds)

    def _is_refused(self, headers: Headers, scheme: str) -> bool:
        """Say whether a request comes from a web page that is none of the server's clients.

        One that a user of an open server visits must not reach that server.
        """
        if self._allowed_hosts is not None and not host_allowed(headers.getlist("host"), self._allowed_hosts):
            return True
        return self._origins.refuses(headers, scheme)


async def _refuse_browser(scope: _Scope, receive: _Receive, send: _Send) -> None:
    answer = _answer(
        Failure(
            protocol.UNAUTHORIZED,
            "this server does not let this web page in, and without tokens it answers to localhost only",
        ),
        403,
    )
    if scope["type"] == "http":
        await answer(scope, receive, send)
    else:
        await _deny(WebSocket(scope, receive, send), answer)


async def _deny(socket: WebSocket, answer: Response) -> None:
    """Answer a handshake with something else than a WebSocket."""
    del answer.headers["content-length"]  # uvicorn sets it, and older versions would send both
    await socket.send_denial_response(answer)


def _no_token() -> Failure:
    return Failure(protocol.UNAUTHORIZED, "this server wants a token")


def _answer(failure: Failure, status: int | None = None) -> Response:
    error = protocol.error(failure.code, failure.message, retry=failure.retry)
    content: dict[str, Any] = {"error": {"code": error.code, "message": error.message, "retry": error.retry}}
    headers = {}
    if failure.retry_after is not None:
        content["error"]["retry_after"] = failure.retry_after
        headers["Retry-After"] = str(failure.retry_after)
    return JSONResponse(content | failure.details, status or _STATUS[failure.code], headers)


async def _body(
    service: Service, request: Request, limit: int, seconds: float, idle_seconds: float | None = None
) -> bytes:
    """Return a request's body, if it comes in time, without long pauses, and is not larger than it may be."""

    async def read() -> bytes:
        body = bytearray()
        parts = request.stream()
        while (part := await wait_for(anext(parts, None), idle_seconds)) is not None:
            body += part
            if len(body) > limit:
                raise Failure(protocol.TOO_LARGE, f"a body of more than {limit} bytes")
        return bytes(body)

    late = Failure(protocol.TIMEOUT, "the body did not come in time", retry=True)
    with service.reading(create_task(read())) as reading:
        await wait({reading}, timeout=seconds)
        if not reading.done():
            raise late
    try:
        return reading.result()
    except TimeoutError:
        raise late from None
    except CancelledError:  # of the task by the service, not of this one
        raise shutting_down() from None


def _announcement(body: bytes) -> tuple[str, int, str]:
    try:
        message = json.loads(body)
    except (ValueError, RecursionError):
        message = None
    if isinstance(message, dict) and message.keys() == {"kind", "size", "sha256"}:
        kind, size, fingerprint = message["kind"], message["size"], message["sha256"]
        if isinstance(kind, str) and type(size) is int and isinstance(fingerprint, str):
            return kind, size, fingerprint
    raise Failure(protocol.BAD_REQUEST, 'send {"kind": text, "size": bytes, "sha256": hex digits}')


def _chunk_headers(request: Request) -> tuple[int, str]:
    offset = request.headers.get("upload-offset", "")
    checksum = _CHECKSUM.fullmatch(request.headers.get("upload-checksum", ""))
    if not re.fullmatch(r"[0-9]{1,15}", offset) or checksum is None:
        raise Failure(protocol.BAD_REQUEST, "a chunk has the headers Upload-Offset and Upload-Checksum")
    return int(offset), checksum[1]


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
