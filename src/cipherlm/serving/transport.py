"""The client's HTTP: a server's address, who may have the token, and requests that are tried again."""

from __future__ import annotations

import json
import os
import random
import ssl
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import httpx

from cipherlm.serving import protocol
from cipherlm.serving.auth import is_loopback
from cipherlm.serving.errors import ConnectionFailed, InsecureConnection, ServerError, TimedOut

MAX_ANSWER_BYTES = 4 << 20
_CONNECT_SECONDS = 10.0
_FIRST_DELAY_SECONDS = 0.25
_GREATEST_DELAY_SECONDS = 8.0
_TRANSIENT_STATUSES = {429, 502, 503, 504}
UNAUTHORIZED = "the server wants a token, or another one: give it with --token or in CIPHERLM_TOKEN"


class Address:
    """A server's address, checked: ``https://host[:port][/path]``, or ``http://`` on this machine.

    ``verify`` is True for the certificates that this machine trusts, a file or directory of others, or False
    to trust anybody. Raises :class:`ValueError` for what is no address, and :class:`InsecureConnection` for
    another machine over plain HTTP, unless ``insecure_plain_http``, and for a token without ``verify``.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        verify: str | os.PathLike[str] | bool = True,
        *,
        insecure_plain_http: bool = False,
    ) -> None:
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port = None, None
        if not host or parts.scheme not in ("http", "https") or parts.query or parts.fragment:
            raise ValueError("a server's address is like https://example.org:8470, with nothing behind it")
        if parts.username is not None or parts.password is not None:
            raise ValueError("a server's address holds no password: give a token instead")
        if token is not None and not (token and token.isascii() and token.isprintable() and " " not in token):
            raise ValueError("a token is printable ASCII without spaces")
        self.loopback = is_loopback(host)
        self.secure = parts.scheme == "https"
        if not self.secure and not self.loopback and not insecure_plain_http:
            raise InsecureConnection(
                f"{host} is another machine, and over plain HTTP anybody on the way can answer in its name: "
                "use https://, with --ca FILE (verify=FILE) for an authority of your own; or add "
                "--insecure-plain-http (insecure_plain_http=True)"
            )
        if token is not None and verify is False:
            raise InsecureConnection(
                "verify=False would give the token to whoever answers: name the certificates to trust, "
                "verify=FILE (--ca FILE), or leave the token out"
            )
        name = f"[{host}]" if ":" in host else host
        self._place = f"{name}:{port}" if port is not None else name
        self._place += parts.path.rstrip("/")
        self.headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self.ssl = _ssl_context(verify) if self.secure else None

    @property
    def http(self) -> str:
        """The address of HTTP requests."""
        return f"http{'s' if self.secure else ''}://{self._place}"

    @property
    def websocket(self) -> str:
        """The address of WebSockets."""
        return f"ws{'s' if self.secure else ''}://{self._place}"

    def __repr__(self) -> str:
        return f"Address({self.http!r})"


class Backoff:
    """Waits between attempts, longer each time, ``seconds`` at most in all."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self._delay = _FIRST_DELAY_SECONDS

    def wait(self) -> bool:
        """Wait before the next attempt; return False, at once, when there should be none."""
        # Jitter, so that the clients of a server that comes back do not all come at once.
        delay = self._delay * random.uniform(0.5, 1)
        if time.monotonic() + delay > self._end:
            return False
        time.sleep(delay)
        self._delay = min(2 * self._delay, _GREATEST_DELAY_SECONDS)
        return True


class Requests:
    """Short HTTP requests with JSON answers. ``timeout`` is per answer, ``patience`` for all attempts (s)."""

    def __init__(self, address: Address, timeout: float, patience: float) -> None:
        self._address = address
        self._timeout = timeout
        self._patience = patience
        self._http = httpx.Client(
            headers=address.headers,
            verify=address.ssl if address.ssl is not None else False,
            timeout=httpx.Timeout(timeout, connect=min(timeout, _CONNECT_SECONDS)),
            # A proxy for the network is none for this machine, and must not see its token.
            trust_env=not address.loopback,
        )

    def send(
        self, method: str, path: str, doing: str, *, again: bool = True, **arguments: Any
    ) -> dict[str, Any]:
        """Return the JSON object that the server answers with.

        ``doing`` is what errors say was being done. With ``again``, failures that may pass are retried.
        """
        backoff = Backoff(self._patience)
        while True:
            try:
                return self._send_once(method, path, doing, arguments)
            except (ConnectionFailed, ServerError) as failure:
                if not (again and may_pass(failure) and backoff.wait()):
                    raise

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _send_once(self, method: str, path: str, doing: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        try:
            with self._http.stream(method, self._address.http + path, **arguments) as response:
                body = _read(response)
        except httpx.TimeoutException as error:
            raise timed_out(self._address, doing, self._timeout) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise unreachable(self._address, doing, error) from error
        answer = json_object(body) if response.status_code != 204 else {}
        if response.is_success and answer is not None:
            return answer
        raise refusal(self._address, doing, response.status_code, answer)


def may_pass(failure: Exception) -> bool:
    """Return whether it is worth trying again."""
    if isinstance(failure, ServerError):
        return failure.retry and failure.code != protocol.RATE_LIMITED  # that takes up to an hour
    return isinstance(failure, ConnectionFailed) and not any(
        isinstance(cause, ssl.SSLError | httpx.UnsupportedProtocol | httpx.InvalidURL)
        for cause in _causes(failure)
    )


def unreachable(address: Address, doing: str, error: BaseException) -> ConnectionFailed:
    """Return what to raise for a connection that failed or broke."""
    where = f"{doing}: {address.http}"
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            why = cause.verify_message or "it cannot be verified"
            return ConnectionFailed(
                f"{where} has a certificate that is not trusted ({why}): name the file of the authority that "
                "signed it"
            )
        if isinstance(cause, ssl.SSLError):
            return ConnectionFailed(f"{where} does not speak TLS: is it http:// rather than https://?")
        if isinstance(cause, ConnectionRefusedError):
            return ConnectionFailed(f"{where} refuses connections: is the server running, and on this port?")
    what = " ".join(str(error).split())[:200] or type(error).__name__
    return ConnectionFailed(f"{where} cannot be reached ({what})")


def timed_out(address: Address, doing: str, seconds: float) -> TimedOut:
    """Return what to raise when no answer has come."""
    return TimedOut(
        f"{doing}: no answer from {address.http} within {seconds:g} s: try again, or allow it more time"
    )


def nonsense(address: Address, doing: str) -> ServerError:
    """Return what to raise for an answer that is against the protocol; trying again would not help."""
    return ServerError(
        protocol.PROTOCOL, f"{doing}: {address.http} does not answer as a CipherLM server does"
    )


def asks_too_much(address: Address, doing: str, what: str) -> ServerError:
    """Return what to raise where a server wants more of its client than its model needs."""
    return ServerError(
        protocol.PROTOCOL,
        f"{doing}: {address.http} asks for {what}, which the model does not need: the session was ended",
    )


def refusal(address: Address, doing: str, status: int, answer: Mapping[str, Any] | None) -> ServerError:
    """Return what to raise for an HTTP status other than success, or an answer that is not JSON."""
    details = answer.get("error", answer) if answer is not None else {}
    if not isinstance(details, dict):
        details = {}
    code, message = details.get("code"), details.get("message")
    if status in (401, 403):
        return ServerError(protocol.UNAUTHORIZED, f"{doing}: {UNAUTHORIZED}", status=status)
    if not isinstance(code, str) or not isinstance(message, str):
        code = protocol.BUSY if status in _TRANSIENT_STATUSES else protocol.PROTOCOL
        message = f"{address.http} answers with HTTP {status}, not as a CipherLM server does"
    retry = status in _TRANSIENT_STATUSES or details.get("retry") is True
    after = details.get("retry_after")
    after = after if type(after) is int and after >= 0 else None
    return server_error(code, message, doing, retry=retry, status=status, retry_after=after)


def server_error(
    code: str,
    message: str,
    doing: str,
    *,
    retry: bool = False,
    status: int | None = None,
    retry_after: int | None = None,
) -> ServerError:
    """Return what to raise for an error that a server reports; its text is a stranger's."""
    text = protocol.error(code, message).message
    return ServerError(code[:64], f"{doing}: {text}", retry=retry, status=status, retry_after=retry_after)


def _read(response: httpx.Response) -> bytes:
    body = bytearray()
    for piece in response.iter_bytes():
        body += piece
        if len(body) > MAX_ANSWER_BYTES:
            return b""  # no answer of a CipherLM server
    return bytes(body)


def json_object(body: bytes) -> dict[str, Any] | None:
    """Return an answer, or None if it is not a JSON object."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return answer if isinstance(answer, dict) else None


def _causes(error: BaseException | None) -> list[BaseException]:
    causes: list[BaseException] = []
    while error is not None and error not in causes:
        causes.append(error)
        error = error.__cause__ or error.__context__
    return causes


def _ssl_context(verify: str | os.PathLike[str] | bool) -> ssl.SSLContext:
    if isinstance(verify, bool):
        return httpx.create_ssl_context(verify=verify)
    try:
        if os.path.isdir(verify):
            return ssl.create_default_context(capath=verify)
        return ssl.create_default_context(cafile=verify)
    except (OSError, ssl.SSLError) as error:
        raise ConnectionFailed(f"{os.fspath(verify)} is no file of certificates in PEM format") from error
