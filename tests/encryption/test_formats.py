"""Known answers: what frames look like to the byte, and which polynomial a seed stands for.

Keys and ciphertexts that were written must be readable by every later version, and by both sides.
"""

from __future__ import annotations

import json
import math
import struct

import numpy as np
import pytest

from cipherlm.engine import (
    Ciphertext,
    EvaluationKeys,
    Evaluator,
    Parameters,
    Plaintext,
    PublicKey,
    RefreshReply,
    RefreshRequest,
    SecretKey,
)

from .expansion import Expansion, limbs, stream
from .frames import VERSIONS, Payload, dropped, frame, packed, packed_rounded
from .opener import Opener
from .rings import PrimeRing, minus

SEED = bytes(range(32))
KEY = bytes.fromhex("00112233445566778899aabbccddeeff")
SCALE = struct.pack("<QQi", 1 << 63, 0, 28 - 127)  # high and low half of a mantissa of 128 bits, exponent


@pytest.fixture(scope="module")
def parameters() -> Parameters:
    """Primes that are written here, so that nothing follows a preset."""
    literal = {"log_n": 12, "q": [274877816833, 268460033], "p": [274878062593], "log_scale": 28}
    return Parameters.from_dict(literal | {"ring": "standard"})


def rings(parameters: Parameters) -> tuple[list[PrimeRing], list[PrimeRing]]:
    q, p = (
        [PrimeRing(parameters.degree, prime) for prime in primes] for primes in (parameters.q, parameters.p)
    )
    return q, p


def written(of: list[PrimeRing], start: int) -> bytes:
    """Return a polynomial as it stands in frames: its residues, packed, prime by prime."""
    return b"".join(packed(ring, (np.arange(ring.degree) + start) * 7919 % ring.prime) for ring in of)


def handmade(parameters: Parameters, kind: int, payload: bytes, key: bytes = KEY) -> bytes:
    """Return a frame: magic, version, type, parameters, key, length, zeros; payload; checksum."""
    fingerprint = bytes.fromhex(parameters.fingerprint)
    return frame(b"CLHE" + struct.pack("<HH", VERSIONS.get(kind, 1), kind) + fingerprint + key, payload)


def test_the_stream_of_a_seed():
    """BLAKE2Xb with OutputLengthUnknown of golang.org/x/crypto, which keys' seeds are expanded with."""
    assert stream(SEED, 0, 1).hex() == (
        "81774c0b7d0ced259644243682535a5f118748f61ea4ebac47afcad2efdd2c10"
        "9e0fac79583a09169fa9e7fc88e567d7e1c9c2cca79e129bf58cb38d105ada85"
    )


def test_the_polynomial_of_a_key_s_seed(parameters: Parameters):
    q, p = rings(parameters)
    expansion = Expansion(SEED)
    found = [*expansion.polynomial(q), *expansion.polynomial(p)]
    assert [values[:3].tolist() for values in found] == [
        [49342639397, 234114734687, 232442358700],
        [205979117, 92847316, 53475569],
        [269082742749, 197661362619, 113087086832],
    ]


def test_the_polynomial_of_a_ciphertext_s_seed(parameters: Parameters):
    q, _ = rings(parameters)
    found = limbs(SEED, q)
    assert [values[:3].tolist() for values in found] == [
        [232637702096, 184099436416, 198822174693],
        [206535363, 47914629, 195923040],
    ]
    # The engine expands it to the same: it doubles a ciphertext and writes both components.
    payload = struct.pack("<II", 0, 1) + SCALE + SEED + written(q, 0)
    ciphertext = Ciphertext.from_bytes(handmade(parameters, 6, payload), parameters)
    doubled = Evaluator(parameters).add(ciphertext, ciphertext).to_bytes()
    expected = b"".join(packed(ring, 2 * v % ring.prime) for ring, v in zip(q, found, strict=True))
    assert doubled[-4 - len(expected) : -4] == expected


def test_the_fingerprint_of_parameters(parameters: Parameters):
    assert parameters.fingerprint == "2b51fafbc0d6e10585e08f5d149c6f5a"
    payload = Payload(parameters.to_bytes(), 1)
    assert (payload.parameters.hex(), payload.key) == (parameters.fingerprint, bytes(16))
    text = json.loads(payload.rest())
    assert {name: text[name] for name in parameters.to_dict()} == parameters.to_dict()


def payloads(parameters: Parameters) -> dict[type, tuple[int, bytes]]:
    """Return the type's number and a payload by the description of the format, for each type."""
    q, p = rings(parameters)
    relinearisation = struct.pack("<QQ", 0, 1) + SEED + written(q + p, 1) + written(q + p, 2)
    rotation = struct.pack("<QQ", 5, 0) + SEED[::-1] + written(q[:1] + p, 3)
    half = [packed(ring, np.arange(ring.degree // 2) * 7919 % ring.prime) for ring in q]
    eighth = packed(q[0], np.arange(parameters.degree // 8) * 7919 % q[0].prime)
    reply = b"\x00" + SEED + written(q, 1) + b"\x80" + SEED[::-1] + b"".join(half)
    ternary = bytes(0b10_01_00_10 if i % 2 else 0b01_00_00_10 for i in range(parameters.degree // 4))
    return {
        SecretKey: (2, ternary),
        PublicKey: (3, SEED + written(q + p, 0)),
        EvaluationKeys: (4, struct.pack("<II", 2, 0) + relinearisation + rotation),
        Plaintext: (5, struct.pack("<Q", 1) + SCALE + written(q, 0)),
        Ciphertext: (6, struct.pack("<II", 1, 1) + SCALE + written(q, 0) + written(q, 5)),
        RefreshRequest: (
            7,
            bytes([0, 1, 0, 0])
            + struct.pack("<I", 3)
            + (b"\x01\x00" + written(q[:1], 0) + written(q[:1], 5))
            + (b"\x01\x82" + eighth + written(q[:1], 3))
            + (b"\x02\x80\x83" + written(q[:1], 7) + written(q[:1], 2)),
        ),
        RefreshReply: (8, struct.pack("<II", 1, 2) + reply),
    }


@pytest.mark.parametrize(
    "kind", [SecretKey, PublicKey, EvaluationKeys, Plaintext, Ciphertext, RefreshRequest, RefreshReply]
)
def test_frames_are_written_and_read_by_their_description(parameters: Parameters, kind: type):
    number, payload = payloads(parameters)[kind]
    frame = handmade(parameters, number, payload, bytes(16) if kind is Plaintext else KEY)
    assert kind.from_bytes(frame, parameters).to_bytes() == frame


@pytest.mark.parametrize(("level", "shift", "lost"), [(0, 8, (11, 6)), (1, 2, (5, 0)), (1, 16, (19, 14))])
def test_a_rounded_request_by_its_description(
    parameters: Parameters, level: int, shift: int, lost: tuple[int, int]
):
    """Multiples of powers of two: digits of 61 bits, all the lowest before those of what is left."""
    rings_used = rings(parameters)[0][: level + 1]
    modulus = math.prod(ring.prime for ring in rings_used)
    places = np.arange(parameters.degree).astype(object)
    payload = bytes([level, 1, shift, 0]) + struct.pack("<I", 1) + b"\x01\x00"
    for bits in lost:
        coefficients = (places + 1) * (modulus // 4099) % modulus
        coefficients[0] = modulus - 1
        payload += packed_rounded(coefficients, rings_used, bits)
    assert dropped(parameters.degree, level, shift) == lost
    frame = handmade(parameters, 7, payload)
    assert RefreshRequest.from_bytes(frame, parameters).to_bytes() == frame
    assert len(payload) == 10 + sum(
        ((modulus - 1) >> bits).bit_length() * parameters.degree // 8 for bits in lost
    )


def test_a_seeded_ciphertext_by_its_description(parameters: Parameters):
    q, _ = rings(parameters)
    frame = handmade(parameters, 6, struct.pack("<II", 0, 1) + SCALE + SEED + written(q, 0))
    found = Ciphertext.from_bytes(frame, parameters)
    assert (found.seeded, found.level, found.scale) == (True, 1, 2.0**28)
    assert found.to_bytes() == frame


def test_the_engine_decrypts_what_numpy_encrypts(parameters: Parameters):
    """c0 = m - a s + e, of a secret, a message and an error of choice."""
    _, ternary = payloads(parameters)[SecretKey]
    secret_key = SecretKey.from_bytes(handmade(parameters, 2, ternary), parameters)
    opener = Opener(secret_key)
    expected = [-1, 0, 0, 1, -1, 0, 1, -1]  # two bits each: 2, 0, 0, 1 and 2, 0, 1, 2
    assert opener.secret[:8].tolist() == expected
    message, error = np.zeros(parameters.degree, np.int64), np.arange(parameters.degree) % 7 - 3
    message[0] = 5 << 20
    a = limbs(SEED, opener.q)
    product = [ring.multiply(v, opener.secret_at(ring)) for ring, v in zip(opener.q, a, strict=True)]
    first = minus([ring.ntt(message + error) for ring in opener.q], product)
    payload = struct.pack("<II", 0, 1) + SCALE + SEED
    payload += b"".join(packed(ring, ring.reduce(v)) for ring, v in zip(opener.q, first, strict=True))
    ciphertext = Ciphertext.from_bytes(handmade(parameters, 6, payload), parameters)
    plaintext = opener.plaintext(secret_key.decrypt_plaintext(ciphertext).to_bytes())
    for ring, values in zip(opener.q, plaintext, strict=True):
        assert (ring.intt(values) == ring.reduce(message + error)).all()
    assert np.abs(secret_key.decrypt(ciphertext) - 5 / 256).max() < 1e-4
