"""Products at a server over a loopback connection: right, after failures too, and fair."""

import json
import logging
import re
import socket
import threading
from contextlib import contextmanager, suppress
from dataclasses import replace

import numpy as np
import pytest
import trustme
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from cipherlm.errors import Refused
from cipherlm.linear.client import LinearClient
from cipherlm.linear.server import load_plan
from cipherlm.serving import protocol
from cipherlm.serving.auth import Tokens
from cipherlm.serving.bundle import Bundle, load_hosted_model
from cipherlm.serving.errors import InsecureConnection, RemoteError, ServerError, WrongModel
from cipherlm.serving.linear import IN_FLIGHT, MAX_ROWS, LinearProducts
from cipherlm.serving.protocol import Close, Connect, Connected, Error, Multiply, Result, pack, unpack
from cipherlm.serving.remote_products import RemoteProducts
from cipherlm.serving.run import create_server, running
from cipherlm.serving.service import LINEAR_LIMITS, Service
from linear.architectures import remote, tiny
from linear.bundles import exported, exported_wide, wide_weights

GROUP = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"


@contextmanager
def serving(root=None, port=0, tokens=None, tls=(None, None), **limits):
    model = load_hosted_model((root or exported()) / "server")
    service = Service(model, None, tokens, replace(LINEAR_LIMITS, **limits))
    server = create_server(service, port=port, certfile=tls[0], keyfile=tls[1])
    with running(server) as url:
        yield url, service


@pytest.fixture(scope="module")
def server():
    with serving() as (url, service):
        yield url, service


@pytest.fixture(scope="module")
def weights():
    return remote(tiny("llama"))[0].weights


def close_to(found, x, matrix):
    expected = x @ matrix.T.astype(float)
    scale = np.linalg.norm(x, axis=1, keepdims=True) * np.sqrt((matrix.astype(float) ** 2).mean())
    return found.shape == expected.shape and np.abs((found - expected) / scale).max() < 1e-3


def products(url, root=None, **options):
    return RemoteProducts(url, (root or exported()) / "client", **options)


def vectors(count, columns=32, seed=0):
    return np.random.default_rng(seed).normal(size=(count, columns))


@pytest.mark.parametrize("rows", [1, MAX_ROWS, IN_FLIGHT * MAX_ROWS + 3])
def test_products_of_any_number_of_vectors(server, weights, rows):
    x = vectors(rows)
    with products(server[0]) as remote_products:
        assert close_to(remote_products.product(GROUP, x), x, weights[GROUP])
        assert remote_products.traffic.exchanges == -(-rows // MAX_ROWS)
        assert remote_products.traffic.connections == 1


def test_a_product_with_rotations():
    x = vectors(3, 300)
    with serving(exported_wide()) as (url, _), products(url, exported_wide()) as remote_products:
        assert len(remote_products.plan.rotations) > 1
        assert close_to(remote_products.product("wide", x), x, wide_weights()["wide"])


def test_keys_that_lack_a_rotation_are_refused():
    model = load_hosted_model(exported_wide() / "server")
    client = LinearClient(load_plan(exported_wide() / "client"))
    some = [rotation for rotation in client.plan.rotations if rotation]
    model.connect(client.secret_key.evaluation_keys(some, relinearization=False).to_bytes()).close()
    with pytest.raises(Refused, match="lack rotations"):
        model.connect(client.secret_key.evaluation_keys(some[1:], relinearization=False).to_bytes())


def test_no_vectors(server):
    with products(server[0]) as remote_products:
        assert remote_products.product(GROUP, vectors(0)).shape == (0, 64)


def test_what_cannot_be_encrypted_is_not_sent(server):
    with products(server[0]) as remote_products:
        with pytest.raises(ValueError, match="not finite"):
            remote_products.product(GROUP, np.full((1, 32), np.nan))
        with pytest.raises(ValueError, match="vectors of 32 values"):
            remote_products.product(GROUP, vectors(1, 31))
        with pytest.raises(ValueError, match="no product 'lm_head'"):
            remote_products.product("lm_head", vectors(1))
        with pytest.raises(ValueError, match="without training"):
            remote_products.product(GROUP, vectors(1, 64), transposed=True)
        assert remote_products.traffic.exchanges == 0


def test_gradients(weights):
    root = exported(training=True)
    x = vectors(2, 64)
    with serving(root) as (url, _), products(url, root) as remote_products:
        assert close_to(remote_products.product(GROUP, x, transposed=True), x, weights[GROUP].T)


def test_a_server_that_restarts(weights):
    x = vectors(2)
    with serving() as (url, _):
        port = int(url.rpartition(":")[2])
        remote_products = products(url)
        assert close_to(remote_products.product(GROUP, x), x, weights[GROUP])
    with serving(port=port), remote_products:
        assert close_to(remote_products.product(GROUP, x), x, weights[GROUP])
        assert remote_products.traffic.connections == 2


def test_a_connection_that_is_lost_while_exchanges_are_on_their_way(weights, monkeypatch):
    x = vectors(3 * MAX_ROWS)
    with serving() as (url, _), products(url) as remote_products:
        multiply, calls = LinearProducts.multiply, []

        def broken(self, *arguments):
            calls.append(arguments)
            if len(calls) == 2:
                remote_products._connection._socket.socket.shutdown(socket.SHUT_RDWR)
            return multiply(self, *arguments)

        monkeypatch.setattr(LinearProducts, "multiply", broken)
        assert close_to(remote_products.product(GROUP, x), x, weights[GROUP])
        assert remote_products.traffic.connections == 2


def test_a_server_that_is_gone():
    with serving() as (url, _):
        remote_products = products(url, patience=0.1)
        remote_products.connect()
    with remote_products, pytest.raises(RemoteError, match=r"refuses connections|broke off"):
        remote_products.product(GROUP, vectors(1))


def test_a_closed_connection(server):
    remote_products = products(server[0])
    remote_products.close()
    with pytest.raises(RemoteError, match="is closed"):
        remote_products.product(GROUP, vectors(1))


def test_a_server_of_other_weights(server):
    with (
        products(server[0], exported(seed=1)) as remote_products,
        pytest.raises(WrongModel, match="exported"),
    ):
        remote_products.connect()


def other_keys(client, plan, blobs):
    rows, _ = LinearClient(plan).encrypt(GROUP, vectors(1))
    return [part.to_bytes() for part in rows[0]]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda client, plan, blobs: [b"no ciphertext"], "no result that can be decrypted"),
        (lambda client, plan, blobs: [blobs[0][:-1]], "no result that can be decrypted"),
        (
            lambda client, plan, blobs: [client.evaluation_keys().to_bytes()],
            "no result that can be decrypted",
        ),
        (other_keys, "no result that can be decrypted"),
        (lambda client, plan, blobs: blobs * 2, "does not answer as a CipherLM server does"),
        (lambda client, plan, blobs: [], "does not answer as a CipherLM server does"),
    ],
)
def test_a_server_that_answers_nonsense(monkeypatch, answer, words):
    with serving() as (url, _), products(url, patience=0.1) as remote_products:
        multiply = LinearProducts.multiply

        def wrong(self, *arguments):
            return answer(remote_products._client, remote_products.plan, multiply(self, *arguments))

        monkeypatch.setattr(LinearProducts, "multiply", wrong)
        with pytest.raises(RemoteError, match=words):
            remote_products.product(GROUP, vectors(1))


def test_tls(tmp_path, weights):
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    certificate.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    certificate.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    x = vectors(MAX_ROWS + 1)
    with serving(tls=(tmp_path / "cert.pem", tmp_path / "key.pem")) as (url, _):
        with products(url, verify=tmp_path / "ca.pem") as remote_products:
            assert close_to(remote_products.product(GROUP, x), x, weights[GROUP])
        with products(url, patience=0.1) as remote_products, pytest.raises(RemoteError, match="not trusted"):
            remote_products.connect()


def test_no_plain_http_to_another_machine():
    with pytest.raises(InsecureConnection):
        products("http://192.0.2.1:8470")


def test_as_many_clients_as_may_be():
    with serving(sessions=1) as (url, _), products(url) as first, products(url, patience=0.1) as second:
        first.connect()
        with pytest.raises(ServerError, match="all the sessions") as caught:
            second.connect()
    assert (caught.value.code, caught.value.retry) == (protocol.BUSY, True)


def test_who_does_not_say_anything():
    with serving(upload_seconds=0.1) as (url, _), Stranger(url).socket as opened:
        answer = unpack(opened.recv(timeout=30), protocol.PRODUCTS_SERVER_MESSAGES)
    assert isinstance(answer, Error)
    assert answer.code == protocol.TIMEOUT


def test_tokens():
    with serving(tokens=Tokens([("alice", "secret-of-alice")])) as (url, _):
        with products(url, token="secret-of-alice") as remote_products:
            remote_products.connect()
        with products(url, patience=0.1) as remote_products, pytest.raises(ServerError, match="token"):
            remote_products.connect()


def test_many_clients_at_once(weights):
    """None waits for another to end: after each has had one product, none has had many."""
    count, each = 32, 6
    done, order, wrong, barrier = [0] * count, [], [], threading.Barrier(count)

    def run(index):
        x = vectors(1, seed=index)
        with products(url) as remote_products:
            remote_products.connect()
            barrier.wait(60)
            for _ in range(each):
                if not close_to(remote_products.product(GROUP, x), x, weights[GROUP]):
                    wrong.append(index)
                order.append(index)
                done[index] += 1

    with serving() as (url, _):
        threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    assert done == [each] * count
    assert not wrong
    assert set(order[: count * each // 2]) == set(range(count))


class Stranger:
    """Speaks the protocol by hand."""

    def __init__(self, url):
        about = Bundle.load(exported() / "client", "client").about
        self.description = about["description"]
        with products(url) as own:
            self.client, self.plan = LinearClient(own.plan), own.plan
        self.keys = self.client.evaluation_keys().to_bytes()
        self.socket = connect(f"{url.replace('http', 'ws')}/v1/products", max_size=None, compression=None)

    def say(self, message):
        self.socket.send(message if isinstance(message, (bytes, str)) else pack(message))

    def hear(self):
        return unpack(self.socket.recv(timeout=30), protocol.PRODUCTS_SERVER_MESSAGES)

    def greet(self, **changes):
        fields = {
            "protocol": protocol.VERSION,
            "model": self.description["fingerprint"],
            "plan": self.plan.digest,
            "blob": self.keys,
            **changes,
        }
        self.say(Connect(**fields))
        return self.hear()

    def inputs(self, count=1):
        rows, _ = self.client.encrypt(GROUP, vectors(count))
        return [part.to_bytes() for row in rows for part in row]

    def ask(self, id, **changes):
        self.say(
            Multiply(
                **{
                    "id": id,
                    "group": GROUP,
                    "transposed": False,
                    "rows": 1,
                    "blobs": self.inputs(),
                    **changes,
                }
            )
        )


@pytest.fixture
def stranger(server):
    made = Stranger(server[0])
    with made.socket:
        yield made


def foreign(stranger):
    rows, _ = LinearClient(stranger.plan).encrypt(GROUP, vectors(1))
    return [part.to_bytes() for part in rows[0]]


def damaged(stranger):
    data = bytearray(stranger.inputs()[0])
    data[len(data) // 2] ^= 1
    return [bytes(data)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (lambda s: {"group": "lm_head"}, "no product 'lm_head'"),
        (lambda s: {"transposed": True}, "without training"),
        (lambda s: {"rows": 2}, "1 ciphertexts for 2 vectors"),
        (lambda s: {"rows": 0, "blobs": []}, "0 ciphertexts for 0 vectors"),
        (lambda s: {"rows": MAX_ROWS + 1, "blobs": s.inputs(MAX_ROWS + 1)}, "1 to 16"),
        (lambda s: {"group": DOWN}, "another scale"),
        (lambda s: {"blobs": foreign(s)}, "another key"),
        (lambda s: {"blobs": damaged(s)}, "checksum|damaged|corrupt"),
        (lambda s: {"blobs": [b"nothing"]}, ""),
        (lambda s: {"blobs": [s.keys]}, ""),
    ],
)
def test_a_request_that_is_refused_leaves_the_connection(stranger, changes, words):
    assert isinstance(stranger.greet(), Connected)
    stranger.ask(1, **changes(stranger))
    stranger.ask(2)
    refused, answered = stranger.hear(), stranger.hear()
    assert isinstance(refused, Error)
    assert (refused.id, refused.code) == (1, protocol.BAD_REQUEST)
    assert re.search(words, refused.message), refused.message
    assert isinstance(answered, Result)
    assert answered.id == 2


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        (lambda s: {"protocol": 99}, protocol.PROTOCOL),
        (lambda s: {"model": "00"}, protocol.UNKNOWN_MODEL),
        (lambda s: {"plan": "00"}, protocol.UNKNOWN_MODEL),
        (lambda s: {"blob": b"x" * 100}, protocol.BAD_KEYS),
        (lambda s: {"blob": s.keys[:-1]}, protocol.BAD_KEYS),
        (lambda s: {"blob": bytes(s.description["key_bytes"] + 1)}, protocol.TOO_LARGE),
    ],
)
def test_a_greeting_that_is_refused_ends_the_connection(stranger, changes, code):
    answer = stranger.greet(**changes(stranger))
    assert isinstance(answer, Error)
    assert (answer.code, answer.id) == (code, None)


@pytest.mark.parametrize(
    "say",
    [
        lambda s: s.say("text"),
        lambda s: s.say(b"\0" * 10),
        lambda s: s.ask(1),
        lambda s: (s.greet(), s.greet()),
        lambda s: (s.greet(), s.ask(1), s.hear(), s.ask(1)),
        lambda s: (s.greet(), [s.ask(n, blobs=s.inputs(), rows=1) for n in range(200)]),
    ],
)
def test_what_is_out_of_place_ends_the_connection(stranger, say):
    heard = []
    with suppress(ConnectionClosed, OSError):
        say(stranger)
    with suppress(ConnectionClosed, OSError):
        while True:
            heard.append(stranger.hear())
    # Who asks on amid the farewell may find the connection gone before it has read that.
    for error in (answer for answer in heard if isinstance(answer, Error)):
        assert (error.code, error.id) == (protocol.PROTOCOL, None)


def test_damaged_messages(server, weights):
    """Each is answered with a product, refused, or ends its connection; the server goes on."""
    generator = np.random.default_rng(7)
    outcomes = set()
    for _ in range(40):
        made = Stranger(server[0])
        with made.socket:
            made.greet()
            fields = {"id": 1, "group": GROUP, "transposed": False, "rows": 1, "blobs": made.inputs()}
            data = bytearray(pack(Multiply(**fields)))
            for place in generator.integers(0, 200, 2) if generator.random() < 0.5 else [-1 - len(data) // 3]:
                data[place] ^= int(generator.integers(1, 256))
            made.say(bytes(data[: -1 if generator.random() < 0.2 else None]))
            answer = made.hear()
            outcomes.add(answer.code if isinstance(answer, Error) else "ok")
    assert outcomes <= {"ok", protocol.PROTOCOL, protocol.BAD_REQUEST}
    assert {protocol.PROTOCOL, protocol.BAD_REQUEST} <= outcomes
    x = vectors(1)
    with products(server[0]) as remote_products:
        assert close_to(remote_products.product(GROUP, x), x, weights[GROUP])


def test_the_server_lets_go_of_who_has_gone(server):
    _, service = server
    made = Stranger(server[0])
    with made.socket:
        made.greet()
        made.say(Close())
        with pytest.raises(ConnectionClosed, match="1000"):
            made.hear()
    for _ in range(500):
        if not service.sessions:
            break
        threading.Event().wait(0.01)
    assert not service.sessions


def test_evaluations_per_hour():
    with serving(evaluations_per_hour=1) as (url, _), products(url) as remote_products:
        for _ in range(len(remote_products.plan.groups)):
            remote_products.product(GROUP, vectors(1))
        with pytest.raises(ServerError) as caught:
            remote_products.product(GROUP, vectors(1))
    assert caught.value.code == protocol.RATE_LIMITED


def test_the_log_has_neither_bytes_nor_numbers(caplog):
    with caplog.at_level(logging.INFO), serving() as (url, _), products(url) as remote_products:
        remote_products.product(GROUP, vectors(1))
        key = remote_products._client.secret_key.to_bytes()
    text = json.dumps([str(record.__dict__) for record in caplog.records])
    assert "products ended" in text
    assert key.hex() not in text
