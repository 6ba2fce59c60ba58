"""What only who has the secret key can see: that encryptions have the errors that hide what is in them.

Wrong errors, seeds and secrets decrypt as well as right ones, or better. So these tests open what the engine
encrypts, with arithmetic of their own, and look at what is left.
"""

from __future__ import annotations

import numpy as np

from cipherlm.engine import Parameters, SecretKey

from .conftest import Client
from .distributions import assert_fresh, assert_gaussian, assert_ternary, assert_uniform, assert_unrelated
from .expansion import blake2b, limbs
from .opener import Opener
from .rings import PrimeRing, RealRing

# The arithmetic of these tests.


def test_blake2b_as_published():
    """The digest of "abc" from appendix A of RFC 7693: one of 64 bytes, without a key, tree of one node."""
    parameters = np.zeros((8, 1), np.uint64)
    parameters[0] = 64 | 1 << 16 | 1 << 24
    digest = blake2b(parameters, b"abc").T.astype("<u8").tobytes()
    assert digest.hex().startswith("ba80a53f981c4d0d6a2797b69f12f6e94c212f14685ac4b74b12bb6fdbffa2d1")


def test_the_transform_is_a_ring_isomorphism():
    """Products of values are products of polynomials, by the schoolbook and modulo X^N + 1."""
    ring = PrimeRing(64, Parameters.preset(12).q[0])
    a, b = np.random.default_rng(0).integers(0, ring.prime, (2, ring.degree))
    product = np.zeros(ring.degree, object)
    for i, x in enumerate(a.tolist()):
        for j, y in enumerate(b.tolist()):
            sign = 1 if i + j < ring.degree else -1
            product[(i + j) % ring.degree] += sign * x * y
    assert (ring.intt(ring.ntt(a)) == a).all()
    assert (ring.intt(ring.multiply(ring.ntt(a), ring.ntt(b))) == product % ring.prime).all()


def test_the_real_ring_is_one_too():
    """The product of X^i + X^-i and X^j + X^-j, in two terms, and back from values to coefficients."""
    ring = RealRing(64, PrimeRing(128, Parameters.preset(12).q[0]).prime)
    a, b, expected = np.zeros((3, 64), np.int64)
    a[5], b[9] = 1, 1
    expected[[14, 4]] = 1
    assert (ring.intt(ring.multiply(ring.ntt(a), ring.ntt(b))) == expected).all()
    a[5], a[60], expected[[14, 4]] = 0, 1, 0
    expected[[128 - 69, 51]] = ring.prime - 1, 1  # X^69 + X^-69 = -(X^59 + X^-59)
    assert (ring.intt(ring.multiply(ring.ntt(a), ring.ntt(b))) == expected).all()


# Secret keys.


def test_secrets_are_ternary(any_client: Client):
    secrets = [any_client.opener.secret]
    secrets += [Opener(SecretKey.generate(any_client.parameters)).secret for _ in range(3)]
    assert_ternary(np.stack(secrets))
    assert_unrelated(np.stack(secrets))


# Fresh encryptions under the secret key, whose second component is a seed.


def test_fresh_errors_are_gaussian(any_client: Client):
    assert_gaussian(any_client.fresh[1])


def test_fresh_errors_are_independent(any_client: Client):
    assert_unrelated(np.concatenate([any_client.fresh[1], any_client.opener.secret[None]]))


def test_fresh_masks_are_uniform(any_client: Client):
    rings = any_client.opener.q[:2]
    masks = [limbs(seed, rings) for seed in any_client.fresh[0]]
    for ring, residues in zip(rings, zip(*masks, strict=True), strict=True):
        assert_uniform(np.stack(residues), ring.prime)
    # Nor do residues modulo one prime follow from those modulo another.
    pairs = [(ring, values) for mask in masks[:4] for ring, values in zip(rings, mask, strict=True)]
    assert_unrelated(np.stack([ring.centred(values) for ring, values in pairs]))


def test_no_seed_serves_twice(any_client: Client):
    plaintext = any_client.message(0)
    headers = [any_client.secret_key.encrypt(plaintext).to_bytes()[92:124] for _ in range(80)]
    assert_fresh(headers + any_client.fresh[0])
