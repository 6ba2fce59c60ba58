"""Symmetric quantisers: levels, saturation, and what calibration gains."""

import numpy as np
import pytest

from cipherlm.schemes.tfhe.quantization import InputQuantizer, check_bits, largest_level, quantize_weight


@pytest.mark.parametrize("n_bits", range(2, 9))
def test_inputs_use_symmetric_levels_and_saturate(n_bits):
    rows = np.random.default_rng(0).normal(size=(200, 8)) * np.arange(1, 9)
    quantizer = InputQuantizer.calibrate(rows, n_bits)
    top = largest_level(n_bits)
    one_channel = np.zeros((5, 8))
    one_channel[:, 0] = [1e9, -1e9, np.inf, -np.inf, np.nan]
    np.testing.assert_array_equal(quantizer(one_channel)[:, 0], [top, -top, top, -top, 0])
    assert np.abs(quantizer(rows)).max() == top


def test_a_row_longer_than_any_seen_is_scaled_back():
    rows = np.random.default_rng(0).normal(size=(200, 8))
    quantizer = InputQuantizer.calibrate(rows, 6)
    np.testing.assert_array_equal(quantizer(1e3 * rows), quantizer(1e6 * rows))
    assert np.all(np.linalg.norm(quantizer(1e6 * rows), axis=1) <= quantizer.largest_norm + np.sqrt(8) / 2)


@pytest.mark.parametrize("n_bits", range(3, 9))
def test_the_error_inside_the_range_is_at_most_half_a_step(n_bits):
    rows = np.random.default_rng(1).normal(size=(500, 4))
    quantizer = InputQuantizer.calibrate(rows, n_bits)
    inside = np.abs(rows) <= largest_level(n_bits) * quantizer.channel_scale  # no row is too long
    error = np.abs(quantizer.dequantize(quantizer(rows)) - rows)
    assert np.all(error[inside] <= np.broadcast_to(quantizer.channel_scale / 2 + 1e-12, rows.shape)[inside])


def test_channels_of_very_different_size_keep_the_same_relative_precision():
    rng = np.random.default_rng(2)
    rows = rng.normal(size=(2000, 3)) * np.array([0.01, 1.0, 100.0])
    quantizer = InputQuantizer.calibrate(rows, 4)
    error = np.sqrt(((quantizer.dequantize(quantizer(rows)) - rows) ** 2).mean(0)) / rows.std(0)
    assert np.all(error < 0.15)


@pytest.mark.parametrize("n_bits", [2, 4, 8])
def test_weights_stay_within_their_bits_and_passing_errors_on_helps(n_bits):
    rng = np.random.default_rng(3)
    inputs = rng.normal(size=(400, 32)) @ rng.normal(size=(32, 32))
    weight = rng.normal(size=(32, 6))
    gram = inputs.T @ inputs / len(inputs)
    integers, scale = quantize_weight(weight, gram, n_bits)
    assert np.abs(integers).max() <= largest_level(n_bits)
    plain = np.clip(np.rint(weight / scale), -largest_level(n_bits), largest_level(n_bits))

    def output_error(rounded):
        return np.square(inputs @ (rounded * scale - weight)).mean()

    assert output_error(integers) < output_error(plain)


@pytest.mark.parametrize("n_bits", [1, 9, 0, -4, 4.0, True, "4"])
def test_bits_out_of_range_are_refused(n_bits):
    with pytest.raises(ValueError, match="n_bits must be"):
        check_bits(n_bits)
