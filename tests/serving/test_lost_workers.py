"""What a client hears when the machine that computes for its session is gone."""

from cipherlm.serving.computation import WorkerLost

from .conftest import FakeComputation


def lost(*_):
    raise WorkerLost("the machine is gone")


def test_during_an_evaluation(start, monkeypatch):
    with start() as harness:
        with harness.session() as client, monkeypatch.context() as patch:
            patch.setattr(FakeComputation, "reverse", lost)
            client.ask("reverse", b"abc")
            header, _ = client.receive()
            assert (header["type"], header["code"], header["id"]) == ("error", "shutting_down", 1)
            assert (header["retry"], header["message"]) == (True, "the machine is gone")
            header, _ = client.receive()
            assert (header["code"], "id" in header) == ("shutting_down", False)
            assert client.closed() == 1012
        harness.serves()


def test_while_keys_are_opened(start, monkeypatch):
    with start() as harness:
        keys = harness.keys()
        with harness.socket() as client, monkeypatch.context() as patch:
            patch.setattr(harness.model, "open", lost)
            header = client.open(keys)
            assert (header["code"], header["retry"]) == ("busy", True)
            assert client.closed() == 1008
        harness.serves()
