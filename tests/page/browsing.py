"""The page in a browser, as a person uses it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

from playwright.sync_api import BrowserContext, Page, expect

LONG = 180_000
"""Milliseconds, for what takes seconds on a machine that does nothing else."""


class Tab:
    """One tab with the page."""

    def __init__(self, context: BrowserContext, url: str) -> None:
        self.page: Page = context.new_page()
        self.page.set_default_timeout(LONG)
        self.faults: list[str] = []
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("console", self._heard)
        self.page.goto(url)

    def _heard(self, message: Any) -> None:
        # What the network or a server refuses, browsers call an error too.
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.faults.append(message.text)

    def press(self, selector: str) -> None:
        """Press a button that a pointer can reach.

        Playwright's own click waits until a button stands still from one frame to the next, and a browser
        without a screen sometimes stops drawing frames.
        """
        button = self.page.locator(selector)
        expect(button).to_be_visible(timeout=LONG)
        expect(button).to_be_enabled(timeout=LONG)
        assert button.evaluate(_REACHED), f"something covers {selector}"
        button.dispatch_event("click")

    def reload(self) -> None:
        self.page.reload()

    def connect(self, *, server: str | None = None, token: str = "") -> None:
        self.page.wait_for_selector("#connect-form", state="visible")
        if server is not None:
            self.page.select_option("#choice", server)
        if token:
            self.press("#connect summary")
            self.page.fill("#token", token)
        self.press("#connect-form button")

    def make_keys(self, passphrase: str = "") -> None:
        """Make keys, and wait for the conversation that can begin then."""
        self.page.wait_for_selector("#keys-form", state="visible")
        self.page.fill("#passphrase", passphrase)
        self.press("#keys-button")

    def ready(self) -> None:
        """Wait until one can write."""
        expect(self.page.locator("#chat")).to_be_visible(timeout=LONG)

    def ask(self, text: str, tokens: int) -> None:
        self.page.fill("#text", text)
        self.page.fill("#most", str(tokens))
        self.press("#send")
        expect(self.page.locator("#stop")).to_be_visible()

    def finished(self) -> None:
        """Wait until nothing is evaluated any more."""
        expect(self.page.locator("#stop")).to_be_hidden(timeout=LONG)

    def answer(self) -> str:
        return self.page.locator("#log .said:last-child p").text_content() or ""

    def said(self, selector: str) -> str:
        return self.page.locator(selector).text_content() or ""

    def error(self) -> str:
        """Wait for an error, and return it."""
        expect(self.page.locator("#error")).to_be_visible(timeout=LONG)
        return self.said("#error")

    def evaluations(self) -> int:
        return int(self.said("#evaluations"))

    def records(self) -> list[dict[str, Any]]:
        """The keys in the browser's store."""
        return list(
            self.page.evaluate(
                _DATABASE + "return await all(db.transaction('keys').objectStore('keys').getAll());})()"
            )
        )

    def secret(self) -> bytes:
        """The secret key as it is kept."""
        (record,) = self.records()
        return bytes(record["secret"].get("clear") or record["secret"]["sealed"])

    def change_keys(self, change: str) -> None:
        """Change the one record of keys by a statement of JavaScript about ``record``."""
        self.page.evaluate(
            _DATABASE
            + "const store = db.transaction('keys', 'readwrite').objectStore('keys');"
            + f"const [record] = await all(store.getAll()); {change}; await all(store.put(record)); }})()"
        )

    def delete_piece(self) -> None:
        """Delete a piece of the evaluation keys."""
        self.page.evaluate(
            _DATABASE
            + "const store = db.transaction('pieces', 'readwrite').objectStore('pieces');"
            + "const keys = await all(store.getAllKeys()); await all(store.delete(keys[5])); })()"
        )


_REACHED = """(button) => {
  button.scrollIntoView({ block: "nearest" });
  const { x, y, width, height } = button.getBoundingClientRect();
  return button.contains(document.elementFromPoint(x + width / 2, y + height / 2));
}"""

_DATABASE = """(async () => {
  const all = (request) => new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  const db = await all(indexedDB.open("cipherlm"));
"""


@contextmanager
def static(directory: Path, headers: Mapping[str, str] | None = None) -> Iterator[str]:
    """Serve files as any web server does, and yield the URL."""

    class Handler(SimpleHTTPRequestHandler):
        def end_headers(self) -> None:
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Cache-Control", "no-store")
            super().end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(directory)))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def megabytes(text: str) -> float:
    """Return a size as the page writes it, in megabytes."""
    match = re.fullmatch(r"([0-9.]+) (B|kB|MB|GB)", text)
    assert match is not None, text
    return float(match[1]) * {"B": 1e-6, "kB": 1e-3, "MB": 1.0, "GB": 1e3}[match[2]]
