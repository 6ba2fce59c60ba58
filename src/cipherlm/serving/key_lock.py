"""One process at a time makes keys on this machine, so that others can use what it made."""

from __future__ import annotations

from contextlib import AbstractContextManager

from cipherlm.exclusive import exclusive
from cipherlm.progress import Progress
from cipherlm.serving.keystore import keys_directory


def making_keys(progress: Progress) -> AbstractContextManager[None]:
    """Wait until no other process makes keys, and keep others waiting for as long as the context lasts."""
    return exclusive(keys_directory(), lambda: progress("waiting for keys that another process makes"))
