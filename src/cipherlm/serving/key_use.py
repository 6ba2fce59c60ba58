"""What a key set has been used for: by which server, for which model, and for how many texts.

A server that cheats learns about a key from what its client does with the texts that come of it: a bit of the
key from each at most, where it sees when texts end. So a key belongs to one server, which cannot go on where
another one has stopped, and serves a number of texts, after which a new one is made.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from filelock import FileLock

from cipherlm.serving.auth import is_loopback
from cipherlm.serving.keystore import DamagedKeysError

BUDGET = 256
"""Texts that a key serves: a sixty-fourth of the 16,384 bits that a server would need for all of a key."""

USE_NAME = "use.json"
_LOCK_NAME = "use.lock"
_MAX_BYTES = 1 << 16
_PORTS = {"http": 80, "https": 443}


def server_identity(url: str) -> str:
    """Return what tells servers apart: an address in one spelling. All names of this machine are one."""
    parts = urlsplit(url)
    host = (parts.hostname or "").lower()
    host = "localhost" if is_loopback(host) else host
    return f"{parts.scheme}://{host}:{parts.port or _PORTS.get(parts.scheme)}{parts.path.rstrip('/')}"


@dataclass(frozen=True)
class Use:
    """Which server and model a key belongs to, if it was used at all, and how many texts it has served."""

    server: str | None = None
    model: str | None = None
    texts: int = 0

    def allows(self, server: str, model: str) -> bool:
        """Say whether a key may be used with a server's model: it belongs to that, or to none yet."""
        return self.server is None or (self.server, self.model) == (server, model)


class KeyUse:
    """The use of one key set, in a file beside it that several processes may write."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def read(self) -> Use:
        """Return what there is. Raises ``DamagedKeysError`` for a file that nobody wrote."""
        path = self._directory / USE_NAME
        try:
            with path.open("rb") as file:
                use = Use(**json.loads(file.read(_MAX_BYTES)))
        except FileNotFoundError:
            return Use()
        except (OSError, ValueError, TypeError, RecursionError):
            raise DamagedKeysError(f"{path} is damaged: generate new keys") from None
        if type(use.texts) is not int or use.texts < 0 or not isinstance(use.server, str | None):
            raise DamagedKeysError(f"{path} is damaged: generate new keys")
        return use

    def bind(self, server: str, model: str) -> bool:
        """Give the key to a server's model; return whether it belongs to it."""
        with self._locked():
            use = self.read()
            if not use.allows(server, model):
                return False
            self._write(replace(use, server=server, model=model))
            return True

    def spend(self, texts: int, budget: int) -> bool:
        """Note texts that are about to be generated; return False, and note nothing, if the key is spent."""
        with self._locked():
            use = self.read()
            if use.texts >= budget:
                return False
            self._write(replace(use, texts=use.texts + texts))
            return True

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with FileLock(self._directory / _LOCK_NAME, mode=0o600):
            yield

    def _write(self, use: Use) -> None:
        # Under its name it is whole or not there, whenever the machine stops.
        descriptor, name = tempfile.mkstemp(prefix=".use-", dir=self._directory)  # mode 0600
        try:
            with os.fdopen(descriptor, "w") as file:
                json.dump(asdict(use), file)
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(self._directory / USE_NAME)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
