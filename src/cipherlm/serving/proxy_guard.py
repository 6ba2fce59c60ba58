"""Who may reach the OpenAI-compatible endpoint: no web page, and nobody without the API key."""

from collections.abc import Collection

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from cipherlm.serving.auth import Tokens
from cipherlm.serving.hosts import host_allowed
from cipherlm.serving.openai_format import ApiError


def error_response(error: ApiError) -> JSONResponse:
    """Return an error in OpenAI's form."""
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


class Guard:
    """Refuses what a web page could send, and requests without the API key."""

    def __init__(self, app: ASGIApp, *, keys: Tokens, allowed_hosts: Collection[str] | None) -> None:
        self._app = app
        self._keys = keys
        self._allowed_hosts = allowed_hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it here."""
        if scope["type"] == "http":
            try:
                self._check(Headers(scope=scope))
            except ApiError as error:
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, headers: Headers) -> None:
        hosts = headers.getlist("host")
        if self._allowed_hosts is not None and not host_allowed(hosts, self._allowed_hosts):
            raise ApiError(403, "This endpoint does not answer to this host name.", code="host_not_allowed")
        host = hosts[0].lower() if len(hosts) == 1 else ""
        # Browsers name the origin of what a page sends; only pages of this endpoint would be its own.
        for origin in headers.getlist("origin"):
            if origin.lower() not in (f"http://{host}", f"https://{host}"):
                raise ApiError(403, "This endpoint does not answer web pages.", code="origin_not_allowed")
        if self._keys.owner(headers.get("authorization")) is None:
            raise ApiError(
                401,
                "Incorrect API key provided.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
