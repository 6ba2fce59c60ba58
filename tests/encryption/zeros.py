"""The encryptions of zero that come from a public key, taken off what they were added to.

A public key is (e - a s, a). One whose first component is a constant c instead makes encryptions of zero that
tell what they are made of. With a random ternary u and errors e0 and e1 they are, rounded to integers,
((u c + e0) / P, (u a + e1) / P), where P is the first prime of the key-switching modulus: for c = P the first
component is u.
"""

from __future__ import annotations

import numpy as np

from cipherlm.engine import Ciphertext, Evaluator, PublicKey

from .conftest import Client
from .frames import SEED, frame, packed
from .rings import Polynomial, minus

Zero = tuple[Polynomial, Polynomial]  # in NTT form


def telltale(client: Client, constant: int, seed: bytes = bytes(SEED)) -> PublicKey:
    """Return a public key whose first component is a constant, and whose second a seed generates."""
    opener, degree = client.opener, client.parameters.degree
    payload = seed
    for ring in opener.q + opener.p:
        # In Montgomery form, and equal everywhere in NTT form.
        payload += packed(ring, np.full(degree, (constant << 64) % ring.prime))
    return PublicKey.from_bytes(frame(client.public_header, payload), client.parameters)


def result(client: Client, level: int) -> Ciphertext:
    """Return a computed ciphertext, which has no seed."""
    fresh = client.secret_key.encrypt(client.message(level))
    return Evaluator(client.parameters).add(fresh, fresh)


def encrypted(client: Client, key: PublicKey, count: int, level: int) -> list[Zero]:
    """Return the zeros of encryptions under a public key: of one plaintext, which must not decide them."""
    plaintext, zeros = client.message(level), []
    for _ in range(count):
        first, second = client.opener.ciphertext(key.encrypt(plaintext).to_bytes())
        zeros.append((minus(first, client.opener.plaintext(plaintext.to_bytes())), second))
    return zeros


def rerandomised(client: Client, key: PublicKey, count: int, level: int, flood: int = 0) -> list[Zero]:
    """Return what rerandomisation adds to a result, each time that it leaves."""
    evaluator, before, zeros = Evaluator(client.parameters), result(client, level), []
    for _ in range(count):
        after = evaluator.rerandomize(before, key, flood=flood)
        zeros.append(difference(client, after, before))
    return zeros


def difference(client: Client, after: Ciphertext, before: Ciphertext) -> Zero:
    """Return what was added to a ciphertext."""
    parts = zip(*(client.opener.ciphertext(c.to_bytes()) for c in (after, before)), strict=True)
    first, second = (minus(new, old) for new, old in parts)
    return first, second


def refreshed(client: Client, key: PublicKey, count: int, level: int) -> list[Zero]:
    """Return the zeros of ciphertexts that are masked to be refreshed, in two requests."""
    return masked(client, key, count, level)[0]


def masked(
    client: Client, key: PublicKey, count: int, level: int, shift: int = 0
) -> tuple[list[Zero], list[Polynomial]]:
    """Return the zeros, and the masks, of ciphertexts that are masked to be refreshed, in two requests.

    A mask is 2^shift times what taking it off takes off the client's reply: the lowest bits are missing, as
    they are in what is sent.
    """
    evaluator, opener, before = Evaluator(client.parameters), client.opener, result(client, level)
    c0, c1 = opener.ciphertext(before.to_bytes())
    zeros, masks = [], []
    for size in (count - count // 2, count // 2):
        request, kept = evaluator.mask([before] * size, key, level=level, to_level=level, shift=shift)
        reply = client.secret_key.refresh(request)
        after = evaluator.unmask(reply, kept)
        for (first, second), (_, fresh, _), new in zip(
            opener.request(request.to_bytes()), opener.reply(reply.to_bytes()), after, strict=True
        ):
            unmasked, _ = opener.ciphertext(new.to_bytes())
            taken = zip(opener.q, minus(fresh, unmasked), strict=False)
            mask = [ring.multiply(ring.reduce(values), 1 << shift) for ring, values in taken]
            zeros.append((minus(minus(first, c0), mask), minus(second, c1)))
            masks.append(mask)
    return zeros, masks
