"""What a client sends back of a refresh are fresh encryptions."""

from __future__ import annotations

import numpy as np
import pytest

from cipherlm.engine import Evaluator

from .conftest import Client
from .distributions import assert_fresh, assert_gaussian, assert_uniform, assert_unrelated
from .expansion import limbs
from .rings import small
from .zeros import result

Opened = tuple[list[bytes], np.ndarray]


@pytest.fixture(scope="module")
def replies(client: Client) -> Opened:
    """Seeds and errors (count, N) of the ciphertexts in two replies.

    What is encrypted are the integers that the requests decrypt to: centred modulo the lowest prime, divided
    by a power of two and rounded, half up.
    """
    opener, evaluator = client.opener, Evaluator(client.parameters)
    seeds, errors = [], []
    half, top = client.count // 2, client.parameters.max_level
    for size, level, shift in ((client.count - half, 1, 0), (half, top, 3)):
        request, _ = evaluator.mask(
            [result(client, 1)] * size,
            client.secret_key.public_key(),
            level=0,
            to_level=level,
            shift=shift,
        )
        reply = client.secret_key.refresh(request)
        rings = opener.q[: level + 1]
        for (masked, factor), (seed, *fresh) in zip(
            opener.request(request.to_bytes()), opener.reply(reply.to_bytes()), strict=True
        ):
            [seen] = opener.phase(rings[:1], masked, factor)
            sent = (rings[0].centred(seen) + (1 << shift >> 1)) >> shift
            phases = opener.phase(rings, *fresh)
            error = [ring.reduce(p - sent) for ring, p in zip(rings, phases, strict=True)]
            errors.append(small(rings, error))
            seeds.append(seed)
    return seeds, np.stack(errors)


def test_errors_of_replies_are_gaussian(replies: Opened):
    assert_gaussian(replies[1])


def test_errors_of_replies_are_independent(client: Client, replies: Opened):
    assert_unrelated(np.concatenate([replies[1], client.opener.secret[None], client.fresh[1][:3]]))


def test_masks_of_replies_are_uniform(client: Client, replies: Opened):
    ring = client.opener.q[0]
    assert_uniform(np.stack([limbs(seed, [ring])[0] for seed in replies[0]]), ring.prime)


def test_no_seed_of_a_reply_serves_twice(client: Client, replies: Opened):
    evaluator, public_key = Evaluator(client.parameters), client.secret_key.public_key()
    seeds = replies[0] + client.fresh[0]
    for _ in range(2):
        request, _ = evaluator.mask([result(client, 0)] * 40, public_key, level=0, to_level=0)
        reply = client.secret_key.refresh(request)
        seeds += [seed for seed, _, _ in client.opener.reply(reply.to_bytes())]
    assert_fresh(seeds)
