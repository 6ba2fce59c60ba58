"""One process at a time makes keys on this machine, so that others can use what it made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from filelock import FileLock, Timeout

from cipherlm.progress import Progress
from cipherlm.serving.keystore import keys_directory

_NAME = ".lock"


@contextmanager
def making_keys(progress: Progress) -> Iterator[None]:
    """Wait until no other process makes keys, and keep others waiting for as long as the context lasts.

    The system lets go of the lock of a process that dies.
    """
    directory = keys_directory()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = FileLock(directory / _NAME, mode=0o600)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        with progress("waiting for keys that another process makes"):
            lock.acquire()
    try:
        yield
    finally:
        lock.release()
