"""Who computes next: a bounded queue, round robin between owners, and a few slots for those that compute."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain

from cipherlm.serving.computation import Cancelled
from cipherlm.serving.fairness import may_have_another


class Full(Exception):  # noqa: N818 - not an error, a state
    """As many jobs wait as may."""


class Job:
    """A piece of work that waits for a slot, and then has a thread of its own.

    ``moved`` is called, from any thread, with the number of jobs before this one whenever that changes.
    """

    def __init__(self, scheduler: "Scheduler", owner: str, work: Callable[["Job"], None]) -> None:
        self._scheduler = scheduler
        self.owner = owner
        self.work = work
        self.moved: Callable[[int], None] = lambda position: None
        self.position = -1
        self.has_slot = False
        self.cancelled = False
        self.woken = threading.Event()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let others compute meanwhile: a job that waits for its client needs no slot.

        Goes on before the owner's jobs that have not begun, so that what is begun ends. Leaves without a
        slot if the block raises; raises :class:`Cancelled` for a job that is cancelled before it has its slot
        again.
        """
        self._scheduler._release(self)
        yield
        self._scheduler._return(self)


class Scheduler:
    """Runs jobs, at most ``workers`` of them computing at once and at most ``limit`` waiting to begin.

    Owners take turns, also in going on after a pause; the jobs of one owner go in the order in which they
    came. As a session has one job at a time, that is round robin between the sessions of an owner too. Each
    of ``owners`` can count on its share of the places in the queue.
    """

    def __init__(self, workers: int, limit: int, owners: int = 1) -> None:
        self._free = workers
        self._workers = workers
        self._limit = limit
        self._number_of_owners = owners
        self._lock = threading.Lock()
        self._lanes: dict[str, deque[Job]] = {}
        self._turns = 0
        self._served: dict[str, int] = {}  # the last turn of each owner
        self._returning: deque[Job] = deque()

    @property
    def waiting(self) -> int:
        """How many jobs have not begun."""
        with self._lock:
            return sum(map(len, self._lanes.values()))

    @property
    def running(self) -> int:
        """How many jobs compute, without those that are paused."""
        with self._lock:
            return self._workers - self._free

    def submit(
        self, owner: str, work: Callable[[Job], None], moved: Callable[[int], None] | None = None
    ) -> Job:
        """Queue a job. Raises :class:`Full`."""
        job = Job(self, owner, work)
        if moved is not None:
            job.moved = moved
        with self._lock:
            waiting = {name: len(lane) for name, lane in self._lanes.items()}
            if not self._free and not may_have_another(waiting, owner, self._limit, self._number_of_owners):
                raise Full
            self._lanes.setdefault(owner, deque()).append(job)
        self._dispatch()
        return job

    def cancel(self, job: Job) -> bool:
        """Take a job out of the queue. Returns False for one that has begun: that sees ``job.cancelled``."""
        with self._lock:
            job.cancelled = True
            lane = self._lanes.get(job.owner)
            waited = lane is not None and job in lane
            if lane is not None and waited:
                lane.remove(job)
                if not lane:
                    del self._lanes[job.owner]
            elif job in self._returning:
                self._returning.remove(job)
                job.woken.set()
        if waited:
            self._dispatch()
        return waited

    def _release(self, job: Job) -> None:
        with self._lock:
            if not job.has_slot:
                return
            job.has_slot = False
            self._free += 1
        self._dispatch()

    def _return(self, job: Job) -> None:
        with self._lock:
            if job.cancelled:
                raise Cancelled
            job.woken.clear()
            self._returning.append(job)
        self._dispatch()
        job.woken.wait()
        if not job.has_slot:
            raise Cancelled

    def _dispatch(self) -> None:
        begun = []
        with self._lock:
            while self._free and (self._returning or self._lanes):
                self._free -= 1
                owner = self._owners([job.owner for job in self._returning], self._lanes)[0]
                self._turns += 1
                self._served[owner] = self._turns
                back = next((job for job in self._returning if job.owner == owner), None)
                if back is not None:
                    self._returning.remove(back)
                    back.has_slot = True
                    back.woken.set()
                else:
                    job = self._next(owner)
                    job.has_slot = True
                    begun.append(job)
            moved = [(place, job) for place, job in enumerate(self._line()) if place != job.position]
            for place, job in moved:
                job.position = place
        for job in begun:
            # A daemon: native code cannot be stopped, and must not keep a server that was told to end.
            threading.Thread(target=self._run, args=(job,), name="evaluation", daemon=True).start()
        for place, job in moved:
            job.moved(place)

    def _next(self, owner: str) -> Job:
        job = self._lanes[owner].popleft()
        if not self._lanes[owner]:
            del self._lanes[owner]
        return job

    def _owners(self, *waiting: Iterable[str]) -> list[str]:
        """Return who waits, the one that was served the longest time ago first."""
        owners = dict.fromkeys(chain(*waiting))
        return sorted(owners, key=lambda owner: self._served.get(owner, 0))

    def _line(self) -> Iterator[Job]:
        """Yield the waiting jobs in the order in which they will begin."""
        lanes = [list(self._lanes[owner]) for owner in self._owners(self._lanes)]
        for turn in range(max(map(len, lanes), default=0)):
            yield from (lane[turn] for lane in lanes if turn < len(lane))

    def _run(self, job: Job) -> None:
        try:
            job.work(job)
        finally:
            self._release(job)
