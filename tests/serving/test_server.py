"""The server as a whole: its routes, slow and many clients, TLS, logs, what it leaves behind, and its end."""

import json
import os
import random
import signal
import socket as sockets
import ssl
import subprocess
import sys
import threading
from contextlib import ExitStack, closing
from pathlib import Path

import httpx
import pytest
import trustme
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from cipherlm import __version__
from cipherlm.serving.auth import ANONYMOUS, Tokens, is_loopback
from cipherlm.serving.run import create_server

from .conftest import FINGERPRINT, MEGABYTE, FakeModel, eventually, frame, patch, sha256


def test_routes(harness):
    with harness.http() as http:
        assert http.get("/v1/health").json() == {"status": "ok", "version": __version__, "protocol": 1}
        assert http.get("/v1/model").json() == FakeModel().description
        for path in ("/", "/docs", "/openapi.json", "/v1/keys/..%2f..%2fetc%2fpasswd", "/v1/session"):
            answer = http.get(path)
            assert answer.status_code == 404
            assert set(answer.json()["error"]) == {"code", "message", "retry"}
        assert http.put("/v1/model").status_code == 405
        assert "server" not in answer.headers


def test_metrics(start):
    def value(name):
        with harness.http() as http:
            lines = http.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    with start() as harness:
        assert value("cipherlm_sessions") == 0
        with harness.session() as client:
            assert value("cipherlm_sessions ") == 1
            client.ask("refresh", b"x", count=2)
            for _ in range(2):
                client.answer(client.receive()[0], b"y")
            client.receive()
            client.ask("break")
            client.receive()
            client.ask("gate")
            eventually(lambda: value("cipherlm_running ") == 1)
        eventually(lambda: value("cipherlm_sessions ") == 0)
        eventually(lambda: value("cipherlm_evaluations_total") == 3)
        assert value('cipherlm_evaluations_total{outcome="ok"}') == 1
        assert value('cipherlm_evaluations_total{outcome="internal"}') == 1
        assert value('cipherlm_evaluations_total{outcome="cancelled"}') == 1
        assert value("cipherlm_evaluation_seconds_count") == 3
        assert value("cipherlm_refresh_rounds_total") == 2
        assert value('cipherlm_session_bytes_total{direction="in"}') > 0
        assert value('cipherlm_requests_total{method="POST",route="/v1/keys",status="200"}') == 2
        assert value('cipherlm_requests_total{method="WEBSOCKET",route="/v1/session",status="101"}') == 1
        assert value("cipherlm_key_bytes ") == len(b"evaluation key public key ")
        with harness.http() as http:
            http.get("/" + "x" * 50)
            http.request("NONSENSE", "/v1/model")
        assert value('cipherlm_requests_total{method="other",route') == 1
        with harness.http() as http:
            assert "xxx" not in http.get("/metrics").text


def raw(harness, data):
    """Return a socket that has sent some bytes."""
    host, port = harness.url.removeprefix("http://").split(":")
    socket = sockets.create_connection((host, int(port)), timeout=20)
    socket.sendall(data)
    return closing(socket)


HANDSHAKE = (
    b"GET /v1/session HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GET /v1/hea",
        b"GET /v1/health HTTP/1.1\r\nHost: localhost\r\n",
        b"GET /v1/health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /v1",
        HANDSHAKE[:-2],
        # This one does not answer the server's close either, which takes the server ten seconds.
        pytest.param(HANDSHAKE + b"\x82\xfe\x01\x00", marks=pytest.mark.slow),
    ],
    ids=["nothing", "line", "head", "second", "handshake", "half a message"],
)
def test_clients_that_never_finish_are_let_go(start, data):
    with start(head_seconds=0.3) as harness:
        with raw(harness, data) as socket:
            while socket.recv(1000):
                pass  # up to the end of the connection
        harness.serves()


def test_who_sends_nothing_holds_no_place(start):
    with start(upload_idle_seconds=0.3) as harness:
        content = b"x" * 100
        with harness.http() as http:
            http.post("/v1/keys", json={"kind": "public", "size": 100, "sha256": sha256(content)})
        head = (
            f"PATCH /v1/keys/{sha256(content)} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n"
            f"Upload-Offset: 0\r\nUpload-Checksum: sha256 {sha256(content)}\r\n\r\n"
        )
        with raw(harness, head.encode() + b"x" * 10) as socket:
            assert socket.recv(1000).startswith(b"HTTP/1.1 408")
        with harness.http() as http:
            assert patch(http, content, 0).json()["complete"]


def test_the_end_does_not_wait_for_a_paused_upload(start, logged):
    """Who uploads is told to come again, and nothing in the log looks like a fault."""
    with start() as harness:
        content = b"x" * 100
        with harness.http() as http:
            http.post("/v1/keys", json={"kind": "public", "size": 100, "sha256": sha256(content)})
        head = (
            f"PATCH /v1/keys/{sha256(content)} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n"
            f"Upload-Offset: 0\r\nUpload-Checksum: sha256 {sha256(content)}\r\n\r\n"
        )
        with raw(harness, head.encode() + b"x" * 10) as socket:
            eventually(lambda: harness.service._reading)
            harness.server.should_exit = True
            answer = b""  # head and body may come one after the other
            while b"shutting_down" not in answer and (more := socket.recv(1000)):
                answer += more
    assert answer.startswith(b"HTTP/1.1 503")
    assert b"shutting_down" in answer
    events = [json.loads(line)["event"] for line in logged.getvalue().splitlines()]
    assert events == ["serving", "shutting down", "request refused", "ended"]


def test_a_body_that_never_comes(start):
    with start(head_seconds=0.3, upload_seconds=0.3) as harness:
        content = b"x" * 100
        with harness.http() as http:
            http.post("/v1/keys", json={"kind": "public", "size": 100, "sha256": sha256(content)})
        head = (
            f"PATCH /v1/keys/{sha256(content)} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n"
            f"Upload-Offset: 0\r\nUpload-Checksum: sha256 {sha256(content)}\r\n\r\n"
        )
        for data in (
            head.encode() + b"x" * 10,
            b"POST /v1/keys HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{",
        ):
            with raw(harness, data) as socket:
                assert socket.recv(1000).startswith(b"HTTP/1.1 408")
        with raw(harness, head.encode() + b"x" * 10):
            pass  # gone in the middle of a chunk
        with harness.http() as http:
            assert patch(http, content, 0).json()["complete"]
        harness.serves()


@pytest.mark.parametrize("seed", range(5))
def test_noise_instead_of_http(harness, seed):
    noise = random.Random(seed)
    for data in (
        noise.randbytes(3000),
        HANDSHAKE + noise.randbytes(3000),
        b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 20000,
    ):
        with raw(harness, data) as socket:
            socket.shutdown(sockets.SHUT_WR)
            try:
                while socket.recv(1000):
                    pass
            except ConnectionError:
                pass


def test_connections_are_bounded(start):
    with start(connections=3, head_seconds=1) as harness:
        with ExitStack() as stack:
            for _ in range(3):
                stack.enter_context(raw(harness, b""))
            eventually(lambda: len(harness.server.server_state.connections) == 3)
            with raw(harness, b"") as socket:
                assert socket.recv(1) == b""
        harness.serves()


def test_tls(start, tmp_path):
    authority, other = trustme.CA(), trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    certfile, keyfile = tmp_path / "cert.pem", tmp_path / "key.pem"
    certificate.cert_chain_pems[0].write_to_path(certfile)
    certificate.private_key_pem.write_to_path(keyfile)
    context, wrong = ssl.create_default_context(), ssl.create_default_context()
    authority.configure_trust(context)
    other.configure_trust(wrong)
    with start(tls=(certfile, keyfile)) as harness:
        assert harness.url.startswith("https://")
        with httpx.Client(base_url=harness.url, verify=context) as http:
            assert http.get("/v1/health").json()["status"] == "ok"
        url = harness.url.replace("https", "wss") + "/v1/session"
        with connect(url, ssl=context) as socket:
            socket.send(frame({"type": "open", "protocol": 1, "model": FINGERPRINT, "keys": {}}))
            assert b"bad_request" in socket.recv(20)
        with pytest.raises(httpx.ConnectError), httpx.Client(base_url=harness.url, verify=wrong) as http:
            http.get("/v1/health")
        with pytest.raises(httpx.HTTPError):
            httpx.get(harness.url.replace("https", "http") + "/v1/health")


def test_where_a_server_may_listen(start):
    with start() as harness:
        service = harness.service
        for host in ("0.0.0.0", "::", "192.168.1.1", "example.org", ""):
            with pytest.raises(ValueError, match="needs a token"):
                create_server(service, host)
        with pytest.raises(ValueError, match="certificate"):
            create_server(service, certfile=Path("cert.pem"))
    with start(tokens=[("a", "token")]) as harness:
        with pytest.raises(ValueError, match=r"TLS.*insecure_plain_http"):
            create_server(harness.service, "0.0.0.0")
        create_server(harness.service, "0.0.0.0", insecure_plain_http=True)
        create_server(harness.service, "0.0.0.0", certfile=Path("cert.pem"), keyfile=Path("key.pem"))
    assert is_loopback("127.0.0.1")
    assert is_loopback("::1")
    assert is_loopback("localhost")
    assert not is_loopback("127.0.0.1.example.org")


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("localhost", True),
        ("127.0.0.1:8470", True),
        ("[::1]:8470", True),
        ("evil.example", False),
        ("evil.example:8470", False),
        ("127.0.0.1.evil.example", False),
        ("", False),
    ],
)
def test_no_rebound_name_reaches_a_server_without_tokens(harness, host, allowed):
    for path in ("/v1/health", "/v1/model", "/metrics"):
        response = httpx.get(harness.url + path, headers={"Host": host})
        assert response.status_code == (200 if allowed else 403)
        assert allowed or response.json()["error"]["code"] == "unauthorized"
    address = harness.url.removeprefix("http://")
    with sockets.create_connection(address.split(":")) as raw:
        handshake = (
            f"GET /v1/session HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        raw.sendall(handshake.encode())
        assert raw.recv(100).startswith(b"HTTP/1.1 101" if allowed else b"HTTP/1.1 403")


def test_a_server_with_tokens_may_have_any_name(start):
    with start(tokens=[("a", "token")]) as harness, harness.http("token") as http:
        assert http.get("/v1/model", headers={"Host": "models.example"}).status_code == 200
        assert httpx.get(harness.url + "/v1/model", headers={"Host": "models.example"}).status_code == 401


def test_tokens(tmp_path):
    path = tmp_path / "tokens"
    path.write_text("# two owners\nalice first\nalice second\n\nbob third\nfourth\n")
    tokens = Tokens.read(path)
    assert [tokens.owner(f"Bearer {token}") for token in ("first", "second", "third", "fourth")] == [
        "alice",
        "alice",
        "bob",
        "default",
    ]
    for wrong in (
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer fifth",
        "Basic first",
        "first",
        "Bearer \udcff",
        "Bearer é",
    ):
        assert tokens.owner(wrong) is None
    assert Tokens().owner(None) == ANONYMOUS
    for text in ("", "a b c\n", "alice same\nbob same\n", "alice é\n"):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="token"):
            Tokens.read(path)


def test_logs_have_no_payloads_and_no_tokens(start, logged):
    token = "CORRECT-HORSE"
    with start(tokens=[("alice", token)]) as harness:
        with harness.session(b"PAYLOAD", token) as client:
            client.ask("refresh", b"PAYLOAD")
            client.answer(client.receive()[0], b"PAYLOAD")
            client.receive()
            client.ask("break", b"PAYLOAD")
            client.receive()
            client.ask("PAYLOAD", b"PAYLOAD")
            client.receive()
            client.ask("gate", b"PAYLOAD")
            client.send({"type": "PAYLOAD", "PAYLOAD": 1}, b"PAYLOAD")
            client.closed()
        with harness.socket(token) as client:
            client.open({**harness.keys(token=token), "evaluation": harness.put(b"explosive", token=token)})
        with pytest.raises(InvalidStatus), harness.socket("WRONG-HORSE"):
            pass
        with harness.http("WRONG-HORSE") as http:
            http.get("/v1/model?PAYLOAD", headers={"PAYLOAD": "PAYLOAD"})
            http.get("/PAYLOAD")
        with raw(harness, b"PAYLOAD\r\n\r\n") as socket:
            socket.recv(1000)
        with raw(harness, HANDSHAKE.replace(b"session", b"PAYLOAD")) as socket:
            socket.recv(1000)
        harness.serves(token)
    text = logged.getvalue()
    events = [json.loads(line) for line in text.splitlines()]
    for event in (
        "serving",
        "session opened",
        "evaluation queued",
        "evaluation broke",
        "session failed",
        "ended",
    ):
        assert any(entry.get("event") == event for entry in events), event
    assert any(entry.get("error") == "RuntimeError" and entry["stack"] for entry in events)
    assert "alice" in text
    for secret in ("PAYLOAD", "HORSE", "reyek"):
        assert secret not in text, [line for line in text.splitlines() if secret in line]


def census():
    return len(os.listdir("/proc/self/fd")), threading.active_count()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts files by /proc")
def test_two_hundred_sessions_leave_nothing_behind(start):
    with start() as harness:

        def session(number):
            keys = harness.keys()
            with harness.socket() as client:
                client.open(keys)
                client.ask("refresh", b"x")
                refresh, _ = client.receive()
                if number % 4 == 0:
                    return  # gone during a refresh
                client.answer(refresh, b"y")
                assert client.receive()[1] == [b"y"]
                if number % 4 == 1:
                    client.socket.send(b"garbage")
                    client.closed()
                elif number % 4 == 2:
                    client.send({"type": "close"})
                    client.closed()

        def quiet():
            service = harness.service
            return not (service.sessions or service.conversations or harness.server.server_state.connections)

        for number in range(20):
            session(number)
        eventually(quiet)
        files, threads = census()
        for number in range(200):
            session(number)
        eventually(quiet)
        # Threads of the pool for short blocking calls stay, as many as there are processors at most.
        eventually(lambda: census()[0] <= files)
        pool = min(32, (os.cpu_count() or 1) + 4)
        eventually(lambda: census()[1] <= threads + pool)
        assert not [thread for thread in threading.enumerate() if thread.name == "evaluation"]
        assert harness.model.open_sessions == 0
        harness.serves()


def test_the_end_lets_evaluations_finish(start):
    with start(grace_seconds=20) as harness, harness.session(b"1") as busy, harness.session(b"2") as idle:
        busy.ask("gate", b"abc")
        eventually(lambda: harness.service.scheduler.running == 1)
        harness.server.should_exit = True
        header, _ = idle.receive()
        assert (header["code"], header["retry"]) == ("shutting_down", True)
        assert idle.closed() == 1012
        with pytest.raises(ConnectionError), raw(harness, b""):
            pass  # nobody new
        harness.model.gate.set()
        assert busy.receive() == ({"type": "result", "id": 1}, [b"abc"])
        assert busy.receive()[0]["code"] == "shutting_down"
        assert busy.closed() == 1012
    assert harness.model.open_sessions == 0


@pytest.mark.parametrize("module", ["gate", "refresh", "stuck"])
def test_the_end_does_not_wait_for_ever(start, module):
    with start(grace_seconds=0.1) as harness:
        with harness.session(b"1") as client, harness.session(b"2") as waiting:
            client.ask(module, b"abc")
            eventually(lambda: len(harness.model.order) == 1)
            waiting.ask("gate", b"waiting")
            harness.server.should_exit = True
            codes = []
            while "shutting_down" not in codes:
                codes.append(client.receive()[0].get("code"))
            assert client.closed() == 1012
            assert waiting.receive()[0]["code"] == "shutting_down"
        if module == "stuck":
            harness.model.gate.set()


SERVER = """
import sys
from cipherlm.cli import main, serve
from {conftest} import FakeModel
serve.load_hosted_model = lambda path: FakeModel()
sys.exit(main(sys.argv[1:]))
"""


def test_the_verb(tmp_path):
    """``cipherlm serve`` starts, serves and ends on SIGTERM with 0."""
    code = SERVER.format(conftest="conftest")
    arguments = ["serve", "bundle", "--port", "0", "--data-dir", str(tmp_path), "--grace-seconds", "5"]
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "CIPHERLM_TOKEN": "verb-token"},
    )
    with process:
        entry = json.loads(process.stderr.readline())
        assert entry["event"] == "serving"
        assert httpx.get(entry["url"] + "/v1/health").json()["status"] == "ok"
        assert httpx.get(entry["url"] + "/v1/model").status_code == 401
        answer = httpx.get(entry["url"] + "/v1/model", headers={"Authorization": "Bearer verb-token"})
        assert answer.json()["max_tokens"] == 16
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        assert process.wait(30) == 0, rest
    assert [json.loads(line)["event"] for line in rest.splitlines()] == [
        "request refused",
        "shutting down",
        "ended",
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--host", "0.0.0.0"], 2, "needs a token"),
        (["--host", "0.0.0.0", "--insecure-plain-http"], 2, "needs a token"),
        (["--host", "0.0.0.0", "--token", "a"], 2, "--certfile and --keyfile, or add --insecure-plain-http"),
        (["--certfile", "cert.pem"], 2, "belong together"),
        (["--certfile", "no", "--keyfile", "no"], 1, "no such file"),
        (["--token", "a", "--token-file", "b"], 2, "not allowed with"),
        (["--token-file", "/nonexistent"], 1, "No such file"),
        (["--token", "two words"], 1, "cannot carry"),
        (["--disk-budget", "lots"], 2, "not a size"),
        (["--port", "70000"], 2, "not a port"),
    ],
)
def test_wrong_usage_of_the_verb(capsys, monkeypatch, arguments, code, words):
    from cipherlm.cli import main

    monkeypatch.delenv("CIPHERLM_TOKEN", raising=False)
    assert main(["serve", "bundle", *arguments]) == code
    assert words in capsys.readouterr().err


def test_sizes():
    from cipherlm.cli.serve import size_argument

    assert [size_argument(text) for text in ("7", "500MB", "1.5 GB")] == [7, 500 * 10**6, 15 * 10**8]
    assert MEGABYTE == 2**20
