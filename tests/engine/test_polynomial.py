"""Polynomials agree with NumPy on intervals of every size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cipherlm.engine import Chebyshev, InvalidArgumentError, LevelError

from .conftest import FRESH, Party


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    degree=st.integers(1, 15),
    low=st.floats(-20, 10),
    width=st.floats(2**-4, 20),
    seed=st.integers(0, 2**32 - 1),
)
def test_agrees_with_numpy(each: Party, degree, low, width, seed):
    random = np.random.default_rng(seed)
    polynomial = Chebyshev(random.normal(size=degree + 1) / (degree + 1), (low, low + width))
    x = random.uniform(low, low + width, each.parameters.slots)
    ct = each.secret_key.encrypt(x)
    levels = polynomial.levels(each.parameters, ct.scale)
    assert levels - np.ceil(np.log2(degree + 1)) in (0, 1)
    if levels > ct.level:
        with pytest.raises(LevelError, match="levels"):
            each.evaluator.polynomial(ct, polynomial)
        return
    result = each.evaluator.polynomial(ct, polynomial)
    assert result.level == ct.level - levels
    assert result.scale == pytest.approx(each.parameters.scale)
    # 2^-14, 4 bits of drift, and the noise of the input magnified by the slope.
    slope = degree**2 / width
    assert each.error(result, polynomial(x)) < 2**-10 + slope * FRESH * 32


def test_a_fit(party: Party):
    exponential = Chebyshev.fit(np.exp, (-2, 2), 7)
    x = np.linspace(-2, 2, 100)
    assert np.abs(exponential(x) - np.exp(x)).max() < 2e-4
    result = party.secret_key.decrypt(party.evaluator.polynomial(party.secret_key.encrypt(x), exponential))
    assert np.abs(result[:100] - np.exp(x)).max() < 3e-4


def test_the_interval_is_free_where_the_scale_allows(party: Party):
    cubic = Chebyshev(np.array([0.1, 0.2, 0.3, 0.4]), (-64, 64))
    assert cubic.levels(party.parameters) == 3
    ct = party.secret_key.encrypt(np.linspace(-64, 64, 50), scale=party.parameters.scale / 64)
    assert cubic.levels(party.parameters, ct.scale) == 2
    result = party.evaluator.polynomial(ct, cubic)
    assert result.level == ct.level - 2
    got = party.secret_key.decrypt(result)[:50]
    assert np.abs(got - cubic(np.linspace(-64, 64, 50))).max() < 2**-12


def test_nonsense(party: Party):
    ct = party.secret_key.encrypt(party.values())
    for polynomial in (
        Chebyshev(np.array([1.0, np.nan])),
        Chebyshev(np.array([1.0, 2.0]), (1.0, 1.0)),
        Chebyshev(np.array([1.0, 2.0]), (0.0, np.inf)),
    ):
        with pytest.raises(InvalidArgumentError):
            party.evaluator.polynomial(ct, polynomial)
    with pytest.raises(ValueError, match="two"):
        Chebyshev(np.array([1.0]))
