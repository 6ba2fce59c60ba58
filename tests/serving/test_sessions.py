"""Sessions over a real connection: what should work, and everything that may go wrong with a client."""

import socket as sockets
import struct
import time
from contextlib import ExitStack, suppress

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from cipherlm.serving import conversation
from cipherlm.serving.rate import HourlyBudget

from .conftest import FINGERPRINT, MEGABYTE, entries, eventually, frame, parse


def error(message):
    header = message[0] if isinstance(message, tuple) else message
    assert header["type"] == "error"
    return header["code"]


def test_a_session(harness):
    keys = harness.keys()
    with harness.socket() as client:
        opened = client.open(keys)
        assert opened["type"] == "opened"
        assert opened["limits"]["max_tokens"] == 16
        assert opened["limits"]["message_bytes"] == MEGABYTE
        client.ask("reverse", b"abc", b"", b"12")
        assert client.receive() == ({"type": "result", "id": 1}, [b"cba", b"", b"21"])
        client.ask("refresh", b"x" * 1000, count=3)
        for number in range(3):
            header, blobs = client.receive()
            assert header == {"type": "refresh", "id": 2, "round": number}
            assert blobs == [b"refresh " + b"x" * 1000]
            client.answer(header, bytes([number]))
        assert client.receive() == ({"type": "result", "id": 2}, [b"\0", b"\1", b"\2"])
        client.send({"type": "close"})
        assert client.closed() == 1000


def test_progress_is_told(harness):
    with harness.session() as client:
        client.ask("refresh", b"x", count=2)
        seen = []
        while not seen or seen[-1]["type"] != "result":
            header, _ = parse(client.socket.recv(20))
            seen.append(header)
            if header["type"] == "refresh":
                client.answer(header, b"y")
    told = [header for header in seen if header["type"] == "progress"]
    assert told == [{"type": "progress", "id": 1, "done": done, "total": 2} for done in (1, 2)]


def test_large_messages(harness):
    with harness.session() as client:
        blob = bytes(range(256)) * (MEGABYTE // 256)
        client.ask("reverse", blob)
        assert client.receive()[1] == [blob[::-1]]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"protocol": 2}, "protocol"),
        ({"protocol": "1"}, "protocol"),
        ({"model": "cd" * 32}, "unknown_model"),
        ({"keys": {}}, "bad_request"),
        ({"keys": {"evaluation": "00" * 32, "public": "00" * 32}}, "unknown_keys"),
        ({"keys": {"evaluation": "../../etc/passwd", "public": ""}}, "unknown_keys"),
        ({"more": 1}, "protocol"),
        ({"type": "cancel", "id": 1}, "protocol"),
    ],
)
def test_wrong_openings(harness, changes, code):
    keys = harness.keys()
    with harness.socket() as client:
        assert error(client.open(keys, **changes)) == code
        assert client.closed() == 1008


def test_keys_of_the_wrong_kind_are_unknown(harness):
    keys = harness.keys()
    with harness.socket() as client:
        assert error(client.open(dict(zip(keys, reversed(keys.values()), strict=True)))) == "unknown_keys"


@pytest.mark.parametrize(
    ("content", "code"), [(b"damaged", "bad_keys"), (b"explosive", "internal"), (b"unforeseen", "internal")]
)
def test_keys_that_do_not_open(harness, content, code, logged):
    keys = {**harness.keys(), "evaluation": harness.put(content)}
    with harness.socket() as client:
        refused = client.open(keys)
        assert error(refused) == code
        assert "PAYLOAD" not in refused["message"]
        assert client.closed() == 1008
    for entry in entries(logged, "keys could not be opened"):
        assert entry["reference"] in refused["message"]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\0\0",
        b"\xff" * 100,
        b"\x10\0\0\0{}",
        frame({"type": "evaluate", "id": 1, "module": "reverse", "start": 0, "count": 1}, b"abc")[:-1],
        frame(
            {"type": "evaluate", "id": 1, "module": "reverse", "start": 0, "count": 1, "blobs": [5]}, b"abc"
        ),
        frame({"type": "evaluate", "id": 1, "module": "reverse", "start": -1, "count": 1}),
        frame({"type": "nonsense"}),
        frame({"type": "result", "id": 1}),
        struct.pack("<I", 70000) + b" " * 70000,
        "text",
    ],
)
@pytest.mark.parametrize("opened", [False, True])
def test_garbage(harness, data, opened):
    keys = harness.keys()
    with harness.socket() as client:
        if opened:
            client.open(keys)
        client.socket.send(data)
        assert error(client.receive()) == "protocol"
        assert client.closed() == 1008


def test_oversized_messages(harness):
    with harness.session() as client:
        client.ask("reverse", b"x" * (MEGABYTE + 100_000))
        assert error(client.receive()) == "too_large"
        assert client.closed() == 1008
    with harness.session() as client:
        with suppress(ConnectionClosed):
            client.ask("reverse", b"x" * (4 * MEGABYTE))
        assert client.closed() in (1009, 1006)  # the reset of the connection may overtake its close
    with harness.session() as client:  # the same in fragments
        with suppress(ConnectionClosed):
            client.socket.send([b"x" * MEGABYTE] * 4)
        assert client.closed() in (1009, 1006)


EVALUATE = {"type": "evaluate", "id": 1, "module": "gate", "start": 0, "count": 1}


@pytest.mark.parametrize(
    "messages",
    [
        [EVALUATE, {**EVALUATE, "id": 2}],
        [{**EVALUATE, "module": "reverse", "id": 5}, {**EVALUATE, "id": 5}],
        [{"type": "refreshed", "id": 1, "round": 0, "blobs": [0]}],
        [EVALUATE, {"type": "refreshed", "id": 1, "round": 0, "blobs": [0]}],
        [EVALUATE, {"type": "refreshed", "id": 2, "round": 0, "blobs": [0]}],
        [{"type": "cancel", "id": 1}],
        [{"type": "open", "protocol": 1, "model": FINGERPRINT, "keys": {}}],
    ],
)
def test_wrong_order(harness, messages):
    with harness.session() as client:
        for message in messages:
            client.send(message)
            if message.get("module") == "reverse":
                assert client.receive()[0]["type"] == "result"
        assert error(client.receive()) == "protocol"
        assert client.closed() == 1008


def test_two_openings_at_once(harness):
    keys = harness.keys()
    with harness.socket() as client:
        client.send({"type": "open", "protocol": 1, "model": FINGERPRINT, "keys": keys})
        client.send({"type": "open", "protocol": 1, "model": FINGERPRINT, "keys": keys})
        assert client.closed() == 1008


def test_a_wrong_round(harness):
    with harness.session() as client:
        client.ask("refresh", b"x", count=2)
        header, _ = client.receive()
        client.answer({**header, "round": 1}, b"y")
        assert error(client.receive()) == "protocol"
    eventually(lambda: harness.model.cancelled > 0)


def test_an_answer_given_twice(harness):
    with harness.session() as client:
        client.ask("refresh", b"x", count=2)
        header, _ = client.receive()
        client.answer(header, b"y")
        client.answer(header, b"y")
        assert client.closed() == 1008


@pytest.mark.parametrize(
    ("module", "start", "count"),
    [("nothing", 0, 1), ("reverse", 0, 0), ("reverse", 0, 17), ("reverse", 16, 1), ("reverse", 2**53 - 1, 1)],
)
def test_bad_requests_leave_the_session_open(harness, module, start, count):
    with harness.session() as client:
        client.ask(module, b"x", start=start, count=count)
        header, _ = client.receive()
        assert error(header) == "bad_request"
        assert header["id"] == 1
        client.ask("reverse", b"abc", start=15)
        assert client.receive()[1] == [b"cba"]


def test_what_the_computation_refuses_and_what_breaks_in_it(harness, logged):
    """The texts of errors that nobody meant for a client do not reach it, whatever their type is."""
    with harness.session() as client:
        client.ask("refuse")
        header, _ = client.receive()
        assert (error(header), header["message"]) == ("bad_request", "inputs of another shape")
        for count, module in enumerate(("break", "stumble"), 1):
            client.ask(module)
            header, _ = client.receive()
            assert error(header) == "internal"
            assert "PAYLOAD" not in str(header)
            broken = entries(logged, "evaluation broke")
            assert len(broken) == count
            assert header["message"].endswith(f"under the reference {broken[-1]['reference']}")
        client.ask("reverse", b"abc")
        assert client.receive()[1] == [b"cba"]


def abandon(client):
    """Be gone without a word, as a machine that loses its power."""
    linger = struct.pack("ii", 1, 0)
    client.socket.socket.setsockopt(sockets.SOL_SOCKET, sockets.SO_LINGER, linger)
    client.socket.socket.shutdown(sockets.SHUT_RDWR)
    client.socket.socket.close()


@pytest.mark.parametrize("farewell", [abandon, lambda client: client.socket.close()])
def test_a_client_that_goes_while_it_is_served(harness, farewell):
    before = harness.model.cancelled
    with harness.session() as client:
        client.ask("gate", b"x")
        eventually(lambda: harness.service.scheduler.running == 1)
        farewell(client)
    eventually(lambda: harness.model.cancelled == before + 1)


@pytest.mark.parametrize("farewell", [abandon, lambda client: client.socket.close()])
def test_a_client_that_goes_during_a_refresh(harness, farewell):
    before = harness.model.cancelled
    with harness.session() as client:
        client.ask("refresh", b"x")
        assert client.receive()[0]["type"] == "refresh"
        farewell(client)
    eventually(lambda: harness.model.cancelled == before + 1)


def test_a_client_that_goes_while_it_waits(harness):
    with harness.session(b"1") as first, harness.session(b"2") as second:
        first.ask("gate", b"first")
        eventually(lambda: harness.service.scheduler.running == 1)
        second.ask("gate", b"second")
        eventually(lambda: harness.service.scheduler.waiting == 1)
        abandon(second)
        eventually(lambda: harness.service.scheduler.waiting == 0)
        harness.model.gate.set()
        assert first.receive()[1] == [b"first"]
    assert b"second" not in harness.model.order


def test_keys_stay_as_long_as_a_session_uses_them(harness):
    keys = harness.keys(b"held")
    with harness.http() as http:
        with harness.socket() as client:
            client.open(keys)
            assert http.delete(f"/v1/keys/{keys['evaluation']}").status_code == 409
            client.send({"type": "close"})
            client.closed()
        eventually(lambda: http.delete(f"/v1/keys/{keys['evaluation']}").status_code == 204)
        assert error_of(harness, keys) == "unknown_keys"


def error_of(harness, keys):
    with harness.socket() as client:
        return error(client.open(keys))


def test_a_client_that_goes_while_native_code_runs(harness):
    with harness.session() as client:
        client.ask("stuck", b"x")
        eventually(lambda: harness.service.scheduler.running == 1)
        abandon(client)
    eventually(lambda: not harness.service.conversations)
    assert harness.service.sessions == 1  # its memory is not free before the thread is
    assert harness.model.open_sessions == 1
    harness.model.gate.set()
    eventually(lambda: harness.service.sessions == 0)


def test_cancel(harness):
    with harness.session() as client:
        client.ask("gate", b"x")
        eventually(lambda: harness.service.scheduler.running == 1)
        client.send({"type": "cancel", "id": 1})
        client.send({"type": "cancel", "id": 1})
        header, _ = client.receive()
        assert (error(header), header["id"]) == ("cancelled", 1)
        client.ask("refresh", b"x")
        refresh, _ = client.receive()
        client.send({"type": "cancel", "id": 2})
        client.answer(refresh, b"y")  # crosses the cancellation
        assert error(client.receive()) == "cancelled"
        client.send({"type": "cancel", "id": 2})  # crosses the end
        client.answer(refresh, b"y")
        client.ask("reverse", b"abc")
        assert client.receive()[1] == [b"cba"]


def test_cancel_while_waiting(harness):
    with harness.session(b"1") as first, harness.session(b"2") as second:
        first.ask("gate", b"first")
        eventually(lambda: harness.service.scheduler.running == 1)
        second.ask("gate", b"second")
        header, _ = parse(second.socket.recv(20))
        assert header == {"type": "queued", "id": 1, "position": 0}
        second.send({"type": "cancel", "id": 1})
        assert error(second.receive()) == "cancelled"
        harness.model.gate.set()
        assert first.receive()[1] == [b"first"]


def test_others_compute_while_a_client_refreshes(harness):
    with harness.session(b"1") as first, harness.session(b"2") as second:
        first.ask("refresh", b"x")
        refresh, _ = first.receive()
        second.ask("reverse", b"abc")
        assert second.receive()[1] == [b"cba"]
        first.answer(refresh, b"y")
        assert first.receive()[1] == [b"y"]


def test_the_queue_is_bounded(start):
    with start(queue=1) as harness:
        with harness.session(b"1") as first, harness.session(b"2") as second, harness.session(b"3") as third:
            first.ask("gate", b"1")
            eventually(lambda: harness.service.scheduler.running == 1)
            second.ask("gate", b"2")
            eventually(lambda: harness.service.scheduler.waiting == 1)
            third.ask("gate", b"3")
            header, _ = third.receive()
            assert (error(header), header["retry"], header["id"]) == ("busy", True, 1)
            harness.model.gate.set()
            assert first.receive()[1] == [b"1"]
            assert second.receive()[1] == [b"2"]
            third.ask("gate", b"3")
            assert third.receive()[1] == [b"3"]
        harness.serves()


def test_sessions_are_bounded(start):
    with start(sessions=2, sessions_per_owner=1, tokens=[(o, f"token-{o}") for o in "abc"]) as harness:
        keys = {owner: harness.keys(owner.encode(), f"token-{owner}") for owner in "abc"}
        with harness.socket("token-a") as a, harness.socket("token-a") as again:
            assert a.open(keys["a"])["type"] == "opened"
            assert error(again.open(keys["a"])) == "busy"
            with harness.socket("token-b") as b, harness.socket("token-c") as c:
                assert b.open(keys["b"])["type"] == "opened"
                refused = c.open(keys["c"])
                assert (error(refused), refused["retry"]) == ("busy", True)
        harness.serves("token-c")


def take_turns(harness, clients, turns):
    """Let every client always have an evaluation in the queue; return who was served, in order."""
    order = harness.model.order
    for number, (name, client) in enumerate(clients.items()):
        client.ask("ticket", name)
        eventually(lambda waiting=number: harness.service.scheduler.waiting == waiting and order)
    for turn in range(turns):
        harness.model.tickets.release()
        served = clients[order[turn]]
        assert served.receive()[1] == [order[turn]]
        served.ask("ticket", order[turn])
        eventually(lambda served=turn + 2: len(order) == served)
        eventually(lambda: harness.service.scheduler.waiting == len(clients) - 1)
    return order[:turns]


def test_sessions_take_turns(start):
    """Eight clients, one worker: nobody is served again before all others were."""
    names = [b"%d" % number for number in range(8)]
    with start() as harness:
        with ExitStack() as stack:
            clients = {name: stack.enter_context(harness.session(name)) for name in names}
            order = take_turns(harness, clients, 40)
        assert all(sorted(order[turn : turn + 8]) == names for turn in range(33))
        harness.serves()


def test_owners_take_turns(start):
    """Three sessions of one owner get no more than the one of another."""
    with start(tokens=[("a", "token-a"), ("b", "token-b")]) as harness:
        with ExitStack() as stack:
            names = {b"a1": "token-a", b"a2": "token-a", b"a3": "token-a", b"b": "token-b"}
            clients = {
                name: stack.enter_context(harness.session(name, token)) for name, token in names.items()
            }
            order = take_turns(harness, clients, 24)
        assert order.count(b"b") in (11, 12)
        assert {order.count(name) for name in (b"a1", b"a2", b"a3")} <= {3, 4, 5}
        harness.serves("token-a")


def test_an_evaluation_that_takes_too_long(start):
    with start(evaluation_seconds=0.1) as harness:
        with harness.session() as client:
            client.ask("gate", b"x")
            header, _ = client.receive()
            assert (error(header), header["id"], header["retry"]) == ("timeout", 1, True)
        harness.serves()


def test_an_answer_that_does_not_come(start):
    with start(reply_seconds=0.1) as harness:
        with harness.session() as client:
            client.ask("refresh", b"x")
            refresh, _ = client.receive()
            header, _ = client.receive()
            assert (error(header), header["id"]) == ("timeout", 1)
            client.answer(refresh, b"too late")
            client.ask("reverse", b"abc")
            assert client.receive()[1] == [b"cba"]
        harness.serves()


def test_a_client_that_asks_for_nothing(start):
    with start(idle_seconds=0.1, head_seconds=0.3) as harness:
        with harness.session() as client:
            assert error(client.receive()) == "timeout"
            assert client.closed() == 1008
        with harness.socket() as client:  # and one that does not even open
            assert error(client.receive()) == "timeout"
            assert client.closed() == 1008
        assert harness.service.sessions == 0


def test_who_takes_no_answers_is_let_go(start, monkeypatch, logged):
    """Requests without end, and nobody who reads the answers: they do not pile up at the server."""
    monkeypatch.setattr(conversation, "FAREWELL_SECONDS", 0.1)
    unsent = [0]

    def ask(client):
        [session] = harness.service.conversations
        for _ in range(1_000_000):
            client.ask("no such module")
            unsent.append(session._outbox.qsize())

    with start() as harness, harness.socket(close_timeout=0.5) as client:
        assert client.open(harness.keys())["type"] == "opened"
        with pytest.raises((ConnectionClosed, OSError)):
            ask(client)
        eventually(lambda: not harness.service.conversations)
    assert max(unsent) < 100
    assert [entry["code"] for entry in entries(logged, "session failed")] == ["protocol"]


def test_evaluations_per_hour(start):
    """One owner has had its share: its sessions stay open, and others are served."""
    now = [0.0]
    with start(tokens=[("a", "ta"), ("b", "tb")], evaluations_per_hour=2, idle_seconds=60) as harness:
        harness.service.budget._clock = lambda: now[0]
        modules = len(harness.service.description["modules"])
        with harness.session(b"a", "ta") as one, harness.session(b"a", "ta") as two:
            # Each is of one module, so that as many of them as there are modules are one of the model.
            for client in [one] * modules + [two] * modules:
                now[0] += 100
                client.ask("reverse", b"abc")
                assert client.receive()[1] == [b"cba"]
            for client in (one, two):
                client.ask("reverse", b"abc")
                header, _ = client.receive()
                assert (error(header), header["retry"]) == ("rate_limited", True)
                assert header["retry_after"] == 3600 + 100 - now[0]  # a hundred seconds in was the first
                assert "2 evaluations of the model within an hour" in header["message"]
            with pytest.raises(InvalidStatus) as refused, harness.socket("ta"):
                pass
            assert refused.value.response.status_code == 429
            assert refused.value.response.headers["Retry-After"] == f"{3600 + 100 - now[0]:.0f}"
            with harness.session(b"b", "tb") as other:
                other.ask("reverse", b"abc")
                assert other.receive()[1] == [b"cba"]
            now[0] = 3700
            one.ask("reverse", b"abc")
            assert one.receive()[1] == [b"cba"]
            one.ask("reverse", b"abc")
            assert one.receive()[0]["retry_after"] == 100


def test_each_ciphertext_counts(start):
    """Several chunks of a prompt in one evaluation are as many as one after the other."""
    with start(evaluations_per_hour=1, idle_seconds=60) as harness, harness.session() as client:
        modules = len(harness.service.description["modules"])
        for blobs in (modules - 1, 1):
            client.ask("reverse", *[b"abc"] * blobs)
            assert client.receive()[1] == [b"cba"] * blobs
        client.ask("reverse", b"abc")
        assert error(client.receive()[0]) == "rate_limited"


def test_a_budget_is_exact_in_any_hour_and_small():
    now = [0.0]
    budget = HourlyBudget(1000, lambda: now[0])
    for _ in range(1000):
        assert budget.wait("a") == 0
        budget.spend("a")
        now[0] += 0.01
    assert budget.wait("a") == pytest.approx(3590)
    assert budget.wait("b") == 0
    assert len(budget._entries["a"]) <= 11
    now[0] = 3600
    assert budget.wait("a") == 0  # the first second's are gone
    spent = 0
    while not budget.wait("a"):
        budget.spend("a")
        spent += 1
    assert 90 <= spent <= 101


def test_what_is_refused_spends_nothing(start):
    with start(evaluations_per_hour=1) as harness, harness.session() as client:
        for _ in range(30):
            client.ask("reverse", b"abc", count=17)
            assert error(client.receive()[0]) == "bad_request"
        client.ask("reverse", b"abc")
        assert client.receive()[1] == [b"cba"]


def test_tokens(start):
    with start(tokens=[("a", "token-a"), ("b", "token-b")]) as harness:
        for token in (None, "wrong", "token-", "token-aa"):
            with pytest.raises(InvalidStatus) as refused, harness.socket(token):
                pass
            assert refused.value.response.status_code == 401
            assert b"unauthorized" in refused.value.response.body
        keys = harness.keys(token="token-a")
        with harness.socket("token-b") as client:  # knows a's fingerprints, and that is not enough
            assert error(client.open(keys)) == "unknown_keys"
        harness.serves("token-a")
        harness.serves("token-b")


def test_a_web_page_is_no_client(harness):
    with pytest.raises(InvalidStatus) as refused, harness.socket(origin="https://example.com"):
        pass
    assert refused.value.response.status_code == 403
    with harness.http() as http:
        assert http.get("/v1/model", headers={"Origin": "https://example.com"}).status_code == 403


def test_keys_of_an_idle_session_leave_the_memory(start):
    """After a while without an evaluation, once; the session goes on, and again after the next one."""
    with start(keys_seconds=0.1) as harness, harness.session() as client:
        eventually(lambda: harness.model.releases == 1)
        client.ask("reverse", b"abc")
        assert client.receive()[1] == [b"cba"]
        eventually(lambda: harness.model.releases == 2)
    assert harness.model.mistakes == []


def test_keys_stay_while_something_is_evaluated(start):
    with start(keys_seconds=0.05) as harness, harness.session() as client:
        client.ask("gate", b"abc")
        before = harness.model.releases
        time.sleep(0.2)
        assert harness.model.releases == before
        harness.model.gate.set()
        assert client.receive()[1] == [b"abc"]
        eventually(lambda: harness.model.releases == before + 1)
