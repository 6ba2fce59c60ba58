"""What the engine writes, read by its description: header, payload, checksum."""

from __future__ import annotations

import hashlib
import math
import struct
import zlib

import numpy as np

from .rings import PrimeRing

HEADER, SEED, SCALE = 64, 32, 20
VERSIONS = {6: 4, 7: 4, 8: 5}  # of types that are not of version 1: ciphertexts, refreshes, replies to them
DIGIT = 61
"""The bits of a digit, of which numbers below the product of two primes have two."""


def checksum(body: bytes) -> bytes:
    """Return the checksum of a header and a payload: short in the types that are only passed on."""
    (kind,) = struct.unpack_from("<H", body, 6)
    if kind in VERSIONS:
        return struct.pack(">I", zlib.crc32(body))
    return hashlib.blake2b(body, digest_size=32).digest()


def checksum_size(data: bytes) -> int:
    """Return how many bytes the checksum takes of a frame that begins like this."""
    return len(checksum(data[:HEADER]))


def dropped(degree: int, level: int, shift: int) -> tuple[int, int] | None:
    """Return the bits that the coefficients of a refresh request have lost, by component, if any."""
    if level > 1 or shift < 2:
        return None
    return shift - 2 + (degree.bit_length() - 3) // 2, shift - 2


class Payload:
    """Reads a frame's payload, after its header and checksum were compared with what they must be."""

    def __init__(self, data: bytes, kind: int) -> None:
        assert data[:8] == struct.pack("<4sHH", b"CLHE", VERSIONS.get(kind, 1), kind)
        assert struct.unpack_from("<Q", data, 40) == (len(data) - HEADER,)
        assert data[48:HEADER] == bytes(16)
        body = data[: len(data) - checksum_size(data)]
        assert checksum(body) == data[len(body) :]
        self.parameters, self.key = data[8:24], data[24:40]
        self._data, self._at = body[HEADER:], 0

    def bytes(self, count: int) -> bytes:
        piece = self._data[self._at : self._at + count]
        assert len(piece) == count
        self._at += count
        return piece

    def integers(self, form: str) -> tuple[int, ...]:
        return struct.unpack("<" + form, self.bytes(struct.calcsize("<" + form)))

    def polynomial(self, rings: list[PrimeRing], size: int = 0) -> list[np.ndarray]:
        """Read residues, each of the bits of its prime, by prime: as many as the degree, or ``size``."""
        return [self._residues(ring, size or ring.degree) for ring in rings]

    def rounded(self, rings: list[PrimeRing], lost: int, size: int) -> np.ndarray:
        """Read coefficients modulo the product of the primes without the lowest bits, as integers."""
        modulus = math.prod(ring.prime for ring in rings)
        width = ((modulus - 1) >> lost).bit_length()
        multiples = sum(
            unpacked(self.bytes(size * bits // 8), bits).astype(object) << DIGIT * place
            for place, bits in enumerate(digits(width))
        )
        assert (multiples <= (modulus - 1) >> lost).all()
        return multiples << lost

    def skip(self, rings: list[PrimeRing]) -> None:
        for ring in rings:
            self.bytes(ring.degree * ring.prime.bit_length() // 8)

    def _residues(self, ring: PrimeRing, size: int) -> np.ndarray:
        width = ring.prime.bit_length()
        residues = unpacked(self.bytes(size * width // 8), width)
        assert (residues < ring.prime).all()
        return residues

    def rest(self) -> bytes:
        return self.bytes(len(self._data) - self._at)

    def end(self) -> None:
        assert self._at == len(self._data)


def frame(header: bytes, payload: bytes) -> bytes:
    """Put a payload behind a header of the same kind, with the right length and checksum."""
    body = header[:40] + struct.pack("<Q", len(payload) + checksum_size(header)) + bytes(16) + payload
    return body + checksum(body)


def sealed(data: bytes) -> bytes:
    """Put the right length and checksum on a changed frame, as an attacker would."""
    return frame(data, data[HEADER : len(data) - checksum_size(data)])


def digits(width: int) -> list[int]:
    """Return the bits of the digits of numbers of so many bits, the lowest first."""
    return [width] if width <= DIGIT else [DIGIT, width - DIGIT]


def unpacked(data: bytes, width: int) -> np.ndarray:
    """Return numbers that were written in so many bits each."""
    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little").reshape(-1, width)
    padded = np.zeros((len(bits), 64), np.uint8)
    padded[:, :width] = bits
    return np.packbits(padded, axis=1, bitorder="little").view("<i8")[:, 0]


def packed(ring: PrimeRing, residues: np.ndarray) -> bytes:
    """Write residues, each in the bits of its prime: the inverse of Payload.polynomial for one prime."""
    return packed_bits(residues, ring.prime.bit_length())


def packed_rounded(integers: np.ndarray, rings: list[PrimeRing], lost: int) -> bytes:
    """Write coefficients without the lowest bits: the inverse of Payload.rounded."""
    width = ((math.prod(ring.prime for ring in rings) - 1) >> lost).bit_length()
    multiples, written = integers >> lost, b""
    for bits in digits(width):
        written += packed_bits((multiples % (1 << bits)).astype(np.int64), bits)
        multiples = multiples >> bits
    return written


def packed_bits(values: np.ndarray, width: int) -> bytes:
    bits = np.unpackbits(values.astype("<i8").view(np.uint8).reshape(-1, 8), axis=1, bitorder="little")
    return np.packbits(bits[:, :width], bitorder="little").tobytes()
