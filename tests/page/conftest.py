"""What tests of the web page share: what was built of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext

    from tests.page.browsing import Tab

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
    found = shutil.which("node", path=build.Node.find().path)
    assert found is not None
    return [found]


@pytest.fixture(scope="session")
def built_page() -> Path:
    """The page in the package, built from the sources as they are."""
    return build.build_page()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A Chromium."""
    from playwright.sync_api import sync_playwright

    from tests.page.chromium import chromium

    # As root, who alone uses a container, Chromium has no sandbox.
    options = [] if os.geteuid() else ["--no-sandbox"]
    path = chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=options)
        yield browser
        browser.close()


@pytest.fixture
def open_tab(browser: Browser, built_page: Path) -> Iterator[Callable[..., Tab]]:
    """Opens tabs, of a new profile for this test unless one is given. No tab may have a fault."""
    from tests.page.browsing import Tab

    own = browser.new_context()
    tabs: list[Tab] = []

    def opened(url: str, profile: BrowserContext | None = None) -> Tab:
        tabs.append(Tab(profile or own, url))
        return tabs[-1]

    yield opened
    faults = [fault for tab in tabs for fault in tab.faults]
    for tab in tabs:
        tab.page.close()
    own.close()
    assert faults == []


def run_script(node: list[str], script: str, *arguments: object) -> str:
    """Run a script beside the tests, and return what it prints."""
    command = [*node, str(Path(__file__).parent / script), *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "NODE_NO_WARNINGS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
