"""How often an owner may do something in an hour."""

import time
from collections import defaultdict, deque
from collections.abc import Callable

HOUR = 3600.0


class HourlyBudget:
    """At most ``most`` events of one owner in any hour: a sliding window over their times."""

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.most = most
        self._clock = clock
        self._times: defaultdict[str, deque[float]] = defaultdict(deque)

    def wait(self, owner: str) -> float:
        """Return after how many seconds the owner may do the next; 0 for now."""
        times, now = self._times[owner], self._clock()
        while times and times[0] <= now - HOUR:
            times.popleft()
        return times[0] + HOUR - now if len(times) >= self.most else 0.0

    def spend(self, owner: str) -> None:
        """Count one."""
        self._times[owner].append(self._clock())
