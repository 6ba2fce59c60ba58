"""Progress of long steps: a callback that brackets each of them, and one that shows them on a terminal."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TextIO

Progress = Callable[[str], AbstractContextManager[None]]
"""``with progress("generating keys"): ...`` brackets one step. Steps may nest, in one thread."""

_FRAMES = "|/-\\"
_INTERVAL_SECONDS = 0.2


Detail = Callable[[str], None]
"""Shows in a few words how far the innermost step is."""


def silent(_step: str) -> AbstractContextManager[None]:
    """Show nothing: what the library does unless told otherwise."""
    return nullcontext()


@contextmanager
def detailed(progress: Progress, step: str) -> Iterator[Detail]:
    """Bracket a step that knows how far it is: yields what shows it, if ``progress`` can show such.

    ``with detailed(progress, "uploading keys") as show: show("12 of 226 MB")``
    """
    with progress(step):
        yield getattr(progress, "detail", _unseen)


Count = Callable[[int, int], None]
"""Hears how many parts of how many are done."""


@contextmanager
def counted(progress: Progress, step: str, part: str) -> Iterator[Count]:
    """Bracket one of many like steps, each of several parts: yields what hears how many are done.

    ``with counted(progress, "evaluating", "block") as report: report(2, 12)`` shows "block 3 of 12". No line
    stays behind, unless the step fails.
    """
    with getattr(progress, "passing", progress)(step):
        show: Detail = getattr(progress, "detail", _unseen)

        def report(done: int, total: int) -> None:
            if done < total:
                show(f"{part} {done + 1} of {total}")

        yield report


def _unseen(_text: str) -> None:
    pass


@dataclass
class _Step:
    name: str
    start: float
    detail: str = ""


class TerminalProgress:
    """Show the innermost step and its elapsed time on a terminal; show nothing where ``stream`` is piped.

    A finished step leaves one line with its duration behind, a failed one too.
    """

    def __init__(self, stream: TextIO | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._clock = clock
        self._shown = self._stream.isatty()
        self._steps: list[_Step] = []
        # Guards the steps and the line on the terminal, which the ticking thread redraws.
        self._lock = threading.Lock()

    def __call__(self, step: str) -> AbstractContextManager[None]:
        """Bracket one step."""
        return self._bracket(step) if self._shown else nullcontext()

    def detail(self, text: str) -> None:
        """Show how far the innermost step is, until the next call or the end of the step."""
        with self._lock:
            if self._steps:
                self._steps[-1].detail = text
                self._draw(0)

    def passing(self, step: str) -> AbstractContextManager[None]:
        """Bracket a step that leaves no line behind unless it fails."""
        return self._bracket(step, passing=True) if self._shown else nullcontext()

    @contextmanager
    def _bracket(self, step: str, passing: bool = False) -> Iterator[None]:
        start = self._clock()
        with self._lock:
            self._steps.append(_Step(step, start))
            # Drawn here too: native code that holds the interpreter lock would keep the thread from it.
            self._draw(0)
            outermost = len(self._steps) == 1
        stop = threading.Event()
        ticker = threading.Thread(target=self._tick, args=(stop,), daemon=True)
        if outermost:
            ticker.start()
        outcome = "failed after"
        try:
            yield
            outcome = "done in"
        finally:
            stop.set()
            if outermost:
                ticker.join()
            with self._lock:
                self._steps.pop()
                if passing and outcome == "done in":
                    self._write("")
                else:
                    self._write(f"{step}: {outcome} {_duration(self._clock() - start)}\n")
                if self._steps:
                    self._draw(0)

    def _tick(self, stop: threading.Event) -> None:
        tick = 0
        while not stop.wait(_INTERVAL_SECONDS):
            tick += 1
            with self._lock:
                self._draw(tick)

    def _draw(self, tick: int) -> None:
        step = self._steps[-1]
        words = f"{step.name}: {step.detail}" if step.detail else step.name
        self._write(f"{_FRAMES[tick % len(_FRAMES)]} {words} {_duration(self._clock() - step.start)}")

    def _write(self, text: str) -> None:
        self._stream.write(f"\r\x1b[K{text}")
        self._stream.flush()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes else f"{seconds:.1f}s"
