"""The masked refresh: it keeps values, hides them, and serves once."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cipherlm.engine import (
    Ciphertext,
    InvalidArgumentError,
    KeyMaterialError,
    LevelError,
    Parameters,
    Plaintext,
    RefreshReply,
    RefreshRequest,
    ScaleError,
    SecretKey,
    wrap_probability,
)
from tests.encryption.frames import VERSIONS, frame

from .conftest import FRESH, PRODUCT, Party


def refresh(party: Party, inputs, **options):
    """Both halves, over the wire."""
    request, mask = party.evaluator.mask(inputs, party.public_key, **options)
    received = RefreshRequest.from_bytes(request.to_bytes(), party.parameters)
    reply = RefreshReply.from_bytes(party.secret_key.refresh(received).to_bytes(), party.parameters)
    return party.evaluator.unmask(reply, mask)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    level=st.integers(1, 4),
    to_level=st.integers(0, 4),
    shift=st.integers(0, 8),
    count=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_values_stay(each: Party, level, to_level, shift, count, seed):
    x = [each.values(1, seed + i) for i in range(count)]
    inputs = [each.secret_key.encrypt(v) for v in x]
    for v, before, after in zip(
        x, inputs, refresh(each, inputs, level=level, to_level=to_level, shift=shift), strict=True
    ):
        assert after.level == to_level
        assert after.scale == before.scale / 2**shift
        assert each.error(after, v) < 4 * PRODUCT * 2**shift
        if to_level:
            assert each.error(each.evaluator.multiply(after, v, rescale=True), v * v) < 8 * PRODUCT * 2**shift


def coefficients(plaintext: Plaintext) -> np.ndarray:
    """The coefficients of a plaintext, by the inverse of decoding, in units of 1/scale."""
    slots = plaintext.decode() * plaintext.scale
    size = plaintext.parameters.slots
    exponents = np.array([pow(5, j, 4 * size) for j in range(size)])
    spectrum = np.zeros(4 * size, complex)
    spectrum[exponents] = slots
    spectrum[-exponents % (4 * size)] = slots.conj()
    return (np.fft.fft(spectrum)[: 2 * size] / (2 * size)).real


def test_the_client_sees_uniform_integers_whatever_the_message(party: Party):
    """The client's view: c1 and the decrypted integers, for two very different messages."""
    modulus = float(np.prod([float(q) for q in party.parameters.q[:2]]))
    views = []
    for message in (np.zeros(party.parameters.slots), party.values(100)):
        ct = party.secret_key.encrypt(message)
        seen = []
        for _ in range(8):
            request, _mask = party.evaluator.mask([ct], party.public_key, level=1)
            plaintext = decrypt_request(party, request)
            seen.append(coefficients(plaintext) / modulus)
        views.append(np.concatenate(seen))
    for view in views:
        assert np.abs(view).max() <= 0.5 + 1e-9
        histogram, _ = np.histogram(view, 64, (-0.5, 0.5))
        mean = len(view) / 64
        chi_square = ((histogram - mean) ** 2 / mean).sum()
        assert chi_square < 63 + 6 * np.sqrt(2 * 63)
    # No linear trace of the message in what is seen.
    message = coefficients(Plaintext.encode(party.parameters, party.values(100)))
    repeated = np.tile(message, len(views[1]) // len(message))
    correlation = np.corrcoef(views[1], repeated)[0, 1]
    assert abs(correlation) < 6 / np.sqrt(len(repeated))


def decrypt_request(party: Party, request: RefreshRequest) -> Plaintext:
    """What the client decrypts, by way of its own fresh encryption of it."""
    return party.secret_key.decrypt_plaintext(
        first_ciphertext(party, party.secret_key.refresh(request).to_bytes())
    )


def first_ciphertext(party: Party, reply: bytes) -> Ciphertext:
    """Put a reply's only ciphertext in a frame of its own, at scale 1."""
    level, _count = struct.unpack_from("<II", reply, 64)
    one = struct.pack("<QQi", 1 << 63, 0, -127)
    payload = struct.pack("<BxxxI", 0, level) + one + reply[73:-4]
    header = reply[:4] + struct.pack("<HH", VERSIONS[6], 6) + reply[8:64]
    return Ciphertext.from_bytes(frame(header, payload), party.parameters)


def test_both_components_are_masked_afresh(party: Party):
    ct = party.secret_key.encrypt(party.values())
    first, second = (party.evaluator.mask([ct], party.public_key)[0].to_bytes() for _ in range(2))
    same = np.mean(np.frombuffer(first[72:-4], np.uint8) == np.frombuffer(second[72:-4], np.uint8))
    assert same < 0.01  # 1/256 by chance


def test_a_mask_serves_once(party: Party):
    ct = party.secret_key.encrypt(party.values())
    request, mask = party.evaluator.mask([ct], party.public_key)
    reply = party.secret_key.refresh(request)
    party.evaluator.unmask(reply, mask)
    with pytest.raises(InvalidArgumentError, match="once"):
        party.evaluator.unmask(reply, mask)


def test_mistakes(party: Party):
    ev, ct = party.evaluator, party.secret_key.encrypt(party.values(), 1)
    with pytest.raises(LevelError):
        ev.mask([ct], party.public_key, level=2)
    with pytest.raises(LevelError):
        ev.mask([ct], party.public_key, to_level=5)
    with pytest.raises(InvalidArgumentError):
        ev.mask([ct], party.public_key, shift=61)
    with pytest.raises(InvalidArgumentError):
        ev.mask([ct], party.public_key, shift=-1)
    with pytest.raises(InvalidArgumentError, match="at most 4096"):
        ev.mask([ct] * 4097, party.public_key)
    with pytest.raises(ScaleError, match="flooding"):
        ev.rerandomize(ev.drop_level(ct, 0), party.public_key, flood=42)
    stranger = SecretKey.generate(party.parameters)
    with pytest.raises(KeyMaterialError):
        ev.mask([ct], stranger.public_key())
    request, mask = ev.mask([ct], party.public_key, to_level=2)
    with pytest.raises(KeyMaterialError):
        stranger.refresh(request)
    other, _ = ev.mask([ct, ct], party.public_key, to_level=2)
    with pytest.raises(InvalidArgumentError):
        ev.unmask(party.secret_key.refresh(other), mask)
    higher, _ = ev.mask([ct], party.public_key, to_level=3)
    with pytest.raises(LevelError):
        ev.unmask(party.secret_key.refresh(higher), mask)


@pytest.mark.parametrize(
    ("level", "shift", "lost"),
    [(1, 0, 0), (1, 1, 0), (1, 2, 5), (1, 8, 6 + 11), (1, 16, 14 + 19), (0, 8, 6 + 11), (2, 8, 0)],
)
def test_bytes_are_packed(party: Party, level, shift, lost):
    ct = party.secret_key.encrypt(party.values())
    request, _ = party.evaluator.mask([ct, ct], party.public_key, level=level, to_level=4, shift=shift)
    bits = 2 * sum(q.bit_length() for q in party.parameters.q[: level + 1]) - lost
    assert len(request.to_bytes()) == 64 + 8 + 2 * (2 + bits * party.parameters.degree // 8) + 4
    bits = sum(q.bit_length() for q in party.parameters.q)
    reply = party.secret_key.refresh(request).to_bytes()
    assert len(reply) == 64 + 8 + 2 * (1 + bits * party.parameters.degree // 8 + 32) + 4


def test_wrap_probability():
    parameters = Parameters.preset(14)
    assert wrap_probability(parameters, 1, parameters.scale, 16) < 2**-31
    assert wrap_probability(parameters, 0, parameters.scale, 16) == 1.0


@pytest.mark.parametrize("flood", [0, 10, 24])
def test_rerandomize(each: Party, flood):
    x = each.values()
    ct = each.secret_key.encrypt(x, 1)
    result = each.evaluator.rerandomize(ct, each.public_key, flood=flood)
    noise = 2.0**flood * np.sqrt(each.parameters.degree) / ct.scale
    assert each.error(result, x) < PRODUCT + 6 * noise
    if flood == 24:
        assert each.error(result, x) > noise / 10
    assert each.error(ct, x) < FRESH
