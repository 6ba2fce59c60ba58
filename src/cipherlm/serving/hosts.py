"""Under which names a server on this machine answers.

A web page of ``evil.example`` can have that name resolve to 127.0.0.1 (DNS rebinding): the browser then takes
a server here for the page's own and lets the page read its answers. The Host header still says
``evil.example``.
"""

import re
from collections.abc import Collection, Sequence

LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")

_HOST = re.compile(r"(\[[^\]]*\]|[^:]*)(?::\d+)?")


def host_allowed(headers: Sequence[str], allowed: Collection[str]) -> bool:
    """Return whether a request has one Host header, and it names one of the ``allowed`` hosts."""
    name = _HOST.fullmatch(headers[0].lower()) if len(headers) == 1 else None
    return name is not None and name[1] in allowed


def in_url(host: str) -> str:
    """Return a host as URLs and Host headers have it: IPv6 addresses in brackets."""
    return f"[{host}]" if ":" in host else host
