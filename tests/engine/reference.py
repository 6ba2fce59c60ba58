"""Encryption as the mathematics has it, in NumPy, to look behind what the engine writes.

Frames are read here, seeds expanded and transforms undone without the engine's help: with the
secret key, what is left of an encryption is its error.
"""

from __future__ import annotations

import hashlib
import struct
from functools import cached_property

import numpy as np
from sympy import primitive_root

from cipherlm.engine import Parameters, SecretKey

HEADER, CHECKSUM, SEED, SCALE = 64, 32, 32, 20


class PrimeRing:
    """Polynomials modulo X^N + 1 and a prime: int64 arrays (..., N) of values in [0, prime)."""

    def __init__(self, degree: int, prime: int) -> None:
        assert prime < 1 << 51, "a float64 finds the quotient of a product up to here"
        self.degree, self.prime = degree, prime
        self.root = pow(int(primitive_root(prime)), (prime - 1) // (2 * degree), prime)

    def multiply(self, a: np.ndarray, b: np.ndarray | int) -> np.ndarray:
        """Multiply modulo the prime; int64 products wrap, and so does what is taken off them."""
        quotient = (a.astype(float) * b / self.prime).astype(np.int64)
        rest = a * b - quotient * self.prime
        rest += np.where(rest < 0, self.prime, 0)
        return rest - np.where(rest >= self.prime, self.prime, 0)

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
            a = self.reduce(np.stack(halves, axis=-2)).reshape(a.shape)
            blocks *= 2
        return a

    def intt(self, values: np.ndarray) -> np.ndarray:
        """Return the coefficients: algorithm 2 of the same paper."""
        a, blocks = values, self.degree
        while blocks > 1:
            blocks //= 2
            parts = a.reshape(*a.shape[:-1], blocks, 2, -1)
            total = self.reduce(parts[..., 0, :] + parts[..., 1, :])
            twisted = self.reduce(parts[..., 0, :] - parts[..., 1, :])
            twisted = self.multiply(twisted, self._backward[blocks : 2 * blocks, None])
            a = np.stack([total, twisted], axis=-2).reshape(a.shape)
        return self.multiply(a, pow(self.degree, -1, self.prime))


# BLAKE2b: the first words of its state and the order in which its rounds take a message (RFC 7693).
INITIAL = np.array(
    [
        0x6A09E667F3BCC908, 0xBB67AE8584CAA73B, 0x3C6EF372FE94F82B, 0xA54FF53A5F1D36F1,
        0x510E527FADE682D1, 0x9B05688C2B3E6C1F, 0x1F83D9ABFB41BD6B, 0x5BE0CD19137E2179,
    ],
    np.uint64,
)  # fmt: skip
ORDER = [
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
    [14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3],
    [11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4],
    [7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8],
    [9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13],
    [2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9],
    [12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11],
    [13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10],
    [6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5],
    [10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0],
]


def rotated(words: np.ndarray, bits: int) -> np.ndarray:
    return words >> np.uint64(bits) | words << np.uint64(64 - bits)


def blake2b(parameters: np.ndarray, message: bytes) -> np.ndarray:
    """Hash one message of at most 128 bytes under many parameter blocks (8, count): digests (8, count).

    hashlib does not take the depth of 0 that BLAKE2X has.
    """
    words = np.frombuffer(message.ljust(128, b"\0"), "<u8")
    state = INITIAL[:, None] ^ parameters
    v = np.concatenate([state, np.broadcast_to(INITIAL[:, None], state.shape)])
    v[12] ^= np.uint64(len(message))
    v[14] = ~v[14]  # the last block
    # The four columns at once, then the four diagonals.
    a, b, c, d = v[0:4], v[4:8], v[8:12], v[12:16]
    for turn in range(12):
        order = words[ORDER[turn % 10]]
        for half in range(2):
            x, y = order[8 * half : 8 * half + 8].reshape(4, 2, 1).transpose(1, 0, 2)
            a = a + b + x
            d = rotated(d ^ a, 32)
            c = c + d
            b = rotated(b ^ c, 24)
            a = a + b + y
            d = rotated(d ^ a, 16)
            c = c + d
            b = rotated(b ^ c, 63)
            sign = 2 * half - 1
            b, c, d = (np.roll(part, sign * shift, 0) for part, shift in ((b, 1), (c, 2), (d, 3)))
    return state ^ np.concatenate([a ^ c, b ^ d])


def stream(seed: bytes, first: int, count: int) -> bytes:
    """Return 64-byte pieces of BLAKE2Xb of a key and an empty message, of a length not known beforehand.

    "BLAKE2X" (Aumasson and others, 2016): each piece is a hash of the root, at a node offset of its own;
    the upper half of the offset is the length, 2^32 - 1 for an unknown one.
    """
    length = 0xFFFFFFFF << 32
    parameters = np.zeros((8, count), np.uint64)
    parameters[0] = 64 | 64 << 32  # sizes of digest and leaf; no key, fanout or depth
    parameters[1] = np.arange(first, first + count, dtype=np.uint64) | np.uint64(length)
    parameters[2] = 64 << 8  # inner size
    root = hashlib.blake2b(key=seed, node_offset=length).digest()
    return blake2b(parameters, root).T.astype("<u8").tobytes()


class Expansion:
    """The uniform polynomials that a seed stands for, as Lattigo samples them.

    A residue is the next 8 bytes, big-endian, cut to the bits of its prime; one that is not below the
    prime is thrown away. Bytes are taken in blocks of 1,024, and a new polynomial begins a new block.
    """

    def __init__(self, seed: bytes) -> None:
        self._seed, self._pieces = seed, 0
        self._words = np.empty(0, np.uint64)

    def polynomial(self, rings: list[PrimeRing]) -> list[np.ndarray]:
        """Return a polynomial's residues, by prime."""
        result, used = [], 0
        for ring in rings:
            mask = np.uint64((1 << ring.prime.bit_length()) - 1)
            while True:
                words = self._words[used:] & mask
                accepted = np.flatnonzero(words < np.uint64(ring.prime))
                if len(accepted) >= ring.degree:
                    break
                self._read(ring.degree)
            result.append(words[accepted[: ring.degree]].astype(np.int64))
            used += int(accepted[ring.degree - 1]) + 1
        self._words = self._words[-(-used // 128) * 128 :]
        return result

    def _read(self, words: int) -> None:
        count = -(-words // 128) * 16  # whole blocks
        data = stream(self._seed, self._pieces, count)
        self._pieces += count
        self._words = np.concatenate([self._words, np.frombuffer(data, ">u8").astype(np.uint64)])


class Payload:
    """Reads a frame's payload, after its header and checksum were compared with what they must be."""

    def __init__(self, data: bytes, kind: int) -> None:
        assert data[:8] == struct.pack("<4sHH", b"CLHE", 1, kind)
        assert struct.unpack_from("<Q", data, 40) == (len(data) - HEADER,)
        assert data[48:HEADER] == bytes(16)
        assert hashlib.blake2b(data[:-CHECKSUM], digest_size=CHECKSUM).digest() == data[-CHECKSUM:]
        self.parameters, self.key = data[8:24], data[24:40]
        self._data, self._at = data[HEADER:-CHECKSUM], 0

    def bytes(self, count: int) -> bytes:
        piece = self._data[self._at : self._at + count]
        assert len(piece) == count
        self._at += count
        return piece

    def integers(self, form: str) -> tuple[int, ...]:
        return struct.unpack("<" + form, self.bytes(struct.calcsize("<" + form)))

    def polynomial(self, rings: list[PrimeRing]) -> list[np.ndarray]:
        """Read residues, each of the bits of its prime, by prime."""
        return [self._residues(ring) for ring in rings]

    def _residues(self, ring: PrimeRing) -> np.ndarray:
        width = ring.prime.bit_length()
        packed = np.frombuffer(self.bytes(ring.degree * width // 8), np.uint8)
        bits = np.unpackbits(packed, bitorder="little").reshape(ring.degree, width)
        padded = np.zeros((ring.degree, 64), np.uint8)
        padded[:, :width] = bits
        residues = np.packbits(padded, axis=1, bitorder="little").view("<i8")[:, 0]
        assert (residues < ring.prime).all()
        return residues

    def end(self) -> None:
        assert self._at == len(self._data)


def frame(header: bytes, payload: bytes) -> bytes:
    """Put a payload behind a header of the same kind, with the right length and checksum."""
    body = header[:40] + struct.pack("<Q", len(payload) + CHECKSUM) + bytes(16) + payload
    return body + hashlib.blake2b(body, digest_size=CHECKSUM).digest()


class Opener:
    """Opens encryptions with the secret key."""

    def __init__(self, secret_key: SecretKey) -> None:
        self.parameters: Parameters = secret_key.parameters
        degree = self.parameters.degree
        self.q = [PrimeRing(degree, prime) for prime in self.parameters.q]
        self.p = [PrimeRing(degree, prime) for prime in self.parameters.p]
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

    def phase(
        self, rings: list[PrimeRing], first: list[np.ndarray], second: list[np.ndarray]
    ) -> list[np.ndarray]:
        """Return c0 + c1 s, in coefficients, by prime."""
        return [
            ring.intt(ring.reduce(c0 + ring.multiply(c1, self.secret_at(ring))))
            for ring, c0, c1 in zip(rings, first, second, strict=True)
        ]

    def fresh(self, ciphertext: bytes, plaintext: bytes) -> tuple[bytes, np.ndarray]:
        """Return the seed and the error of a seeded ciphertext of a plaintext."""
        payload = Payload(ciphertext, 6)
        kind, level = payload.integers("II")
        assert kind == 0
        rings = self.q[: level + 1]
        scale = payload.bytes(SCALE)
        seed, first = payload.bytes(SEED), payload.polynomial(rings)
        payload.end()
        message = Payload(plaintext, 5)
        assert (*message.integers("Q"), message.bytes(SCALE)) == (level, scale)
        for c0, m in zip(first, message.polynomial(rings), strict=True):
            c0 -= m
        message.end()
        return seed, small(rings, self.phase(rings, first, Expansion(seed).polynomial(rings)))


def small(rings: list[PrimeRing], residues: list[np.ndarray]) -> np.ndarray:
    """Return the integers that residues stand for, which must be the same modulo every prime."""
    integers = [ring.centred(values) for ring, values in zip(rings, residues, strict=True)]
    for other in integers[1:]:
        assert (other == integers[0]).all(), "the residues are not those of one small polynomial"
    return integers[0]
