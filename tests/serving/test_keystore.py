import json
import os
import struct
import threading
import time
from pathlib import Path

import pytest

from cipherlm.serving import keystore
from cipherlm.serving.keystore import (
    DamagedKeysError,
    KeySet,
    KeyStoreError,
    PassphraseError,
    PermissionsError,
    delete,
    keys_directory,
    names,
    parameters_fingerprint,
)

SECRET = b"the secret key \x00\xff" * 100
PASSPHRASE = "correct horse"
DESCRIPTION = {"scheme": "ckks", "name": "tiny", "parameters": {"log_n": 14, "moduli": [55, 45]}}
PUBLIC = {
    "evaluation": lambda file: file.write(memoryview(b"evaluation" * 1000)),
    "public": lambda file: file.write(b"public"),
}


@pytest.fixture(autouse=True)
def cheap_scrypt(monkeypatch):
    monkeypatch.setattr(keystore, "_SCRYPT_COST", (14, 8, 1))


def create(root: Path, name: str = "mine", passphrase: str | None = None, **changes) -> KeySet:
    given = {"description": DESCRIPTION, "secret": SECRET, "public": PUBLIC, **changes}
    return KeySet.create(root, name, given["description"], given["secret"], given["public"], passphrase)


def secret_file(root: Path) -> Path:
    return root / "mine" / "secret"


@pytest.mark.parametrize("passphrase", [None, PASSPHRASE])
def test_keys_come_back(tmp_path, passphrase):
    made = create(tmp_path, passphrase=passphrase)
    loaded = KeySet.load(tmp_path, "mine")
    assert loaded.secret(passphrase) == made.secret(passphrase) == SECRET
    assert loaded.has_passphrase == (passphrase is not None)
    assert loaded.description == DESCRIPTION
    assert loaded.fingerprints == made.fingerprints
    assert loaded.sizes == {"evaluation": 10000, "public": 6}
    assert loaded.path("public").read_bytes() == b"public"
    # printf public | sha256sum
    assert loaded.fingerprints["public"] == "efa1f375d76194fa51a3556a97e641e61685f914d446979da50a551a4333ffd7"
    assert loaded.created.endswith("+00:00")
    loaded.verify()


def test_only_an_encrypted_file_hides_the_secret(tmp_path):
    create(tmp_path)
    assert SECRET in secret_file(tmp_path).read_bytes()
    create(tmp_path, "other", PASSPHRASE)
    for path in (tmp_path / "other").iterdir():
        assert SECRET[:16] not in path.read_bytes()
        assert PASSPHRASE.encode() not in path.read_bytes()


def test_equal_secrets_under_equal_passphrases_differ_on_disk(tmp_path):
    create(tmp_path, "mine", PASSPHRASE)
    create(tmp_path, "other", PASSPHRASE)
    first, second = ((tmp_path / name / "secret").read_bytes() for name in ("mine", "other"))
    assert first[-200:] != second[-200:]


def test_accents_may_be_composed_either_way(tmp_path):
    create(tmp_path, passphrase="caf\u00e9")
    assert KeySet.load(tmp_path, "mine").secret("cafe\u0301") == SECRET


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_nobody_else_can_read(tmp_path):
    old = os.umask(0)
    try:
        create(tmp_path / "keys")
    finally:
        os.umask(old)
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "keys" / "mine").stat().st_mode & 0o777 == 0o700
    for path in (tmp_path / "keys" / "mine").iterdir():
        assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
@pytest.mark.parametrize(("what", "mode"), [("mine/secret", 0o640), ("mine/secret", 0o604), ("mine", 0o750)])
def test_what_others_can_read_is_refused(tmp_path, what, mode):
    create(tmp_path)
    (tmp_path / what).chmod(mode)
    with pytest.raises(PermissionsError, match=f"{mode:o}.*chmod"):
        KeySet.load(tmp_path, "mine").secret()


def test_wrong_or_missing_passphrase(tmp_path):
    keys = create(tmp_path, passphrase=PASSPHRASE)
    with pytest.raises(PassphraseError, match="wrong passphrase"):
        keys.secret("correct horsf")
    with pytest.raises(PassphraseError, match="needs its passphrase: give --passphrase-file, --ask"):
        keys.secret()
    with pytest.raises(PassphraseError, match="empty"):
        keys.secret("")
    with pytest.raises(PassphraseError, match="empty"):
        create(tmp_path, "other", "")
    assert names(tmp_path) == ["mine"]


@pytest.mark.parametrize("passphrase", [None, PASSPHRASE])
def test_damage_anywhere_is_found(tmp_path, passphrase):
    keys = create(tmp_path, passphrase=passphrase)
    whole = secret_file(tmp_path).read_bytes()
    for position in [*range(0, 60), 100, len(whole) - 40, len(whole) - 1]:
        damaged = bytearray(whole)
        damaged[position] ^= 1
        secret_file(tmp_path).write_bytes(damaged)
        with pytest.raises(KeyStoreError) as caught:
            keys.secret(passphrase)
        assert not isinstance(caught.value, PassphraseError)
    for length in (0, 10, 60, len(whole) - 1):
        secret_file(tmp_path).write_bytes(whole[:length])
        with pytest.raises(DamagedKeysError):
            keys.secret(passphrase)
    secret_file(tmp_path).write_bytes(whole + b"\n")
    with pytest.raises(DamagedKeysError):
        keys.secret(passphrase)
    secret_file(tmp_path).unlink()
    with pytest.raises(DamagedKeysError, match="missing"):
        keys.secret(passphrase)


def forged(whole: bytes, cost: tuple[int, int, int]) -> bytes:
    """Return a secret file that asks for other work, with a checksum that fits."""
    body = bytearray(whole[:-32])
    struct.pack_into("BBB", body, 18, *cost)
    return bytes(body) + keystore.hashlib.sha256(body).digest()


@pytest.mark.parametrize("cost", [(31, 8, 1), (20, 255, 1), (20, 8, 255), (4, 8, 1), (17, 0, 1), (17, 8, 0)])
def test_a_file_cannot_ask_for_any_amount_of_work(tmp_path, monkeypatch, cost):
    keys = create(tmp_path, passphrase=PASSPHRASE)
    secret_file(tmp_path).write_bytes(forged(secret_file(tmp_path).read_bytes(), cost))
    monkeypatch.setattr(keystore, "_derive", lambda *_: pytest.fail("the work was begun"))
    with pytest.raises(DamagedKeysError, match="too much work"):
        keys.secret(PASSPHRASE)


def test_work_within_bounds_is_done_and_authenticated(tmp_path):
    keys = create(tmp_path, passphrase=PASSPHRASE)
    secret_file(tmp_path).write_bytes(forged(secret_file(tmp_path).read_bytes(), (14, 8, 2)))
    with pytest.raises(PassphraseError, match="wrong"):
        keys.secret(PASSPHRASE)


def test_no_error_or_repr_holds_a_secret(tmp_path):
    keys = create(tmp_path, passphrase=PASSPHRASE)
    clear = create(tmp_path, "clear")
    assert "secret key" not in repr(keys) + str(vars(clear))
    for action in (lambda: keys.secret("Guess"), lambda: create(tmp_path, passphrase="Guess")):
        with pytest.raises(KeyStoreError) as caught:
            action()
        text = repr(caught.value)
        assert "Guess" not in text
        assert PASSPHRASE not in text
        assert "secret key" not in text


def test_a_name_is_taken_once(tmp_path):
    create(tmp_path)
    with pytest.raises(KeyStoreError, match="already"):
        create(tmp_path, secret=b"another")
    assert KeySet.load(tmp_path, "mine").secret() == SECRET


def test_of_two_that_take_a_name_at_once_one_wins(tmp_path):
    both = threading.Barrier(2)
    outcomes = []

    def public(file):
        both.wait(timeout=30)
        file.write(b"x")

    def attempt(secret: bytes) -> None:
        try:
            create(tmp_path, secret=secret, public={"public": public})
            outcomes.append(secret)
        except KeyStoreError:
            outcomes.append(None)

    threads = [threading.Thread(target=attempt, args=(secret,)) for secret in (b"one", b"two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = (outcome for outcome in outcomes if outcome)
    assert len(outcomes) == 2
    assert KeySet.load(tmp_path, "mine").secret() == winner
    assert os.listdir(tmp_path) == ["mine"]


def test_a_failed_run_leaves_nothing(tmp_path):
    def full(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        create(tmp_path, public={"public": full})
    assert os.listdir(tmp_path) == []


def test_leftovers_of_a_killed_run_go_when_they_are_old(tmp_path):
    for name, age in ((".new-old", 2 * 86400), (".new-other", 60)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    create(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".new-other", "mine"]
    assert names(tmp_path) == ["mine"]


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../mine", "a/b", "/etc", "-x", ".hidden", "a" * 65, "a\n", "ä"]
)
def test_names_stay_in_the_directory(tmp_path, name):
    for action in (
        lambda: create(tmp_path, name),
        lambda: KeySet.load(tmp_path, name),
        lambda: delete(tmp_path, name),
    ):
        with pytest.raises(KeyStoreError, match="not a name"):
            action()


@pytest.mark.parametrize("kind", ["secret", "keys.json", "../x", ""])
def test_kinds_cannot_take_other_files(tmp_path, kind):
    with pytest.raises(KeyStoreError, match="not a kind"):
        create(tmp_path, public={kind: lambda file: None})


def test_delete_and_names(tmp_path):
    assert names(tmp_path / "nothing") == []
    create(tmp_path, "b")
    create(tmp_path, "a")
    assert names(tmp_path) == ["a", "b"]
    (tmp_path / "a" / "keys.json").write_text("damaged")
    assert names(tmp_path) == ["a", "b"]
    delete(tmp_path, "a")
    assert os.listdir(tmp_path) == ["b"]
    with pytest.raises(KeyStoreError, match="no keys 'a'"):
        delete(tmp_path, "a")


def test_loading_what_is_not_there_says_what_is(tmp_path):
    with pytest.raises(KeyStoreError, match="it has none"):
        KeySet.load(tmp_path / "nothing", "mine")
    create(tmp_path, "theirs")
    with pytest.raises(KeyStoreError, match="there are: theirs"):
        KeySet.load(tmp_path, "mine")


def test_public_files_are_checked(tmp_path):
    keys = create(tmp_path)
    path = keys.path("evaluation")
    path.write_bytes(b"Evaluation" * 1000)
    with pytest.raises(DamagedKeysError, match="evaluation is damaged"):
        KeySet.load(tmp_path, "mine").verify()
    path.write_bytes(b"short")
    with pytest.raises(DamagedKeysError, match="wrong size"):
        KeySet.load(tmp_path, "mine")
    with pytest.raises(KeyStoreError, match="no 'other' keys"):
        keys.path("other")


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"files": []},
        {"files": {"../../x": {"size": 1, "sha256": "0" * 64}}},
        {"files": {"public": {"size": "6", "sha256": "0" * 64}}},
        {"files": {"public": {"size": 6, "sha256": "0"}}},
        {"fingerprint": "0" * 64},
        {"description": {"scheme": "ckks", "parameters": {}}},
        {"description": None},
        {"created": 5},
    ],
)
def test_a_damaged_description_is_refused(tmp_path, change):
    create(tmp_path)
    path = tmp_path / "mine" / "keys.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(KeyStoreError, match=r"keys\.json"):
        KeySet.load(tmp_path, "mine")


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", "[" * 100_000, "\xff"])
def test_a_description_that_is_none_is_refused(tmp_path, text):
    create(tmp_path)
    (tmp_path / "mine" / "keys.json").write_text(text, encoding="latin-1")
    with pytest.raises(DamagedKeysError):
        KeySet.load(tmp_path, "mine")


def test_keys_fit_models_of_their_parameters(tmp_path):
    keys = create(tmp_path)
    assert keys.fits({**DESCRIPTION, "name": "another", "fingerprint": "0" * 64})
    assert not keys.fits({**DESCRIPTION, "parameters": {"log_n": 15}})
    assert not keys.fits({**DESCRIPTION, "scheme": "tfhe"})
    reordered = {"parameters": {"moduli": [55, 45], "log_n": 14}, "scheme": "ckks"}
    assert parameters_fingerprint(reordered) == keys.parameters_fingerprint


def test_descriptions_are_what_json_makes_of_them(tmp_path):
    parameters = {"levels": {2: 1, 10: 2}, "shape": (1, 2), "scale": 0.1}
    keys = create(tmp_path, description={"scheme": "tfhe", "parameters": parameters})
    assert KeySet.load(tmp_path, "mine").parameters_fingerprint == keys.parameters_fingerprint
    assert keys.fits({"scheme": "tfhe", "parameters": parameters})
    with pytest.raises(ValueError, match="JSON"):
        create(tmp_path, "other", description={"scheme": "tfhe", "parameters": float("nan")})
    assert names(tmp_path) == ["mine"]


def test_where_keys_are(tmp_path, monkeypatch):
    monkeypatch.delenv("CIPHERLM_HOME", raising=False)
    monkeypatch.setattr(keystore.platformdirs, "user_data_dir", lambda name: f"/data/{name}")
    assert keys_directory() == Path("/data/cipherlm/keys")
    monkeypatch.setenv("CIPHERLM_HOME", str(tmp_path))
    assert keys_directory() == tmp_path / "keys"
    assert keys_directory("elsewhere") == Path("elsewhere")
    create(None)
    assert names() == ["mine"]
    assert KeySet.load(None, "mine").secret() == SECRET


def test_the_default_cost_is_what_is_recommended(monkeypatch, tmp_path):
    monkeypatch.undo()
    keys = create(tmp_path, passphrase=PASSPHRASE)
    assert keys.secret(PASSPHRASE) == SECRET
    log2_n, r, p = secret_file(tmp_path).read_bytes()[18:21]
    assert (128 * r * p << log2_n) >= 128 << 20
