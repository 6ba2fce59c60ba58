"""Keys on the server's disk: uploads, owners, the budget, and what goes wrong there."""

import errno
import hashlib
import os
import random
import stat
from types import SimpleNamespace

import pytest

from cipherlm.serving import keys as keys_module
from cipherlm.serving.failures import Failure
from cipherlm.serving.keys import EXPIRY_SECONDS, UPLOADS_PER_OWNER, KeyStore

from .conftest import MEGABYTE, patch, sha256

LIMITS = {"evaluation": 1000, "public": 100}


class Clock:
    def __init__(self):
        self.now = 1_000_000.0

    def __call__(self):
        self.now += 1
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(tmp_path, clock):
    return KeyStore(tmp_path, LIMITS, 2000, clock=clock)


def put(store, content, owner="a", kind="evaluation"):
    fingerprint = sha256(content)
    store.announce(owner, kind, len(content), fingerprint)
    assert store.append(owner, fingerprint, 0, content)["complete"]
    return fingerprint


def code(action, *arguments, **named):
    with pytest.raises(Failure) as failure:
        action(*arguments, **named)
    return failure.value.code


def test_an_upload(store, tmp_path):
    content = random.Random(0).randbytes(500)
    fingerprint = sha256(content)
    assert code(store.status, "a", fingerprint) == "unknown_keys"
    assert store.announce("a", "evaluation", 500, fingerprint) == {
        "size": 500,
        "received": 0,
        "complete": False,
    }
    store.append("a", fingerprint, 0, content[:200])
    assert store.status("a", fingerprint) == {"size": 500, "received": 200, "complete": False}
    assert code(store.lease, "a", {"evaluation": fingerprint}) == "unknown_keys"
    store.append("a", fingerprint, 200, content[200:])
    done = {"size": 500, "received": 500, "complete": True}
    assert store.status("a", fingerprint) == store.announce("a", "evaluation", 500, fingerprint) == done
    lease = store.lease("a", {"evaluation": fingerprint})
    assert lease.paths["evaluation"].read_bytes() == content


def test_files_are_private(store, tmp_path):
    put(store, b"complete")
    store.announce("a", "evaluation", 100, "00" * 32)
    for path in (tmp_path / "keys").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)


def test_the_next_server_knows_all(store, tmp_path, clock):
    complete, partial = put(store, b"complete"), b"partial" * 9
    store.announce("a", "evaluation", len(partial), sha256(partial))
    store.append("a", sha256(partial), 0, partial[:10])
    (tmp_path / "keys" / "stray").mkdir()
    (tmp_path / "keys" / "stray" / "file").write_text("not ours")
    again = KeyStore(tmp_path, LIMITS, 2000, clock=clock)
    assert again.status("a", complete)["complete"]
    assert again.status("a", sha256(partial)) == {"size": 63, "received": 10, "complete": False}
    assert again.append("a", sha256(partial), 10, partial[10:])["complete"]
    assert again.size == len(b"complete") + len(partial)


def test_a_part_that_was_whole_when_the_server_stopped_starts_anew(store, tmp_path):
    store.announce("a", "evaluation", 4, sha256(b"abcd"))
    next((tmp_path / "keys").rglob("*.part")).write_bytes(b"abcx")
    again = KeyStore(tmp_path, LIMITS, 2000)
    assert code(again.status, "a", sha256(b"abcd")) == "unknown_keys"
    put(again, b"abcd")


@pytest.mark.parametrize(
    ("kind", "size", "fingerprint", "expected"),
    [
        ("evaluation", 1001, "00" * 32, "too_large"),
        ("public", 101, "00" * 32, "too_large"),
        ("secret", 10, "00" * 32, "bad_request"),
        ("evaluation", 0, "00" * 32, "bad_request"),
        ("evaluation", -1, "00" * 32, "bad_request"),
        ("evaluation", 10, "00" * 31, "bad_request"),
        ("evaluation", 10, "AB" * 32, "bad_request"),
        ("evaluation", 10, "../" * 20 + "abcd", "bad_request"),
    ],
)
def test_wrong_announcements(store, tmp_path, kind, size, fingerprint, expected):
    assert code(store.announce, "a", kind, size, fingerprint) == expected
    assert not list((tmp_path / "keys").rglob("*.*"))


def test_wrong_chunks(store):
    content = b"x" * 50
    fingerprint = sha256(content)
    store.announce("a", "evaluation", 50, fingerprint)
    with pytest.raises(Failure) as failure:
        store.append("a", fingerprint, 10, content[10:])
    assert (failure.value.code, failure.value.details["received"]) == ("conflict", 0)
    assert code(store.append, "a", fingerprint, 0, b"") == "bad_request"
    assert code(store.append, "a", fingerprint, 0, content + b"x") == "bad_request"
    assert code(store.announce, "a", "evaluation", 51, fingerprint) == "conflict"
    assert code(store.announce, "a", "public", 50, fingerprint) == "conflict"
    assert store.append("a", fingerprint, 0, content)["complete"]
    assert code(store.append, "a", fingerprint, 0, content) == "conflict"


def test_keys_that_arrive_wrong_are_thrown_away(store, tmp_path):
    fingerprint = sha256(b"right")
    store.announce("a", "evaluation", 5, fingerprint)
    assert code(store.append, "a", fingerprint, 0, b"wrong") == "bad_keys"
    assert code(store.status, "a", fingerprint) == "unknown_keys"
    assert store.size == 0
    assert not list((tmp_path / "keys").rglob("*.*"))
    put(store, b"right")


def test_a_file_that_somebody_removed(store, tmp_path):
    fingerprint = put(store, b"complete")
    next((tmp_path / "keys").rglob("*.evaluation")).unlink()
    assert code(store.lease, "a", {"evaluation": fingerprint}) == "unknown_keys"
    put(store, b"complete")


def test_owners_do_not_see_each_other(store):
    fingerprint = put(store, b"mine", "a")
    assert code(store.status, "b", fingerprint) == "unknown_keys"
    assert code(store.lease, "b", {"evaluation": fingerprint}) == "unknown_keys"
    assert code(store.delete, "b", fingerprint) == "unknown_keys"
    assert code(store.append, "b", fingerprint, 0, b"mine") == "unknown_keys"
    put(store, b"mine", "b")
    store.delete("b", fingerprint)
    assert store.status("a", fingerprint)["complete"]
    assert code(store.status, "b", fingerprint) == "unknown_keys"


def test_the_least_recently_used_make_room(store, clock, tmp_path):
    old, used, held = (put(store, bytes([n]) * 600) for n in range(3))
    store.lease("a", {"evaluation": used}).release()
    lease = store.lease("a", {"evaluation": held})
    store = KeyStore(tmp_path, LIMITS, 2000, clock=clock)  # the order outlives the server
    lease = store.lease("a", {"evaluation": held})
    newer = put(store, b"n" * 800)
    assert code(store.status, "a", old) == "unknown_keys"
    put(store, b"m" * 600)
    assert code(store.status, "a", used) == "unknown_keys"
    assert lease.paths["evaluation"].exists()
    store.lease("a", {"evaluation": newer})
    assert code(store.announce, "a", "evaluation", 1000, "00" * 32) == "storage"
    assert code(store.delete, "a", held) == "conflict"
    lease.release()
    lease.release()
    put(store, b"l" * 900)
    assert code(store.status, "a", held) == "unknown_keys"
    assert store.size <= 2000


def test_a_refused_announcement_evicts_nothing(store):
    idle = put(store, b"i" * 900)
    store.lease("a", {"evaluation": put(store, b"h" * 900)})
    store.lease("a", {"public": put(store, b"p" * 100, kind="public")})
    store.lease("a", {"public": put(store, b"q" * 100, kind="public")})
    assert code(store.announce, "a", "evaluation", 1000, "00" * 32) == "storage"
    assert store.status("a", idle)["complete"]


def test_announcements_evict_nothing(store):
    victims = {owner: put(store, owner.encode() * 450, owner) for owner in ("v", "w", "x", "y")}
    store.announce("mallory", "evaluation", 400, f"{0:064x}")
    assert code(store.announce, "mallory", "evaluation", 400, f"{1:064x}") == "busy"
    store.append("mallory", f"{0:064x}", 0, b"x" * 399)
    assert all(store.status(owner, victims[owner])["complete"] for owner in victims)


def test_owners_within_their_share_keep_their_keys(store):
    kept = [put(store, bytes([n]) * 450, "victim") for n in range(2)]
    own = [put(store, bytes([10 + n]) * 500, "mallory") for n in range(6)]
    assert all(store.status("victim", fingerprint)["complete"] for fingerprint in kept)
    assert [code(store.status, "mallory", fingerprint) for fingerprint in own[:4]] == ["unknown_keys"] * 4
    assert all(store.status("mallory", fingerprint)["complete"] for fingerprint in own[4:])


def test_who_took_more_than_a_share_gives_it_back(tmp_path, clock):
    store = KeyStore(tmp_path, LIMITS, 2000, owners=("early", "late"), clock=clock)
    hoard = [put(store, bytes([n]) * 500, "early") for n in range(4)]
    late = [put(store, bytes([10 + n]) * 500, "late") for n in range(2)]
    assert [code(store.status, "early", fingerprint) for fingerprint in hoard[:2]] == ["unknown_keys"] * 2
    late.append(put(store, b"x" * 500, "late"))
    assert code(store.status, "late", late[0]) == "unknown_keys"
    assert all(store.status("early", fingerprint)["complete"] for fingerprint in hoard[2:])


def test_who_has_no_token_any_more_makes_room(tmp_path, clock):
    gone = put(KeyStore(tmp_path, LIMITS, 2000, clock=clock), b"g" * 900, "gone")
    store = KeyStore(tmp_path, LIMITS, 2000, owners=("a", "b"), clock=clock)
    mine = [put(store, bytes([n]) * 500, "a") for n in range(3)]
    assert code(store.status, "gone", gone) == "unknown_keys"
    assert all(store.status("a", fingerprint)["complete"] for fingerprint in mine)


def test_uploads_expire(store, clock):
    for number in range(UPLOADS_PER_OWNER):
        store.announce("a", "public", 100, f"{number:064x}")
    assert code(store.announce, "a", "public", 100, "ff" * 32) == "busy"
    store.announce("b", "public", 100, "ff" * 32)
    kept = put(store, b"complete", "c")
    clock.now += EXPIRY_SECONDS
    store.announce("a", "public", 100, "ff" * 32)
    assert code(store.status, "a", f"{0:064x}") == "unknown_keys"
    assert store.status("c", kept)["complete"]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_the_upload_where_it_was(store, monkeypatch, tmp_path, error):
    content = b"x" * 100
    fingerprint = sha256(content)
    store.announce("a", "evaluation", 100, fingerprint)
    store.append("a", fingerprint, 0, content[:40])

    real_open = keys_module.Path.open

    class FullFile:
        """Writes a little, then has no room."""

        def __init__(self, file):
            self.file = file
            self.written = False

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            if self.written:
                raise OSError(error, os.strerror(error))
            self.written = True
            return self.file.write(data[:7])

        def __getattr__(self, name):
            return getattr(self.file, name)

    monkeypatch.setattr(keys_module.Path, "open", lambda *a, **k: FullFile(real_open(*a, **k)))
    assert code(store.append, "a", fingerprint, 40, content[40:]) == "storage"
    monkeypatch.undo()
    assert store.status("a", fingerprint)["received"] == 40
    assert next((tmp_path / "keys").rglob("*.part")).stat().st_size == 40
    assert store.append("a", fingerprint, 40, content[40:])["complete"]


def test_a_disk_without_room_is_told_before_the_upload(store, monkeypatch):
    monkeypatch.setattr(keys_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=99))
    assert code(store.announce, "a", "evaluation", 100, "00" * 32) == "storage"
    store.announce("a", "evaluation", 99, "00" * 32)


# The same over HTTP.


@pytest.fixture
def http(harness):
    with harness.http() as http:
        yield http


def test_chunks_over_http(http):
    content = random.Random(1).randbytes(20 * MEGABYTE - 5)
    fingerprint = sha256(content)
    announcement = {"kind": "evaluation", "size": len(content), "sha256": fingerprint}
    assert http.get(f"/v1/keys/{fingerprint}").status_code == 404
    assert http.post("/v1/keys", json=announcement).json()["received"] == 0
    for offset in range(0, len(content), 8 * MEGABYTE):
        state = http.get(f"/v1/keys/{fingerprint}").json()
        assert state == {"size": len(content), "received": offset, "complete": False}
        assert patch(http, content, offset).status_code == 200
    assert http.post("/v1/keys", json=announcement).json()["complete"]
    assert http.delete(f"/v1/keys/{fingerprint}").status_code == 204
    assert http.get(f"/v1/keys/{fingerprint}").status_code == 404


def test_failures_over_http(http):
    content = b"some content"
    fingerprint = sha256(content)
    http.post("/v1/keys", json={"kind": "public", "size": len(content), "sha256": fingerprint})
    answer = patch(http, content, 0, checksum="00" * 32)
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "bad_keys")
    answer = patch(http, content, 3)
    assert (answer.status_code, answer.json()["received"]) == (409, 0)
    for headers in (
        {},
        {"Upload-Offset": "0"},
        {"Upload-Offset": "-1", "Upload-Checksum": f"sha256 {'0' * 64}"},
    ):
        assert http.patch(f"/v1/keys/{fingerprint}", content=content, headers=headers).status_code == 400
    assert patch(http, content, 0).json()["complete"]
    assert http.patch("/v1/keys/unknown", content=b"x", headers={}).status_code == 400
    assert patch(http, b"unknown", 0).status_code == 404


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"[" * 50_000, 400),
        (b"null", 400),
        (b'{"kind": "public", "size": "1", "sha256": ""}', 400),
        (b'{"kind": ["public"], "size": 1, "sha256": ""}', 400),
        (b'{"kind": "public", "size": true, "sha256": ""}', 400),
        (b'{"kind": "public", "size": 1}', 400),
        (b'{"kind": "public", "size": 99999999, "sha256": "' + b"0" * 64 + b'"}', 413),
        (b" " * 100_000, 413),
    ],
)
def test_wrong_announcements_over_http(http, body, status):
    answer = http.post("/v1/keys", content=body)
    assert answer.status_code == status
    assert answer.json()["error"]["code"] in ("bad_request", "too_large")


def test_a_chunk_that_is_too_large(http):
    content = bytes(9 * MEGABYTE)
    http.post("/v1/keys", json={"kind": "evaluation", "size": len(content), "sha256": sha256(content)})
    assert patch(http, content, 0, size=9 * MEGABYTE).status_code == 413
    assert http.delete(f"/v1/keys/{sha256(content)}").status_code == 204


def test_a_full_disk_over_http(harness, http, monkeypatch):
    content = b"will not fit"
    http.post("/v1/keys", json={"kind": "public", "size": len(content), "sha256": sha256(content)})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(keys_module.os, "fsync", full)
        assert patch(http, content, 0).status_code == 507
    assert hashlib.sha256(content).hexdigest() == harness.put(content, "public")


def test_an_upload_goes_on_after_a_restart(start, tmp_path):
    content = random.Random(2).randbytes(9 * MEGABYTE)
    announcement = {"kind": "evaluation", "size": len(content), "sha256": sha256(content)}
    with start(directory=tmp_path) as first, first.http() as http:
        http.post("/v1/keys", json=announcement)
        assert patch(http, content, 0).status_code == 200
    with start(directory=tmp_path) as second, second.http() as http:
        assert http.post("/v1/keys", json=announcement).json()["received"] == 8 * MEGABYTE
        assert patch(http, content, 8 * MEGABYTE).json()["complete"]
        second.serves()


def test_tokens_over_http(start):
    with start(tokens=[("a", "token-a"), ("b", "token-b")]) as harness:
        fingerprint = harness.put(b"mine", token="token-a")
        with harness.http() as nobody, harness.http("token-b") as b, harness.http("token-a") as a:
            for path in ("/v1/model", f"/v1/keys/{fingerprint}", "/metrics"):
                refused = nobody.get(path)
                assert (refused.status_code, refused.json()["error"]["code"]) == (401, "unauthorized")
            assert nobody.post("/v1/keys", json={}).status_code == 401
            assert nobody.delete(f"/v1/keys/{fingerprint}").status_code == 401
            assert patch(nobody, b"mine", 0).status_code == 401
            assert nobody.get("/v1/health").json()["status"] == "ok"
            assert b.get(f"/v1/keys/{fingerprint}").status_code == 404
            assert b.delete(f"/v1/keys/{fingerprint}").status_code == 404
            assert a.delete(f"/v1/keys/{fingerprint}").status_code == 204
