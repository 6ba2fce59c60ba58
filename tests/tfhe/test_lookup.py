"""Tables on the leading bits of an accumulator: rounding, and saturation instead of a wrap."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cipherlm.schemes.tfhe.lookup import FULL_SCALE, lookup, noisy_lookup, traced_lookup


def square(t):
    return (t**2 - 1.0) * 1000.0


def flat_ended(t):
    return 1000.0 * np.tanh(6.0 * t)


@given(st.integers(-FULL_SCALE, FULL_SCALE - 1), st.integers(3, 9))
def test_inside_the_range_a_lookup_is_the_function_of_the_nearest_cell(value, bits):
    cell = 2 * FULL_SCALE >> bits
    nearest = np.floor(value / cell + 0.5) * cell / FULL_SCALE
    assert lookup(np.array([value]), bits, square)[0] == np.rint(square(nearest))


@given(st.floats(1.0, 2.0))
def test_a_square_keeps_rising_up_to_twice_its_range(fraction):
    value = np.array([round(fraction * FULL_SCALE), -round(fraction * FULL_SCALE)])
    result = lookup(value, 8, square)
    # 1 - (2 - |t|)^2 in place of t^2 - 1, to half a cell.
    assert np.all(np.abs(result - 1000.0 * (1.0 - (2.0 - fraction) ** 2)) <= 1000.0 * 2 * 2.0 / 256 + 1)


@given(st.floats(1.0, 1.4))
def test_a_function_with_flat_ends_saturates(fraction):
    value = np.array([round(fraction * FULL_SCALE), -round(fraction * FULL_SCALE)])
    np.testing.assert_allclose(lookup(value, 8, flat_ended), [1000, -1000], atol=1)


def test_each_position_may_have_a_table_of_its_own():
    scales = np.array([10.0, 20.0, 30.0])
    accumulator = np.full((2, 3), FULL_SCALE // 2)
    expected = np.tile(scales / 2, (2, 1))
    np.testing.assert_array_equal(lookup(accumulator, 6, lambda t: t * scales), expected)


@pytest.mark.parametrize("bits", [4, pytest.param(6, marks=pytest.mark.slow)])
def test_concrete_agrees_with_the_clear_lookup_inside_and_outside_the_range(bits):
    fhe = pytest.importorskip("concrete.fhe")
    configuration = fhe.Configuration(
        p_error=1e-4,
        approximate_rounding_config=fhe.ApproximateRoundingConfig(
            logical_clipping=False, approximate_clipping_start_precision=False
        ),
    )
    cell = 2 * FULL_SCALE >> bits
    compiler = fhe.Compiler(lambda x: traced_lookup(x, bits, square), {"x": "encrypted"})
    small = [np.array([-FULL_SCALE // 2, 0, 5, FULL_SCALE // 2, 1, 2])]
    circuit = compiler.compile([*small, -small[0]], configuration)
    # The middles of cells, where noise cannot reach the neighbours; the last two lie outside the range.
    for start in (-FULL_SCALE, -FULL_SCALE // 2, 0):
        values = start + cell * np.arange(6)
        np.testing.assert_array_equal(circuit.encrypt_run_decrypt(values), lookup(values, bits, square))


@pytest.mark.parametrize("p_error", [0.1, 0.01])
def test_simulated_noise_reaches_the_next_cell_as_often_as_stated(p_error):
    bits, values = 6, np.zeros(200_000, dtype=np.int64)  # the middle of a cell
    noisy = noisy_lookup(p_error, np.random.default_rng(0))(values, bits, lambda t: 32.0 * t)
    assert np.mean(noisy != 0) == pytest.approx(p_error, rel=0.1)
