"""What functions cost on ciphertexts, so that the cheapest of several ways can be chosen.

The unit is a product of two ciphertexts, relinearised. Ratios are those of
``cipherlm bench engine --degrees 14 --only primitives`` at the highest levels, rounded; they need not be
exact to choose well.
"""

from __future__ import annotations

from cipherlm.engine import Chebyshev

REFRESH = 2.5
"""Of one ciphertext: the server's mask, and the client's decryption and encryption."""

SUM = 4.0
"""Of a row of scores: some rotations, one after the other."""

_POLYNOMIALS = {1: 0.5, 3: 2.0, 7: 3.5, 15: 6.0, 31: 9.0, 63: 11.5, 127: 17.0}


def of_polynomial(polynomial: Chebyshev) -> float:
    """Return the cost of a polynomial of a degree ``2^d - 1``, up to 127."""
    return _POLYNOMIALS[polynomial.degree]
