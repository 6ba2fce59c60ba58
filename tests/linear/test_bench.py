"""The benchmark measures what it should; its figures are another matter."""

import argparse

import pytest

from cipherlm.cli import bench_linear


def test_one_small_block(monkeypatch):
    monkeypatch.setitem(bench_linear.GEOMETRIES, "gpt2", (2, {"qkv": (48, 16), "down": (16, 64)}))
    monkeypatch.setattr(bench_linear, "PEER_LAYER", (48, 16))
    parser = argparse.ArgumentParser()
    bench_linear.add_arguments(parser)
    figures = bench_linear.run(parser.parse_args(["--tokens", "8", "--repeat", "1"]))
    assert figures["blocks"] == 2
    for layer in figures["layers"].values():
        assert layer["relative_error"] < 1e-3
        assert 8 * layer["token"]["sent_bytes"] == pytest.approx(layer["tokens_8"]["sent_bytes"], rel=0.01)
    for total in ("all_token", "all_tokens_8"):
        parts = [layer[total.removeprefix("all_")] for layer in figures["layers"].values()]
        for name in ("server_seconds", "client_seconds", "sent_bytes"):
            assert figures[total][name] == pytest.approx(2 * sum(part[name] for part in parts))
    assert figures["keys_bytes"] < 8e6
    assert figures["peer"]["token"]["times_faster"] > 0
