"""Record a real run in a terminal: ``python docs/recording.py`` writes docs/images/demo.cast and demo.svg.

The first is asciinema's format (version 2), the second an animation that needs no player. Both have what
the command printed, when it printed it; the animation cuts pauses to ``LONGEST_PAUSE``.

    python docs/recording.py                      record `cipherlm demo`, and draw it
    python docs/recording.py --draw               draw the recording that is there again
    python docs/recording.py -- cipherlm inspect  record another command
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import pty
import shlex
import struct
import sys
import termios
import time
from collections.abc import Iterator
from html import escape
from pathlib import Path

import pyte

IMAGES = Path(__file__).parent / "images"
COLUMNS, ROWS = 100, 28
LONGEST_PAUSE = 2.0
LAST_PAUSE = 8.0
FRAME_SECONDS = 0.2
CHARACTER, LINE, MARGIN = 7.8, 18, 16

Event = tuple[float, str]
STYLE = """
text { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; fill: #e6edf3; white-space: pre; }
.frame { fill: #0d1117; stroke: #3d444d; } .typed { fill: #3fb950; } g { visibility: hidden; }
@media (prefers-reduced-motion: reduce) { g { animation: none !important; } .last { visibility: visible; } }
"""


def recorded(command: list[str]) -> Iterator[Event]:
    """Run a command in a terminal, and yield seconds and text. Raises ``SystemExit`` if it fails."""
    yield 0.0, "$ "
    yield 0.8, f"{shlex.join(command)}\r\n"
    start = time.monotonic() - 1.0
    child, terminal = pty.fork()
    if child == 0:
        os.execvp(command[0], command)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    rest = b""
    while True:
        try:
            data = os.read(terminal, 65536)
        except OSError:  # how Linux says that the other side has closed
            data = b""
        if not data:
            break
        data = rest + data
        text = data.decode("utf-8", "ignore")
        rest = data[len(text.encode()) :]
        yield time.monotonic() - start, text
    _, status = os.waitpid(child, 0)
    if status:
        raise SystemExit(f"{shlex.join(command)} failed")


def write_cast(path: Path, events: list[Event]) -> None:
    """Write a recording as asciinema does."""
    header = {"version": 2, "width": COLUMNS, "height": ROWS, "timestamp": int(time.time())}
    lines = [json.dumps(header), *(json.dumps([round(when, 3), "o", text]) for when, text in events)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_cast(path: Path) -> list[Event]:
    """Read what ``write_cast`` wrote."""
    _, *lines = path.read_text(encoding="utf-8").splitlines()
    return [(when, text) for when, _, text in map(json.loads, lines)]


def frames(events: list[Event]) -> Iterator[tuple[float, list[str]]]:
    """Yield when the screen changes and the lines that it has then, with long pauses cut."""
    screen = pyte.Screen(COLUMNS, ROWS)
    stream = pyte.Stream(screen)
    cut, before, shown = 0.0, 0.0, -FRAME_SECONDS
    for index, (when, text) in enumerate(events):
        cut += max(0.0, when - before - LONGEST_PAUSE)
        before = when
        stream.feed(text)
        follows = events[index + 1][0] if index + 1 < len(events) else float("inf")
        if when - shown >= FRAME_SECONDS or follows - when >= FRAME_SECONDS:
            shown = when
            yield when - cut, [line.rstrip() for line in screen.display]


def drawn(events: list[Event]) -> str:
    """Return a recording as an animated SVG that plays again and again."""
    spans: list[tuple[int, str, float, float]] = []  # row, text, from, to
    open_at: dict[int, tuple[str, float]] = {}
    end = 0.0
    for when, lines in frames(events):
        for row, text in enumerate(lines):
            previous, since = open_at.get(row, ("", when))
            if text != previous:
                if previous:
                    spans.append((row, previous, since, when))
                open_at[row] = text, when
        end = when
    total = end + LAST_PAUSE
    last = [(row, text, since, total) for row, (text, since) in open_at.items() if text]
    rules, groups = [], []
    for index, (row, text, start, stop) in enumerate([*spans, *last]):
        first, then = (f"{100 * seconds / total:.2f}%" for seconds in (start, stop))
        hidden = f"{then} {{ visibility: hidden }}" if stop < total else ""
        rules.append(f"@keyframes k{index} {{ {first} {{ visibility: visible }} {hidden} }}")
        rules.append(f"#l{index} {{ animation: k{index} {total:.2f}s step-end infinite }}")
        kind = ' class="last"' if stop == total else ""
        typed = ' class="typed"' if text.startswith("$ ") else ""
        groups.append(
            f'<g id="l{index}"{kind}><text{typed} x="{MARGIN}" y="{MARGIN + 14 + row * LINE}" '
            f'xml:space="preserve">{escape(text)}</text></g>'
        )
    width, height = round(COLUMNS * CHARACTER + 2 * MARGIN), ROWS * LINE + 2 * MARGIN
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" role="img"><title>A recording of a terminal</title>',
            f"<style>{STYLE}{chr(10).join(rules)}</style>",
            f'<rect class="frame" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8"/>',
            *groups,
            "</svg>\n",
        ]
    )


def main() -> None:
    """Record and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draw", action="store_true", help="draw the recording that is there again")
    parser.add_argument("--name", default="demo", metavar="NAME", help="name of the files (default: demo)")
    parser.add_argument("command", nargs="*", default=["cipherlm", "demo"], metavar="COMMAND")
    options = parser.parse_args()
    cast = IMAGES / f"{options.name}.cast"
    if not options.draw:
        events = []
        for when, text in recorded(options.command):
            sys.stdout.write(text)
            sys.stdout.flush()
            events.append((when, text))
        write_cast(cast, events)
    cast.with_suffix(".svg").write_text(drawn(read_cast(cast)), encoding="utf-8")


if __name__ == "__main__":
    main()
