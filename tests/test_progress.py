import io
import re
import threading
import time

import pytest

from cipherlm.progress import TerminalProgress, counted, detailed, silent


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines(terminal: io.StringIO) -> list[str]:
    """Return what a reader sees in the end: of every line, the text after the last return to its start."""
    return [re.split(r"\r\x1b\[K", line)[-1] for line in terminal.getvalue().split("\n")]


def test_silent():
    with silent("compiling"):
        pass


def test_nothing_where_piped():
    stream = io.StringIO()
    with TerminalProgress(stream)("compiling"):
        time.sleep(0.01)
    assert stream.getvalue() == ""


def test_steps_with_their_durations():
    now = iter([0.0, 0.0, 12.34])
    terminal = Terminal()
    with TerminalProgress(terminal, clock=lambda: next(now))("compiling"):
        assert lines(terminal) == ["| compiling 0.0s"]
    assert lines(terminal) == ["compiling: done in 12.3s", ""]


def test_elapsed_time_moves_on():
    terminal = Terminal()
    with TerminalProgress(terminal)("compiling"):
        first = terminal.getvalue()
        deadline = time.monotonic() + 5
        while terminal.getvalue() == first and time.monotonic() < deadline:
            time.sleep(0.01)
        assert terminal.getvalue() != first


def test_nested_steps():
    terminal = Terminal()
    progress = TerminalProgress(terminal)
    with progress("outer"):
        with progress("inner"):
            assert lines(terminal)[-1].startswith("| inner")
        assert lines(terminal)[-1].startswith("| outer")
    assert [line.partition(":")[0] for line in lines(terminal)] == ["inner", "outer", ""]


def test_minutes():
    now = iter([0.0, 0.0, 185.0])
    terminal = Terminal()
    with TerminalProgress(terminal, clock=lambda: next(now))("generating keys"):
        pass
    assert lines(terminal)[0] == "generating keys: done in 3m05s"


def test_failure():
    terminal = Terminal()
    threads = threading.active_count()
    with pytest.raises(RuntimeError, match="too wide"), TerminalProgress(terminal)("compiling"):
        raise RuntimeError("too wide")
    assert lines(terminal)[0].startswith("compiling: failed after")
    assert threading.active_count() == threads


def test_details_of_the_innermost_step():
    terminal = Terminal()
    progress = TerminalProgress(terminal, clock=lambda: 0.0)
    with detailed(progress, "uploading") as show:
        show("1 of 2 MB")
        assert lines(terminal) == ["| uploading: 1 of 2 MB 0.0s"]
        with progress("hashing"):
            assert lines(terminal) == ["| hashing 0.0s"]
        assert lines(terminal)[-1] == "| uploading: 1 of 2 MB 0.0s"
        show("2 of 2 MB")
    assert lines(terminal)[-2:] == ["uploading: done in 0.0s", ""]
    progress.detail("nothing is going on")
    assert lines(terminal)[-1] == ""


def test_details_are_not_shown_by_what_cannot():
    piped = io.StringIO()
    for progress in (silent, TerminalProgress(piped)):
        with detailed(progress, "uploading") as show:
            show("1 of 2 MB")
    assert piped.getvalue() == ""


def test_counted_steps_leave_no_line():
    terminal = Terminal()
    progress = TerminalProgress(terminal, clock=lambda: 0.0)
    for _ in range(2):
        with counted(progress, "evaluating", "block") as report:
            assert lines(terminal) == ["| evaluating 0.0s"]
            report(1, 3)
            assert lines(terminal) == ["| evaluating: block 2 of 3 0.0s"]
            report(3, 3)
        assert lines(terminal) == [""]


def test_a_counted_step_that_fails_says_so():
    terminal = Terminal()
    progress = TerminalProgress(terminal, clock=lambda: 0.0)
    with pytest.raises(RuntimeError), counted(progress, "evaluating", "block"):
        raise RuntimeError
    assert lines(terminal) == ["evaluating: failed after 0.0s", ""]


def test_counts_are_not_shown_by_what_cannot():
    piped = io.StringIO()
    for progress in (silent, TerminalProgress(piped)):
        with counted(progress, "evaluating", "block") as report:
            report(1, 2)
    assert piped.getvalue() == ""
