"""The embedded model, whole, in Chromium: the same text as the clear model's, and what it costs.

Server and browser share the machine. The bars are for two cores with nothing else to do, and stretch with the
load of others; ``-s`` shows the figures.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from playwright.sync_api import Browser

from cipherlm import load_model, load_tokenizer
from cipherlm.cli import main
from cipherlm.serving.page import STATIC, compressed_file
from tests.page.browsing import LONG, Tab, megabytes
from tests.serving import small

PROMPT, NEW = "The old man looked at the sea", 6
MOST_KEY_SECONDS, MOST_TOKEN_SECONDS = 60, 25
MOST_MEMORY = 1 << 30
MOST_PAGE = 5_000_000


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, built_page: Path, module_monkeypatch: pytest.MonkeyPatch
) -> Iterator[small.Process]:
    """A server with the embedded model and its page."""
    directory = tmp_path_factory.mktemp("embedded")
    assert main(["export", "tiny", str(directory / "bundle")]) == 0
    module_monkeypatch.setattr(small, "exported", lambda placement: directory / "bundle")
    with small.process("all", directory, "--page") as process:
        yield process


@pytest.fixture(scope="module")
def module_monkeypatch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def continuation() -> str:
    """The clear model's greedy text."""
    model, tokenizer = load_model("tiny"), load_tokenizer("tiny")
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    start = torch.cat([torch.tensor([[tokenizer.bos_token_id]]), ids], 1)
    with torch.inference_mode():
        whole = model.generate(start, max_new_tokens=NEW, do_sample=False)[0, 1:]
    return str(tokenizer.decode(whole)).removeprefix(tokenizer.decode(ids[0]))


class Tabs:
    """The browser's tabs as processes: their processor time, and the most memory of the times one looked."""

    def __init__(self, browser: Browser) -> None:
        self._session = browser.new_browser_cdp_session()
        self.most_memory = 0

    def look(self) -> float:
        """Return the processor time of all tabs so far, in seconds."""
        memory, time = 0, 0.0
        for process in self._session.send("SystemInfo.getProcessInfo")["processInfo"]:
            if process["type"] != "renderer":
                continue
            time += process["cpuTime"]
            with suppress(OSError):
                rollup = Path(f"/proc/{process['id']}/smaps_rollup").read_text()
                found = re.search(r"^Pss:\s+(\d+) kB", rollup, re.MULTILINE)
                memory += int(found[1]) << 10 if found else 0
        self.most_memory = max(self.most_memory, memory)
        return time


def processor_seconds(pid: int) -> float:
    """Return the processor time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def seconds(text: str) -> float:
    return float(text.removesuffix(" s"))


def test_the_embedded_model(server: small.Process, browser: Browser, open_tab: Callable[..., Tab]) -> None:
    tabs = Tabs(browser)

    def until(selector: str) -> None:
        for _ in range(LONG // 250):
            tabs.look()
            if tab.page.is_visible(selector):
                return
            tab.page.wait_for_timeout(250)
        raise AssertionError(f"no {selector}: {tab.said('#error')}")

    tab = open_tab(server.url)
    tab.connect()
    tab.make_keys()
    until("#work-text:has-text('Making keys')")
    before_keys = tabs.look()
    until("#work-text:not(:has-text('Making keys'))")
    after_keys = tabs.look()
    until("#chat")
    before = tabs.look(), processor_seconds(server.process.pid)
    tab.ask(PROMPT, NEW)
    until("#send:enabled")
    after = tabs.look(), processor_seconds(server.process.pid)
    assert tab.answer() == continuation()
    evaluations = tab.evaluations()
    figures = {
        "seconds for keys": seconds(tab.said("#cost-keys")),
        "... of a processor": after_keys - before_keys,
        "seconds for a token": seconds(tab.said("#cost-token")),
        "... of a processor, browser": (after[0] - before[0]) / evaluations,
        "... of a processor, server": (after[1] - before[1]) / evaluations,
        "MB of keys": megabytes(tab.said("#cost-key-bytes")),
        "MB a token": megabytes(tab.said("#cost-traffic")) / evaluations,
        "MB of memory": tabs.most_memory / 1e6,
        "load": os.getloadavg()[0],
    }
    print("\n" + "\n".join(f"{name:28} {value:8.1f}" for name, value in figures.items()))
    # What is measured keeps both cores busy by itself.
    stretch = max(1.0, figures["load"] / (os.cpu_count() or 1) - 1)
    assert figures["seconds for keys"] < MOST_KEY_SECONDS * stretch
    assert figures["seconds for a token"] < MOST_TOKEN_SECONDS * stretch
    assert 0 < tabs.most_memory < MOST_MEMORY


def test_the_page_is_small(built_page: Path) -> None:
    """Compressed, as servers send it."""
    program = [path for path in STATIC.rglob("*") if path.is_file() and path.suffix != ".gz"]
    sizes = [(compressed_file(path) or path).stat().st_size for path in program]
    print(f"\n{sum(sizes) / 1e6:.2f} MB")
    assert len(program) == 5
    assert sum(sizes) < MOST_PAGE
