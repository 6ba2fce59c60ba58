"""Which web pages may talk to a server, and what browsers need that other clients do not.

A browser says with every request that matters from which page it comes (``Origin``). No page may talk to a
server but the server's own, where it has one, and those that its operator has named.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from cipherlm.serving.hosts import in_url

SUBPROTOCOL = "cipherlm.1"
"""What a WebSocket of a page asks for, beside its token."""
_TOKEN = "cipherlm.token."
"""Before the token in a subprotocol's name, in base64 for URLs: a page cannot set a WebSocket's headers."""
_ANSWERED_SECONDS = 600


def origin_argument(text: str) -> str:
    """Return the origin of web pages as browsers write it. Raises ``ValueError`` for what is none."""
    parts = urlsplit(text)
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    rest = (parts.path.rstrip("/"), parts.query, parts.fragment, parts.username)
    if parts.scheme not in ("http", "https") or not host or any(rest):
        raise ValueError(f"{text!r} is not the origin of a web page, such as https://chat.example.org")
    shown = port is not None and port != {"http": 80, "https": 443}[parts.scheme]
    return f"{parts.scheme}://{in_url(host)}" + (f":{port}" if shown else "")


class Origins:
    """Whose pages may talk to a server: ``allowed`` ones, and its ``own`` where it has a page."""

    def __init__(self, allowed: Iterable[str] = (), *, own: bool = False) -> None:
        self._allowed = frozenset(map(origin_argument, allowed))
        self._own = own

    def refuses(self, headers: Headers, scheme: str) -> bool:
        """Return whether a request comes from a page that may not talk to the server."""
        given = headers.getlist("origin")
        return bool(given) and not (len(given) == 1 and self._allows(given[0], headers, scheme))

    def answer_headers(self, headers: Headers) -> dict[str, str]:
        """Return what lets a page of another origin read an answer; nothing for other clients."""
        origin = headers.get("origin")
        if origin is None or origin not in self._allowed:
            return {}
        return {
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Expose-Headers": "Retry-After",
            "Vary": "Origin",
        }

    def preflight_headers(self, headers: Headers) -> dict[str, str] | None:
        """Return what answers a browser that asks whether a page may send a request; None for no page."""
        answer = self.answer_headers(headers)
        if not answer:
            return None
        return {
            **answer,
            "Access-Control-Allow-Methods": "GET, POST, PATCH, DELETE",
            "Access-Control-Allow-Headers": "Authorization, Content-Type, Upload-Offset, Upload-Checksum",
            "Access-Control-Max-Age": str(_ANSWERED_SECONDS),
        }

    def _allows(self, origin: str, headers: Headers, scheme: str) -> bool:
        if origin in self._allowed:
            return True
        # The page of a name that somebody else has given this machine has that name as its host too. On a
        # server without tokens those are refused before, and with tokens such a page has none.
        page_scheme = {"ws": "http", "wss": "https"}.get(scheme, scheme)
        hosts = headers.getlist("host")
        return self._own and len(hosts) == 1 and origin == f"{page_scheme}://{hosts[0]}"


def subprotocols(headers: Headers) -> list[str]:
    """Return the subprotocols that a WebSocket's client offers."""
    return [name.strip() for value in headers.getlist("sec-websocket-protocol") for name in value.split(",")]


def authorization(headers: Headers) -> str | None:
    """Return what proves who a WebSocket's client is, as the header of that name has it."""
    given = headers.get("authorization")
    for name in subprotocols(headers):
        if given is None and name.startswith(_TOKEN):
            encoded = name.removeprefix(_TOKEN)
            try:
                token = base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)).decode()
            except (binascii.Error, ValueError):
                continue
            given = f"Bearer {token}"
    return given
