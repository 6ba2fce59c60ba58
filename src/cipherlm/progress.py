"""Progress of long steps: a callback that brackets each of them, and one that shows them on a terminal."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TextIO

Progress = Callable[[str], AbstractContextManager[None]]
"""``with progress("generating keys"): ...`` brackets one step. Steps may nest, in one thread."""

_FRAMES = "|/-\\"
_INTERVAL_SECONDS = 0.2


def silent(_step: str) -> AbstractContextManager[None]:
    """Show nothing: what the library does unless told otherwise."""
    return nullcontext()


class TerminalProgress:
    """Show the innermost step and its elapsed time on a terminal; show nothing where ``stream`` is piped.

    A finished step leaves one line with its duration behind, a failed one too.
    """

    def __init__(self, stream: TextIO | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._clock = clock
        self._shown = self._stream.isatty()
        self._steps: list[tuple[str, float]] = []
        # Guards the steps and the line on the terminal, which the ticking thread redraws.
        self._lock = threading.Lock()

    def __call__(self, step: str) -> AbstractContextManager[None]:
        """Bracket one step."""
        return self._bracket(step) if self._shown else nullcontext()

    @contextmanager
    def _bracket(self, step: str) -> Iterator[None]:
        start = self._clock()
        with self._lock:
            self._steps.append((step, start))
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
        step, start = self._steps[-1]
        self._write(f"{_FRAMES[tick % len(_FRAMES)]} {step} {_duration(self._clock() - start)}")

    def _write(self, text: str) -> None:
        self._stream.write(f"\r\x1b[K{text}")
        self._stream.flush()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes else f"{seconds:.1f}s"
