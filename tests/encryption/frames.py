"""What the engine writes, read by its description: header, payload, checksum."""

from __future__ import annotations

import hashlib
import struct

import numpy as np

from .rings import PrimeRing

HEADER, CHECKSUM, SEED, SCALE = 64, 32, 32, 20
VERSIONS = {6: 2, 8: 2}  # of the format of types that are not of version 1: ciphertexts, replies to refreshes


class Payload:
    """Reads a frame's payload, after its header and checksum were compared with what they must be."""

    def __init__(self, data: bytes, kind: int) -> None:
        assert data[:8] == struct.pack("<4sHH", b"CLHE", VERSIONS.get(kind, 1), kind)
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

    def skip(self, rings: list[PrimeRing]) -> None:
        for ring in rings:
            self.bytes(ring.degree * ring.prime.bit_length() // 8)

    def _residues(self, ring: PrimeRing) -> np.ndarray:
        width = ring.prime.bit_length()
        packed = np.frombuffer(self.bytes(ring.degree * width // 8), np.uint8)
        bits = np.unpackbits(packed, bitorder="little").reshape(ring.degree, width)
        padded = np.zeros((ring.degree, 64), np.uint8)
        padded[:, :width] = bits
        residues = np.packbits(padded, axis=1, bitorder="little").view("<i8")[:, 0]
        assert (residues < ring.prime).all()
        return residues

    def rest(self) -> bytes:
        return self.bytes(len(self._data) - self._at)

    def end(self) -> None:
        assert self._at == len(self._data)


def frame(header: bytes, payload: bytes) -> bytes:
    """Put a payload behind a header of the same kind, with the right length and checksum."""
    body = header[:40] + struct.pack("<Q", len(payload) + CHECKSUM) + bytes(16) + payload
    return body + hashlib.blake2b(body, digest_size=CHECKSUM).digest()


def packed(ring: PrimeRing, residues: np.ndarray) -> bytes:
    """Write residues, each in the bits of its prime: the inverse of Payload.polynomial for one prime."""
    width = ring.prime.bit_length()
    bits = np.unpackbits(residues.astype("<i8").view(np.uint8).reshape(-1, 8), axis=1, bitorder="little")
    return np.packbits(bits[:, :width], bitorder="little").tobytes()
