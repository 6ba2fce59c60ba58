"""What can go wrong between a quantised model and its encrypted run, each with its mend in the message."""

from __future__ import annotations

from pathlib import Path


class MissingSchemeError(ImportError):
    """The scheme's library is not installed."""


class TfheError(RuntimeError):
    """Base of this scheme's errors."""


class NotCompiledError(TfheError):
    """An encrypted run was asked for before ``compile``."""


class TooManyTokensError(TfheError):
    """More tokens than the circuit was compiled for."""

    def __init__(self, tokens: int, limit: int):
        super().__init__(
            f"{tokens} tokens do not fit a circuit compiled for {limit}: compile with tokens={tokens} or more"
        )


class NoParametersError(TfheError):
    """Concrete finds no secure parameters that keep the noise below what the circuit asks for."""


class DamagedCacheError(TfheError):
    """A cached circuit or key is not what was written."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f"{path} is damaged ({reason}): delete the folder {path.parent}, it will be rebuilt")
