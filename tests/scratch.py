"""Directories for what several tests use."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

_made: list[TemporaryDirectory[str]] = []


def directory(name: str) -> Path:
    """Make a directory that is there until the tests of this process have ended."""
    made = TemporaryDirectory(prefix=f"cipherlm-{name}-")
    _made.append(made)
    return Path(made.name)


def remove() -> None:
    """Remove them all. Processes of pytest-xdist end without what would remove them otherwise."""
    for made in _made:
        made.cleanup()
