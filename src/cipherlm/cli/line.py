"""The line between client and server: what its delay and its rate make of round trips and bytes."""

from __future__ import annotations

import argparse
import math
import re
import time
from dataclasses import dataclass

_NUMBER = r"(\d+(?:\.\d*)?|\.\d+)"
_DURATION = re.compile(_NUMBER + r"\s*(ms|s)")
_RATE = re.compile(_NUMBER + r"\s*(kbit|mbit|gbit)?")
_SECONDS = {"ms": 1e-3, "s": 1.0}
_MBIT = {"kbit": 1e-3, None: 1.0, "mbit": 1.0, "gbit": 1e3}


@dataclass(frozen=True)
class Line:
    """``rtt`` seconds for a round trip, and ``mbit`` millions of bits a second in either direction."""

    rtt: float = 0.0
    mbit: float = math.inf

    def seconds(self, round_trips: float, sent: float) -> float:
        """Return what so many round trips with so many bytes in them take."""
        return round_trips * self.rtt + sent * 8 / (self.mbit * 1e6)

    def carry(self, sent: int) -> float:
        """Wait for as long as so many bytes take in one direction, and return the seconds."""
        began = time.perf_counter()
        time.sleep(self.seconds(0.5, sent))
        return time.perf_counter() - began

    def __str__(self) -> str:
        rate = "any rate" if math.isinf(self.mbit) else f"{self.mbit:g} Mbit/s"
        return f"{self.rtt * 1000:g} ms, {rate}"


def add_line_options(parser: argparse._ActionsContainer) -> None:
    """Add ``--rtt`` and ``--mbit``."""
    parser.add_argument(
        "--rtt", type=duration, metavar="TIME", help="a round trip between client and server, such as 50ms"
    )
    parser.add_argument(
        "--mbit", type=rate, metavar="RATE", help="Mbit/s between client and server in either direction"
    )


def line_of(options: argparse.Namespace) -> Line | None:
    """Return the line that the options describe, or None where they describe none."""
    if options.rtt is None and options.mbit is None:
        return None
    return Line(options.rtt or 0.0, options.mbit or math.inf)


def line_figures(options: argparse.Namespace) -> dict[str, float | None] | None:
    """Return the line that the options describe, for JSON."""
    line = line_of(options)
    return None if line is None else {"rtt_seconds": line.rtt, "mbit": options.mbit}


def duration(text: str) -> float:
    """Return seconds for ``50ms`` or ``0.05s``."""
    found = _DURATION.fullmatch(text.strip().lower())
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time: give a unit, as in 50ms or 0.05s")
    return float(found[1]) * _SECONDS[found[2]]


def rate(text: str) -> float:
    """Return Mbit/s for ``100``, ``100mbit`` or ``1gbit``."""
    found = _RATE.fullmatch(text.strip().lower())
    value = float(found[1]) * _MBIT[found[2]] if found else 0.0
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a rate: use Mbit/s, as in 100 or 100mbit")
    return value
