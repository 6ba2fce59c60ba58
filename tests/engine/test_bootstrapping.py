"""Bootstrapping, at the smallest parameters that have room for it."""

from __future__ import annotations

import numpy as np
import pytest

from cipherlm.engine import (
    Bootstrapper,
    Parameters,
    ParametersError,
    SecretKey,
    bootstrappable,
)


def test_small_rings_have_no_room_for_it():
    with pytest.raises(ParametersError, match=r"2\^15 or 2\^16"):
        SecretKey.generate(Parameters.preset(12)).bootstrapping_keys()


def test_its_moduli_count_for_security():
    with pytest.raises(ParametersError, match="881 bits"):
        SecretKey.generate(Parameters.preset(15)).bootstrapping_keys()


@pytest.mark.slow
def test_bootstrap(tmp_path):
    parameters = bootstrappable()
    secret_key = SecretKey.generate(parameters)
    keys = secret_key.bootstrapping_keys()
    with open(tmp_path / "keys", "wb") as file:
        size = keys.write_to(file)
    assert size < keys.nbytes
    with open(tmp_path / "keys", "rb") as file:
        keys = type(keys).read_from(file, parameters)
    bootstrapper = Bootstrapper(keys)
    random = np.random.default_rng(1)
    x = random.uniform(-1, 1, parameters.slots) + 1j * random.uniform(-1, 1, parameters.slots)
    result = bootstrapper.bootstrap(secret_key.encrypt(x, 0))
    assert result.level == parameters.max_level
    error = np.abs(secret_key.decrypt(result) - x)
    assert np.sqrt(np.mean(error**2)) < 2**-13
    assert error.max() < 2**-9
