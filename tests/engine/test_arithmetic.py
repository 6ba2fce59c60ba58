"""Every operation agrees with NumPy within a stated bound."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cipherlm.engine import (
    Evaluator,
    InvalidArgumentError,
    KeyMaterialError,
    LevelError,
    ParametersError,
    Plaintext,
    ScaleError,
    SecretKey,
    inner_sum_rotations,
)

from .conftest import DEEP, FRESH, PRODUCT, PUBLIC, Party

fast = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
levels = st.integers(1, 4)
seeds = st.integers(0, 2**32 - 1)
sizes = st.floats(2**-10, 2**7)


@fast
@given(level=st.integers(0, 4), length=st.integers(1, 4096), size=sizes, seed=seeds)
def test_encrypt_and_decrypt(party: Party, level, length, size, seed):
    values = party.values(size, seed)[:length]
    expected = np.zeros(party.parameters.slots, complex)
    expected[:length] = values
    assert party.error(party.secret_key.encrypt(values, level), expected) < FRESH * max(1, size)
    assert party.error(party.public_key.encrypt(values, level), expected) < PUBLIC * max(1, size)


@fast
@given(a=levels, b=levels, size=sizes, seed=seeds)
def test_sums(party: Party, a, b, size, seed):
    x, y = party.values(size, seed), party.values(size, seed + 1)
    cx, cy = party.secret_key.encrypt(x, a), party.secret_key.encrypt(y, b)
    ev, bound = party.evaluator, 4 * FRESH * max(1, size)
    assert ev.add(cx, cy).level == min(a, b)
    assert party.error(ev.add(cx, cy), x + y) < bound
    assert party.error(ev.subtract(cx, cy), x - y) < bound
    assert party.error(ev.add(cx, y), x + y) < bound
    assert party.error(ev.subtract(cx, y), x - y) < bound
    assert party.error(ev.add(cx, 0.25 - 3j), x + 0.25 - 3j) < bound
    assert party.error(ev.subtract(cx, np.float64(2.5)), x - 2.5) < bound
    assert party.error(ev.negate(cx), -x) < bound


@fast
@given(a=levels, b=levels, size=st.floats(2**-3, 8), seed=seeds)
def test_products(each: Party, a, b, size, seed):
    x, y = each.values(size, seed), each.values(size, seed + 1)
    cx, cy = each.secret_key.encrypt(x, a), each.secret_key.encrypt(y, b)
    ev, bound = each.evaluator, PRODUCT * max(1, size) ** 2
    product = ev.multiply(cx, cy)
    assert product.level == min(a, b) - 1
    assert each.error(product, x * y) < bound
    assert each.error(ev.square(cx), x * x) < bound
    for factor in (y, 0.3, -1.5, 7):
        result = ev.multiply(cx, factor)
        assert result.scale == pytest.approx(cx.scale, rel=2**-50)
        assert result.level == (a if isinstance(factor, int) else a - 1)
        assert each.error(result, x * factor) < 8 * bound
    lazy = ev.multiply(cx, cy, relinearize=False, rescale=False)
    assert lazy.degree == 2
    assert each.error(lazy, x * y) < bound
    assert each.error(ev.rescale(ev.relinearize(lazy)), x * y) < bound


@fast
@given(terms=st.integers(1, 5), level=levels, seed=seeds)
def test_dot(each: Party, terms, level, seed):
    x = [each.values(1, seed + i) for i in range(terms)]
    y = [each.values(1, seed + terms + i) for i in range(terms)]
    cx, cy = [each.secret_key.encrypt(v, level) for v in x], [each.secret_key.encrypt(v) for v in y]
    expected = np.sum(np.multiply(x, y), axis=0)
    assert each.error(each.evaluator.dot(cx, cy), expected) < terms * PRODUCT
    scale = float(each.parameters.q[level])
    plain = [Plaintext.encode(each.parameters, v, level, scale) for v in y]
    result = each.evaluator.dot(cx, plain)
    assert result.scale == cx[0].scale
    assert each.error(result, expected) < terms * PRODUCT


@fast
@given(by=st.sampled_from([0, 1, 2, 5, 8, 100, -1]), level=st.integers(0, 4), seed=seeds)
def test_rotations(each: Party, by, level, seed):
    x = each.values(1, seed)
    ct = each.secret_key.encrypt(x, level)
    assert each.error(each.evaluator.rotate(ct, by), np.roll(x, -by)) < PRODUCT
    amounts = [by, 3, 64, 0]
    for amount, result in zip(amounts, each.evaluator.rotate_hoisted(ct, amounts), strict=True):
        assert each.error(result, np.roll(x, -amount)) < PRODUCT


@fast
@given(count=st.sampled_from([1, 2, 4, 8]), step=st.sampled_from([1, 8]), seed=seeds)
def test_inner_sums(each: Party, count, step, seed):
    x = each.values(1, seed)
    ct = each.secret_key.encrypt(x, 2)
    expected = sum(np.roll(x, -step * i) for i in range(count))
    assert each.error(each.evaluator.inner_sum(ct, step, count), expected) < 8 * PRODUCT


def test_an_inner_sum_of_any_count(party: Party):
    x = party.values()
    expected = x + np.roll(x, -1) + np.roll(x, -2)
    assert party.error(party.evaluator.inner_sum(party.secret_key.encrypt(x), 1, 3), expected) < DEEP


def test_an_inner_sum_with_more_keys(party: Party):
    rotations = inner_sum_rotations(2, 32, faster=True)
    assert rotations == [2, 4, 8, 16, 32, 6, 24]
    x = party.values()
    expected = sum(np.roll(x, -2 * i) for i in range(32))
    evaluator = Evaluator(party.parameters, party.secret_key.evaluation_keys(rotations))
    assert party.error(evaluator.inner_sum(party.secret_key.encrypt(x, 2), 2, 32), expected) < 32 * PRODUCT


def test_conjugation_and_split(party: Party):
    x, ev = party.values(), party.evaluator
    ct = party.secret_key.encrypt(x)
    assert party.error(ev.conjugate(ct), x.conj()) < PRODUCT
    real, imaginary = ev.split(ct)
    assert party.error(real, 2 * x.real) < PRODUCT
    assert party.error(imaginary, 2 * x.imag) < PRODUCT


def test_nothing_to_conjugate_in_the_real_ring(real_party: Party):
    with pytest.raises(InvalidArgumentError, match="real"):
        real_party.evaluator.conjugate(real_party.secret_key.encrypt(real_party.values()))
    with pytest.raises(InvalidArgumentError, match="real"):
        real_party.evaluator.add(real_party.secret_key.encrypt(real_party.values()), 1j)
    with pytest.raises(ValueError, match="real"):
        real_party.secret_key.encrypt([1j])


def test_in_place(party: Party):
    x, y, ev = party.values(), party.values(), party.evaluator
    a, b = party.secret_key.encrypt(x), party.secret_key.encrypt(y)
    assert ev.add(a, b, out=a) is a
    ev.multiply(a, b, out=a)
    ev.rotate(a, 1, out=a)
    ev.subtract(a, 0.5, out=a)
    ev.drop_level(a, 1, out=a)
    assert party.error(a, np.roll((x + y) * y, -1) - 0.5) < DEEP
    assert party.error(b, y) < FRESH
    with pytest.raises(InvalidArgumentError, match="second"):
        ev.add(a, b, out=b)


def test_copies_are_apart(party: Party):
    x = party.values()
    a = party.secret_key.encrypt(x)
    b = a.copy()
    party.evaluator.add(b, 1, out=b)
    assert party.error(a, x) < FRESH


@fast
@given(factor=st.floats(2**-6, 2**6), level=levels, seed=seeds)
def test_scales(party: Party, factor, level, seed):
    x, ev = party.values(1, seed), party.evaluator
    ct = party.secret_key.encrypt(x, level)
    declared = ev.set_scale(ct, ct.scale * factor)
    assert declared.level == level
    assert party.error(declared, x / factor) < FRESH / min(1, factor)
    adjusted = ev.adjust_scale(declared, ct.scale)
    assert (adjusted.level, adjusted.scale) == (level - 1, ct.scale)
    assert party.error(adjusted, x / factor) < PRODUCT / min(1, factor)


@fast
@given(level=st.integers(0, 4), seed=seeds)
def test_dropping_levels(party: Party, level, seed):
    x = party.values(1, seed)
    ct = party.evaluator.drop_level(party.secret_key.encrypt(x), level)
    assert ct.level == level
    assert ct.seeded
    assert party.error(ct, x) < FRESH


def test_what_would_go_silently_wrong_is_refused(party: Party, real_party: Party):
    ev, sk = party.evaluator, party.secret_key
    x = party.values()
    ct = sk.encrypt(x)
    with pytest.raises(ScaleError, match="unequal scales"):
        ev.add(ct, sk.encrypt(x, scale=2 * ct.scale))
    with pytest.raises(ScaleError, match="unequal scales"):
        ev.add(ct, ev.set_scale(ct, ct.scale * (1 + 2**-20)))
    with pytest.raises(ScaleError, match="unequal scales"):
        ev.dot([ct, ct], [ct, ev.set_scale(ct, 3.0 * ct.scale)])
    with pytest.raises(ScaleError, match="too great"):
        sk.encrypt(2.0**20 * x, level=0)
    with pytest.raises(ScaleError):
        ev.adjust_scale(ct, 2.0)
    with pytest.raises(ScaleError):
        ev.set_scale(ct, -1.0)
    with pytest.raises(LevelError):
        ev.rescale(sk.encrypt(x, 0))
    with pytest.raises(LevelError):
        ev.drop_level(sk.encrypt(x, 1), 2)
    with pytest.raises(LevelError):
        sk.encrypt(x, 5)
    with pytest.raises(InvalidArgumentError, match="relinearise"):
        ev.rotate(ev.multiply(ct, ct, relinearize=False), 1)
    with pytest.raises(InvalidArgumentError, match="finite"):
        sk.encrypt([np.nan])
    with pytest.raises(InvalidArgumentError, match="do not fit"):
        sk.encrypt(np.zeros(party.parameters.slots + 1))
    with pytest.raises(ParametersError, match="different parameters"):
        ev.add(real_party.secret_key.encrypt(real_party.values()), 1)
    stranger = SecretKey.generate(party.parameters)
    with pytest.raises(KeyMaterialError, match="under key"):
        ev.add(ct, stranger.encrypt(x))
    with pytest.raises(KeyMaterialError, match="another key"):
        stranger.decrypt(ct)
    with pytest.raises(KeyMaterialError, match="rotation by 7"):
        ev.rotate(ct, 7)


def test_decoding_to_a_precision(party: Party):
    ct = party.secret_key.encrypt(party.values())
    rounded = party.secret_key.decrypt(ct, precision=8)
    assert np.array_equal(rounded * 256, np.round(rounded * 256))
    whole = party.secret_key.decrypt(ct, precision=0)
    assert np.array_equal(whole, np.round(whole))
    assert party.error(ct, whole) < 0.75
    for nonsense in (float("nan"), float("inf"), 1e9):
        with pytest.raises(InvalidArgumentError, match="precision"):
            party.secret_key.decrypt(ct, precision=nonsense)


def test_a_number_is_a_number_in_any_form(party: Party):
    x = party.values()
    ct, ev = party.secret_key.encrypt(x, 2), party.evaluator
    for two in (2, 2.0, np.float32(2), np.array(2.0), Fraction(2), Decimal(2), np.int8(2)):
        assert party.error(ev.multiply(ct, two), 2 * x) < PRODUCT
        assert party.error(ev.add(ct, two), x + 2) < PRODUCT
        assert party.error(ev.subtract(ct, two), x - 2) < PRODUCT


def test_what_overflows_the_modulus_is_refused(party: Party):
    ct, ev = party.secret_key.encrypt(party.values(), 1), party.evaluator
    for attempt in (
        lambda: ev.add(ct, 1e30),
        lambda: ev.subtract(ct, -1e30j),
        lambda: ev.multiply(ct, 2**80),
        lambda: ev.adjust_scale(ct, 2.0**43),
    ):
        with pytest.raises(ScaleError):
            attempt()
    assert party.error(ev.add(ct, 0), party.secret_key.decrypt(ct)) < FRESH
