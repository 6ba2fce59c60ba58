"""Bearer tokens and whose they are."""

import hashlib
import hmac
import ipaddress
from collections.abc import Iterable
from pathlib import Path

ANONYMOUS = "anonymous"
"""The one owner of a server without tokens."""
DEFAULT_OWNER = "default"


class Tokens:
    """The tokens that open a server, each with the name of its owner. Without any, everyone is one owner."""

    def __init__(self, pairs: Iterable[tuple[str, str]] = ()) -> None:
        """Take pairs of owner and token. Raises :class:`ValueError` for a token that no header can carry."""
        # Digests all have one length, so that comparing them tells nothing about a token's.
        self._owners: dict[bytes, str] = {}
        for owner, token in pairs:
            if not token.isascii() or not token.isprintable() or not token or " " in token:
                raise ValueError(f"the token of {owner!r} has characters that an HTTP header cannot carry")
            if self._owners.setdefault(_digest(token), owner) != owner:
                raise ValueError(f"{owner!r} has the token of another owner")

    @classmethod
    def read(cls, path: Path) -> "Tokens":
        """Read a file with ``name token`` or ``token`` on each line; empty lines and # comments may be.

        Raises :class:`ValueError` for any other line and for a file without tokens.
        """
        pairs = []
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            words = [] if line.lstrip().startswith("#") else line.split()
            if len(words) > 2:
                raise ValueError(f'{path}, line {number}: write "name token", or a token alone')
            if words:
                pairs.append((words[0] if len(words) == 2 else DEFAULT_OWNER, words[-1]))
        if not pairs:
            raise ValueError(f"{path}: no token in it")
        return cls(pairs)

    def __bool__(self) -> bool:
        return bool(self._owners)

    @property
    def owners(self) -> frozenset[str]:
        """The names of all who have a token."""
        return frozenset(self._owners.values())

    def owner(self, authorization: str | None) -> str | None:
        """Return whose token an Authorization header carries, or None. Takes as long for a wrong token."""
        if not self._owners:
            return ANONYMOUS
        scheme, _, token = (authorization or "").partition(" ")
        offered = _digest(token.strip())
        found = None
        for digest, owner in self._owners.items():
            if hmac.compare_digest(digest, offered):
                found = owner
        return found if scheme.lower() == "bearer" else None


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a server bound to ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
