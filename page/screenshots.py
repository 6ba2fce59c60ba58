"""Takes the documentation's screenshots, and prints the figures: ``python page/screenshots.py URL``.

Run from the repository's directory with the packages of the tests, for a server of the embedded model:
``cipherlm serve tiny-bundle/server --page``.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from playwright.sync_api import sync_playwright  # noqa: E402

from tests.page.browsing import Tab  # noqa: E402
from tests.page.chromium import chromium  # noqa: E402

IMAGES = ROOT / "docs" / "images"
PROMPT, NEW = "The old man looked at the sea", 10
WIDE, NARROW = {"width": 1100, "height": 860}, {"width": 390, "height": 844}


def main(url: str) -> None:
    """Use the page once, and take it in light, in dark and on a phone's width."""
    IMAGES.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        tab = Tab(browser.new_context(viewport=WIDE), url)
        tab.connect()
        tab.make_keys()
        tab.ready()
        tab.ask(PROMPT, NEW)
        tab.finished()
        for figure in tab.page.locator(".figures div").all_inner_texts():
            print(" ".join(figure.split()))
        tab.page.evaluate("document.activeElement.blur()")
        tab.page.screenshot(path=IMAGES / "page-light.png")
        tab.page.emulate_media(color_scheme="dark")
        tab.page.screenshot(path=IMAGES / "page-dark.png")
        tab.page.set_viewport_size(NARROW)
        tab.page.locator("#chat").scroll_into_view_if_needed()
        tab.page.evaluate("document.querySelector('#chat').scrollIntoView()")
        tab.page.screenshot(path=IMAGES / "page-phone.png")
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1])
