"""Circuits on real ciphertexts: agreement with the clear result, the cache, and refusals."""

import json
import os
import shutil
import stat
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import pytest

from cipherlm.schemes.tfhe import circuit as circuits
from cipherlm.schemes.tfhe.attention import QuantizedAttention
from cipherlm.schemes.tfhe.circuit import AttentionCircuit, import_concrete
from cipherlm.schemes.tfhe.errors import (
    DamagedCacheError,
    MissingSchemeError,
    NoParametersError,
    TooManyTokensError,
)
from tests.tfhe.conftest import float_heads, random_rows


def root_mean_square(values):
    return float(np.sqrt(np.mean(np.square(values))))


@pytest.fixture(scope="module")
def attention(small_layer, calibration):
    return QuantizedAttention.calibrate(small_layer, calibration, heads=[0], n_bits=4)


@pytest.fixture(scope="module")
def circuit(attention, tmp_path_factory):
    pytest.importorskip("concrete.fhe")
    compiled = AttentionCircuit.compile(attention, 4, cache_dir=tmp_path_factory.mktemp("cache"))
    compiled.keygen()
    return compiled


@pytest.mark.slow  # test_parties.py has a circuit on ciphertexts among the fast ones
def test_ciphertexts_give_the_clear_result_up_to_the_noise_of_rounding(circuit, attention, small_layer):
    """Bounds: they differ by less than a third, and the error against float less than doubles.

    Ten runs gave differences of 0.12 to 0.18 and errors of 0.96 to 1.33 times the quantised one.
    """
    rows = [random_rows(16, 4, seed) for seed in range(4)]
    encrypted = np.concatenate([circuit.execute(x) for x in rows])
    clear = np.concatenate([attention(x) for x in rows])
    exact = np.concatenate([float_heads(small_layer, [0], x) for x in rows])
    assert root_mean_square(encrypted - clear) < 0.35 * root_mean_square(clear)
    assert root_mean_square(encrypted - exact) < 2.0 * root_mean_square(clear - exact)


@pytest.mark.slow
def test_shorter_inputs_run_in_the_same_circuit(circuit, attention):
    for tokens in (1, 2, 3):
        x = random_rows(16, tokens, tokens)
        result = circuit.execute(x)
        assert result.shape == (tokens, 4)
        assert root_mean_square(result - attention(x)) < 0.6 * root_mean_square(attention(x))


def test_a_longer_input_is_refused(circuit):
    with pytest.raises(TooManyTokensError, match="5 tokens do not fit a circuit compiled for 4"):
        circuit.execute(random_rows(16, 5, 0))


def test_simulated_noise_is_of_the_size_of_the_real_one(circuit, attention):
    """The simulation assumes all the noise that ``p_error`` allows: it bounds the real run."""
    rows = [random_rows(16, 4, seed) for seed in range(30)]
    difference = np.concatenate([circuit.simulate(x) - attention(x) for x in rows])
    assert 0.02 < root_mean_square(difference) / root_mean_square([attention(x) for x in rows]) < 0.5
    with pytest.raises(TooManyTokensError):
        circuit.simulate(random_rows(16, 5, 0))


def test_statistics_count_what_the_layout_needs(circuit):
    tokens, head_dim = 4, 4
    pairs = tokens * (tokens - 1) // 2
    squares = pairs * head_dim + 2 * (tokens - 1) * head_dim  # of q + k, q and k
    mixing = pairs * head_dim + (tokens - 1) * head_dim  # of p + v and v
    assert circuit.statistics.pbs == squares + mixing + 3 * pairs + head_dim
    assert circuit.statistics.pbs_per_bit_width == {6: squares + mixing + head_dim, 7: 3 * pairs}
    assert circuit.evaluation_key_bytes < circuit.statistics.evaluation_key_bytes_in_memory / 2


def test_a_second_compilation_reads_the_cache_and_its_keys(circuit, attention):
    again = AttentionCircuit.compile(attention, 4, cache_dir=circuit.folder.parent)
    assert again.from_cache
    assert again.statistics == circuit.statistics
    again.keygen()
    x = random_rows(16, 4, 2)
    assert root_mean_square(again.execute(x) - attention(x)) < 0.6 * root_mean_square(attention(x))
    assert again.last_run.ciphertext_bytes_in < 10_000  # seeds, not whole ciphertexts
    if os.name == "posix":
        assert stat.S_IMODE((circuit.folder / "keys").stat().st_mode) == 0o600


def test_what_the_circuit_depends_on_is_in_its_name(circuit, attention, small_layer, calibration):
    other = QuantizedAttention.calibrate(small_layer, calibration, heads=[1], n_bits=4)
    for parameters, tokens, p_error in ((other, 2, 0.01), (attention, 2, 0.01), (attention, 2, 0.02)):
        compiled = AttentionCircuit.compile(
            parameters, tokens, p_error=p_error, cache_dir=circuit.folder.parent
        )
        assert not compiled.from_cache


@pytest.mark.parametrize("name", ["circuit.json", "server.zip", "keys"])
def test_a_damaged_cache_is_refused_with_its_name_and_left_alone(circuit, attention, tmp_path, name):
    shutil.copytree(circuit.folder, tmp_path / circuit.folder.name)
    path = tmp_path / circuit.folder.name / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x40
    damaged = bytes(content) if name != "circuit.json" else b"{" + bytes(content)
    path.write_bytes(damaged)
    with pytest.raises(DamagedCacheError, match=f"{name} is damaged"):
        AttentionCircuit.compile(attention, 4, cache_dir=tmp_path).keygen()
    assert path.read_bytes() == damaged


def test_an_unfinished_cache_entry_is_compiled_again(attention, tmp_path):
    pytest.importorskip("concrete.fhe")
    folder = AttentionCircuit.compile(attention, 2, cache_dir=tmp_path).folder
    (folder / "circuit.json").unlink()
    assert not AttentionCircuit.compile(attention, 2, cache_dir=tmp_path).from_cache
    assert json.loads((folder / "circuit.json").read_text())["statistics"]["tokens"] == 2


@pytest.mark.slow
def test_circuits_that_are_wanted_at_once_are_compiled_once_and_share_keys(attention, tmp_path, monkeypatch):
    pytest.importorskip("concrete.fhe")
    compiled, waiting, compile_ = [], threading.Event(), circuits._compile

    def progress(step):
        if step == "waiting for another process with this circuit":
            waiting.set()
        return nullcontext()

    def wanted():
        circuit = AttentionCircuit.compile(attention, 2, cache_dir=tmp_path, progress=progress)
        circuit.keygen()
        return circuit

    with ThreadPoolExecutor(1) as process:

        def compile_while_another_waits(*arguments):
            compiled.append(process.submit(wanted))
            assert waiting.wait(60)
            return compile_(*arguments)

        monkeypatch.setattr(circuits, "_compile", compile_while_another_waits)
        one = wanted()
        (other,) = [found.result() for found in compiled]
    assert (one.from_cache, other.from_cache) == (False, True)
    assert one._client.keys.serialize() == other._client.keys.serialize()


def test_no_parameters_names_the_stages_and_the_mend(small_layer, calibration):
    pytest.importorskip("concrete.fhe")
    attention = QuantizedAttention.calibrate(small_layer, calibration, heads=[0], n_bits=8)
    with pytest.raises(NoParametersError, match=r"8 bits in the softmax .* lower n_bits"):
        AttentionCircuit.compile(attention, 2, p_error=1e-300, cache_dir=None)


@pytest.mark.parametrize("p_error", [0.0, 1.0, -1.0])
def test_an_impossible_error_probability_is_refused(attention, p_error):
    pytest.importorskip("concrete.fhe")
    with pytest.raises(ValueError, match="p_error"):
        AttentionCircuit.compile(attention, 2, p_error=p_error, cache_dir=None)


def test_without_concrete_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "concrete", None)
    with pytest.raises(MissingSchemeError, match=r'pip install "cipherlm\[tfhe\]"') as raised:
        import_concrete()
    assert "\n" not in str(raised.value)


@pytest.mark.slow
def test_all_heads_with_the_projection_on_ciphertexts(small_layer, calibration):
    pytest.importorskip("concrete.fhe")
    attention = QuantizedAttention.calibrate(small_layer, calibration, heads=None, n_bits=5)
    circuit = AttentionCircuit.compile(attention, 3, cache_dir=None)
    x = random_rows(16, 3, 1)
    clear = attention(x)
    assert root_mean_square(circuit.execute(x) - clear) < 0.3 * root_mean_square(clear)
