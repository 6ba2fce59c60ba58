"""Finds a Chromium for the tests of the page, and installs Debian's where there is none and it may."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


class NoChromiumError(Exception):
    """There is none, and why."""


def chromium() -> str:
    """Return the path of a Chromium: the system's, Playwright's, or one that is installed now."""
    found = _there()
    if found is not None:
        return found
    apt = shutil.which("apt-get")
    if apt is None or os.geteuid() != 0:
        raise NoChromiumError(
            "no Chromium for the tests of the page: install it (apt-get install chromium, or "
            "`playwright install chromium`)"
        )
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in ([apt, "update"], [apt, "install", "-y", "--no-install-recommends", "chromium"]):
        print(*command, file=sys.stderr)
        done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
        if done.returncode:
            raise NoChromiumError(
                f"no Chromium, and `{' '.join(command)}` fails: {done.stderr.strip()[-500:]}"
            )
    found = _there()
    if found is None:
        raise NoChromiumError("no Chromium, though Debian's was installed")
    return found


def _there() -> str | None:
    for name in NAMES:
        if (found := shutil.which(name)) is not None:
            return found
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = playwright.chromium.executable_path
    return path if Path(path).is_file() else None


if __name__ == "__main__":
    try:
        print(chromium())
    except NoChromiumError as error:
        sys.exit(str(error))
