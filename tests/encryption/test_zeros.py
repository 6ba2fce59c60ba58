"""Encryptions of zero under a public key: in what it encrypts, in results and in refresh requests."""

from __future__ import annotations

import os
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import pytest

from .conftest import Client
from .distributions import (
    SIGMA,
    assert_frequencies,
    assert_gaussian,
    assert_ternary,
    assert_uniform,
    assert_unrelated,
)
from .expansion import Expansion
from .frames import SEED, dropped
from .rings import Polynomial, small
from .zeros import encrypted, masked, refreshed, rerandomised, telltale

SOURCES = [encrypted, rerandomised, refreshed]


def coefficients(client: Client, values: Polynomial) -> Polynomial:
    """Return the coefficients, by prime, of a polynomial in NTT form."""
    return [ring.intt(ring.reduce(v)) for ring, v in zip(client.opener.q, values, strict=False)]


def integers(client: Client, values: Polynomial) -> np.ndarray:
    """Return the small integers that are the coefficients of a polynomial in NTT form."""
    return small(client.opener.q[: len(values)], coefficients(client, values))


@pytest.mark.parametrize("source", SOURCES)
def test_zeros_have_the_error_that_rounding_makes(client: Client, source: Callable):
    """With the true key: two roundings r0 + r1 s, uniform in [-1/2, 1/2], beside which the rest vanishes.

    Their variance is (1 + h) / 12 for a secret with h coefficients that are not zero.
    """
    opener, rings = client.opener, client.opener.q
    zeros = source(client, client.secret_key.public_key(), client.count, client.parameters.max_level)
    errors = np.stack([small(rings, opener.phase(rings, *zero)) for zero in zeros])
    assert_gaussian(errors, ((1 + np.count_nonzero(opener.secret)) / 12) ** 0.5)
    assert_unrelated(np.concatenate([errors, opener.secret[None]]))


@pytest.mark.parametrize("source", SOURCES)
def test_each_zero_has_a_random_factor_of_its_own(client: Client, source: Callable):
    """u is ternary, and what the second component hides behind: (u a + e1) / P, rounded."""
    opener, special, seed = client.opener, client.opener.p[0], os.urandom(SEED)
    zeros = source(client, telltale(client, special.prime, seed), client.count, 1)
    factors = np.stack([integers(client, first) for first, _ in zeros])
    assert_ternary(factors)
    assert_unrelated(np.concatenate([factors, opener.secret[None]]))
    expansion = Expansion(seed)
    rings = [*opener.q[:2], special]
    a = [*expansion.polynomial(opener.q)[:2], *expansion.polynomial([special])]
    for u, (_, second) in zip(factors[:3], zeros, strict=False):
        # Keys are in Montgomery form: a is what the seed generates, divided by 2^64.
        *products, rest = (
            ring.intt(ring.multiply(ring.multiply(k, ring.ntt(u)), pow(1 << 64, -1, ring.prime)))
            for ring, k in zip(rings, a, strict=True)
        )
        for ring, product, values in zip(rings, products, coefficients(client, second), strict=False):
            rounded = ring.reduce(product - special.centred(rest))
            expected = ring.multiply(rounded, pow(special.prime, -1, ring.prime))
            # e1 moves a rounding in one of 2^30 coefficients, P having 38 bits or more.
            assert np.count_nonzero(values - expected) <= 2


@pytest.mark.parametrize("source", SOURCES)
def test_each_zero_has_an_error_of_its_own(client: Client, source: Callable):
    """c = (P - 1) / 2 + t makes the first component 1 where u is 1 and e0 above -t, and -1 where u is -1 and
    e0 below t: rounding turns on the error, whose distribution is measured at some t."""
    special = client.opener.p[0].prime
    for threshold in (-6, -1, 0, 4):
        key = telltale(client, special // 2 + threshold)
        zeros = source(client, key, client.count, 0)
        signs = np.stack([integers(client, first) for first, _ in zeros])
        assert set(np.unique(signs)) <= {-1, 0, 1}
        counts = np.array([(signs == value).sum() for value in (-1, 0, 1)])
        above = NormalDist(0, SIGMA).cdf(threshold - 0.5)
        assert_frequencies(counts, np.array([above, 3 - 2 * above, above]) / 3)
        if threshold > -6:  # where few are not zero, correlations are not normal
            assert_unrelated(signs)


@pytest.mark.parametrize("flood", [16, 24])
def test_flooding_is_uniform_and_new_each_time(client: Client, flood: int):
    """c = K P makes the first component K u and the flooding noise; it tells them apart."""
    room = 1 << (flood + 2)
    key = telltale(client, room * client.opener.p[0].prime)
    zeros = rerandomised(client, key, client.count, 1, flood)
    sums = np.stack([integers(client, first) for first, _ in zeros])
    factors = (sums + room // 2) // room
    assert_ternary(factors)
    noise = sums - room * factors
    assert noise.min() >= -(1 << flood)
    assert noise.max() < 1 << flood
    assert_uniform(noise + (1 << flood), 2 << flood)
    assert_unrelated(np.concatenate([noise, factors]))


def test_masks_are_uniform_and_serve_once(client: Client):
    """Uniform modulo Q, not only modulo each prime; neither equal nor near to each other."""
    opener = client.opener
    _, masks = masked(client, client.secret_key.public_key(), client.count, 1)
    residues = [coefficients(client, mask) for mask in masks]
    for ring, values in zip(opener.q, zip(*residues, strict=True), strict=False):
        assert_uniform(np.stack(values), ring.prime)
        assert_unrelated(np.stack([ring.centred(v) for v in values]))
    assert_uniform_apart(client, masks)


def assert_uniform_apart(client: Client, values: list[Polynomial], lost: int = 0) -> None:
    """Assert that polynomials are uniform modulo Q and unlike each other, but for so many low bits."""
    p, q = (ring.prime for ring in client.opener.q[:2])
    residues = np.array([coefficients(client, polynomial) for polynomial in values], object)
    joined = np.stack([a + p * ((b - a) * pow(p, -1, q) % q) for a, b in residues]) >> lost
    modulus = (p * q - 1 >> lost) + 1
    assert_uniform(joined, modulus)
    for i in range(1, len(joined)):
        assert_uniform((joined[i:] - joined[:-i]) % modulus, modulus)


@pytest.mark.parametrize("shift", [8, 16])
def test_rounded_requests_have_masks_and_zeros_of_their_own(client: Client, shift: int):
    """c = K P makes the first component K u and what rounding adds, which is less than half of K."""
    lost = dropped(client.parameters.degree, 1, shift)
    assert lost is not None
    room = 1 << (lost[0] + 2)
    key = telltale(client, room * client.opener.p[0].prime, os.urandom(SEED))
    zeros, masks = masked(client, key, client.count, 1, shift)
    sums = np.stack([integers(client, first) for first, _ in zeros])
    factors = (sums + room // 2) // room
    assert_ternary(factors)
    assert_unrelated(factors)
    assert np.abs(sums - room * factors).max() < 1 << lost[0]
    assert_uniform_apart(client, masks, shift)
    assert_uniform_apart(client, [second for _, second in zeros], lost[1])
