"""One process at a time in a directory, so that others can use what it leaves there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

_NAME = ".lock"


@contextmanager
def exclusive(directory: Path, waiting: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Hold a directory's lock for as long as the context lasts; it is made, for its owner alone, if need be.

    What ``waiting`` returns is entered while another process has it. The system lets go of the lock of one
    that dies.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = FileLock(directory / _NAME, mode=0o600)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        with waiting():
            lock.acquire()
    try:
        yield
    finally:
        lock.release()
