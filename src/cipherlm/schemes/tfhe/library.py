"""Concrete, which is optional: importing it, and which one it is."""

from __future__ import annotations

import platform
import shutil
import warnings
import weakref
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

from cipherlm.schemes.tfhe.errors import MissingSchemeError

_ARCHIVE = frozenset(
    {
        "client.specs.json",
        "compilation_feedback.json",
        "composition_rules.json",
        "is_simulated",
        "program_info.concrete.params.json",
        "sharedlib.so",
        "sharedlib.dylib",
        "staticlib.a",
    }
)
"""What ``fhe.Server.save`` puts into an archive: JSON and native code."""


def import_concrete() -> ModuleType:
    """Return ``concrete.fhe``; ``MissingSchemeError`` with the mend where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from concrete import fhe
    except ImportError as error:
        raise MissingSchemeError(
            'TFHE needs Concrete: pip install "cipherlm[tfhe]" (Python 3.10 to 3.12, Linux or macOS)'
        ) from error
    return fhe  # type: ignore[no-any-return]


def concrete_version() -> str:
    """Return the version of the Concrete that is installed."""
    from importlib.metadata import version

    return version("concrete-python")


def machine() -> str:
    """Return the kind of machine that circuits compiled here run on, such as ``"Linux x86_64"``."""
    return f"{platform.system()} {platform.machine()}"


def load_server(path: Path) -> Any:
    """Return the ``fhe.Server`` of an archive that ``fhe.Server.save`` wrote; ``ValueError`` for another.

    The archive holds native code, which runs: load only what comes from a trusted place. Concrete would also
    take one with a program and a configuration in jsonpickle, which can name any Python object; that is
    refused. The unpacked files go when the server does.
    """
    fhe = import_concrete()
    try:
        with zipfile.ZipFile(path) as archive:
            unexpected = sorted({entry.filename for entry in archive.infolist()} - _ARCHIVE)
        if unexpected:
            raise ValueError(f"{path} is not a compiled circuit: it holds {unexpected[0]!r}")
        server = fhe.Server.load(path)
    except (zipfile.BadZipFile, RuntimeError, KeyError) as error:
        raise ValueError(f"{path} is not a compiled circuit: {error}") from error
    unpacked = server._library.get_output_dir_path()
    weakref.finalize(server, shutil.rmtree, unpacked, ignore_errors=True)
    return server
