"""How often an owner may do something in an hour."""

import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable

HOUR = 3600.0
_RESOLUTION = 1.0
"""Events of so many seconds are one entry of the window, so that it stays small whatever is allowed."""


class HourlyBudget:
    """At most ``most`` events of one owner in any hour: a sliding window over their times."""

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.most = most
        self._clock = clock
        self._entries: defaultdict[str, deque[list[float]]] = defaultdict(deque)  # [time, events] each
        self._spent: Counter[str] = Counter()

    def wait(self, owner: str) -> float:
        """Return after how many seconds the owner may do the next; 0 for now."""
        entries, now = self._entries[owner], self._clock()
        while entries and entries[0][0] <= now - HOUR:
            self._spent[owner] -= int(entries.popleft()[1])
        return entries[0][0] + HOUR - now if entries and self._spent[owner] >= self.most else 0.0

    def spend(self, owner: str, events: int = 1) -> None:
        """Count some."""
        entries, now = self._entries[owner], self._clock()
        if entries and now - entries[-1][0] < _RESOLUTION:
            entries[-1][1] += events
        else:
            entries.append([now, events])
        self._spent[owner] += events
