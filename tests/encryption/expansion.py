"""The uniform polynomials that seeds stand for, from BLAKE2Xb or AES by rejection sampling, in NumPy."""

from __future__ import annotations

import hashlib
import struct

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR

from .rings import PrimeRing

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


LEFT = [np.roll(range(4), -shift) for shift in range(4)]


def rotated(words: np.ndarray, bits: int) -> np.ndarray:
    low = words << np.uint64(64 - bits)
    words >>= np.uint64(bits)
    words |= low
    return words


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
    a, b, c, d = v.reshape(4, 4, -1)
    for turn in range(12):
        order = words[ORDER[turn % 10]]
        for half in range(2):
            x, y = order[8 * half : 8 * half + 8].reshape(4, 2, 1).transpose(1, 0, 2)
            for term, right, left in ((x, 32, 24), (y, 16, 63)):
                a += b
                a += term
                d = rotated(d ^ a, right)
                c += d
                b = rotated(b ^ c, left)
            turns = (3, 2, 1) if half else (1, 2, 3)
            b, c, d = (part[LEFT[turn]] for part, turn in zip((b, c, d), turns, strict=True))
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
    """The uniform polynomials that a key's seed stands for, as Lattigo samples them.

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
                self._read(-(-ring.degree // 128))
            result.append(words[accepted[: ring.degree]].astype(np.int64))
            used += int(accepted[ring.degree - 1]) + 1
        self._words = self._words[-(-used // 128) * 128 :]
        return result

    def _read(self, blocks: int) -> None:
        self._words = np.concatenate(
            [self._words, np.frombuffer(self._bytes(blocks), ">u8").astype(np.uint64)]
        )

    def _bytes(self, blocks: int) -> bytes:
        first, count = self._pieces, 16 * blocks
        self._pieces += count
        return stream(self._seed, first, count)


class LimbExpansion(Expansion):
    """The same modulo one prime of a ciphertext, from the key stream of AES-256 in counter mode."""

    def __init__(self, seed: bytes, number: int) -> None:
        super().__init__(seed)
        self._encryptor = Cipher(AES256(seed), CTR(struct.pack(">QQ", number, 0))).encryptor()

    def _bytes(self, blocks: int) -> bytes:
        return self._encryptor.update(bytes(1024 * blocks))


def limbs(seed: bytes, rings: list[PrimeRing]) -> list[np.ndarray]:
    """Return the uniform polynomial that a ciphertext's seed stands for: a stream for each prime."""
    return [LimbExpansion(seed, number).polynomial([ring])[0] for number, ring in enumerate(rings)]
