"""Sessions on the workers of a Ray cluster, mostly with a model that computes nothing.

Its two machines are this one, as two nodes with raylets and object stores of their own.
"""

import functools
import os
import signal
import sys
import tempfile
import threading
import time
from contextlib import closing, contextmanager, suppress

import pytest
import torch

from cipherlm import engine
from cipherlm.cli import main
from cipherlm.errors import Refused
from cipherlm.serving.computation import Cancelled, WorkerBroke, WorkerLost

ray = pytest.importorskip("ray")

from linear.architectures import tiny  # noqa: E402
from linear.bundles import exported  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

from cipherlm.linear.client import LinearClient  # noqa: E402
from cipherlm.linear.server import load_plan  # noqa: E402
from cipherlm.serving import bundle, ray_cluster  # noqa: E402
from cipherlm.serving.client import Connection  # noqa: E402
from cipherlm.serving.errors import SessionLost  # noqa: E402
from cipherlm.serving.keys import KeyStore  # noqa: E402
from cipherlm.serving.ray_cluster import ClusterError, RayHostedModel, cores_per_worker  # noqa: E402
from cipherlm.serving.ray_products import RayHostedProducts  # noqa: E402
from cipherlm.serving.remote_linear import RemoteLinearModel  # noqa: E402
from cipherlm.serving.run import create_server, running  # noqa: E402
from cipherlm.serving.service import LINEAR_LIMITS, Limits, Service  # noqa: E402

from . import small  # noqa: E402
from .conftest import eventually  # noqa: E402

FINGERPRINT = "c1" * 32


class FakeModel:
    """What runs in the workers. Evaluations tell of the process that they are in."""

    def __init__(self):
        self.description = {
            "scheme": "fake",
            "name": "fake",
            "modules": ["tell", "remember", "refresh", "stall", "refuse", "break"],
            "parameters": {},
            "fingerprint": FINGERPRINT,
            "keys": {"evaluation": 64 << 20, "public": 1 << 20},
            "max_tokens": 64,
            "message_bytes": 8 << 20,
        }
        self.sessions = 0
        self.computing = 0

    def open(self, keys):
        if keys["public"].read_bytes() == b"damaged":
            raise Refused("the public key is damaged")
        self.sessions += 1
        return FakeComputation(self, keys["evaluation"].read_bytes())


class FakeComputation:
    def __init__(self, model, key):
        self.model = model
        self.key = key
        self.remembered = []

    def evaluate(self, module, start, count, inputs, exchange, report):
        self.model.computing += 1
        try:
            return getattr(self, "do_" + module)(count, inputs, exchange, report)
        finally:
            self.model.computing -= 1

    def do_tell(self, *_):
        told = [os.getpid(), self.model.sessions, self.model.computing, engine.threads(), len(self.key)]
        return [b"%d" % number for number in told]

    def do_remember(self, count, inputs, exchange, report):
        self.remembered += inputs
        return self.remembered

    def do_refresh(self, count, inputs, exchange, report):
        outputs = []
        for block in range(count):
            outputs.append(exchange(inputs[0] + b"%d" % block))
            report(block + 1, count)
        return outputs

    def do_stall(self, count, inputs, exchange, report):
        while True:
            report(0, 1)
            time.sleep(0.01)

    def do_refuse(self, *_):
        raise Refused("inputs of another shape")

    def do_break(self, *_):
        raise KeyError("PAYLOAD in an exception")

    def close(self):
        self.model.sessions -= 1


def other_model():
    """A model that differs from process to process."""
    model = FakeModel()
    model.description["fingerprint"] = f"{os.getpid():064x}"
    return model


def no_model():
    raise ValueError("there is no bundle here")


@pytest.fixture(scope="module")
def cluster():
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # The workers cannot import this module.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    cluster.add_node(num_cpus=2)
    ray_cluster.connect(cluster.address)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def shared(cluster):
    with closing(RayHostedModel(FakeModel, 2)) as model:
        yield model


@pytest.fixture
def keys(tmp_path):
    evaluation, public = tmp_path / "evaluation", tmp_path / "public"
    evaluation.write_bytes(bytes(1000))
    public.write_bytes(b"public")
    return {"evaluation": evaluation, "public": public}


@pytest.fixture
def model(shared, keys):
    """Two workers. Each test must leave them without sessions, and alive."""
    yield shared
    eventually(lambda: alive(shared, keys), 60)
    with two_sessions(shared, keys) as sessions:
        assert [told(session)[1] for session in sessions] == [1, 1]


def alive(model, keys):
    for place in model._workers:
        place.rests_until = 0
    try:
        with two_sessions(model, keys) as sessions:
            return len({told(session)[0] for session in sessions}) == 2
    except WorkerLost:
        return False


@contextmanager
def two_sessions(model, keys):
    with closing(model.open(keys)) as first, closing(model.open(keys)) as second:
        yield first, second


def never(request):
    raise AssertionError("nothing needs a refresh")


def unheard(done, total):
    pass


def run(session, module, *inputs, count=1, exchange=never, report=unheard):
    return session.evaluate(module, 0, count, inputs, exchange, report)


def told(session):
    """Return process, sessions, evaluations that compute, threads of the engine, bytes of the key."""
    return [int(number) for number in run(session, "tell")]


def kill(session):
    """End the worker of a session as a machine ends that loses its power."""
    os.kill(told(session)[0], signal.SIGKILL)


def test_sessions_spread(model, keys):
    with two_sessions(model, keys) as (first, second):
        assert told(first)[0] != told(second)[0]
        assert told(first)[0] != os.getpid()
        assert told(first)[1:] == [1, 1, 1, 1000]
        assert run(first, "remember", b"a", b"b") == [b"a", b"b"]
        assert run(second, "remember", b"c") == [b"c"]
        assert run(first, "remember", b"") == [b"a", b"b", b""]
        with closing(model.open(keys)) as third:
            assert told(third)[1] == 2
        first.close()
        with closing(model.open(keys)) as fourth:
            assert told(fourth)[0] != told(second)[0]


def test_keys_larger_than_a_chunk_and_empty_ones(model, keys):
    keys["evaluation"].write_bytes(bytes(2 * ray_cluster.CHUNK_BYTES + 1))
    with closing(model.open(keys)) as session:
        assert told(session)[4] == 2 * ray_cluster.CHUNK_BYTES + 1


def test_damaged_keys(model, keys):
    keys["public"].write_bytes(b"damaged")
    with pytest.raises(ValueError, match="the public key is damaged"):
        model.open(keys)
    keys["public"].write_bytes(b"public")


@pytest.mark.parametrize("size", [1, 100_000, 2_000_000])
def test_exchanges(model, keys, size):
    reports = []
    data = os.urandom(size)
    with closing(model.open(keys)) as session:
        results = run(
            session,
            "refresh",
            data,
            count=3,
            exchange=lambda request: request[::-1],
            report=lambda *report: reports.append(report),
        )
    assert results == [(data + b"%d" % block)[::-1] for block in range(3)]
    assert reports == [(1, 3), (2, 3), (3, 3)]


def test_errors_leave_a_session_as_it_was(model, keys):
    with closing(model.open(keys)) as session:
        run(session, "remember", b"a")
        with pytest.raises(ValueError, match="inputs of another shape"):
            run(session, "refuse")
        with pytest.raises(WorkerBroke, match=r"under [0-9a-f]{8}$") as caught:
            run(session, "break")
        assert caught.value.reference in str(caught.value)
        assert "PAYLOAD" not in str(caught.value)
        assert run(session, "remember", b"b") == [b"a", b"b"]


@pytest.mark.parametrize("module", ["stall", "refresh"])
def test_cancelling(model, keys, module):
    def cancel(*_):
        raise Cancelled

    with closing(model.open(keys)) as session:
        with pytest.raises(Cancelled):
            run(session, module, b"x", count=2, exchange=cancel, report=cancel)
        assert told(session)[2] == 1  # nothing but this computes there now
        with pytest.raises(Cancelled):
            run(session, module, b"x", count=2, exchange=cancel, report=cancel)


def test_an_evaluation_that_waits_for_its_client_lets_others_compute(model, keys):
    with two_sessions(model, keys) as (first, _), closing(model.open(keys)) as third:
        assert told(first)[0] == told(third)[0]
        assert told(first)[1] == 2
        seen = []

        def exchange(request):
            seen.append(told(third)[2])
            return request

        assert run(first, "refresh", b"x", exchange=exchange) == [b"x0"]
        assert seen == [2]  # that one, paused, and the one that tells


def test_one_evaluation_computes_at_a_time(model, keys):
    stop = threading.Event()

    def report(done, total):
        if stop.is_set():
            raise Cancelled

    with two_sessions(model, keys) as (first, second), closing(model.open(keys)) as third:

        def stall():
            with suppress(Cancelled):
                run(first, "stall", report=report)

        stalled = threading.Thread(target=stall)
        waits = threading.Thread(target=lambda: told(third))
        stalled.start()
        time.sleep(0.1)
        waits.start()
        assert told(second)[2] == 1  # on the other worker
        waits.join(0.2)
        assert waits.is_alive()
        stop.set()
        waits.join(20)
        stalled.join(20)
        assert not waits.is_alive()


def test_a_worker_that_dies(model, keys):
    with two_sessions(model, keys) as (first, second):
        run(second, "remember", b"a")
        with pytest.raises(WorkerLost):
            run(first, "stall", report=killer(first))
        with pytest.raises(WorkerLost):
            told(first)
        assert run(second, "remember", b"b") == [b"a", b"b"]
        with closing(model.open(keys)) as third:
            assert told(third)[0] == told(second)[0]
        # The worker is started again; the session it had is not there.
        eventually(lambda: not is_gone(model._workers[first._place.index]), 60)
        with pytest.raises(WorkerLost, match="lost"):
            told(first)


def test_a_worker_that_was_away(model, keys, monkeypatch):
    """It is told later that a session has ended."""
    call = ray_cluster.Place.call

    def calling(self, method, *arguments):
        if method == "close":
            raise WorkerLost
        return call(self, method, *arguments)

    with two_sessions(model, keys) as (first, _):
        with monkeypatch.context() as patch:
            patch.setattr(ray_cluster.Place, "call", calling)
            first.close()
        with closing(model.open(keys)) as third:
            assert third._place is first._place
            assert told(third)[1] == 2
        with closing(model.open(keys)) as fourth:
            assert fourth._place is first._place
            assert told(fourth)[1] == 1


def killer(session):
    """Return a report that kills the worker which reports."""
    process = told(session)[0]
    return lambda *_: os.kill(process, signal.SIGKILL)


def is_gone(place):
    try:
        ray.get(place.actor.describe.remote())
    except ray.exceptions.RayError:
        return True
    return False


def test_no_worker(model, keys, monkeypatch):
    """Every worker dies as it is asked: they are started again, so that killing them before is too early."""
    with two_sessions(model, keys) as sessions:
        processes = {session._place.index: told(session)[0] for session in sessions}
    call = ray_cluster.RayComputation._call

    def calling(self, method, *arguments):
        if self._place.index in processes:
            os.kill(processes.pop(self._place.index), signal.SIGKILL)
        return call(self, method, *arguments)

    monkeypatch.setattr(ray_cluster.RayComputation, "_call", calling)
    with pytest.raises(WorkerLost):
        model.open(keys)
    assert not processes


def test_a_worker_that_dies_during_an_upload(model, keys, monkeypatch):
    """What has arrived so far is gone: the keys go to another worker."""
    monkeypatch.setattr(ray_cluster, "CHUNK_BYTES", 100)
    call, calls = ray_cluster.RayComputation._call, []

    def calling(self, method, *arguments):
        calls.append((self._place.index, method))
        if len(calls) == 5:
            with closing(ray_cluster.RayComputation(self._place, lambda place: None)) as neighbour:
                monkeypatch.setattr(ray_cluster.RayComputation, "_call", call)
                neighbour.open(keys, FINGERPRINT)
                kill(neighbour)
        return call(self, method, *arguments)

    monkeypatch.setattr(ray_cluster.RayComputation, "_call", calling)
    with closing(model.open(keys)) as session:
        assert session._place.index != calls[0][0]
        assert told(session)[4] == 1000


def test_the_whole_server(model, keys, tmp_path):
    """A client whose worker dies is told so, and begins anew on the other one."""
    store = KeyStore(tmp_path / "data", model.description["keys"], 1 << 28)
    service = Service(model, store, limits=Limits(workers=2))
    with running(create_server(service, port=0)) as url, Connection(url) as connection:
        fingerprints = {kind: connection.upload(kind, path) for kind, path in keys.items()}
        connection.open(fingerprints)
        assert connection.evaluate("remember", 0, 1, [b"a"], never) == [b"a"]
        assert connection.evaluate("refresh", 0, 2, [b"x"], lambda request: request[::-1]) == [b"0x", b"1x"]
        process = int(connection.evaluate("tell", 0, 1, [], never)[0])

        def refresh(request):
            os.kill(process, signal.SIGKILL)
            return request

        with pytest.raises(SessionLost, match="gone"):
            connection.evaluate("refresh", 0, 2, [b"x"], refresh)
        connection.reopen()
        assert connection.evaluate("remember", 0, 1, [b"b"], never) == [b"b"]
        assert int(connection.evaluate("tell", 0, 1, [], never)[0]) != process
        connection.close()
        eventually(lambda: service.sessions == 0)


def test_workers_that_differ(cluster):
    with pytest.raises(ClusterError, match="different models"):
        RayHostedModel(other_model, 2)


def test_workers_without_a_bundle(cluster):
    with pytest.raises(ClusterError, match="there is no bundle here"):
        RayHostedModel(no_model, 1)


def test_a_cluster_without_room(cluster):
    with pytest.raises(ClusterError, match="are their cores free"):
        RayHostedModel(FakeModel, 1, 100, seconds=1)


def test_a_machine_that_dies(cluster, keys):
    machine = cluster.add_node(num_cpus=3)
    assert sorted(ray_cluster.cluster_cores()) == [2, 2, 3]
    with closing(RayHostedModel(FakeModel, 1, 3)) as model:  # there is room for it there only
        session = model.open(keys)
        assert told(session)[3] == 3

        def report(*_):
            if report.first:
                cluster.remove_node(machine, allow_graceful=False)
            report.first = False

        report.first = True
        with pytest.raises(WorkerLost):
            run(session, "stall", report=report)
        with pytest.raises(WorkerLost):
            told(session)
        session.close()
        eventually(lambda: sorted(ray_cluster.cluster_cores()) == [2, 2], 60)


@pytest.mark.parametrize(
    ("machines", "workers", "cores"),
    [
        ([8], 1, 8),
        ([8, 8], 2, 8),
        ([8, 4], 2, 4),
        ([8, 4], 3, 4),
        ([16, 4], 4, 4),
        ([3, 3], 4, 1),
        ([2], 2, 1),
    ],
)
def test_cores_per_worker(machines, workers, cores):
    assert cores_per_worker(machines, workers) == cores


def test_more_workers_than_cores():
    with pytest.raises(ClusterError, match="5 cores"):
        cores_per_worker([4, 1], 6)


@pytest.mark.slow
def test_encrypted_text(cluster, tmp_path):
    """Two clients on two workers, one of which dies between two tokens: its text goes on on the other."""
    load = functools.partial(bundle.load_hosted_model, small.exported("all") / "server")
    with closing(RayHostedModel(load, 2)) as model:
        store = KeyStore(tmp_path, model.description["keys"], 1 << 30)
        service = Service(model, store, limits=Limits(workers=2))
        with (
            running(create_server(service, port=0)) as url,
            small.connect(url, "all") as one,
            small.connect(url, "all", "two") as two,
        ):
            assert [place.sessions for place in model._workers] == [1, 1]
            ids = small.prompt_ids()
            first = one.generate(ids, max_new_tokens=1, do_sample=False)
            assert small.generate(two) == small.continuation()
            place = model._workers[0]
            os.kill(ray.get(place.actor.describe.remote())["process"], signal.SIGKILL)
            again = one.generate(first, max_new_tokens=1, do_sample=False)
            assert again[0, ids.shape[1] :].tolist() == small.continuation()
            assert [place.sessions for place in model._workers] == [0, 2]


@pytest.mark.slow
def test_the_verb(tmp_path, monkeypatch):
    # The paths of Ray's sockets must be short.
    short = tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)
    monkeypatch.setenv("RAY_TMPDIR", short.name)
    with (
        short,
        small.process("all", tmp_path, "--ray", "local", "--ray-workers", "2") as server,
        small.connect(server.url, "all") as model,
    ):
        assert small.generate(model) == small.continuation()
    assert server.process.returncode == 0
    assert b'"workers": 2' in server.log


def test_the_verb_without_a_cluster(tmp_path, capsys):
    assert main(["serve", str(tmp_path), "--port", "0", "--ray", "127.0.0.1:1"]) == 1
    assert "there is no Ray cluster to connect to at 127.0.0.1:1" in capsys.readouterr().err
    assert main(["serve", str(tmp_path), "--ray-workers", "2"]) == 2
    assert "--ray-workers needs --ray" in capsys.readouterr().err


@pytest.fixture
def layers(cluster):
    """Two workers with half of the linear layers each."""
    load = functools.partial(bundle.load_hosted_model, str(exported() / "server"))
    with closing(RayHostedProducts(load, 2)) as model:
        yield model


@contextmanager
def remote_model(layers):
    service = Service(layers, None, None, LINEAR_LIMITS)
    with running(create_server(service, port=0)) as url:
        options = {"bundle": exported() / "client"}
        with RemoteLinearModel.connect(url, **options) as model:
            yield model


def continued(model):
    ids = torch.tensor([[5, 17, 33, 40]])
    return model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).tolist()


def test_linear_layers_on_two_workers(layers):
    assert [place.index for place in layers._places.values()] == [0] * 4 + [1] * 4
    with remote_model(layers) as model:
        assert continued(model) == continued(tiny("llama"))


def test_a_worker_with_half_of_the_layers_is_lost(layers):
    """It is started again, gets the keys again, and the client goes on."""
    with remote_model(layers) as model:
        expected = continued(model)
        worker = layers._workers[1].actor
        os.kill(ray.get(worker.describe.remote())["process"], signal.SIGKILL)
        assert continued(model) == expected


def test_keys_that_workers_refuse(layers):
    with pytest.raises(Refused):
        layers.connect(b"no keys")


def test_a_product_that_workers_refuse(layers):
    keys = LinearClient(load_plan(exported() / "client")).evaluation_keys().to_bytes()
    with closing(layers.connect(keys)) as products:
        name = next(iter(layers.description["modules"]))
        with pytest.raises(Refused, match="0 ciphertexts for 1 vectors"):
            products.multiply(name, False, 1, [])
        with pytest.raises(Refused, match="no product"):
            products.multiply("lm_head", False, 1, [])
