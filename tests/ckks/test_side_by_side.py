"""Chunks of a long prompt that are computed side by side: as if they came one after the other."""

from __future__ import annotations

import gc
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cipherlm.cli.counting import CountingSession, Sizes
from cipherlm.errors import Refused
from cipherlm.nn.blocks import calibrated
from cipherlm.schemes.ckks import layout
from cipherlm.schemes.ckks.arithmetic import MOST_TOGETHER, Arithmetic, Scaled
from cipherlm.schemes.ckks.geometry import Geometry
from cipherlm.schemes.ckks.session import MOST_CHUNKS, Client, Hosted, InProcess, Server
from cipherlm.schemes.ckks.side_by_side import Meeting

from .models import Clear
from .parties import Checking
from .test_architectures import CONTEXT, largest, model, text


def hosted(name, prefix):
    """Return what a server has of a model, with its geometry, and hidden states before and behind it."""
    clear: Clear = model(name)
    ids = text(CONTEXT)
    before, after = map(clear.ready, clear.hidden_states(ids))
    found = clear.prefixes(ids[:prefix]) if prefix else [None] * clear.args.layers
    texts = [clear.embed(ids[:prefix] + text(CONTEXT - prefix, seed)) for seed in range(1, 5)]
    ranges = calibrated(clear.exact, [x[prefix:] for x in [*texts, before]], found if prefix else [])
    args = clear.args
    geometry = Geometry(
        args.heads,
        args.head_dim,
        4,
        prefix,
        CONTEXT,
        width=args.width,
        inner=args.inner,
        rotary=args.rope is not None,
    )
    return Hosted(clear.exact.fitted(ranges, CONTEXT), found), geometry, before, after


@given(
    prefix=st.sampled_from([0, 1, 3, 5]),
    before=st.integers(0, 20),
    count=st.integers(1, 30),
    most=st.integers(1, 8),
)
def test_passes(prefix, before, count, most):
    geometry = Geometry(3, 10, 4, prefix, 64)
    start, position = prefix + before, prefix + before
    for first, size in geometry.passes(start, count, most):
        assert first == position
        position += size
        chunks = list(geometry.chunks(first, size))
        assert 1 <= len(chunks) <= most
        assert len(chunks) == 1 or geometry.goes_together(first, size)
        alone = [geometry.is_alone(*chunk) for chunk in chunks]
        assert alone in ([True], [False] * len(chunks))
        behind_prefix = first == prefix
        if len(chunks) > 1 and not behind_prefix:  # each chunk is a group of the KV cache
            assert (first - geometry.layout.prefix) % 4 == 0
    assert position == start + count


@pytest.mark.parametrize(
    ("name", "prefix", "passes", "bound"),
    [
        ("gpt2", 1, ((0, 13), (13, 1), (12, 3)), 6e-3),  # a prefix in the slots of the first chunk
        pytest.param(  # and one apart
            "llama", 5, ((0, 13), (13, 1), (14, 9), (18, 9)), 3e-3, marks=pytest.mark.slow
        ),
        *(
            pytest.param(
                name,
                prefix,
                ((0, 13), (13, 1), (14, 1), (15, 10), (22, 2), (21, 12), (17, 9), (26, 1)),
                bound,
                marks=pytest.mark.slow,
            )
            for name, bound in (("gpt2", 6e-3), ("llama", 3e-3))
            for prefix in (0, 3)
        ),
    ],
)
def test_a_long_text(keys, name, prefix, passes, bound, monkeypatch):
    """Several chunks in a prompt, behind tokens and drafts, and from where a text is taken back.

    Slots repeat as often as tensors say, and are real where they say so.
    """
    module, geometry, before, after = hosted(name, prefix)
    client = keys.client(geometry)
    process = InProcess(Server({"all": module}, geometry), client)
    arithmetic, most = process.session.arithmetic, layout.MOST_REPETITIONS
    arithmetic._refresher = checking = Checking(arithmetic._refresher, client.secret_key, most)
    # More than a refresh makes use of, so that whatever is said is looked at.
    monkeypatch.setattr(layout, "MOST_REPETITIONS", geometry.parameters.slots)
    for start, count in passes:
        first, end = prefix + start, prefix + start + count
        got = process.evaluate("all", before[first:end], first)
        assert largest(got, after[first:end]) < bound, (start, count)
    assert {subring.real for subring in checking.found} == {False, True}
    assert min(subring.copies for subring in checking.found) == 1
    assert max(subring.copies for subring in checking.found) > most
    process.session.close()


def test_fewer_round_trips_and_ciphertexts(keys):
    """Ciphertexts of different chunks travel as one."""
    module, geometry, _, _ = hosted("gpt2", 1)
    taken = []
    for most in (1, MOST_CHUNKS):
        sizes = Sizes(geometry)
        sizes.client = Client(keys.client(geometry).secret_key, geometry, most_chunks=most)
        taken.append(CountingSession(geometry, module, sizes).evaluate(31, 1))
    apart, together = taken
    assert together.round_trips < apart.round_trips / 5
    assert together.refreshes < apart.refreshes
    assert together.calls["transform_many"] < apart.calls["transform_many"] / 1.5


def test_a_real_run_is_as_counted(keys):
    module, geometry, before, _ = hosted("llama", 5)
    client, sizes = keys.client(geometry), []

    class Listening(type(client)):
        def refresh(self, request):
            sizes.append(request.size)
            return super().refresh(request)

    process = InProcess(Server({"all": module}, geometry), Listening(client.secret_key, geometry))
    process.evaluate("all", before[5:29], 5)
    tally = CountingSession(geometry, module).evaluate(24, 5)
    assert (tally.round_trips, tally.refreshes) == (len(sizes), sum(sizes))
    assert max(sizes) <= MOST_TOGETHER
    process.session.close()


@pytest.mark.parametrize("at", [0, pytest.param(5, marks=pytest.mark.slow)])
def test_whatever_fails_ends_all_chunks(keys, at):
    """A client that leaves, at some refresh: its error comes out, and the next text is computed."""
    module, geometry, before, after = hosted("gpt2", 1)
    client = keys.client(geometry)
    left = [at]

    class Leaving(type(client)):
        def refresh(self, request):
            left[0] -= 1
            if left[0] == -1:
                raise Refused("the client has left")
            return super().refresh(request)

    process = InProcess(Server({"all": module}, geometry), Leaving(client.secret_key, geometry))
    threads = threading.active_count()
    with pytest.raises(Refused, match="has left"):
        process.evaluate("all", before[1:17], 1)
    assert threading.active_count() <= threads + 2  # those of the arithmetic, which are kept
    with pytest.raises(Refused, match="where 1 was expected"):
        process.evaluate("all", before[5:9], 5)
    assert largest(process.evaluate("all", before[1:9], 1), after[1:9]) < 6e-3
    process.session.close()


def test_what_fails_holds_nothing(keys):
    """Ciphertexts and keys go with the error, and do not wait for Python's garbage collector."""
    module, geometry, before, _ = hosted("gpt2", 1)
    client = keys.client(geometry)
    replies = []

    class Leaving(type(client)):
        def refresh(self, request):
            replies.append(request)
            if len(replies) == 3:
                raise Refused("the client has left")
            return super().refresh(request)

    process = InProcess(Server({"all": module}, geometry), Leaving(client.secret_key, geometry))
    evaluator = process.session.arithmetic.evaluator
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(Refused, match="has left"):
            process.evaluate("all", before[1:17], 1)
        process.session.release_keys()
        assert sys.getrefcount(evaluator) == 2  # the name above, and the argument
    finally:
        gc.enable()
    process.session.close()


def test_no_room_for_a_thread(monkeypatch):
    start, started = threading.Thread.start, []

    def full(self):
        started.append(self)
        if len(started) == 3:
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", full)
    with pytest.raises(RuntimeError, match="start new thread"):
        Meeting(Sums(), 4).run([lambda own: own.refresh([Scaled(1.0, 1.0)], 3)] * 4)
    assert not any(thread.is_alive() for thread in started)


class Sums(Arithmetic):
    """Refreshes numbers: each comes back with the sum of all that go along."""

    encodings = parameters = None

    def __init__(self) -> None:
        self.asked: list[tuple[list[float], int]] = []

    def refresh_together(self, real, others, level, shift):
        values = [item.ciphertext for item in real]
        self.asked.append((values, level))
        return [value + sum(values) for value in values], list(others)


def test_few_wait_for_many_and_then_go_with_them():
    whole = Sums()

    def chunk(index):
        def run(own):
            first = [] if index == 0 else own.refresh([Scaled(float(index), 1.0)], 3)
            second = own.refresh([Scaled(10.0 * index, 1.0)], 5)
            return [*first, *second]

        return run

    results = Meeting(whole, 4).run([chunk(index) for index in range(4)])
    assert whole.asked == [([1.0, 2.0, 3.0], 3), ([0.0, 10.0, 20.0, 30.0], 5)]
    assert results == [[60.0], [7.0, 70.0], [8.0, 80.0], [9.0, 90.0]]


def test_chunks_wait_for_those_before_them():
    done: list[int] = []

    def chunk(index):
        def run(own):
            own.wait(lambda: len(done) == index)
            done.append(index)
            own.changed()
            return own.refresh([Scaled(float(index), 1.0)], 3)

        return run

    whole = Sums()
    Meeting(whole, 5).run([chunk(index) for index in (3, 0, 4, 2, 1)])
    assert done == [0, 1, 2, 3, 4]
    assert len(whole.asked) == 1


def test_an_error_of_a_chunk_wakes_those_that_wait():
    def waits(own):
        own.wait(lambda: False)

    def asks(own):
        own.refresh([Scaled(1.0, 1.0)], 3)
        own.refresh([Scaled(1.0, 1.0)], 3)

    def fails(own):
        own.refresh([Scaled(1.0, 1.0)], 3)
        raise KeyError("of a chunk")

    with pytest.raises(KeyError, match="of a chunk"):
        Meeting(Sums(), 3).run([waits, asks, fails])


def test_chunks_that_wait_for_one_another_are_an_error():
    with pytest.raises(RuntimeError, match="wait for one another"):
        Meeting(Sums(), 2).run([lambda own: own.wait(lambda: False)] * 2)
