"""The client against the real server, against one that is killed, and against servers that misbehave."""

import hashlib
import http.server
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import trustme
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import serve

from cipherlm.serving import client, client_session, protocol, transport
from cipherlm.serving.auth import Tokens
from cipherlm.serving.bounds import Bounds
from cipherlm.serving.client import (
    Connection,
    ConnectionFailed,
    InsecureConnection,
    RemoteError,
    ServerError,
    SessionLost,
    TimedOut,
    WrongModel,
)
from cipherlm.serving.service import Limits

from .echo import FINGERPRINT, EchoModel, echo_server

TOKEN = "sesame-open-1234"
EVALUATION = os.urandom(300_000)
PUBLIC = b"public"


@pytest.fixture
def model():
    return EchoModel()


@pytest.fixture
def url(tmp_path, model):
    with echo_server(tmp_path, model=model) as url:
        yield url
        model.release.set()


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch):
    monkeypatch.setattr(transport, "_FIRST_DELAY_SECONDS", 0.02)
    monkeypatch.setattr(transport, "_GREATEST_DELAY_SECONDS", 0.2)
    monkeypatch.setattr(client_session, "_CLOSE_SECONDS", 0.2)


def connected(url: str, **options) -> Connection:
    return Connection(url, **{"timeout": 20, "patience": 30, **options})


@contextmanager
def session(url: str, **options) -> Iterator[Connection]:
    with connected(url, **options) as connection:
        connection.open(uploaded(connection))
        yield connection


def uploaded(connection: Connection) -> dict[str, str]:
    return {
        "evaluation": connection.upload("evaluation", EVALUATION),
        "public": connection.upload("public", PUBLIC),
    }


def upper(data: bytes) -> bytes:
    return data.upper()


def nothing(_data: bytes) -> bytes:
    raise AssertionError("no refresh was to be asked for")


class Watched:
    """A progress whose steps and details are kept, and that does something at each detail."""

    def __init__(self, happening=lambda details: None) -> None:
        self.steps: list[str] = []
        self.details: list[str] = []
        self._happening = happening

    def __call__(self, step):
        self.steps.append(step)
        return nullcontext()

    def detail(self, text):
        self.details.append(text)
        self._happening(self.details)


# The way as it should be


def test_everything_in_order(url, model):
    reports, progress = [], Watched()
    with connected(url, progress=progress) as connection:
        assert connection.describe()["fingerprint"] == FINGERPRINT
        keys = uploaded(connection)
        assert keys["evaluation"] == hashlib.sha256(EVALUATION).hexdigest()
        connection.open(keys)
        results = connection.evaluate(
            "echo", 0, 3, [b"abc", b""], upper, lambda *report: reports.append(report)
        )
        assert results == [b"cba", b"", b"ROUND 0", b"ROUND 1", b"ROUND 2"]
        assert reports == [(1, 3), (2, 3), (3, 3)]
    assert progress.steps == ["uploading evaluation keys", "uploading public keys", "evaluating echo"]
    assert progress.details[0] == "0.0 of 0.3 MB"
    assert progress.details[-3:] == ["block 1 of 3", "block 2 of 3", "block 3 of 3"]


def test_a_session_remembers_until_it_is_reopened(url):
    with session(url) as connection:
        assert connection.evaluate("remember", 0, 1, [b"a"], nothing) == [b"a"]
        assert connection.evaluate("remember", 1, 1, [b"b"], nothing) == [b"a", b"b"]
        connection.reopen()
        assert connection.evaluate("remember", 0, 1, [b"c"], nothing) == [b"c"]


def test_large_inputs_and_results(url):
    data = [os.urandom(1_000_000), os.urandom(1_000_000)]
    with session(url) as connection:
        assert connection.evaluate("echo", 0, 1, data, lambda request: data[0])[2] == data[0]
        with pytest.raises(ValueError, match=r"takes 42\d{5} at most"):
            connection.evaluate("echo", 0, 1, [bytes(5_000_000)], nothing)
        # Nothing was sent, so that nothing is lost.
        assert connection.evaluate("echo", 0, 1, [b"ab"], upper)[0] == b"ba"


def test_over_tls_with_a_token(tmp_path):
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    certificate.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    certificate.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    tls = {"certfile": tmp_path / "cert.pem", "keyfile": tmp_path / "key.pem"}
    with echo_server(tmp_path, tokens=Tokens([("ann", TOKEN)]), **tls) as url:
        assert url.startswith("https://")
        with session(url, token=TOKEN, verify=str(tmp_path / "ca.pem")) as connection:
            data = os.urandom(3_000_000)
            assert connection.evaluate("echo", 0, 1, [data], upper) == [data[::-1], b"ROUND 0"]
        with pytest.raises(ConnectionFailed, match=r"not trusted.*authority"):
            connected(url, token=TOKEN).describe()
        with pytest.raises(ConnectionFailed, match=r"disconnected|reset|cannot be reached|HTTP"):
            connected(url.replace("https", "http"), token=TOKEN, patience=0).describe()


def test_tls_where_there_is_none(url):
    began = time.monotonic()
    with pytest.raises(ConnectionFailed, match="does not speak TLS"):
        connected(url.replace("http", "https"), patience=600).describe()
    assert time.monotonic() - began < 300  # it is not tried again, for it cannot pass


# Keys


def offsets(details: list[str]) -> list[float]:
    return [float(detail.split()[0]) for detail in details]


def test_an_upload_in_pieces_from_a_file(url, tmp_path, monkeypatch):
    monkeypatch.setattr(client, "UPLOAD_BYTES", 100_000)
    path = tmp_path / "evaluation"
    path.write_bytes(EVALUATION)
    progress = Watched()
    with connected(url, progress=progress) as connection:
        connection.upload("evaluation", path)
        assert offsets(progress.details) == [0.0, 0.1, 0.2]
        # The server has it now: nothing is sent again.
        assert connection.upload("evaluation", memoryview(EVALUATION)) == client._digest(path.open("rb"))
        assert len(progress.details) == 3


def test_an_upload_goes_on_in_another_process(url, monkeypatch):
    monkeypatch.setattr(client, "UPLOAD_BYTES", 100_000)

    def interrupt(details):
        if len(details) == 2:
            raise KeyboardInterrupt

    with connected(url, progress=Watched(interrupt)) as connection, pytest.raises(KeyboardInterrupt):
        connection.upload("evaluation", EVALUATION)
    progress = Watched()
    with connected(url, progress=progress) as connection:
        connection.upload("evaluation", EVALUATION)
    assert offsets(progress.details) == [0.1, 0.2]


def test_a_damaged_piece_is_sent_again(url, monkeypatch):
    monkeypatch.setattr(client, "UPLOAD_BYTES", 100_000)
    damages = damage_pieces(monkeypatch, 2)
    with connected(url) as connection:
        keys = uploaded(connection)
        connection.open(keys)
    assert damages == [0, 0]


def test_pieces_that_are_always_damaged_end(url, monkeypatch):
    damages = damage_pieces(monkeypatch, 1000)
    with connected(url) as connection, pytest.raises(ServerError, match="checksum") as caught:
        connection.upload("evaluation", EVALUATION)
    assert caught.value.status == 422
    assert len(damages) == client._MAX_SETBACKS + 1


@pytest.mark.parametrize("arrives", [True, False])
def test_a_connection_that_breaks_amid_a_piece(url, monkeypatch, arrives):
    monkeypatch.setattr(client, "UPLOAD_BYTES", 100_000)
    sent = []
    send = transport.httpx.Client.stream

    @contextmanager
    def breaking(self, method, url, *, content=None, **arguments):
        if content is None:
            with send(self, method, url, **arguments) as response:
                yield response
            return
        sent.append(int(arguments["headers"]["Upload-Offset"]))
        breaks = len(sent) == 2
        if not breaks or arrives:
            with send(self, method, url, content=content, **arguments) as response:
                if not breaks:
                    yield response
        if breaks:
            raise transport.httpx.ReadError("Connection reset by peer")

    monkeypatch.setattr(transport.httpx.Client, "stream", breaking)
    with connected(url) as connection:
        connection.open(uploaded(connection))
    # What had arrived, though nobody said so, is not sent again.
    assert sent[:4] == ([0, 100_000, 200_000, 0] if arrives else [0, 100_000, 100_000, 200_000])


def test_an_upload_without_a_network_ends(url, monkeypatch):
    def fail(*_, **__):
        raise transport.httpx.ConnectError("[Errno 113] No route to host")

    with connected(url, patience=0.1) as connection:
        monkeypatch.setattr(transport.httpx.Client, "stream", fail)
        with pytest.raises(ConnectionFailed, match=r"uploading public keys: http.* No route to host"):
            connection.upload("public", PUBLIC)


def damage_pieces(monkeypatch, count: int) -> list[int]:
    """Have the network change the first pieces; return the offsets of those that it did change, in time."""
    damages: list[int] = []
    send = transport.httpx.Client.stream

    def damaging(self, method, url, *, content=None, **arguments):
        if content and len(damages) < count:
            damages.append(int(arguments["headers"]["Upload-Offset"]))
            content = content[:-1] + bytes([content[-1] ^ 1])
        return send(self, method, url, content=content, **arguments)

    monkeypatch.setattr(transport.httpx.Client, "stream", damaging)
    return damages


def test_keys_that_changed_are_not_sent_for_ever(url):
    with connected(url) as connection:
        with pytest.raises(RemoteError, match="not what they were"):
            connection.upload("evaluation", b"changed", sha256=hashlib.sha256(b"before").hexdigest())
        # The server has kept nothing of it.
        with pytest.raises(ServerError) as caught:
            connection.open({"evaluation": hashlib.sha256(b"before").hexdigest(), "public": "0" * 64})
        assert caught.value.code == protocol.UNKNOWN_KEYS


def test_keys_that_a_server_refuses(url):
    with connected(url) as connection:
        with pytest.raises(ServerError, match="at most 1048576") as caught:
            connection.upload("public", bytes(1 << 21))
        assert (caught.value.code, caught.value.status) == (protocol.TOO_LARGE, 413)
        keys = uploaded(connection) | {"public": connection.upload("public", b"damaged")}
        with pytest.raises(ServerError, match="these keys are damaged") as caught:
            connection.open(keys)
        assert caught.value.code == protocol.BAD_KEYS
        connection.open(uploaded(connection))


def test_forgotten_keys_have_to_be_uploaded_again(url):
    with connected(url) as connection:
        keys = uploaded(connection)
        connection.forget(keys["public"])
        connection.forget(keys["public"])
        with pytest.raises(ServerError) as caught:
            connection.open(keys)
        assert caught.value.code == protocol.UNKNOWN_KEYS
        connection.open(uploaded(connection))


# A server that is killed


class Killable:
    """A server in another process, always on the same port."""

    def __init__(self, directory: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *, wait: bool = True) -> None:
        script = str(Path(__file__).with_name("echo.py"))
        self._process = subprocess.Popen(
            [sys.executable, script, str(self._directory), str(self.port)], stderr=subprocess.DEVNULL
        )
        while wait:
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
                return
            except ConnectionRefusedError:
                assert self._process.poll() is None
                time.sleep(0.02)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait()


@pytest.fixture
def killable(tmp_path):
    server = Killable(tmp_path)
    server.start()
    yield server
    server.kill()


def test_an_upload_survives_the_server(killable, monkeypatch):
    monkeypatch.setattr(client, "UPLOAD_BYTES", 100_000)

    def restart(details):
        if len(details) == 2:
            killable.kill()
            killable.start(wait=False)

    progress = Watched(restart)
    with connected(killable.url, progress=progress) as connection:
        fingerprint = connection.upload("evaluation", EVALUATION)
        # It went on where it had stopped.
        assert offsets(progress.details) == [0.0, 0.1, 0.1, 0.2]
        connection.open({"evaluation": fingerprint, "public": connection.upload("public", PUBLIC)})


def test_a_session_does_not_survive_the_server_but_can_be_reopened(killable):
    def kill(done, total):
        killable.kill()

    with session(killable.url) as connection:
        with pytest.raises(SessionLost, match="open it again"):
            connection.evaluate("stall", 0, 1, [], nothing, kill)
        with pytest.raises(SessionLost, match="is over"):
            connection.evaluate("echo", 0, 1, [], nothing)
        killable.start(wait=False)
        connection.reopen()
        assert connection.evaluate("echo", 0, 1, [b"ab"], upper) == [b"ba", b"ROUND 0"]


def test_an_evaluation_that_nothing_was_before_is_sent_again(killable):
    with session(killable.url) as connection:
        killable.kill()
        killable.start(wait=False)
        assert connection.evaluate("remember", 0, 1, [b"a"], nothing) == [b"a"]
        killable.kill()
        killable.start()
        # Now there would be something to remember.
        with pytest.raises(SessionLost):
            connection.evaluate("remember", 1, 1, [b"b"], nothing)


def test_a_server_that_shuts_down_ends_sessions_politely(killable):
    with session(killable.url) as connection:
        connection.evaluate("remember", 0, 1, [b"a"], nothing)
        killable.stop()
        with pytest.raises(SessionLost, match=r"shutting down|broke off"):
            connection.evaluate("remember", 1, 1, [b"b"], nothing)


def test_a_server_that_is_not_there(killable):
    killable.kill()
    with pytest.raises(ConnectionFailed, match="refuses connections: is the server running"):
        connected(killable.url, patience=0.1).describe()


# Ends that are not the end of the session


def test_a_refresh_that_fails_cancels(url, model):
    def fail(request):
        raise LookupError("mine")

    with session(url) as connection:
        with pytest.raises(LookupError, match="mine"):
            connection.evaluate("echo", 0, 3, [], fail)
        assert model.cancelled.wait(20)
        assert connection.evaluate("echo", 0, 1, [b"ab"], upper) == [b"ba", b"ROUND 0"]


def test_interrupting_cancels(url, model):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with session(url) as connection:
        connection.evaluate("remember", 0, 1, [b"a"], nothing)
        with pytest.raises(KeyboardInterrupt):
            connection.evaluate("stall", 0, 1, [], nothing, interrupt)
        assert model.cancelled.wait(20)
        # The session is the same one.
        assert connection.evaluate("remember", 1, 1, [b"b"], nothing) == [b"a", b"b"]


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
def test_ctrl_c_while_waiting_cancels(url, model):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # the workers of xdist ignore it
    with session(url) as connection:
        timer = threading.Timer(0.3, signal.raise_signal, [signal.SIGINT])
        timer.start()
        try:
            with pytest.raises(KeyboardInterrupt):
                connection.evaluate("stall", 0, 1, [], nothing)
        finally:
            timer.join()
            signal.signal(signal.SIGINT, before)
        assert model.cancelled.wait(20)
        assert connection.evaluate("echo", 0, 1, [b"ab"], upper) == [b"ba", b"ROUND 0"]


def test_what_is_closed_stays_closed(url):
    """Even where the evaluation that it was closed in would begin again."""
    with session(url) as connection:

        def close(request: bytes) -> bytes:
            connection.close()
            return request

        with pytest.raises(RemoteError, match=r"closed|broke off"):
            connection.evaluate("echo", 0, 1, [b"ab"], close)
        with pytest.raises(RemoteError, match="is closed"):
            connection.reopen()


def test_closing_cancels(url, model):
    def close(done, total):
        connection.close()
        raise LookupError

    connection = connected(url)
    connection.open(uploaded(connection))
    with pytest.raises(LookupError):
        connection.evaluate("stall", 0, 1, [], nothing, close)
    assert model.cancelled.wait(20)


def test_what_the_client_got_wrong_is_told(url):
    with session(url) as connection:
        for module, start, count, words in [
            ("refuse", 0, 1, "evaluating refuse: inputs that no module takes"),
            ("nothing", 0, 1, "no such module"),
            ("echo", 10, 10, "16"),
        ]:
            with pytest.raises(ServerError, match=words) as caught:
                connection.evaluate(module, start, count, [], nothing)
            assert caught.value.code == protocol.BAD_REQUEST
        assert connection.evaluate("echo", 0, 1, [b"ab"], upper) == [b"ba", b"ROUND 0"]


def test_nothing_without_a_session(url):
    connection = connected(url)
    for call in (lambda: connection.evaluate("echo", 0, 1, [], nothing), connection.reopen):
        with pytest.raises(RuntimeError, match=r"call open\(\) first"):
            call()


# Time


@pytest.fixture
def deaf():
    """A port that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_server_that_says_nothing(deaf):
    with pytest.raises(TimedOut, match=r"asking for the model: no answer from http://127.* within 0\.1 s"):
        connected(deaf, timeout=0.1, patience=0).describe()
    with pytest.raises(TimedOut, match=r"uploading public keys: no answer .* more time"):
        connected(deaf, timeout=0.1, patience=0).upload("public", PUBLIC)


def test_an_evaluation_without_a_word(url):
    with session(url, evaluation_timeout=0.2) as connection:
        with pytest.raises(TimedOut, match=r"evaluating dawdle: no answer .* within 0\.2 s"):
            connection.evaluate("dawdle", 0, 1, [], nothing)
        with pytest.raises(SessionLost):
            connection.evaluate("echo", 0, 1, [], nothing)


def test_a_full_server_is_asked_again(tmp_path, model):
    limits = Limits(sessions=1)
    with echo_server(tmp_path, model=model, limits=limits) as url, connected(url) as first:
        first.open(uploaded(first))
        with connected(url, patience=0.1) as second, pytest.raises(ServerError, match="sessions") as caught:
            second.open(uploaded(second))
        assert caught.value.code == protocol.BUSY
        timer = threading.Timer(0.3, first.close)
        timer.start()
        with session(url) as third:
            assert third.evaluate("echo", 0, 1, [b"ab"], upper) == [b"ba", b"ROUND 0"]
        timer.join()


def test_a_full_queue_is_asked_again(tmp_path, model):
    limits = Limits(workers=1, queue=1)
    with echo_server(tmp_path, model=model, limits=limits) as url, session(url, patience=0.1) as connection:
        threads, details = [], []
        for _ in range(2):  # one evaluation runs, one waits
            begun = threading.Event()

            def dawdle(begun=begun):
                with session(url) as other:
                    other.progress = Watched(lambda _details: begun.set())
                    other.evaluate("dawdle", 0, 1, [], upper)
                    details.append(other.progress.details[0])

            threads.append(threading.Thread(target=dawdle))
            threads[-1].start()
            assert begun.wait(20)
        with pytest.raises(ServerError, match="queue is full") as caught:
            connection.evaluate("echo", 0, 1, [], nothing)
        assert (caught.value.code, caught.value.retry) == (protocol.BUSY, True)
        with session(url) as patient:
            timer = threading.Timer(0.2, model.release.set)
            timer.start()
            assert patient.evaluate("echo", 0, 1, [b"ab"], upper) == [b"ba", b"ROUND 0"]
        for thread in (timer, *threads):
            thread.join()
        assert sorted(details) == ["0 before in the queue", "block 0 of 1"]


# Whom to trust


def test_evaluations_per_hour_are_not_waited_for(tmp_path, monkeypatch):
    with echo_server(tmp_path, limits=Limits(evaluations_per_hour=1)) as url, session(url) as connection:
        for _ in connection.describe()["modules"]:
            connection.evaluate("echo", 0, 1, [b"ab"], upper)
        monkeypatch.setattr(transport.Backoff, "wait", lambda _: pytest.fail("it waits"))
        for call in (lambda: connection.evaluate("echo", 0, 1, [b"ab"], upper), connection.reopen):
            with pytest.raises(ServerError, match="1 evaluations of the model within an hour") as caught:
                call()
            assert (caught.value.code, caught.value.retry) == ("rate_limited", True)
            assert 3000 < caught.value.retry_after <= 3600


def test_another_model_than_expected(url, tmp_path):
    with connected(url, model=FINGERPRINT) as connection:
        connection.describe()
    for call in (Connection.describe, lambda connection: connection.open({})):
        with (
            connected(url, model="00" * 32) as connection,
            pytest.raises(WrongModel, match=r"f1f1.*not 0000"),
        ):
            call(connection)


def test_another_model_after_a_restart(tmp_path):
    with echo_server(tmp_path / "a") as url:
        connection = connected(url)
        keys = uploaded(connection)
        connection.open(keys)
    port = int(url.rpartition(":")[2])
    with (
        echo_server(tmp_path / "a", port, EchoModel("ab" * 32)),
        pytest.raises(WrongModel, match="another model"),
    ):
        connection.reopen()
    connection.close()


@pytest.mark.parametrize("token", [None, "wrong"])
def test_a_wrong_token(tmp_path, token):
    with echo_server(tmp_path, tokens=Tokens([("ann", TOKEN)])) as url:
        with connected(url, token=token) as connection:
            for call in (connection.describe, lambda: connection.upload("public", PUBLIC)):
                with pytest.raises(ServerError, match=r"token.*CIPHERLM_TOKEN") as caught:
                    call()
                assert (caught.value.code, caught.value.retry) == (protocol.UNAUTHORIZED, False)
        with connected(url, token=TOKEN) as known:
            description = known.describe()
        with connected(url, token=token) as connection:
            connection._description = description
            with pytest.raises(ServerError, match=r"opening a session.*token") as caught:
                connection.open({})
            assert caught.value.code == protocol.UNAUTHORIZED


@pytest.mark.parametrize("host", ["example.org", "192.0.2.1", "[2001:db8::1]", "localhost.example.org"])
@pytest.mark.parametrize("token", [None, TOKEN])
def test_no_plain_http_to_another_machine(host, token):
    with pytest.raises(InsecureConnection, match=r"https://.*--ca.*--insecure-plain-http") as caught:
        Connection(f"http://{host}:8470", token=token)
    assert TOKEN not in str(caught.value)
    Connection(f"http://{host}:8470", token=token, insecure_plain_http=True).close()
    Connection(f"https://{host}:8470", token=token).close()


@pytest.mark.parametrize("url", ["https://example.org", "https://localhost", "http://localhost"])
def test_no_token_to_who_is_not_verified(url):
    with pytest.raises(InsecureConnection, match=r"verify=FILE") as caught:
        Connection(url, token=TOKEN, verify=False)
    assert TOKEN not in str(caught.value)
    Connection(url, verify=False).close()


def test_an_unverified_server_without_a_token(tmp_path):
    certificate = trustme.CA().issue_cert("127.0.0.1")
    certificate.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    certificate.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    tls = {"certfile": tmp_path / "cert.pem", "keyfile": tmp_path / "key.pem"}
    with echo_server(tmp_path, **tls) as url, connected(url, verify=False) as connection:
        assert connection.describe()["name"] == "echo"


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.1.2.3", "[::1]"])
def test_a_token_in_the_clear_on_this_machine(host):
    Connection(f"http://{host}:8470", token=TOKEN).close()


@pytest.mark.parametrize(
    "url",
    [
        "",
        "example.org",
        "example.org:8470",
        "ftp://example.org",
        "http://",
        "http://example.org:port",
        "http://example.org:99999",
        "http://[::1",
        "http://example.org/?x=1",
        "http://example.org/#x",
        "https://ann:sesame-open-1234@example.org",
    ],
)
def test_what_is_no_address(url):
    with pytest.raises(ValueError, match="address") as caught:
        Connection(url)
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize("token", ["", "two words", "new\nline", "gr\u00fcn", "\x00"])
def test_what_is_no_token(token):
    with pytest.raises(ValueError, match="a token is printable ASCII"):
        Connection("http://localhost", token=token)


def test_certificates_that_are_none(tmp_path):
    (tmp_path / "ca.pem").write_text("nothing")
    for path in ("ca.pem", "missing.pem"):
        with pytest.raises(ConnectionFailed, match="PEM"):
            Connection("https://localhost", verify=tmp_path / path)


def test_no_proxy_sees_what_stays_on_this_machine(url, monkeypatch, deaf):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "ws_proxy"):
        monkeypatch.setenv(name, deaf)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with session(url, timeout=5, patience=0) as connection:
        assert connection.evaluate("echo", 0, 1, [b"ab"], upper) == [b"ba", b"ROUND 0"]


def test_no_secret_in_texts_or_logs(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    for name in ("websockets", "httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.DEBUG)
    secret = b"a-secret-ciphertext"
    texts = []
    with (
        echo_server(tmp_path, tokens=Tokens([("ann", TOKEN)])) as url,
        session(url, token=TOKEN) as connection,
    ):
        texts.append(repr(connection) + repr(connection._address))
        for module in ("refuse", "nothing"):
            with pytest.raises(RemoteError) as caught:
                connection.evaluate(module, 0, 1, [secret], nothing)
            texts.append(repr(caught.value))
        connection.evaluate("echo", 0, 1, [secret], lambda request: secret)
    with pytest.raises(ConnectionFailed) as caught:
        connected(url, token=TOKEN, patience=0).describe()
    texts += [repr(caught.value), repr(caught.value.__cause__)]
    # What the server in this process logs is not the client's.
    logged = [record.getMessage() for record in caplog.records if not record.name.startswith("uvicorn")]
    assert any("POST" in message for message in logged)
    texts += logged
    for text in texts:
        assert TOKEN not in text
        assert secret.decode() not in text
    for name in ("websockets", "httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.NOTSET)


# Servers that are none


class Handler(http.server.BaseHTTPRequestHandler):
    answers: tuple[int, bytes]

    def do_GET(self):
        status, body = self.answers
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (200, b"<html>"),
        (200, b"[]"),
        (200, b'{"fingerprint": 5, "message_bytes": 5}'),
        (200, b'{"fingerprint": "x", "message_bytes": -5}'),
        (200, b'{"fingerprint": "x"}'),
        (200, b"[" * 100_000),
        (200, b'{"a": "' + bytes(5_000_000)),
        (302, b""),
        (404, b"<html>"),
        (500, b'{"error": "text"}'),
        (500, b'{"error": {"code": 5}}'),
    ],
)
def test_what_is_not_a_cipherlm_server(status, body):
    handler = type("Answering", (Handler,), {"answers": (status, body)})
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        with pytest.raises(RemoteError, match=r"not (answer )?as a CipherLM server does"):
            connected(f"http://127.0.0.1:{server.server_address[1]}", patience=0).describe()
        server.shutdown()


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        ((200, {"received": 0, "complete": False}), "not answer as a CipherLM server"),
        ((200, {"received": 7, "complete": False}), "not answer as a CipherLM server"),
        ((200, {"received": -1, "complete": False}), "not answer as a CipherLM server"),
        ((200, {"received": "6", "complete": True}), "not answer as a CipherLM server"),
        # A server that loses everything, again and again.
        ((404, {"error": {"code": "unknown_keys", "message": "no such keys"}}), "no such keys"),
    ],
)
def test_an_upload_that_never_gets_anywhere_ends(monkeypatch, pieces, words):
    monkeypatch.setattr(client, "UPLOAD_BYTES", 2)
    received = iter([2, 4, *[0] * 1000])
    asked = []

    class Losing(Handler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            state = {"received": next(received), "complete": False}
            asked.append(state)
            Losing.answers = 200, json.dumps(state).encode()
            self.do_GET()

        def do_PATCH(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            Losing.answers = pieces[0], json.dumps(pieces[1]).encode()
            self.do_GET()

    with http.server.HTTPServer(("127.0.0.1", 0), Losing) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        with pytest.raises(ServerError, match=words):
            connected(f"http://127.0.0.1:{server.server_address[1]}", patience=2).upload("public", PUBLIC)
        server.shutdown()
    assert len(asked) < 100


def test_a_stranger_s_text_becomes_one_printable_line():
    message = "\x1b[31mred\r\n" + "x" * 5000
    error = transport.server_error("internal", message, "asking")
    assert str(error).startswith("asking: [31mred xxx")
    assert len(str(error)) < 1200
    assert str(error).isprintable()


@contextmanager
def scripted(script, message_bytes: int = 10_000) -> Iterator[str]:
    """A server whose every session runs ``script(socket)`` after it was opened."""
    description = json.dumps({"fingerprint": FINGERPRINT, "message_bytes": message_bytes})

    def respond(connection, request):
        return connection.respond(200, description) if request.path == "/v1/model" else None

    def converse(socket):
        try:
            socket.recv()
            socket.send(protocol.pack(protocol.Opened("id", {})))
            script(socket)
        except ConnectionClosed:
            pass

    with serve(converse, "127.0.0.1", 0, process_request=respond, compression=None) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.socket.getsockname()[1]}"
        server.shutdown()


def answering(*answers):
    def script(socket):
        socket.recv()
        for answer in answers:
            socket.send(answer if isinstance(answer, (str, bytes)) else protocol.pack(answer))
        for _ in socket:
            pass

    return script


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        "text",
        b"\x00\x00\x00\x00",
        protocol.Opened("again", {}),
        protocol.Result(7, []),
        protocol.Progress(2, 1, 1),
        protocol.Refresh(1, 1, b""),
        protocol.Cancel(1),
    ],
)
def test_answers_that_make_no_sense(answer):
    with scripted(answering(answer)) as url, connected(url, evaluation_timeout=20) as connection:
        connection.open({})
        with pytest.raises(ServerError, match="not answer as a CipherLM server"):
            connection.evaluate("echo", 0, 1, [], upper)


def test_answers_that_are_too_large():
    answer = protocol.Result(1, [bytes(100_000)])
    with scripted(answering(answer)) as url, connected(url, evaluation_timeout=20) as connection:
        connection.open({})
        with pytest.raises(SessionLost, match=r"too big|1009|exceeds"):
            connection.evaluate("echo", 0, 1, [], upper)


def test_a_server_that_says_its_messages_are_huge():
    """The size that counts is the one in the client's bundle."""
    answer = protocol.Result(1, [bytes(200_000)])
    for size, fits in ((100_000, False), (300_000, True)):
        options = {"bounds": Bounds(size, 0), "evaluation_timeout": 20}
        with scripted(answering(answer), 2**50) as url, connected(url, **options) as connection:
            connection.open({})
            if fits:
                assert connection.evaluate("echo", 0, 1, [], upper) == [bytes(200_000)]
                continue
            with pytest.raises(SessionLost, match=r"too big|1009|exceeds"):
                connection.evaluate("echo", 0, 1, [], upper)


def test_a_server_that_never_has_enough_of_refreshes():
    answered = []

    def script(socket):
        socket.recv()
        for count in range(1000):
            socket.send(protocol.pack(protocol.Refresh(1, count, b"more")))
            socket.recv()

    def answer(request: bytes) -> bytes:
        answered.append(request)
        return b"fresh"

    options = {"bounds": Bounds(10_000, rounds=5), "evaluation_timeout": 20}
    with scripted(script) as url, connected(url, **options) as connection:
        connection.open({})
        with pytest.raises(ServerError, match="asks for more than 5 refreshes") as caught:
            connection.evaluate("echo", 0, 1, [], answer)
        assert not caught.value.retry
        assert len(answered) == 5
        with pytest.raises(SessionLost):
            connection.evaluate("echo", 0, 1, [], answer)


def test_the_code_decides_whether_a_session_can_be_replayed():
    for code, kind in [
        (protocol.SHUTTING_DOWN, SessionLost),
        (protocol.TIMEOUT, SessionLost),
        (protocol.PROTOCOL, ServerError),
        (protocol.INTERNAL, ServerError),
    ]:
        script = answering(protocol.Progress(1, 1, 2), protocol.error(code, "so it is"))
        with scripted(script) as url, connected(url, evaluation_timeout=20) as connection:
            connection.open({})
            with pytest.raises(kind, match="so it is"):
                connection.evaluate("echo", 0, 1, [], upper)
            with pytest.raises(SessionLost):
                connection.evaluate("echo", 0, 1, [], upper)


def test_a_cancelled_evaluation_that_does_not_end():
    def interrupt(done, total):
        raise KeyboardInterrupt

    with (
        scripted(answering(protocol.Progress(1, 1, 2))) as url,
        connected(url, timeout=1, evaluation_timeout=60) as connection,
    ):
        connection.open({})
        with pytest.raises(KeyboardInterrupt):
            connection.evaluate("echo", 0, 1, [], upper, interrupt)
        with pytest.raises(SessionLost, match=r"end of a cancelled evaluation.*open the session again"):
            connection.evaluate("echo", 0, 1, [], upper)
