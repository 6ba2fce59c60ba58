"""Products at level 0: matrices with a scale of their own, rounded ciphertexts, matrices in files."""

from __future__ import annotations

import numpy as np
import pytest

from cipherlm.engine import (
    Ciphertext,
    CorruptDataError,
    EngineError,
    Evaluator,
    LinearTransformation,
    Parameters,
    SecretKey,
)

SCALE = 2.0**26
WEIGHTS = 2.0**18
ERROR = 2e-3
"""The greatest error of a sum of four products of values below 1, at these scales."""


@pytest.fixture(scope="module", params=["conjugate_invariant", "standard"])
def parameters(request):
    return Parameters(12, log_q=[49], log_p=[51], log_scale=24, ring=request.param)


@pytest.fixture(scope="module")
def secret_key(parameters):
    return SecretKey.generate(parameters)


@pytest.fixture(scope="module")
def evaluator(parameters, secret_key):
    return Evaluator(parameters, secret_key.evaluation_keys({1, 2}, relinearization=False))


def diagonals(parameters, seed=0):
    generator = np.random.default_rng(seed)
    return {k: generator.uniform(-1, 1, parameters.slots) for k in range(4)}


def matrix(parameters, given, storage="int16"):
    return LinearTransformation(parameters, given, level=0, giant_step=2, storage=storage, scale=WEIGHTS)


@pytest.mark.parametrize("storage", ["int16", "int32", "residues"])
def test_a_matrix_with_a_scale_keeps_the_level(parameters, secret_key, evaluator, storage):
    x = np.random.default_rng(1).uniform(-1, 1, parameters.slots)
    given = diagonals(parameters)
    product = evaluator.transform(secret_key.encrypt(x, 0, SCALE), matrix(parameters, given, storage))
    assert product.level == 0
    assert product.scale == SCALE * WEIGHTS
    want = sum(diagonal * np.roll(x, -k) for k, diagonal in given.items())
    assert np.abs(secret_key.decrypt(product) - want).max() < ERROR
    assert 0 < secret_key.decrypt_plaintext(product).greatest < 1


@pytest.mark.parametrize("storage", ["int16", "int32"])
def test_restored_matrices_do_the_same(parameters, secret_key, evaluator, storage):
    original = matrix(parameters, diagonals(parameters), storage)
    rotations, multipliers, coefficients = original.coefficients()
    restored = LinearTransformation.restore(
        parameters, rotations, multipliers, coefficients, level=0, giant_step=2, scale=WEIGHTS
    )
    assert restored.rotations == original.rotations
    assert restored.nbytes == original.nbytes == coefficients.nbytes
    x = secret_key.encrypt(np.ones(4), 0, SCALE)
    assert evaluator.transform(x, restored).to_bytes() == evaluator.transform(x, original).to_bytes()


def test_what_cannot_be_restored(parameters):
    original = matrix(parameters, diagonals(parameters))
    rotations, multipliers, coefficients = original.coefficients()

    def restore(rotations=rotations, multipliers=multipliers, coefficients=coefficients):
        LinearTransformation.restore(
            parameters, rotations, multipliers, coefficients, level=0, giant_step=2, scale=WEIGHTS
        )

    with pytest.raises(EngineError, match="cannot be"):
        restore(rotations=np.zeros(4, np.int64))
    with pytest.raises(EngineError, match="cannot be"):
        restore(multipliers=np.zeros(4, np.int64))
    with pytest.raises(ValueError, match="diagonals do not have"):
        restore(coefficients=coefficients[:3])
    with pytest.raises(ValueError, match="int16 or int32"):
        restore(coefficients=coefficients.astype(np.int64))
    with pytest.raises(ValueError, match="stored"):
        matrix(parameters, diagonals(parameters), "residues").coefficients()
    with pytest.raises(EngineError, match="takes one level"):
        LinearTransformation(parameters, diagonals(parameters), level=0, giant_step=2)


@pytest.mark.parametrize("bits", [0, 1, 5, 20])
def test_rounded_inputs(parameters, secret_key, bits):
    x = np.random.default_rng(2).uniform(-1, 1, parameters.slots)
    ciphertext = secret_key.encrypt(x, 0, SCALE)
    whole, before = len(ciphertext.to_bytes()), secret_key.decrypt(ciphertext)
    ciphertext.round(bits)
    data = ciphertext.to_bytes()
    assert len(data) == whole - parameters.degree * bits // 8
    received = Ciphertext.from_bytes(data, parameters)
    assert received.seeded
    assert received.to_bytes() == data
    assert np.array_equal(secret_key.decrypt(received), secret_key.decrypt(ciphertext))
    # Coefficients are off by at most half a step, which a slot takes from all of them.
    error = np.sqrt(np.mean(np.abs(secret_key.decrypt(received) - before) ** 2)) * SCALE
    assert error <= 1.1 * np.sqrt((4**bits + 2) / 12 * 2 * parameters.degree)


@pytest.mark.parametrize(("first", "second"), [(0, 3), (9, 0), (9, 4), (23, 17)])
def test_rounded_outputs(parameters, secret_key, evaluator, first, second):
    x = secret_key.encrypt(np.ones(parameters.slots), 0, SCALE)
    product = evaluator.transform(x, matrix(parameters, diagonals(parameters)))
    whole, before = len(product.to_bytes()), secret_key.decrypt(product)
    product.round(first, second)
    data = product.to_bytes()
    assert len(data) == whole - parameters.degree * (first + second) // 8
    received = Ciphertext.from_bytes(data, parameters)
    assert np.array_equal(secret_key.decrypt(received), secret_key.decrypt(product))
    error = np.sqrt(np.mean(np.abs(secret_key.decrypt(received) - before) ** 2)) * product.scale
    key = np.sqrt((4 if parameters.real else 2) * parameters.degree / 3)
    expected = np.hypot(2**first * (first > 0), 2**second * key * (second > 0)) / np.sqrt(12)
    assert error <= 1.2 * expected * np.sqrt(2 * parameters.degree)


def test_what_cannot_be_rounded(parameters, secret_key):
    ciphertext = secret_key.encrypt(np.ones(4), 0, SCALE)
    with pytest.raises(EngineError, match="seed"):
        ciphertext.round(0, 1)
    for bits in (-1, 48, 1000):
        with pytest.raises(EngineError, match="lose"):
            ciphertext.round(bits)
    deep = Parameters(13, log_q=[45, 33], log_p=[45], log_scale=33)
    with pytest.raises(EngineError, match="level 0"):
        SecretKey.generate(deep).encrypt([1.0], 1).round(3)


def test_damaged_rounded_ciphertexts(parameters, secret_key):
    ciphertext = secret_key.encrypt(np.ones(4), 0, SCALE)
    ciphertext.round(5)
    data = ciphertext.to_bytes()
    for place in (65, 66, 67, 68, 100, len(data) - 1):
        for value in (1, 60, 255):
            damaged = bytearray(data)
            damaged[place] ^= value
            with pytest.raises(CorruptDataError):
                Ciphertext.from_bytes(bytes(damaged), parameters)
    with pytest.raises(CorruptDataError):
        Ciphertext.from_bytes(data[:-40], parameters)


def test_a_result_of_rounded_ciphertexts_is_whole(parameters, secret_key, evaluator):
    ciphertext = secret_key.encrypt(np.ones(4), 0, SCALE)
    whole = len(evaluator.add(ciphertext, ciphertext).to_bytes())
    ciphertext.round(5)
    other = ciphertext.copy()
    assert len(other.to_bytes()) == len(ciphertext.to_bytes())
    assert len(evaluator.add(ciphertext, other, out=ciphertext).to_bytes()) == whole
