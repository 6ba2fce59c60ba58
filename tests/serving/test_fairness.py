"""What owners share: places for sessions, for chunks and in the queue."""

import asyncio

import pytest

from cipherlm.serving.auth import Tokens
from cipherlm.serving.failures import Failure
from cipherlm.serving.fairness import fair_share, may_have_another
from cipherlm.serving.keys import KeyStore
from cipherlm.serving.scheduler import Full, Scheduler
from cipherlm.serving.service import Limits, Service

from .conftest import MEGABYTE, FakeModel
from .test_scheduler import Work


@pytest.fixture
def service(tmp_path):
    async def make():
        model = FakeModel()
        keys = KeyStore(tmp_path, model.description["keys"], 100 * MEGABYTE)
        return Service(model, keys, Tokens([("a", "ta"), ("b", "tb")]), Limits(sessions=8))

    return asyncio.run(make())


def taken(total, owners, order):
    """Return how many places each owner gets that asks in this order."""
    held = {}
    for owner in order:
        if may_have_another(held, owner, total, owners):
            held[owner] = held.get(owner, 0) + 1
    return held


def test_everybody_can_have_a_share_whoever_asks_first():
    for total in (2, 7, 16):
        for owners in (2, 3, 5):
            names = [f"owner{number}" for number in range(owners)]
            held = taken(total, owners, [names[0]] * 2 * total + names[1:] * total)
            assert sum(held.values()) <= total
            if owners <= total:
                assert min(held.get(name, 0) for name in names) >= fair_share(total, owners)


def test_a_single_owner_can_have_everything():
    assert taken(16, 1, ["a"] * 20) == {"a": 16}


def test_one_owner_does_not_take_all_sessions(service):
    for _ in range(4):
        service.admit("a")
    with pytest.raises(Failure, match="all the sessions that you may have"):
        service.admit("a")
    for _ in range(4):
        service.admit("b")
    with pytest.raises(Failure):
        service.admit("b")
    service.dismiss("a")
    service.admit("a")
    assert service.sessions == 8


def test_one_owner_does_not_take_all_places_for_chunks(service):
    held = [service.uploading("a") for _ in range(9)]
    for place in held[:8]:
        place.__enter__()
    with pytest.raises(Failure, match="send this one again"):
        held[8].__enter__()
    with service.uploading("b"):
        pass
    for place in held[:8]:
        place.__exit__(None, None, None)
    with service.uploading("a"):
        pass


def test_one_owner_does_not_fill_the_queue():
    work = Work(Scheduler(1, 4, owners=2))
    for number in range(3):
        work.submit("a", number)  # one computes, two wait
    with pytest.raises(Full):
        work.submit("a", "one too many")
    for number in range(2):
        work.submit("b", number)
    with pytest.raises(Full):
        work.submit("b", "one too many")
    work.finish(5)
    assert len(work.ended) == 5
