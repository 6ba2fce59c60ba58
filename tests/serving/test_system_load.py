"""Many clients at once, and one after another: nobody starves, and nothing stays behind. Slow."""

from __future__ import annotations

import gc
import os
import threading
import time
from pathlib import Path

import pytest

from cipherlm import engine
from cipherlm.serving.client import Connection

from . import small
from .conftest import eventually
from .small import at_home  # noqa: F401

pytestmark = pytest.mark.slow


def resident() -> int:
    """Bytes of memory that this process has, after letting go of what is not used."""
    gc.collect()
    engine.collect()
    if not Path("/proc/self/statm").exists():
        pytest.skip("memory is read from /proc")
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def handles() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_eight_clients_at_once(tmp_path):
    """Each with its own keys and text. None waits for more than twice as long as any other."""
    texts = [
        f"{first} {second}" for first in ("The old", "A young") for second in ("man", "dog", "tree", "king")
    ]
    names = [f"client{i}" for i in range(len(texts))]
    with small.serving("hybrid", tmp_path) as (url, service):
        for name in names:
            small.connect(url, "hybrid", name).close()  # the keys are made and uploaded
        with small.connect(url, "hybrid", names[0]) as model:
            small.generate(model, "A ship sailed", 3)  # the weights are encoded, once for all
        eventually(lambda: service.sessions == 0)
        before = resident()
        models = [small.connect(url, "hybrid", name) for name in names]
        gate, seconds, results = threading.Barrier(len(names)), {}, {}
        greatest = [0]

        def run(name: str, model, text: str) -> None:
            gate.wait()
            begin = time.monotonic()
            results[name] = small.generate(model, text, 3)
            seconds[name] = time.monotonic() - begin

        threads = [threading.Thread(target=run, args=job) for job in zip(names, models, texts, strict=True)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            greatest[0] = max(greatest[0], int(Path("/proc/self/statm").read_text().split()[1]))
            time.sleep(0.2)
        for model in models:
            model.close()
        eventually(lambda: service.sessions == 0)
        after = resident()
    for name, text in zip(names, texts, strict=True):
        assert results[name] == small.continuation(text, 3)
    # Not a limit of speed: who starts together should end together.
    assert max(seconds.values()) <= 2 * min(seconds.values())
    keys = small.paths()["evaluation"].stat().st_size
    # A session: its keys, twice as large in memory as on the wire and expanded, and ciphertexts.
    assert greatest[0] * os.sysconf("SC_PAGE_SIZE") - before < len(names) * 12 * keys
    assert after - before < 2 * keys


def test_two_hundred_sessions(tmp_path):
    """Memory, disk and file handles are what they were after the first ones."""
    with small.serving("mlp", tmp_path) as (url, service):

        def evaluate() -> None:
            with small.connect(url, "mlp") as model:
                assert small.generate(model, count=1) == small.continuation(count=1)

        def look() -> None:
            with Connection(url) as connection:
                connection.open(small.keys().fingerprints)

        def measured() -> tuple[int, int, list[tuple[str, int]]]:
            eventually(lambda: service.sessions == 0 and not service.conversations)
            time.sleep(0.5)
            files = sorted((str(path), path.stat().st_size) for path in tmp_path.rglob("*") if path.is_file())
            return resident(), handles(), files

        for _ in range(5):
            evaluate()
            look()
        memory, open_files, files = measured()
        for number in range(200):
            (evaluate if number % 10 == 0 else look)()
        later_memory, later_open_files, later_files = measured()
    assert later_files == files
    assert later_open_files <= open_files + 2
    # 200 sessions' keys would be tens of times this.
    keys = small.paths()["evaluation"].stat().st_size
    assert later_memory - memory < 3 * keys
    assert threading.active_count() < 20
