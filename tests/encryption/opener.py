"""Encryptions opened with the secret key: what is left of them is their error.

Frames are read, seeds expanded and transforms undone without the engine's help.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from cipherlm.engine import Parameters, SecretKey, Subring

from .expansion import Expansion, limbs
from .frames import SCALE, SEED, Payload, dropped
from .rings import Polynomial, PrimeRing, RealRing, minus, small
from .subrings import sent, size_of, subring_of


class Opener:
    """Opens encryptions with the secret key."""

    def __init__(self, secret_key: SecretKey) -> None:
        self.parameters: Parameters = secret_key.parameters
        degree = self.parameters.degree
        ring = RealRing if self.parameters.real else PrimeRing
        self.q = [ring(degree, prime) for prime in self.parameters.q]
        self.p = [ring(degree, prime) for prime in self.parameters.p]
        payload = Payload(secret_key.to_bytes(), 2)
        packed = np.frombuffer(payload.bytes(degree // 4), np.uint8)
        payload.end()
        codes = (packed[:, None] >> np.arange(0, 8, 2) & 3).reshape(-1)
        assert codes.max() < 3
        self.secret = np.where(codes == 2, -1, codes).astype(np.int64)
        self._transformed: dict[int, np.ndarray] = {}

    def secret_at(self, ring: PrimeRing) -> np.ndarray:
        """Return the secret in NTT form."""
        if ring.prime not in self._transformed:
            self._transformed[ring.prime] = ring.ntt(self.secret)
        return self._transformed[ring.prime]

    def phase(self, rings: list[PrimeRing], first: Polynomial, second: Polynomial) -> Polynomial:
        """Return c0 + c1 s, in coefficients, by prime."""
        return [
            ring.intt(ring.reduce(c0 + ring.multiply(c1, self.secret_at(ring))))
            for ring, c0, c1 in zip(rings, first, second, strict=True)
        ]

    def plaintext(self, plaintext: bytes) -> Polynomial:
        """Return a plaintext, in NTT form."""
        payload = Payload(plaintext, 5)
        (level,) = payload.integers("Q")
        payload.bytes(SCALE)
        result = payload.polynomial(self.q[: level + 1])
        payload.end()
        return result

    def ciphertext(self, ciphertext: bytes) -> tuple[Polynomial, Polynomial]:
        """Return the components of a ciphertext that has no seed, in NTT form."""
        payload = Payload(ciphertext, 6)
        degree, level = payload.integers("II")
        assert degree == 1
        payload.bytes(SCALE)
        first, second = (payload.polynomial(self.q[: level + 1]) for _ in range(2))
        payload.end()
        return first, second

    def seeded(self, ciphertext: bytes) -> tuple[bytes, Polynomial, Polynomial]:
        """Return the seed of a seeded ciphertext and its components, in NTT form."""
        payload = Payload(ciphertext, 6)
        kind, level = payload.integers("II")
        assert kind == 0
        payload.bytes(SCALE)
        result = self._seeded(payload, self.q[: level + 1])
        payload.end()
        return result

    def _seeded(self, payload: Payload, rings: list[PrimeRing]) -> tuple[bytes, Polynomial, Polynomial]:
        seed = payload.bytes(SEED)
        return seed, payload.polynomial(rings), limbs(seed, rings)

    def fresh(self, ciphertext: bytes, plaintext: bytes) -> tuple[bytes, np.ndarray]:
        """Return the seed and the error of a seeded ciphertext of a plaintext."""
        seed, first, second = self.seeded(ciphertext)
        rings = self.q[: len(first)]
        return seed, small(rings, self.phase(rings, minus(first, self.plaintext(plaintext)), second))

    def request(self, request: bytes) -> list[tuple[Polynomial, Polynomial]]:
        """Return the masked ciphertexts of a refresh request, in NTT form; of no subring."""
        masked = []
        for subring, first, second in self.compact_request(request):
            assert subring == Subring()
            masked.append(([ring.ntt(v) for ring, v in zip(self.q, first, strict=False)], second))
        return masked

    def compact_request(self, request: bytes) -> list[tuple[Subring, Polynomial, Polynomial]]:
        """Return the masked ciphertexts of a refresh request, each with its subring.

        Of the first component there are the coefficients of the subring, and the second is in NTT form.
        """
        payload = Payload(request, 7)
        level, _to_level, shift, padding = payload.bytes(4)
        (count,) = payload.integers("I")
        assert padding == 0
        rings, lost = self.q[: level + 1], dropped(self.parameters.degree, level, shift)

        def component(place: int, size: int) -> Polynomial:
            if lost is None:
                return payload.polynomial(rings, size)
            integers = payload.rounded(rings, lost[place], size)
            return [(integers % ring.prime).astype(np.int64) for ring in rings]

        masked = []
        for _ in range(count):
            subring = sent([subring_of(payload) for _ in range(payload.bytes(1)[0])])
            first = component(0, size_of(subring, self.parameters.degree))
            second = component(1, self.parameters.degree)
            if lost is not None:
                second = [ring.ntt(v) for ring, v in zip(rings, second, strict=True)]
            masked.append((subring, first, second))
        payload.end()
        return masked

    def reply(self, reply: bytes) -> list[tuple[bytes, Polynomial, Polynomial]]:
        """Return the seeds and the fresh ciphertexts of a refresh reply, in NTT form; of no subring."""
        fresh = []
        for subring, seed, first in self.compact_reply(reply):
            assert subring == Subring()
            fresh.append((seed, first, limbs(seed, self.q[: len(first)])))
        return fresh

    def compact_reply(self, reply: bytes) -> list[tuple[Subring, bytes, Polynomial]]:
        """Return subrings, seeds and traces of the first components, in NTT form and each value once."""
        payload, fresh = Payload(reply, 8), []
        level, count = payload.integers("II")
        for _ in range(count):
            subring, seed = subring_of(payload), payload.bytes(SEED)
            size = size_of(subring, self.parameters.degree)
            fresh.append((subring, seed, payload.polynomial(self.q[: level + 1], size)))
        payload.end()
        return fresh

    def public_key(self, key: bytes) -> tuple[bytes, np.ndarray]:
        """Return the seed and the error of a public key: an encryption of zero modulo QP."""
        payload = Payload(key, 3)
        seed = payload.bytes(SEED)
        secret = [self.secret_at(ring) for ring in self.q + self.p]
        error = self._key_error(payload, Expansion(seed), self.q, secret)
        payload.end()
        return seed, error

    def evaluation_keys(self, keys: bytes) -> tuple[list[bytes], list[np.ndarray]]:
        """Return the seeds of evaluation keys, and for each its digits' errors (digits, N).

        A digit's message is P times what the key switches from, modulo the digit's primes, and zero modulo
        the others: "Better Bootstrapping for Approximate Homomorphic Encryption" (Han and Ki, 2019).
        """
        payload = Payload(keys, 4)
        count, padding = payload.integers("II")
        assert padding == 0
        seeds, errors = [], []
        for _ in range(count):
            element, level = payload.integers("QQ")
            q, step = self.q[: level + 1], len(self.p)
            secret = [self.secret_at(ring) for ring in q + self.p]
            if element == 0:  # the relinearisation key: from s^2 to s
                source = [ring.multiply(s, s) for ring, s in zip(q, secret, strict=False)]
            else:  # from s to its image under the inverse of the automorphism
                source = secret[: level + 1]
                secret = [ring.ntt(self._image(element)) for ring in q + self.p]
            factor = math.prod(self.parameters.p)
            source = [ring.multiply(s, factor % ring.prime) for ring, s in zip(q, source, strict=True)]
            seed = payload.bytes(SEED)
            expansion = Expansion(seed)
            digits = [
                self._key_error(
                    payload, expansion, q, secret, {j: source[j] for j in range(level + 1)[i : i + step]}
                )
                for i in range(0, level + 1, step)
            ]
            seeds.append(seed)
            errors.append(np.stack(digits))
        payload.end()
        return seeds, errors

    def _image(self, element: int) -> np.ndarray:
        """Return the secret's image under the inverse of X -> X^element."""
        degree, real = self.parameters.degree, self.parameters.real
        half = 2 * degree if real else degree  # X^half = -1
        places = np.arange(degree) * pow(element, -1, 2 * half) % (2 * half)
        if real:  # X^i + X^-i is the same for i and -i, and changes its sign with half - i
            places = np.minimum(places, 2 * half - places)
            places = np.where(places > degree, half + (half - places), places)
        image = np.empty_like(self.secret)
        image[places % half] = np.where(places < half, self.secret, -self.secret)
        return image

    def _key_error(
        self,
        payload: Payload,
        expansion: Expansion,
        q: list[PrimeRing],
        secret: list[np.ndarray],
        message: Mapping[int, np.ndarray] = MappingProxyType({}),
    ) -> np.ndarray:
        """Return the error of an encryption modulo QP, which is in Montgomery form: times 2^64."""
        rings = q + self.p
        first = payload.polynomial(rings)
        second = expansion.polynomial(q) + expansion.polynomial(self.p)
        phases = []
        for i, (ring, c0, c1, s) in enumerate(zip(rings, first, second, secret, strict=True)):
            phase = ring.reduce(c0 + ring.multiply(c1, s))
            phase = ring.multiply(phase, pow(1 << 64, -1, ring.prime))
            phases.append(ring.intt(ring.reduce(phase - message.get(i, 0))))
        return small(rings, phases)

    def seeds(self, keys: bytes) -> list[bytes]:
        """Return the seeds of evaluation keys, which are not opened."""
        payload = Payload(keys, 4)
        count, _ = payload.integers("II")
        seeds = []
        for _ in range(count):
            _, level = payload.integers("QQ")
            seeds.append(payload.bytes(SEED))
            for _ in range(0, level + 1, len(self.p)):
                payload.skip(self.q[: level + 1] + self.p)
        payload.end()
        return seeds
