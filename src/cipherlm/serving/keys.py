"""Evaluation keys on the server's disk: uploads that resume, owners, and a budget that they share.

What is known about a key is in its file's name and times, so that a server that starts again knows it too::

    keys/<owner>/<SHA-256>.<kind>                 a complete key; its time is that of its last use
    keys/<owner>/<SHA-256>.<kind>.<size>.part     as much of an upload as has arrived

One server at a time may use a directory.
"""

import errno
import hashlib
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from cipherlm.serving.failures import Failure
from cipherlm.serving.fairness import fair_share
from cipherlm.serving.protocol import BAD_KEYS, BAD_REQUEST, BUSY, CONFLICT, STORAGE, TOO_LARGE, UNKNOWN_KEYS

UPLOADS_PER_OWNER = 8
EXPIRY_SECONDS = 24 * 3600.0

_NAME = re.compile(r"([0-9a-f]{64})\.([a-z0-9_]+)(?:\.([0-9]+)\.part)?")
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass
class _Entry:
    path: Path
    fingerprint: str
    kind: str
    size: int
    received: int
    complete: bool
    used: float
    leases: int = 0
    busy: bool = False

    @property
    def place(self) -> str:
        return self.path.parent.name

    @property
    def idle(self) -> bool:
        return self.complete and not self.leases

    @property
    def status(self) -> dict[str, Any]:
        return {"size": self.size, "received": self.received, "complete": self.complete}


class Lease:
    """Keys in use: ``paths`` by kind. They stay where they are until ``release``."""

    def __init__(self, paths: Mapping[str, Path], release: Callable[[], None]) -> None:
        self.paths = paths
        self._release: Callable[[], None] | None = release

    def release(self) -> None:
        """Let the keys go. More than once does nothing more."""
        release, self._release = self._release, None
        if release is not None:
            release()


class KeyStore:
    """The keys of all owners, none of whom can tell what the others have. Thread-safe; raises `Failure`.

    ``limits`` gives the greatest size of each kind, in bytes; ``budget`` that of all complete keys together,
    of which each owner has an equal share: of those named in ``owners`` or, if none is, of those that have
    keys here. An upload that completes takes the room of keys that are not in use, the least recently used
    first. Beyond its share an owner makes room with its own keys; those of an owner that is within its share
    never go for somebody else's. Uploads that are not complete have made no room, so they come on top: of
    each owner as much as its share, or a single one.
    """

    def __init__(
        self,
        directory: Path,
        limits: Mapping[str, int],
        budget: int,
        *,
        owners: Collection[str] = (),
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._limits = dict(limits)
        self._budget = budget
        self._owners = {_place(owner) for owner in owners}
        self._clock = clock
        self._lock = threading.RLock()
        self._directory = directory / "keys"
        _make_private(self._directory)
        self._entries: dict[tuple[str, str], _Entry] = {}
        for path in self._directory.glob("*/*"):
            self._found(path)

    @property
    def size(self) -> int:
        """What all keys take, in bytes, with what has arrived of others."""
        with self._lock:
            return sum(entry.received for entry in self._entries.values())

    def status(self, owner: str, fingerprint: str) -> dict[str, Any]:
        """Return ``{"size", "received", "complete"}`` in bytes."""
        with self._lock:
            return self._entry(owner, fingerprint).status

    def announce(self, owner: str, kind: str, size: int, fingerprint: str) -> dict[str, Any]:
        """Begin an upload, or find how far it is. Returns the status."""
        if kind not in self._limits:
            raise Failure(BAD_REQUEST, f"this model has keys of the kinds {', '.join(self._limits)}")
        if not _FINGERPRINT.fullmatch(fingerprint) or size < 1:
            raise Failure(BAD_REQUEST, "a key has a size and a SHA-256 of 64 lower-case hex digits")
        if size > self._limits[kind]:
            raise Failure(TOO_LARGE, f"{size} bytes of {kind} keys; at most {self._limits[kind]} may be")
        with self._lock:
            self._expire()
            entry = self._entries.get((_place(owner), fingerprint))
            if entry is not None:
                if (entry.kind, entry.size) != (kind, size):
                    raise Failure(CONFLICT, "these keys are here with another kind or size", **entry.status)
                return entry.status
            self._check_room(_place(owner), size)
            place = self._directory / _place(owner)
            _make_private(place)
            path = place / f"{fingerprint}.{kind}.{size}.part"
            with _storage_errors():
                path.touch(mode=0o600)
            entry = _Entry(path, fingerprint, kind, size, 0, False, self._clock())
            self._entries[_place(owner), fingerprint] = entry
            return entry.status

    def append(self, owner: str, fingerprint: str, offset: int, chunk: bytes) -> dict[str, Any]:
        """Write the chunk that begins at ``offset``. The last one completes the key if that is right."""
        with self._lock:
            entry = self._entry(owner, fingerprint)
            if entry.complete or entry.busy or offset != entry.received:
                raise Failure(CONFLICT, "the upload goes on at another offset", retry=True, **entry.status)
            if not chunk or offset + len(chunk) > entry.size:
                raise Failure(BAD_REQUEST, "a chunk that is empty or goes beyond the size of the keys")
            entry.busy = True
        try:
            with _storage_errors():
                _write(entry.path, offset, chunk)
                if offset + len(chunk) == entry.size:
                    self._complete(entry)
            # Only now: after an error the same chunk may come again.
            entry.received += len(chunk)
            entry.used = self._clock()
            return entry.status
        finally:
            entry.busy = False

    def delete(self, owner: str, fingerprint: str) -> None:
        """Remove a key or what there is of it."""
        with self._lock:
            entry = self._entry(owner, fingerprint)
            if entry.leases or entry.busy:
                raise Failure(CONFLICT, "these keys are in use", retry=True, **entry.status)
            self._forget(entry)

    def lease(self, owner: str, fingerprints: Mapping[str, str]) -> Lease:
        """Take keys into use, given and returned by kind."""
        with self._lock:
            entries = {}
            for kind, fingerprint in fingerprints.items():
                entry = self._entries.get((_place(owner), fingerprint))
                if entry is not None and not entry.path.exists():  # somebody has tidied up
                    self._forget(entry)
                    entry = None
                if entry is None or not entry.complete or entry.kind != kind:
                    raise Failure(UNKNOWN_KEYS, f"upload the {kind} keys first")
                entries[kind] = entry
            for entry in entries.values():
                entry.leases += 1
                self._touch(entry)
        return Lease({kind: entry.path for kind, entry in entries.items()}, lambda: self._end(entries))

    def _end(self, entries: Mapping[str, _Entry]) -> None:
        with self._lock:
            for entry in entries.values():
                entry.leases -= 1
                self._touch(entry)

    def _entry(self, owner: str, fingerprint: str) -> _Entry:
        entry = self._entries.get((_place(owner), fingerprint))
        if entry is None:
            raise Failure(UNKNOWN_KEYS, "no such keys")
        return entry

    def _found(self, path: Path) -> None:
        name = _NAME.fullmatch(path.name)
        if name is None:
            return
        fingerprint, kind, size = name.groups()
        stat = path.stat()
        entry = _Entry(
            path, fingerprint, kind, int(size or stat.st_size), stat.st_size, not size, stat.st_mtime
        )
        # A part that is whole was being checked when the server stopped.
        if kind in self._limits and (entry.complete or entry.received < entry.size):
            self._entries[path.parent.name, fingerprint] = entry
        else:
            path.unlink()

    def _complete(self, entry: _Entry) -> None:
        with entry.path.open("rb") as file:
            os.fsync(file.fileno())
            digest = _sha256(file)
        with self._lock:
            if digest != entry.fingerprint:
                self._forget(entry)
                raise Failure(BAD_KEYS, "the keys that arrived do not have the SHA-256 that was announced")
            for old in self._in_the_way(entry.place, entry.size):
                self._forget(old)
            path = entry.path.with_name(f"{entry.fingerprint}.{entry.kind}")
            entry.path = entry.path.replace(path)
            entry.complete = True
            self._touch(entry)

    def _check_room(self, place: str, size: int) -> None:
        """Raise `Failure` unless an upload may begin. Nothing is evicted for one that has not come."""
        begun = [entry.size for entry in self._of(place) if not entry.complete]
        if len(begun) >= UPLOADS_PER_OWNER:
            raise Failure(BUSY, "too many uploads that have not ended: end them or delete them", retry=True)
        if begun and sum(begun) + size > self._share(place):
            raise Failure(BUSY, "your uploads that have not ended take your share of the disk", retry=True)
        self._in_the_way(place, size)
        if shutil.disk_usage(self._directory).free < size:
            raise Failure(STORAGE, "the server's disk has no room for these keys", retry=True)

    def _in_the_way(self, place: str, size: int) -> list[_Entry]:
        """Return the keys that have to go when an owner's upload is complete.

        Raises `Failure` where there is no room.
        """
        missing = self._complete_bytes() + size - self._budget
        own_first = self._complete_bytes(place) + size > self._share(place)
        candidates = [entry for entry in self._entries.values() if entry.idle]
        candidates.sort(
            key=lambda entry: (self._share(entry.place) > 0, (entry.place == place) != own_first, entry.used)
        )
        left = {entry.place: self._complete_bytes(entry.place) for entry in candidates}
        going = []
        for entry in candidates:
            if missing <= 0:
                break
            if entry.place == place or left[entry.place] > self._share(entry.place, place):
                going.append(entry)
                left[entry.place] -= entry.size
                missing -= entry.size
        if missing > 0:
            raise Failure(
                STORAGE, "no room for these keys beside those of others and those in use", retry=True
            )
        return going

    def _complete_bytes(self, place: str | None = None) -> int:
        entries = self._entries.values() if place is None else self._of(place)
        return sum(entry.size for entry in entries if entry.complete)

    def _of(self, place: str) -> list[_Entry]:
        return [entry for entry in self._entries.values() if entry.place == place]

    def _share(self, place: str, asking: str | None = None) -> int:
        """Return how many bytes an owner can count on: none, for one that is no owner any more."""
        if self._owners:
            return fair_share(self._budget, len(self._owners)) if place in self._owners else 0
        there = {place, asking or place, *(entry.place for entry in self._entries.values())}
        return fair_share(self._budget, len(there))

    def _expire(self) -> None:
        for entry in list(self._entries.values()):
            if not (entry.complete or entry.busy) and entry.used < self._clock() - EXPIRY_SECONDS:
                self._forget(entry)

    def _forget(self, entry: _Entry) -> None:
        del self._entries[entry.place, entry.fingerprint]
        entry.path.unlink(missing_ok=True)

    def _touch(self, entry: _Entry) -> None:
        entry.used = self._clock()
        os.utime(entry.path, (entry.used, entry.used))


def _place(owner: str) -> str:
    """Return a directory's name for an owner, whatever characters the owner's name has."""
    return hashlib.sha256(owner.encode()).hexdigest()[:32]


def _make_private(directory: Path) -> None:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    directory.chmod(0o700)


@contextmanager
def _storage_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise Failure(STORAGE, "the server's disk is full", retry=True) from None


def _write(path: Path, offset: int, chunk: bytes) -> None:
    """Write a chunk whole or, if the disk is full, not at all."""
    with path.open("r+b", buffering=0) as file:
        try:
            file.seek(offset)
            rest = memoryview(chunk)
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(offset)
            raise


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
