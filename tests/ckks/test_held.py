"""What tensors say of the slots of ciphertexts that they have refreshed, held against the secret key."""

from __future__ import annotations

import numpy as np
import pytest

from cipherlm.engine import Subring
from cipherlm.schemes.ckks import layout
from cipherlm.schemes.ckks.session import InProcess, Server

from .test_side_by_side import hosted

BOUND = 1e-3
"""Of what slots that are to be equal differ, and of imaginary parts, in parts of the greatest slot."""


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("gpt2", 1),
        pytest.param("llama", 5, marks=pytest.mark.slow),
        pytest.param("llama", 11, marks=pytest.mark.slow),
    ],
)
def test_slots_are_as_they_are_said_to_be(keys, name, prefix, monkeypatch):
    """Of a first chunk and a later one, alone and side by side, of tokens, and of a chunk behind tokens."""
    module, geometry, before, _ = hosted(name, prefix)
    client = keys.client(geometry)
    process = InProcess(Server({"all": module}, geometry), client)
    refresher = process.session.arithmetic._refresher
    found, most = [], layout.MOST_REPETITIONS

    def watched(ciphertexts, held, level, shift):
        for ciphertext, subrings in zip(ciphertexts, held, strict=True):
            slots = client.secret_key.decrypt(ciphertext)
            greatest = np.abs(slots).max()
            if len(subrings) == 1 and subrings[0].real:
                assert np.abs(slots.imag).max() < BOUND * greatest
            parts = [slots] if len(subrings) == 1 else [slots.real, slots.imag]
            for part, subring in zip(parts, subrings, strict=True):
                copies = part.reshape(subring.copies, -1)
                assert np.abs(copies - copies[0]).max() < BOUND * greatest
                found.append(subring)
        known = [[Subring(min(most, copies), real) for copies, real in subrings] for subrings in held]
        return refresher(ciphertexts, known, level, shift)

    # More than a refresh makes use of: so that whatever is said is looked at.
    monkeypatch.setattr(layout, "MOST_REPETITIONS", geometry.parameters.slots)
    process.session.arithmetic._refresher = watched
    first = geometry.tokens - geometry.start
    end = prefix
    for count in (first, geometry.tokens, 1, 3):
        process.evaluate("all", before[end : end + count], end)
        end += count
    process.evaluate("all", before[prefix : prefix + first + geometry.tokens], prefix)
    assert {subring.real for subring in found} == {False, True}
    assert min(subring.copies for subring in found) == 1
    assert max(subring.copies for subring in found) > most
    process.session.close()
