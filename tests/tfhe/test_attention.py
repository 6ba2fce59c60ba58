"""The integer attention in the clear: against float attention, and its saved form."""

import numpy as np
import pytest

from cipherlm.schemes.tfhe.attention import QuantizedAttention
from tests.tfhe.conftest import float_heads, random_layer, random_rows


def relative_error(result, expected):
    return np.sqrt(np.mean((result - expected) ** 2) / np.mean(expected**2))


# Root mean square of the error over that of the result, on rows that calibration has not seen.
BOUNDS = {2: 1.3, 3: 0.75, 4: 0.40, 5: 0.27, 6: 0.2, 7: 0.12, 8: 0.12}


@pytest.mark.parametrize("n_bits", BOUNDS)
def test_heads_approach_float_attention_as_bits_grow(small_layer, calibration, n_bits):
    attention = QuantizedAttention.calibrate(small_layer, calibration, heads=[2, 0], n_bits=n_bits)
    rows = [random_rows(16, 8, seed) for seed in range(20)]
    result = np.concatenate([attention(x) for x in rows])
    expected = np.concatenate([float_heads(small_layer, [2, 0], x) for x in rows])
    assert result.shape == (160, 8)
    assert relative_error(result, expected) < BOUNDS[n_bits]


def test_all_heads_with_the_projection(small_layer, calibration):
    attention = QuantizedAttention.calibrate(small_layer, calibration, heads=None, n_bits=8)
    assert attention.project
    assert attention.heads == (0, 1, 2, 3)
    x = random_rows(16, 8, 1)
    expected = float_heads(small_layer, [0, 1, 2, 3], x) @ small_layer.projection_weight
    assert relative_error(attention(x), expected + small_layer.projection_bias) < 0.12


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 13])
def test_any_length_and_batches(small_layer, calibration, tokens):
    attention = QuantizedAttention.calibrate(small_layer, calibration, heads=[1], n_bits=8)
    batch = np.stack([random_rows(16, tokens, seed) for seed in range(3)])
    result = attention(batch)
    assert result.shape == (3, tokens, 4)
    np.testing.assert_array_equal(result[1], attention(batch[1]))


def test_a_row_sees_no_later_token(small_layer, calibration):
    attention = QuantizedAttention.calibrate(small_layer, calibration, heads=[0], n_bits=4)
    x = random_rows(16, 6, 3)
    changed = np.concatenate([x[:4], random_rows(16, 2, 4)])
    np.testing.assert_array_equal(attention(x)[:4], attention(changed)[:4])


def test_the_parameters_are_frozen_by_calibration(small_layer, calibration):
    attention = QuantizedAttention.calibrate(small_layer, calibration, heads=[0], n_bits=4)
    fingerprint = attention.fingerprint()
    attention(100.0 * random_rows(16, 6, 5))
    assert attention.fingerprint() == fingerprint


def test_wild_inputs_saturate(small_layer, calibration):
    """The result keeps to the size that calibration saw."""
    attention = QuantizedAttention.calibrate(small_layer, calibration, heads=[0], n_bits=4)
    usual = max(np.abs(attention(x)).max() for x in calibration)
    for seed in range(10):
        assert np.abs(attention(1e6 * random_rows(16, 6, seed))).max() < 3 * usual


def test_save_and_load(small_layer, calibration):
    attention = QuantizedAttention.calibrate(small_layer, calibration, heads=None, n_bits=5)
    loaded = QuantizedAttention.from_arrays(attention.to_arrays())
    assert loaded.fingerprint() == attention.fingerprint()
    x = random_rows(16, 5, 6)
    np.testing.assert_array_equal(loaded(x), attention(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("head.1.key_weight"), "missing"),
        (lambda a: a.update({"head.1.key_weight": np.zeros((3, 4))}), "is not"),
        (lambda a: a.update({"head.1.rotation": np.full((4, 4), np.nan)}), "finite"),
        (lambda a: a.update(n_bits=np.array(12)), "n_bits"),
    ],
)
def test_damaged_parameters_are_refused(small_layer, calibration, change, message):
    arrays = QuantizedAttention.calibrate(small_layer, calibration, heads=[1], n_bits=4).to_arrays()
    change(arrays)
    with pytest.raises(ValueError, match=message):
        QuantizedAttention.from_arrays(arrays)


@pytest.mark.parametrize(
    ("heads", "n_bits", "message"),
    [
        ([4], 4, "no head 4"),
        ([-1], 4, "no head -1"),
        ([0, 0], 4, "repeat"),
        ([], 4, "empty"),
        ([0], 9, "n_bits"),
    ],
)
def test_impossible_requests_are_refused(small_layer, calibration, heads, n_bits, message):
    with pytest.raises(ValueError, match=message):
        QuantizedAttention.calibrate(small_layer, calibration, heads=heads, n_bits=n_bits)


def test_calibration_needs_a_sequence_of_two_tokens():
    with pytest.raises(ValueError, match="two tokens"):
        QuantizedAttention.calibrate(random_layer(16, 4), [random_rows(16, 1, 0)], heads=[0], n_bits=4)
