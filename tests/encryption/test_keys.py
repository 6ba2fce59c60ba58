"""The keys that a server gets are encryptions too: their errors, by digit, and their seeds."""

from __future__ import annotations

import numpy as np
import pytest

from .conftest import Client
from .distributions import assert_fresh, assert_gaussian, assert_uniform, assert_unrelated
from .expansion import Expansion

Opened = dict[str, tuple[list[bytes], np.ndarray]]


@pytest.fixture(scope="module")
def opened(any_client: Client) -> Opened:
    """Seeds, and errors (count, N), of each kind of key: of every digit of the evaluation keys."""
    secret_key, opener = any_client.secret_key, any_client.opener
    public = [opener.public_key(secret_key.public_key().to_bytes()) for _ in range(any_client.count)]
    result = {"public": ([seed for seed, _ in public], np.stack([error for _, error in public]))}
    real = any_client.parameters.real
    powers = [sign << i for i in range(any_client.parameters.log_degree - 1) for sign in (1, -1)]
    for name, rotations, options in (
        ("relinearisation", (), {}),
        ("rotation", powers, {"relinearization": False}),
        # Where slots are real there is nothing to conjugate: a rotation stands in.
        ("conjugation", (3,) if real else (), {"relinearization": False, "conjugation": not real}),
    ):
        seeds: list[bytes] = []
        errors: list[np.ndarray] = []
        # First keys of the highest level, then of low ones, as many as give enough digits.
        level = any_client.parameters.max_level
        while sum(map(len, errors)) < any_client.count or len(seeds) < 2:
            keys = secret_key.evaluation_keys(rotations[: 8 if seeds else 1], level=level, **options)
            new_seeds, new_errors = opener.evaluation_keys(keys.to_bytes())
            seeds += new_seeds
            errors += new_errors
            level = 0
        result[name] = seeds, np.concatenate(errors)
    return result


KINDS = ["public", "relinearisation", "rotation", "conjugation"]


@pytest.mark.parametrize("kind", KINDS)
def test_errors_of_keys_are_gaussian(opened: Opened, kind: str):
    assert_gaussian(opened[kind][1])


@pytest.mark.parametrize("kind", KINDS)
def test_errors_of_keys_are_independent(any_client: Client, opened: Opened, kind: str):
    """Of each other, of the secret, and of fresh encryptions."""
    assert_unrelated(
        np.concatenate([opened[kind][1], any_client.opener.secret[None], any_client.fresh[1][:3]])
    )


def test_errors_of_different_keys_are_independent(opened: Opened):
    assert_unrelated(np.concatenate([opened[kind][1][:4] for kind in KINDS]))


@pytest.mark.parametrize("kind", KINDS)
def test_masks_of_keys_are_uniform(any_client: Client, opened: Opened, kind: str):
    ring = any_client.opener.q[0]
    masks = [Expansion(seed).polynomial([ring])[0] for seed in opened[kind][0]]
    assert_uniform(np.stack(masks), ring.prime)


def test_no_seed_of_a_key_serves_twice(any_client: Client, opened: Opened):
    rotations = any_client.secret_key.evaluation_keys(range(1, 81), level=0, relinearization=False)
    seeds = any_client.opener.seeds(rotations.to_bytes())
    assert_fresh(seeds + any_client.fresh[0] + [seed for kind in KINDS for seed in opened[kind][0]])
