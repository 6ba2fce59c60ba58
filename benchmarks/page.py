"""Measures the page in Chromium: ``python benchmarks/page.py URL "What is the capital of France?"``.

Run from the repository's directory with the packages of the tests, for a server that offers the page:
``cipherlm serve smollm2-bundle/server --page``. Prints the answer and the figures that the page shows.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from playwright.sync_api import sync_playwright  # noqa: E402

from tests.page import browsing  # noqa: E402
from tests.page.chromium import chromium  # noqa: E402


def main() -> None:
    """Make keys, ask a question, and wait for the whole answer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="of the server, which offers the page")
    parser.add_argument("text", help="a question, or a text to continue")
    parser.add_argument("--new-tokens", type=int, default=8, metavar="N", help="of the answer (default: 8)")
    parser.add_argument("--hours", type=float, default=1.0, help="to wait for each step (default: 1)")
    options = parser.parse_args()
    browsing.LONG = round(options.hours * 3_600_000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        tab = browsing.Tab(browser.new_context(), options.url)
        tab.connect()
        start = time.perf_counter()
        tab.make_keys()
        tab.ready()
        print(f"keys made and uploaded in {time.perf_counter() - start:.1f} s", flush=True)
        start = time.perf_counter()
        tab.ask(options.text, options.new_tokens)
        tab.finished()
        print(f"answered in {time.perf_counter() - start:.1f} s: {tab.answer()!r}")
        for figure in tab.page.locator(".figures div").all_inner_texts():
            print(" ".join(figure.split()))
        if tab.faults:
            print("faults:", *tab.faults, sep="\n")
        browser.close()


if __name__ == "__main__":
    main()
