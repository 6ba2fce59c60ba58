"""Objects survive the wire; anything else is refused with an exception."""

from __future__ import annotations

import io
import struct
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cipherlm import engine
from cipherlm.engine import (
    Ciphertext,
    CorruptDataError,
    EngineError,
    EvaluationKeys,
    Evaluator,
    Parameters,
    ParametersError,
    Plaintext,
    PublicKey,
    RefreshReply,
    RefreshRequest,
    SecretKey,
)
from tests.encryption.frames import checksum_size, sealed

from .conftest import DEEP, FRESH, Party

HEADER = 64


@pytest.fixture(scope="module")
def tiny() -> Party:
    """Small objects, for many of them."""
    return Party.make(Parameters.preset(12), (1, 2))


@pytest.fixture(scope="module")
def blobs(tiny: Party) -> dict[type, bytes]:
    ct = tiny.secret_key.encrypt(tiny.values())
    request, _ = tiny.evaluator.mask([ct], tiny.public_key, shift=8)  # which is rounded
    objects = [
        tiny.parameters,
        tiny.secret_key,
        tiny.public_key,
        tiny.keys,
        Plaintext.encode(tiny.parameters, [1, 2]),
        tiny.evaluator.add(ct, ct),
        request,
        tiny.secret_key.refresh(request),
    ]
    return {type(item): item.to_bytes() for item in objects}


class Trickle(io.RawIOBase):
    """A file that gives a few bytes at a time, as a socket may."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def read(self, size: int = -1) -> bytes:
        piece = self.data[self.at : self.at + min(size, 7919)]
        self.at += len(piece)
        return piece


def test_everything_comes_back_the_same(tiny: Party, blobs):
    for kind, data in blobs.items():
        assert kind.from_bytes(data, tiny.parameters).to_bytes() == data
        assert kind.read_from(Trickle(data), tiny.parameters).to_bytes() == data


def test_a_stream_of_objects(tiny: Party, blobs):
    """Each object is read to its end and not a byte further."""
    stream = io.BytesIO(b"".join(blobs.values()))
    for kind, data in blobs.items():
        assert kind.read_from(stream, tiny.parameters).to_bytes() == data
    assert stream.read() == b""


def test_what_was_read_works(tiny: Party, blobs):
    p = Parameters.from_bytes(blobs[Parameters])
    secret = SecretKey.from_bytes(blobs[SecretKey], p)
    public = PublicKey.from_bytes(blobs[PublicKey], p)
    evaluator = Evaluator(p, EvaluationKeys.from_bytes(blobs[EvaluationKeys], p))
    assert secret.fingerprint == public.fingerprint == tiny.secret_key.fingerprint
    x = tiny.values()
    ct = Ciphertext.from_bytes(public.encrypt(x).to_bytes(), p)
    result = evaluator.rotate(evaluator.multiply(ct, ct), 2)
    got = tiny.secret_key.decrypt(Ciphertext.from_bytes(result.to_bytes(), p))
    assert np.abs(got - np.roll(x * x, -2)).max() < 2**-6  # scale 2^28
    assert np.abs(secret.decrypt(secret.encrypt(x)) - x).max() < 2**-15


def test_seeds_halve_keys_and_fresh_ciphertexts(party: Party):
    p, degree = party.parameters, party.parameters.degree
    bits_q, bits_qp = sum(q.bit_length() for q in p.q), sum(q.bit_length() for q in p.q + p.p)
    fresh = party.secret_key.encrypt(party.values())
    whole = party.evaluator.add(fresh, fresh)
    assert fresh.seeded
    assert not whole.seeded
    assert len(whole.to_bytes()) == pytest.approx(2 * bits_q * degree / 8, rel=0.01)
    assert len(fresh.to_bytes()) == pytest.approx(len(whole.to_bytes()) / 2, rel=0.01)
    assert len(party.public_key.to_bytes()) == pytest.approx(bits_qp * degree / 8, rel=0.01)
    keys = party.secret_key.evaluation_keys([1, 2, 3])
    digits = p.max_level + 1  # with one prime in P
    assert len(keys.to_bytes()) == pytest.approx(4 * digits * bits_qp * degree / 8, rel=0.01)
    compressed = keys.nbytes
    keys.expand()
    assert keys.nbytes == 2 * compressed
    assert len(keys.to_bytes()) < compressed


def test_a_key_for_fewer_levels_is_smaller(party: Party):
    high = party.secret_key.evaluation_keys([1], relinearization=False)
    low = party.secret_key.evaluation_keys({1: 1}, relinearization=False)
    assert len(low.to_bytes()) < 0.25 * len(high.to_bytes())


def test_truncated(tiny: Party, blobs):
    for kind, data in blobs.items():
        for size in (0, 1, HEADER - 1, HEADER, HEADER + 5, len(data) // 2, len(data) - 33, len(data) - 1):
            with pytest.raises(CorruptDataError):
                kind.from_bytes(data[:size], tiny.parameters)
        with pytest.raises(CorruptDataError, match="after the end"):
            kind.from_bytes(data + b"x", tiny.parameters)


def test_foreign(tiny: Party, party: Party, blobs):
    for kind, data in blobs.items():
        if kind is not Parameters:
            with pytest.raises(ParametersError, match="other parameters"):
                kind.from_bytes(data, party.parameters)
        for other in blobs:
            if other is not kind:
                with pytest.raises(EngineError):
                    other.from_bytes(data, tiny.parameters)
    for junk in (b"", b"PK\x03\x04" + bytes(100), bytes(1000), b"CLHE" + bytes(1000)):
        with pytest.raises(CorruptDataError):
            Ciphertext.from_bytes(junk, tiny.parameters)


def test_a_version_to_come_is_named(tiny: Party, blobs):
    data = bytearray(blobs[Ciphertext])
    data[4] = 9
    with pytest.raises(CorruptDataError, match="version 9"):
        Ciphertext.from_bytes(data, tiny.parameters)


def test_a_version_that_was_is_refused(tiny: Party, blobs):
    """They had a longer checksum, and before that whole coefficients, or another generator of seeds."""
    for kind, version in ((Ciphertext, 4), (RefreshRequest, 4), (RefreshReply, 5)):
        data = bytearray(blobs[kind])
        assert data[4] == version
        data[4] -= 1
        with pytest.raises(CorruptDataError, match=f"{version - 1}: this engine reads version {version}"):
            kind.from_bytes(data, tiny.parameters)


def test_coefficients_beyond_the_modulus_are_refused(tiny: Party, blobs):
    """Ones in all bits of a coefficient of a request, in either component."""
    for span in (slice(HEADER + 10, HEADER + 26), slice(-20, -4)):
        damaged = bytearray(blobs[RefreshRequest])
        damaged[span] = b"\xff" * 16
        with pytest.raises(CorruptDataError, match="not below its modulus"):
            RefreshRequest.from_bytes(sealed(bytes(damaged)), tiny.parameters)


def test_every_flipped_bit_is_found(tiny: Party, blobs):
    random = np.random.default_rng(5)
    for kind, data in blobs.items():
        for bit in random.integers(0, 8 * len(data), 40):
            changed = bytearray(data)
            changed[bit // 8] ^= 1 << (bit % 8)
            try:
                found = kind.from_bytes(changed, tiny.parameters)
            except EngineError:
                continue
            # Only the name of the key can change and leave an object: the checksum covers it.
            pytest.fail(f"{found} was read from {kind.__name__} with bit {bit} flipped")


def test_a_hostile_length_costs_nothing(tiny: Party, blobs):
    """Lengths are checked before memory is taken, and more is never read than is there."""
    for length in (2**63, 2**40, 2**33, 0, 3):
        data = bytearray(blobs[Ciphertext])
        struct.pack_into("<Q", data, 40, length)
        start = time.perf_counter()
        with pytest.raises(CorruptDataError):
            Ciphertext.from_bytes(data, tiny.parameters)
        assert time.perf_counter() - start < 1
    for kind, offset in ((EvaluationKeys, 0), (RefreshRequest, 4), (RefreshReply, 4)):
        data = bytearray(blobs[kind])
        struct.pack_into("<I", data, HEADER + offset, 2**32 - 1)
        with pytest.raises(CorruptDataError):
            kind.from_bytes(sealed(bytes(data)), tiny.parameters)


def test_a_truncated_request_costs_nothing(tiny: Party):
    """A header and some bytes that promise thousands of ciphertexts take no memory for them."""
    ct = tiny.secret_key.encrypt(tiny.values())
    request, _ = tiny.evaluator.mask([ct] * 8, tiny.public_key)
    data, count = bytearray(request.to_bytes()), 4096
    each = (len(data) - HEADER - 8 - 4) // 8
    struct.pack_into("<Q", data, 40, 8 + count * each + 4)
    struct.pack_into("<I", data, HEADER + 4, count)
    before = engine.memory().heap
    with pytest.raises(CorruptDataError, match="truncated"):
        RefreshRequest.from_bytes(bytes(data) + bytes(2**20), tiny.parameters)
    assert engine.memory().heap < before + 100e6  # 4096 ciphertexts would take 540 MB


def mutated(data: bytes, kind: type, edits, cut: int) -> bytes:
    changed = bytearray(data)
    for position, value in edits:
        # Headers and counts, near the front, are where damage is worth most.
        at = position % len(data) if position % 3 else position % 128
        changed[at] = value
    if cut:
        last = len(changed) - checksum_size(data)
        del changed[HEADER + cut % (last - HEADER) : last]
    struct.pack_into("<H", changed, 6, struct.unpack_from("<H", data, 6)[0])
    changed[:6], changed[8:24] = data[:6], data[8:24]
    return sealed(bytes(changed))


mutations = given(
    edits=st.lists(st.tuples(st.integers(0, 2**24), st.integers(0, 255)), max_size=8),
    cut=st.one_of(st.just(0), st.integers(1, 2**20)),
    honest=st.booleans(),
    data=st.data(),
)


def fuzz(tiny: Party, blobs, edits, cut, honest, data) -> None:
    kind = data.draw(st.sampled_from(sorted(blobs, key=lambda item: item.__name__)))
    changed = mutated(blobs[kind], kind, edits, cut)
    if honest:  # without the checksum made right
        size = checksum_size(changed)
        changed = changed[:-size] + blobs[kind][-size:]
    try:
        found = kind.from_bytes(changed, tiny.parameters)
    except EngineError:
        return
    use(tiny, found)


def use(tiny: Party, item) -> None:
    """Well-formed is good enough to be used: nothing worse than an exception comes of it."""
    try:
        if isinstance(item, Ciphertext):
            tiny.evaluator.rescale(tiny.evaluator.add(item, item))
            tiny.secret_key.decrypt(item)
        elif isinstance(item, Plaintext):
            item.decode()
        elif isinstance(item, EvaluationKeys):
            Evaluator(tiny.parameters, item)
        elif isinstance(item, PublicKey | SecretKey):
            item.encrypt([1])
        elif isinstance(item, RefreshRequest):
            tiny.secret_key.refresh(item)
        elif isinstance(item, RefreshReply):
            ct = tiny.secret_key.encrypt([1])
            _, mask = tiny.evaluator.mask([ct], tiny.public_key)
            tiny.evaluator.unmask(item, mask)
    except EngineError:
        pass


relaxed = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=200, **relaxed)
@mutations
def test_fuzz_a_little(tiny: Party, blobs, edits, cut, honest, data):
    fuzz(tiny, blobs, edits, cut, honest, data)


@pytest.mark.slow
@settings(max_examples=30_000, **relaxed)
@mutations
def test_fuzz(tiny: Party, blobs, edits, cut, honest, data):
    fuzz(tiny, blobs, edits, cut, honest, data)


def test_levels_and_scales_survive(party: Party):
    ct = party.evaluator.rescale(party.secret_key.encrypt(party.values()))
    back = Ciphertext.from_bytes(ct.to_bytes(), party.parameters)
    assert (back.level, back.scale, back.degree) == (ct.level, ct.scale, ct.degree)
    assert party.evaluator.add(ct, back).level == ct.level
    lazy = party.evaluator.multiply(ct, ct, relinearize=False)
    assert Ciphertext.from_bytes(lazy.to_bytes(), party.parameters).degree == 2
    x = party.values()
    fresh = party.evaluator.drop_level(party.secret_key.encrypt(x), 1)
    assert party.error(Ciphertext.from_bytes(fresh.to_bytes(), party.parameters), x) < FRESH
    assert DEEP > FRESH
