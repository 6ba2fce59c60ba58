"""Who computes next."""

import threading
import time

import pytest

from cipherlm.serving.computation import Cancelled
from cipherlm.serving.scheduler import Full, Scheduler

from .conftest import eventually


class Work:
    """Jobs that note their names and wait until they are told to go on."""

    def __init__(self, scheduler):
        self.scheduler = scheduler
        self.begun = []
        self.ended = []
        self.permits = threading.Semaphore(0)

    def submit(self, owner, name, moved=None):
        def work(job):
            self.begun.append(name)
            self.permits.acquire()
            self.ended.append(name)

        return self.scheduler.submit(owner, work, moved)

    def finish(self, count):
        for _ in range(count):
            self.permits.release()
        eventually(lambda: self.scheduler.running == 0 and self.scheduler.waiting == 0)


def test_owners_take_turns_and_jobs_of_one_go_in_order():
    work = Work(Scheduler(1, 100))
    work.submit("z", "first")
    for owner, count in (("a", 4), ("b", 2), ("c", 1), ("z", 1)):
        for number in range(count):
            work.submit(owner, f"{owner}{number}")
    work.finish(9)
    assert work.begun == ["first", "a0", "b0", "c0", "z0", "a1", "b1", "a2", "a3"]


def test_as_many_compute_as_there_are_workers():
    work = Work(Scheduler(2, 100))
    for number in range(5):
        work.submit("a", number)
    eventually(lambda: len(work.begun) == 2)
    assert (work.scheduler.running, work.scheduler.waiting) == (2, 3)
    work.finish(5)
    assert sorted(work.begun) == [0, 1, 2, 3, 4]


def test_the_queue_is_bounded():
    work = Work(Scheduler(1, 2))
    for number in range(3):
        work.submit("a", number)
    with pytest.raises(Full):
        work.submit("b", 3)
    work.finish(3)
    work.submit("b", 4)
    work.finish(1)
    assert work.ended == [0, 1, 2, 4]


def test_a_waiting_job_is_cancelled():
    work = Work(Scheduler(1, 10))
    running, waiting = work.submit("a", "running"), work.submit("b", "waiting")
    assert work.scheduler.cancel(waiting)
    assert not work.scheduler.cancel(running)
    assert not work.scheduler.cancel(waiting)
    work.finish(1)
    assert work.ended == ["running"]
    assert running.cancelled


def test_positions():
    work = Work(Scheduler(1, 10))
    heard = []
    work.submit("a", "running")
    work.submit("a", 1, lambda position: heard.append(("a1", position)))
    second = work.submit("a", 2, lambda position: heard.append(("a2", position)))
    work.submit("b", 3, lambda position: heard.append(("b", position)))
    # b has not been served yet, so it goes before both of a's.
    assert heard == [("a1", 0), ("a2", 1), ("b", 0), ("a1", 1), ("a2", 2)]
    work.scheduler.cancel(second)
    assert len(heard) == 5
    work.finish(3)
    deadline = time.monotonic() + 20  # its thread tells
    while len(heard) == 5 and time.monotonic() < deadline:
        time.sleep(0.005)
    assert heard[5:] == [("a1", 0)]


def test_a_paused_job_lets_others_compute_and_goes_on_before_new_ones():
    scheduler = Scheduler(1, 10)
    work = Work(scheduler)
    answer, order = threading.Event(), []

    def asks(job):
        with job.paused():
            assert answer.wait(20)
        order.extend(["goes on", *work.begun])
        assert scheduler.running == 1

    scheduler.submit("a", asks)
    work.submit("b", "meanwhile")
    work.submit("b", "later")
    eventually(lambda: work.begun == ["meanwhile"])
    answer.set()
    eventually(lambda: scheduler._returning)
    work.finish(2)
    assert order == ["goes on", "meanwhile"]
    assert work.begun == ["meanwhile", "later"]


@pytest.mark.parametrize("when", ["asking", "returning"])
def test_a_paused_job_is_cancelled(when):
    scheduler = Scheduler(1, 10)
    work = Work(scheduler)
    answer, outcome = threading.Event(), []

    def asks(job):
        try:
            with job.paused():
                assert answer.wait(20)
        except Cancelled:
            outcome.append("cancelled")

    job = scheduler.submit("a", asks)
    work.submit("b", "meanwhile")
    eventually(lambda: work.begun)
    if when == "asking":
        assert not scheduler.cancel(job)
        answer.set()
    else:
        answer.set()
        eventually(lambda: scheduler._returning)
        assert not scheduler.cancel(job)
    eventually(lambda: outcome == ["cancelled"])
    work.finish(1)
    assert scheduler.running == 0


def test_a_job_that_raises_gives_its_slot_back(monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    scheduler = Scheduler(1, 10)

    def breaks(job):
        with job.paused():
            raise RuntimeError

    scheduler.submit("a", breaks)
    work = Work(scheduler)
    work.submit("a", "next")
    work.finish(1)
    assert work.ended == ["next"]
