"""The engine's benchmark measures what it should; its figures are another matter."""

from __future__ import annotations

import argparse

import pytest

from cipherlm.cli import bench_engine


def measure(*arguments: str) -> dict:
    parser = argparse.ArgumentParser()
    bench_engine.add_arguments(parser)
    return bench_engine.run(parser.parse_args([*arguments, "--budget", "0"]))


def test_operations():
    ring = measure("--degrees", "12", "--only", "operations")["rings"]["12"]
    for name in ("rotation", "hoisted_rotation", "multiplication", "plaintext_multiplication", "encode"):
        assert 0 < ring[name]["seconds"] < 1
    assert set(ring["refresh"]) >= {"mask", "client", "unmask"}
    sizes = ring["bytes"]
    assert sizes["galois_key_memory"] == 2 * sizes["galois_key_compressed_memory"]
    assert sizes["ciphertext_fresh_wire"] == pytest.approx(sizes["ciphertext_wire"] / 2, rel=0.01)


def test_linear_layers():
    """768 x 2304 stays below 150 MB, and is right."""
    small, large = measure("--degrees", "14", "--only", "linear", "--level", "1")["linear"]
    assert (small["shape"], large["shape"]) == ([8, 768, 768], [8, 768, 2304])
    for figures in (small, large):
        assert figures["error"] < 1e-5
        assert figures["matrix_bytes"] < 150e6
