"""The page in Chromium, against a real server: a model of one block, all of it on real ciphertexts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, expect

from cipherlm.cli import main
from tests.page.browsing import LONG, Tab, megabytes, static
from tests.serving import small
from tests.serving.test_system_secrets import of_ids, of_secret_key, of_text

Open = Callable[..., Tab]
PROMPT, NEW = small.PROMPT, 3
PROMPT_TOKENS = len(small.prompt_ids(PROMPT)[0])


def expected(text: str = PROMPT, count: int = NEW) -> str:
    """What the clear model makes of a text."""
    ids = small.prompt_ids(text)[0].tolist()
    new = small.continuation(text, count)
    tokenizer = small.tokenizer()
    return str(tokenizer.decode([*ids, *new])).removeprefix(tokenizer.decode(ids))


def client_bundle() -> Path:
    return small.exported("all") / "client"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, built_page: Path) -> Iterator[small.Process]:
    """A server with its page."""
    directory = tmp_path_factory.mktemp("server")
    with small.process("all", directory, "--page") as process:
        yield process


@pytest.fixture(scope="module")
def profile(server: small.Process, browser: Browser) -> Iterator[BrowserContext]:
    """A profile that has keys for the server, for tests that leave them as they are."""
    context = browser.new_context()
    tab = Tab(context, server.url)
    first_time(tab)
    tab.page.close()
    yield context
    context.close()


@pytest.fixture
def line(server: small.Process) -> Iterator[small.Recorder]:
    """A line to the server that records, and can be cut."""
    recorder = small.Recorder(server.url)
    yield recorder
    recorder.close()


def first_time(tab: Tab, passphrase: str = "") -> None:
    tab.connect()
    tab.make_keys(passphrase)
    tab.ready()


def test_answers_as_the_clear_model_and_sends_neither_key_nor_text(
    line: small.Recorder, open_tab: Open
) -> None:
    tab = open_tab(line.url)
    first_time(tab)
    tab.ask(PROMPT, NEW)
    tab.finished()
    assert tab.answer() == expected()
    assert tab.evaluations() == 1 + (PROMPT_TOKENS - 3) + NEW - 1 + (-(PROMPT_TOKENS + NEW - 1) % 4)
    traffic = line.traffic()
    up = b"".join(data for name, data in traffic.items() if name.endswith("up messages"))
    assert up.count(b'"type":"refreshed"') == int(tab.said("#rounds")) > 20
    assert sum(map(len, traffic.values())) / 1e6 > megabytes(tab.said("#up")) > 20
    needles = small.Needles()
    of_secret_key(needles, tab.secret())
    of_text(needles, "prompt", PROMPT)
    of_text(needles, "text", PROMPT + tab.answer())
    ids = [*small.prompt_ids(PROMPT)[0].tolist(), *small.continuation(PROMPT, NEW)]
    of_ids(needles, "ids", ids)
    assert needles.found(traffic) == set()
    assert needles.found([b"x" + tab.secret() + PROMPT.encode() + b"x"]) >= {"secret key, bytes", "prompt"}

    (before,) = tab.records()
    tab.reload()
    tab.connect()
    tab.ready()
    assert megabytes(tab.said("#up")) < 0.1
    tab.ask(PROMPT, NEW)
    tab.finished()
    assert tab.answer() == expected()
    (after,) = tab.records()
    assert (after["id"], before["texts"], after["texts"]) == (before["id"], 1, 2)
    # The model's files are not fetched again.
    assert sum(data.count(b"GET /model/model.safetensors") for data in line.traffic().values()) == 1


def test_goes_on_after_connections_were_lost(line: small.Recorder, open_tab: Open) -> None:
    """An upload where it was, a text from its beginning."""
    tab = open_tab(line.url)
    tab.connect()
    tab.make_keys()
    expect(tab.page.locator("#work-text")).to_contain_text("Sending evaluation keys", timeout=LONG)
    expect(tab.page.locator("#work-text")).not_to_contain_text(": 0 B of", timeout=LONG)
    line.cut()
    tab.ready()
    (record,) = tab.records()
    assert megabytes(tab.said("#up")) < record["evaluation"]["bytes"] / 1e6 + 2 * 4.2 + 2
    tab.ask(PROMPT, NEW)
    expect(tab.page.locator("#evaluations")).not_to_have_text("0", timeout=LONG)
    line.cut()
    tab.finished()
    assert tab.answer() == expected()
    tab.faults.clear()  # the browser's own words about the connection


def test_hides_where_nobody_reads_any_more(
    server: small.Process, profile: BrowserContext, open_tab: Open
) -> None:
    tab = open_tab(server.url, profile)
    tab.connect()
    tab.ready()
    tab.ask(PROMPT, NEW)
    tab.press("#stop")
    tab.finished()
    assert tab.answer() == "(nothing)"
    assert tab.evaluations() == 1 + (PROMPT_TOKENS - 3) + NEW - 1 + (-(PROMPT_TOKENS + NEW - 1) % 4)


def test_breaks_off(server: small.Process, profile: BrowserContext, open_tab: Open) -> None:
    tab = open_tab(server.url, profile)
    tab.connect()
    tab.ready()
    tab.ask(PROMPT, NEW)
    tab.press("#stop")
    tab.press("#stop")
    tab.finished()
    assert tab.evaluations() < 3
    tab.ask(PROMPT, NEW)
    tab.finished()
    assert tab.answer() == expected()


def test_a_passphrase_opens_the_keys_and_nothing_else_does(server: small.Process, open_tab: Open) -> None:
    tab = open_tab(server.url)
    first_time(tab, "correct horse")
    assert b"CLHE" not in tab.secret()
    tab.reload()
    tab.connect()
    tab.make_keys("wrong horse")
    assert "not the passphrase" in tab.error()
    tab.make_keys("correct horse")
    tab.ready()
    expect(tab.page.locator("#error")).to_be_hidden()


def test_keys_that_are_damaged_are_replaced(server: small.Process, open_tab: Open) -> None:
    tab = open_tab(server.url)
    first_time(tab)
    (before,) = tab.records()
    tab.change_keys("record.secret.clear[100] ^= 1")
    damaged_keys(tab)
    tab.make_keys()
    tab.ready()
    (after,) = tab.records()
    assert after["id"] != before["id"]
    # The server has these; of others it would ask for all pieces.
    tab.change_keys("record.evaluation.sha256 = record.evaluation.sha256.replace(/./g, '0')")
    tab.delete_piece()
    damaged_keys(tab)
    assert tab.records() == []


def damaged_keys(tab: Tab) -> None:
    """Come back, hear that the keys are damaged, and delete them."""
    tab.reload()
    tab.connect()
    assert "the keys in this browser are damaged: delete them and make new ones" in tab.error().lower()
    tab.press("#delete-button")
    expect(tab.page.locator("#keys-button")).to_have_text("Make keys")


def test_two_tabs_share_keys(server: small.Process, open_tab: Open) -> None:
    first, second = open_tab(server.url), open_tab(server.url)
    for tab in (first, second):
        tab.connect()
    for tab in (first, second):
        tab.make_keys()
    for tab in (first, second):
        tab.ready()
    assert len(first.records()) == 1
    for tab in (first, second):
        tab.ask(PROMPT, NEW)
    for tab in (first, second):
        tab.finished()
        assert tab.answer() == expected()
    assert first.records()[0]["texts"] == 2


def test_keys_that_are_spent_are_replaced(server: small.Process, open_tab: Open) -> None:
    tab = open_tab(server.url)
    first_time(tab)
    (before,) = tab.records()
    tab.change_keys("record.texts = 256")
    tab.ask(PROMPT, 1)
    tab.finished()
    assert tab.answer() == expected(count=1)
    (after,) = tab.records()
    assert (after["id"] != before["id"], after["texts"]) == (True, 1)


def test_a_token_opens_the_server(tmp_path: Path, built_page: Path, open_tab: Open) -> None:
    with small.process(
        "all", tmp_path, "--page", "--token", "a token's-own/+characters".replace(" ", "~")
    ) as server:
        tab = open_tab(server.url)
        tab.connect(token="another")
        assert "the server wants a token" in tab.error().lower()
        tab.page.fill("#token", "a~token's-own/+characters")
        tab.press("#connect-form button")
        tab.make_keys()
        tab.ready()
        tab.ask(PROMPT, 1)
        tab.finished()
        assert tab.answer() == expected(count=1)
        assert b"characters" not in server.log


def write_page(directory: Path, *servers: str) -> Path:
    named = [word for server in servers for word in ("--server", server)]
    assert main(["page", str(client_bundle()), str(directory), *named]) == 0
    return directory


def test_a_page_from_elsewhere(tmp_path: Path, built_page: Path, open_tab: Open) -> None:
    """Its server lets it in by name. Another model's server gets nothing, nor does one that refuses it."""
    places = [tmp_path / name for name in ("right", "closed", "other", "page")]
    for place in places[:3]:
        place.mkdir()
    places[3].mkdir()
    with static(tmp_path / "page") as url:
        allowed = ("--allow-origin", url)
        with (
            small.process("all", places[0], *allowed) as right,
            small.process("all", places[1]) as closed,
            small.process("block", places[2], *allowed) as other,
        ):
            write_page(places[3], right.url, closed.url, other.url)
            tab = open_tab(url)
            tab.connect(server=other.url)
            assert "another model" in tab.error()
            tab.connect(server=closed.url)
            assert "let this page in" in tab.error()
            tab.faults.clear()  # the browser's words about its refusal
            assert tab.records() == []
            tab.connect(server=right.url)
            tab.make_keys()
            tab.ready()
            tab.ask(PROMPT, 1)
            tab.finished()
            assert tab.answer() == expected(count=1)
            (record,) = tab.records()
            assert record["server"] == right.url.replace("127.0.0.1", "localhost")
            assert not (places[2] / "data" / "keys").is_dir() or not any(places[2].glob("data/keys/*/*"))
            # The page cannot talk to a server that it does not name, whatever runs in it.
            reached = tab.page.evaluate(
                "fetch('http://localhost:9/').then(() => 'yes', (error) => error.name)"
            )
            assert reached == "TypeError"
            assert any("Content Security Policy" in fault for fault in tab.faults)
            tab.faults.clear()


@pytest.mark.parametrize(
    "name", ["assets/worker-*.js", "assets/engine-*.wasm", "page.json", "model/tokenizer.json"]
)
def test_a_file_that_was_changed_is_not_used(
    tmp_path: Path, built_page: Path, open_tab: Open, name: str
) -> None:
    directory = write_page(tmp_path / "page", "http://127.0.0.1:8470")
    (path,) = directory.glob(name)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with static(directory) as url:
        tab = open_tab(url)
        assert "not the file that" in tab.error()
        expect(tab.page.locator("#connect")).to_be_hidden()
        tab.faults.clear()


def test_works_with_a_keyboard_alone_on_a_phone_s_width(
    server: small.Process, profile: BrowserContext, open_tab: Open
) -> None:
    tab = open_tab(server.url, profile)
    page = tab.page
    page.set_viewport_size({"width": 360, "height": 740})
    expect(page.locator("#connect")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360

    def focus(selector: str) -> None:
        for _ in range(20):
            if page.evaluate("(selector) => document.activeElement.matches(selector)", selector):
                return
            page.keyboard.press("Tab")
        raise AssertionError(f"{selector} cannot be reached by the keyboard")

    focus("#connect-form button")
    page.keyboard.press("Enter")
    tab.ready()
    expect(page.locator("#text")).to_be_focused(timeout=LONG)
    page.keyboard.type(PROMPT)
    focus("#most")
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.type("1")
    page.keyboard.press("Enter")
    expect(page.locator("#log .said")).to_have_count(2)
    tab.finished()
    assert tab.answer() == expected(count=1)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_screen_readers_find_their_way(
    server: small.Process, profile: BrowserContext, open_tab: Open
) -> None:
    """By axe's rules, contrast in the light and in the dark among them."""
    axe = Path(__file__).resolve().parents[2] / "page" / "node_modules" / "axe-core" / "axe.min.js"
    tab = open_tab(server.url, profile)
    tab.page.evaluate(axe.read_text("utf-8"))
    problems = (
        "axe.run().then((found) => found.violations.map((one) => [one.id, one.nodes.map((n) => n.html)]))"
    )
    expect(tab.page.locator("#connect")).to_be_visible()
    assert tab.page.evaluate(problems) == []
    tab.connect()
    tab.ready()
    tab.ask(PROMPT, 1)
    tab.finished()
    tab.press("#connect summary")
    assert tab.page.evaluate(problems) == []
    tab.page.emulate_media(color_scheme="dark")
    assert tab.page.evaluate(problems) == []
