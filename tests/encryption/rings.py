"""Polynomials modulo X^N + 1 and a prime, in NumPy: the ring that encryption works in."""

from __future__ import annotations

from functools import cached_property

import numpy as np
from sympy import primitive_root

Polynomial = list[np.ndarray]  # its residues, by prime


class PrimeRing:
    """Polynomials modulo X^N + 1 and a prime: int64 arrays (..., N) of values in [0, prime)."""

    def __init__(self, degree: int, prime: int) -> None:
        assert prime < 1 << 51, "a float64 finds the quotient of a product up to here"
        self.degree, self.prime = degree, prime
        self.root = pow(int(primitive_root(prime)), (prime - 1) // (2 * degree), prime)

    def multiply(self, a: np.ndarray, b: np.ndarray | int) -> np.ndarray:
        """Multiply modulo the prime; int64 products wrap, and so does what is taken off them."""
        quotient = (a.astype(float) * b * (1 / self.prime)).astype(np.int64)
        rest = a * b
        rest -= quotient * self.prime
        return self._corrected(rest)

    def _corrected(self, a: np.ndarray) -> np.ndarray:
        """Bring integers in (-prime, 2 prime) into [0, prime), in place."""
        a += (a < 0) * self.prime
        a -= (a >= self.prime) * self.prime
        return a

    def reduce(self, a: np.ndarray) -> np.ndarray:
        return a % self.prime

    def centred(self, a: np.ndarray) -> np.ndarray:
        """Return residues as integers of the least size."""
        return np.where(a > self.prime // 2, a - self.prime, a)

    def _powers(self, base: int) -> np.ndarray:
        """Return base^0 ... base^(N - 1), at bit-reversed places."""
        powers = np.ones(1, np.int64)
        while len(powers) < self.degree:
            step = pow(base, self.degree // (2 * len(powers)), self.prime)
            powers = np.concatenate([powers, self.multiply(powers, step)])
        return powers

    @cached_property
    def _forward(self) -> np.ndarray:
        return self._powers(self.root)

    @cached_property
    def _backward(self) -> np.ndarray:
        return self._powers(pow(self.root, -1, self.prime))

    def ntt(self, coefficients: np.ndarray) -> np.ndarray:
        """Return the values at the primitive 2N-th roots of unity, in bit-reversed order.

        Longa and Naehrig, "Speeding up the Number Theoretic Transform for Faster Ideal
        Lattice-Based Cryptography", algorithm 1.
        """
        a, blocks = self.reduce(coefficients), 1
        while blocks < self.degree:
            parts = a.reshape(*a.shape[:-1], blocks, 2, -1)
            twisted = self.multiply(parts[..., 1, :], self._forward[blocks : 2 * blocks, None])
            halves = parts[..., 0, :] + twisted, parts[..., 0, :] - twisted
            a = self._corrected(np.stack(halves, axis=-2)).reshape(a.shape)
            blocks *= 2
        return a

    def intt(self, values: np.ndarray) -> np.ndarray:
        """Return the coefficients: algorithm 2 of the same paper."""
        a, blocks = values, self.degree
        while blocks > 1:
            blocks //= 2
            parts = a.reshape(*a.shape[:-1], blocks, 2, -1)
            total = self._corrected(parts[..., 0, :] + parts[..., 1, :])
            twisted = self._corrected(parts[..., 0, :] - parts[..., 1, :])
            twisted = self.multiply(twisted, self._backward[blocks : 2 * blocks, None])
            a = np.stack([total, twisted], axis=-2).reshape(a.shape)
        return self.multiply(a, pow(self.degree, -1, self.prime))


class RealRing(PrimeRing):
    """Polynomials a_0 + sum of a_i (X^i + X^-i) modulo X^2N + 1 and a prime: the conjugate-invariant ring.

    Kim and Song, "Approximate Homomorphic Encryption over the Conjugate-Invariant Ring" (2018). Its values at
    a root and at the root's inverse are the same; the first of each two are kept.
    """

    def __init__(self, degree: int, prime: int) -> None:
        self.degree, self.prime, self._whole = degree, prime, PrimeRing(2 * degree, prime)

    def ntt(self, coefficients: np.ndarray) -> np.ndarray:
        middle = np.zeros_like(coefficients[..., :1])
        mirrored = np.concatenate([coefficients, middle, -coefficients[..., :0:-1]], axis=-1)
        return self._whole.ntt(mirrored)[..., : self.degree]

    def intt(self, values: np.ndarray) -> np.ndarray:
        mirrored = np.concatenate([values, values[..., ::-1]], axis=-1)
        return self._whole.intt(mirrored)[..., : self.degree]


def small(rings: list[PrimeRing], residues: Polynomial) -> np.ndarray:
    """Return the integers that residues stand for, which must be the same modulo every prime."""
    integers = rings[0].centred(residues[0])
    for ring, values in zip(rings, residues, strict=True):
        assert (ring.reduce(integers) == values).all(), "the residues are not those of one small polynomial"
    return integers


def minus(a: Polynomial, b: Polynomial) -> Polynomial:
    """Return a difference, which is reduced no further."""
    return [x - y for x, y in zip(a, b, strict=True)]
