"""The secret key stays where it is."""

from __future__ import annotations

import ast
import copy
import gc
import pickle
import types
from pathlib import Path

import numpy as np
import pytest

import cipherlm.engine
from cipherlm.engine import Evaluator, KeyMaterialError, SecretKey

from .conftest import PRODUCT, Party

PACKAGE = Path(cipherlm.engine.__file__).parent
SERVER_SIDE = (
    "bootstrapping",
    "ciphertext",
    "evaluator",
    "linear",
    "parameters",
    "polynomial",
    "public",
    "refresh",
)


def test_repr_shows_a_fingerprint_only(party: Party):
    for key in (party.secret_key, party.public_key, party.keys):
        assert repr(key) == str(key) == f"{type(key).__name__}({key.fingerprint})"
        assert len(key.fingerprint) == 32


def test_the_fingerprint_is_not_computed_from_the_key(party: Party):
    """Two keys read from the same coefficients under other names are other keys."""
    data = bytearray(party.secret_key.to_bytes())
    assert bytes.fromhex(party.secret_key.fingerprint) == data[24:40]
    assert bytes.fromhex(party.secret_key.fingerprint) not in bytes(data[64:-32])


def test_the_secret_key_cannot_be_pickled_or_copied(party: Party):
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="SecretKey"):
            attempt(party.secret_key)
    assert not hasattr(party.secret_key, "__dict__")


def test_server_modules_never_import_the_secret_key():
    """Imports and names: nothing on the server's side can even name a secret key."""
    for name in SERVER_SIDE:
        tree = ast.parse((PACKAGE / f"{name}.py").read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                assert node.module != "secret"
            if isinstance(node, ast.Name | ast.Attribute):
                assert "SecretKey" not in ast.dump(node)


def test_no_server_object_refers_to_the_secret_key(party: Party):
    """Walk everything that is reachable from what a server holds."""
    ct = party.secret_key.encrypt([1, 2])
    request, mask = party.evaluator.mask([ct], party.public_key)
    seen: set[int] = set()
    stack: list[object] = [party.evaluator, party.keys, party.public_key, ct, request, mask]
    while stack:
        item = stack.pop()
        if id(item) in seen or isinstance(item, type | types.ModuleType | types.FunctionType):
            continue
        seen.add(id(item))
        assert not isinstance(item, SecretKey)
        stack.extend(gc.get_referents(item))


def test_no_server_bytes_contain_the_secret_key(party: Party):
    """Search what goes to the server for the key's coefficients, as they are written."""
    coefficients = party.secret_key.to_bytes()[64:-32]
    keys = party.secret_key.evaluation_keys([1], conjugation=True)
    ct = party.secret_key.encrypt(party.values())
    for item in (party.parameters, party.public_key, keys, ct):
        data = item.to_bytes()
        for start in range(0, len(coefficients), 64):
            assert coefficients[start : start + 16] not in data


def test_a_key_serves_up_to_its_level(party: Party):
    """The library would use a key of a lower level without a word, and be wrong."""
    keys = party.secret_key.evaluation_keys({1: 2, 2: 4}, conjugation=1, relinearization=3)
    ev, x = Evaluator(party.parameters, keys), party.values()
    low, high = party.secret_key.encrypt(x, 2), party.secret_key.encrypt(x, 3)
    assert party.error(ev.rotate(low, 1), np.roll(x, -1)) < PRODUCT
    assert party.error(ev.rotate(high, 2), np.roll(x, -2)) < PRODUCT
    assert party.error(ev.multiply(high, high), x * x) < PRODUCT
    with pytest.raises(KeyMaterialError, match="serves up to level 2"):
        ev.rotate(high, 1)
    with pytest.raises(KeyMaterialError, match="serves up to level 2"):
        ev.rotate_hoisted(high, [2, 1])
    with pytest.raises(KeyMaterialError, match="serves up to level 1"):
        ev.conjugate(low)
    with pytest.raises(KeyMaterialError, match="serves up to level 3"):
        ev.multiply(party.secret_key.encrypt(x), x * 0 + 1) and ev.square(party.secret_key.encrypt(x))
    assert keys.relinearization_level == 3
    assert sorted(keys.galois_levels.values()) == [1, 2, 4]


def test_without_keys(party: Party):
    ev, x = Evaluator(party.parameters), party.values()
    ct = party.secret_key.encrypt(x)
    assert party.error(ev.multiply(ev.add(ct, ct), x), 2 * x * x) < PRODUCT
    for attempt in (lambda: ev.square(ct), lambda: ev.rotate(ct, 1), lambda: ev.conjugate(ct)):
        with pytest.raises(KeyMaterialError):
            attempt()


def test_keys_of_another_client(party: Party):
    stranger = SecretKey.generate(party.parameters)
    ct = stranger.encrypt(party.values())
    with pytest.raises(KeyMaterialError, match="evaluation keys are of key"):
        party.evaluator.rotate(ct, 1)
    assert stranger.fingerprint != party.secret_key.fingerprint
