"""Refreshes of messages in subrings: what is sent has masks and errors, though there is less of it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from cipherlm.engine import Evaluator, Subring

from .conftest import Client
from .distributions import (
    SIGMA,
    assert_fresh,
    assert_gaussian,
    assert_uniform,
    assert_unrelated,
)
from .expansion import limbs
from .rings import small
from .subrings import projected, size_of, traced, whole
from .zeros import result

SUBRINGS = [Subring(1, True), Subring(2), Subring(4, True)]
TO, SHIFT = 1, 8


def seen(client: Client, subring: Subring, count: int) -> tuple[list[np.ndarray], bytes, list[np.ndarray]]:
    """Return what a client decrypts of a request modulo Q, the reply, and the second components."""
    opener, evaluator = client.opener, Evaluator(client.parameters)
    public_key, before = client.secret_key.public_key(), result(client, 1)
    request, _ = evaluator.mask(
        [before] * count, public_key, level=1, to_level=TO, shift=SHIFT, held=[(subring,)] * count
    )
    p, q = (ring.prime for ring in opener.q[:2])
    integers, seconds = [], []
    for found, first, second in opener.compact_request(request.to_bytes()):
        assert found == subring
        residues = []
        for ring, known, factor in zip(opener.q, first, second, strict=False):
            product = ring.intt(ring.multiply(factor, opener.secret_at(ring)))
            residues.append(ring.reduce(known + projected(ring, subring, product)))
        low, high = (values.astype(object) for values in residues)
        integers.append(low + p * ((high - low) * pow(p, -1, q) % q))
        seconds.append(second[0])
    return integers, client.secret_key.refresh(request).to_bytes(), seconds


@pytest.mark.parametrize("subring", SUBRINGS)
def test_what_is_sent_of_a_subring_is_masked(client: Client, subring: Subring):
    """Uniform modulo Q, each time anew, for one and the same ciphertext."""
    count = client.count * client.parameters.degree // size_of(subring, client.parameters.degree)
    integers, _, seconds = seen(client, subring, min(count, 24))
    p, q = (ring.prime for ring in client.opener.q[:2])
    assert_uniform(np.stack(integers).reshape(1, -1), p * q)
    differences = [(b - a) % (p * q) for a, b in itertools.pairwise(integers)]
    assert_uniform(np.stack(differences).reshape(1, -1), p * q)
    high = [((values << 20) // (p * q)).astype(np.int64) - (1 << 19) for values in integers]
    assert_unrelated(np.stack(high))
    assert_uniform(np.stack(seconds), p)
    assert_unrelated(np.stack([client.opener.q[0].centred(values) for values in seconds]))


@pytest.mark.parametrize("subring", SUBRINGS)
def test_replies_in_a_subring_have_errors_of_their_own(client: Client, subring: Subring):
    """The trace of a fresh error: of a coefficient in the subring as many times as there are copies, and of
    real messages the sum of two coefficients."""
    opener, count = client.opener, 24 if client.parameters.degree > 4096 else 48
    integers, reply, _ = seen(client, subring, count)
    rings = opener.q[: TO + 1]
    modulus = opener.q[0].prime * opener.q[1].prime
    order = subring.copies * (1 + subring.real)
    shift = SHIFT + order.bit_length() - 1 + subring.real  # and by what the way makes of the message
    seeds, errors = [], []
    for values, (found, seed, first) in zip(integers, opener.compact_reply(reply), strict=True):
        assert found == subring
        centred = np.where(values > modulus // 2, values - modulus, values)
        sent = order * ((centred + (1 << shift >> 1)) >> shift)
        residues = []
        for ring, known, a in zip(rings, first, limbs(seed, rings), strict=True):
            product = ring.multiply(a, opener.secret_at(ring))
            phase = ring.intt(ring.reduce(whole(subring, known) + traced(subring, product)))
            kept = phase[:: subring.copies][: len(sent)]
            residues.append(ring.reduce(kept - (sent % ring.prime).astype(np.int64)))
        error = small(rings, residues)
        assert (error % subring.copies == 0).all()
        errors.append(error[1:] // subring.copies)  # the first is its own mirror image
        seeds.append(seed)
    joined = np.stack(errors).reshape(1, -1)
    assert_gaussian(joined, (2 * SIGMA**2 + 1 / 12) ** 0.5 if subring.real else SIGMA)
    assert_unrelated(joined)
    assert_fresh(seeds)
