"""Messages whose slots repeat or are real, in NumPy: what a refresh sends of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cipherlm.engine import Subring

from .frames import Payload
from .rings import PrimeRing


def subring_of(payload: Payload) -> Subring:
    """Read what is known of a message: a flag for real slots, and how often slots repeat."""
    (code,) = payload.bytes(1)
    return Subring(1 << (code & 0x7F), bool(code & 0x80))


def sent(held: Sequence[Subring]) -> Subring:
    """Return the subring of a ciphertext that holds one message, or two real ones."""
    [first, *others] = held
    if not others:
        return first
    [second] = others
    assert first.real
    assert second.real
    return Subring(min(first.copies, second.copies))


def size_of(subring: Subring, degree: int) -> int:
    """Return how many coefficients a polynomial of a subring has."""
    return degree // subring.copies // (1 + subring.real)


def projected(ring: PrimeRing, subring: Subring, coefficients: np.ndarray) -> np.ndarray:
    """Return the coefficients of X^0, X^copies, ... modulo a prime; see :func:`known`."""
    return ring.reduce(known(subring, coefficients))


def known(subring: Subring, coefficients: np.ndarray) -> np.ndarray:
    """Return the coefficients of X^0, X^copies, ...; of real messages the first half of the sum with the
    conjugate, which takes X^i to -X^(N - i)."""
    if subring.real:
        conjugate = -np.roll(coefficients[::-1], 1)
        conjugate[0] *= -1
        coefficients = coefficients + conjugate
    return coefficients[:: subring.copies][: size_of(subring, len(coefficients))]


def whole(subring: Subring, compact: np.ndarray) -> np.ndarray:
    """Return a polynomial of a subring in NTT form, of which each value is given once."""
    values = np.repeat(compact, subring.copies)
    return np.concatenate([values, values[::-1]]) if subring.real else values


def traced(subring: Subring, values: np.ndarray) -> np.ndarray:
    """Return the sum over the automorphisms of a polynomial in NTT form."""
    sums = values.reshape(-1, subring.copies).sum(1)
    sums = (sums + sums[::-1])[: len(sums) // (1 + subring.real)] if subring.real else sums
    return whole(subring, sums)
