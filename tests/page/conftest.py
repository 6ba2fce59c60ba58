"""What tests of the web page share: what was built of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "page"))

import build  # noqa: E402


@pytest.fixture(scope="session")
def engine_module() -> Path:
    """The engine's client half, built from the sources as they are."""
    return build.build_engine()


@pytest.fixture(scope="session")
def node() -> list[str]:
    """The command that runs Node."""
    found = shutil.which("node", path=build.node_path())
    assert found is not None
    return [found]


def run_script(node: list[str], script: str, *arguments: object) -> str:
    """Run a script beside the tests, and return what it prints."""
    command = [*node, str(Path(__file__).parent / script), *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "NODE_NO_WARNINGS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
