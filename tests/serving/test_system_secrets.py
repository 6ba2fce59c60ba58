"""What a server sees of a session: everything between the two processes and everything that it keeps.

The same search looks for planted secrets, which it finds: in what WebSockets carry, in uploads, on disk.
"""

from __future__ import annotations

import ast
import base64
import inspect
import json
import re
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from cipherlm.engine import Plaintext
from cipherlm.schemes.ckks import arithmetic, encrypted, refresh, session
from cipherlm.schemes.ckks.layout import ATTENTION_LEVEL
from cipherlm.schemes.ckks.session import Client
from cipherlm.serving import ckks, evaluations, keys, sessions
from cipherlm.serving.client import Connection, ServerError

from . import small
from .small import at_home  # noqa: F401

NEW = 2
FLOATS = ("<f2", "<f4", "<f8")
INTEGERS = ("<i2", "<i4", "<i8", ">i2", ">i4", ">i8")

# Runs the command, notes what of the engine it used, then uses a secret key to show what that looks like.
LAUNCH = """
import atexit, json, sys
from pathlib import Path

called, frames = set(), set()

def watch():
    from cipherlm.engine import _native
    plain = _native.call
    def call(name, *arguments):
        called.add(name)
        if name == "cl_reader_new":
            frames.add(arguments[1])
        return plain(name, *arguments)
    _native.call = call

def note():
    server = [sorted(called), sorted(frames), sorted(sys.modules)]
    from cipherlm.engine import Parameters, SecretKey
    key = SecretKey.generate(Parameters.preset(12))
    SecretKey.from_bytes(key.to_bytes(), key.parameters).decrypt(key.encrypt([1.0]))
    path = Path(sys.argv[sys.argv.index("--data-dir") + 1]).parent / "watched"
    path.write_text(json.dumps([server, [sorted(called), sorted(frames)]]))

watch()
atexit.register(note)
from cipherlm.cli import main
sys.exit(main(sys.argv[1:]))
"""


@dataclass
class Seen:
    """A session, and all that was seen of it outside the client."""

    needles: small.Needles
    traffic: dict[str, bytes]
    files: dict[str, bytes]
    planted_traffic: dict[str, bytes]
    planted_files: dict[str, bytes]
    watched: list
    text: list[int]


def coefficients(frame: bytes) -> np.ndarray:
    """A secret key's, -1 to 1, from its bytes: two bits each, 2 for -1."""
    packed = np.frombuffer(frame[64:-32], np.uint8)
    codes = (packed[:, None] >> np.arange(0, 8, 2) & 3).reshape(-1).astype(np.int8)
    assert set(np.unique(codes)) == {0, 1, 2}
    return np.where(codes == 2, -1, codes).astype(np.int8)


def of_secret_key(needles: small.Needles, frame: bytes, count: int = 5) -> None:
    """The key's bytes, and its coefficients in every form that comes to mind."""
    payload, s = frame[64:-32], coefficients(frame)
    places = range(120, len(s) - 256, len(s) // count // 120 * 120)  # multiples of 4, 5 and 8
    for text in (frame.hex(), payload.hex()):
        needles.add("secret key, hex", text[1000:1064].encode(), text[1000:1064].upper().encode())
    for shift in range(3):
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            needles.add("secret key, base64", encode(payload[shift : shift + 3000])[40:-40])
    for at in places:
        piece = s[at : at + 240]
        needles.add("secret key, bytes", payload[at // 4 : at // 4 + 24])
        for kind in ("i1", *INTEGERS, "<f4", "<f8"):
            needles.add("secret key, numbers", piece[:64].astype(kind).tobytes())
        needles.add(
            "secret key, codes", (piece[:64] % 3).astype(np.uint8).tobytes(), (piece[:64] + 1).tobytes()
        )
        for prime in (*small.GEOMETRY.parameters.q, *small.GEOMETRY.parameters.p):
            residues = np.where(piece[:32] < 0, prime - 1, piece[:32]).astype(np.uint64)
            needles.add("secret key, residues", residues.tobytes())
            width = prime.bit_length()
            number = sum(int(residue) << (width * i) for i, residue in enumerate(residues[:16]))
            needles.add("secret key, residues", number.to_bytes(2 * width, "little"))
        for minus, zero, one in ((2, 0, 1), (3, 0, 1), (0, 1, 2), (1, 0, 2), (1, 0, 3)):
            codes = np.select([piece < 0, piece == 0], [minus, zero], one)
            for order in ([0, 2, 4, 6], [6, 4, 2, 0]):
                packed = (codes.reshape(-1, 4) << np.array(order)).sum(1).astype(np.uint8)
                needles.add("secret key, two bits", packed.tobytes()[:24])
            for size in (4, 5):
                for digits in (codes.reshape(-1, size), codes.reshape(-1, size)[:, ::-1]):
                    packed = (np.minimum(digits, 2) @ 3 ** np.arange(size)).astype(np.uint8)
                    needles.add("secret key, base 3", packed.tobytes()[:32])
        for plane in (piece != 0, piece < 0, piece > 0):
            for order in ("little", "big"):
                needles.add("secret key, bit planes", np.packbits(plane, bitorder=order).tobytes()[:24])
        for separator in (", ", ",", " "):
            needles.add("secret key, text", separator.join(map(str, piece[:64])).encode())


def of_ids(needles: small.Needles, name: str, ids: list[int]) -> None:
    for kind in INTEGERS:
        data = np.array(ids).astype(kind).tobytes()
        if len(data) >= 8:
            needles.add(name, data)
    for separator in (", ", ",", " "):
        text = separator.join(map(str, ids)).encode()
        if len(text) >= 8:
            needles.add(name, text)


def of_text(needles: small.Needles, name: str, text: str) -> None:
    for encoding in ("utf-8", "utf-16-le", "utf-16-be"):
        needles.add(name, text.encode(encoding))
    needles.add(name, text.encode().hex().encode(), base64.b64encode(text.encode())[:-4])


def of_numbers(needles: small.Needles, name: str, rows: np.ndarray) -> None:
    for table in (rows, rows - rows.mean(-1, keepdims=True)):
        for row in table:
            for kind in FLOATS:
                needles.add(name, row[:8].astype(kind).tobytes(), row[8:16].astype(kind).tobytes())


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> Seen:
    """A session of a prompt and two tokens through a proxy that records, then one that leaks everything."""
    directory = tmp_path_factory.mktemp("server")
    inputs: list[np.ndarray] = []
    outputs: list[np.ndarray] = []
    with pytest.MonkeyPatch.context() as patch, small.process("all", directory, launch=LAUNCH) as server:
        plain_encrypt, plain_decrypt = Client.encrypt, Client.decrypt

        def encrypt(self, hidden, start):
            inputs.append(np.array(hidden))
            return plain_encrypt(self, hidden, start)

        def decrypt(self, ciphertexts, count, start):
            outputs.append(plain_decrypt(self, ciphertexts, count, start))
            return outputs[-1]

        patch.setattr(Client, "encrypt", encrypt)
        patch.setattr(Client, "decrypt", decrypt)
        recorder = small.Recorder(server.url)
        with small.connect(recorder.url, "all") as model:
            new = small.generate(model, count=NEW)
            text = model.tokenizer.decode(new)
        recorder.close()
        needles = needles_of(new, text, inputs, outputs)
        traffic, files = recorder.traffic(), server.files()

        recorder = small.Recorder(server.url)
        planted = b"".join(string for strings in needles.items.values() for string in strings)
        with Connection(recorder.url) as connection:
            connection.open(small.keys().fingerprints)
            with pytest.raises(ServerError, match="not an object of this engine"):
                connection.evaluate("transformer.h", 1, 1, [planted], lambda request: request)
            connection.upload("public", planted)
        recorder.close()
        planted_traffic, planted_files = recorder.traffic(), server.files()
    watched = json.loads((directory / "watched").read_text())
    return Seen(needles, traffic, files, planted_traffic, planted_files, watched, new)


def needles_of(
    new: list[int], text: str, inputs: list[np.ndarray], outputs: list[np.ndarray]
) -> small.Needles:
    needles = small.Needles()
    of_secret_key(needles, small.keys().secret())
    ids = small.prompt_ids()[0].tolist()
    of_text(needles, "prompt", small.PROMPT)
    of_ids(needles, "prompt's ids", ids)
    of_ids(needles, "output's ids", new)
    of_ids(needles, "text's ids", [*ids[-2:], *new])
    if len(text.encode()) >= 8:
        of_text(needles, "output", text)
    of_text(needles, "text", small.tokenizer().decode([*ids, *new]))
    state = small.clear_model().transformer
    with torch.no_grad():
        tokens = state.wte.weight[torch.tensor([*ids, *new])].double().numpy()
        places = state.wpe.weight[1 : 1 + len(tokens)].double().numpy()
    of_numbers(needles, "embeddings", tokens)
    of_numbers(needles, "hidden states", tokens + places)
    of_numbers(needles, "hidden states as sent", np.concatenate(inputs))
    of_numbers(needles, "outputs as decrypted", np.concatenate(outputs))
    layout, parameters = small.GEOMETRY.layout, small.GEOMETRY.parameters
    slots = layout.pack(inputs[0], 1)[0]
    at = int(np.argmax(slots != 0))
    for kind in (*FLOATS, "<c8", "<c16"):
        needles.add("slots", np.asarray(slots[at : at + 64]).astype(kind).tobytes())
    encoded = Plaintext.encode(parameters, slots, ATTENTION_LEVEL).to_bytes()
    needles.add("plaintext", encoded[1000:1032], encoded[-1000:-968])
    return needles


def test_the_session_was_one(seen):
    """Otherwise nothing would be found, whatever the search does."""
    assert seen.text == small.continuation(count=NEW)
    assert sum(map(len, seen.traffic.values())) > 20e6
    up, down = (
        b"".join(data for name, data in seen.traffic.items() if name.endswith(f"{way} messages"))
        for way in ("up", "down")
    )
    for messages, kind in ((up, "refreshed"), (down, "refresh")):
        assert messages.count(b'"type":"%s"' % kind.encode()) > 5
        assert messages.count(b"CLHE") > 5  # the engine's objects
    names = "\n".join(seen.files)
    assert re.search(r"data/keys/\w+/\w{64}\.evaluation", names)
    assert b"evaluation ended" in seen.files["stderr"]


def test_nothing_between_the_parties_tells_a_secret(seen):
    assert seen.needles.found(seen.traffic) == set()


def test_nothing_at_the_server_tells_a_secret(seen):
    """Its keys, logs, home and temporary files."""
    assert seen.needles.found(seen.files) == set()


def test_the_search_finds_every_secret_that_is_there(seen):
    everything = set(seen.needles.items)
    assert len(everything) > 15
    unmasked = {name: data for name, data in seen.planted_traffic.items() if "up messages" in name}
    assert seen.needles.found(unmasked) == everything
    uploads = {name: data for name, data in seen.planted_traffic.items() if name.endswith("up")}
    assert seen.needles.found(uploads) == everything
    stored = {name: data for name, data in seen.planted_files.items() if name not in seen.files}
    assert seen.needles.found(stored) == everything
    assert seen.needles.found({"log": seen.planted_files["stderr"]}) == set()
    # Each form by itself.
    for name, strings in seen.needles.items.items():
        for string in strings:
            assert small.Needles({name: [string]}).found([b"x" + string + b"y"]) == {name}


SECRET_FRAME = 2
SECRET_CALLS = {
    "cl_secret_key_new", "cl_public_key_new", "cl_evaluation_keys_new", "cl_bootstrapping_keys_new",
    "cl_encrypt_secret", "cl_decrypt", "cl_refresh_client",
}  # fmt: skip


def test_no_secret_key_is_ever_at_the_server(seen):
    """Neither made nor read, and nothing is called that needs one. The control makes and reads one."""
    (called, frames, modules), (control_called, control_frames) = seen.watched
    assert not SECRET_CALLS & set(called)
    assert SECRET_FRAME not in frames
    assert {"cl_refresh_mask", "cl_refresh_unmask", "cl_rerandomize"} <= set(called)
    assert {"cl_secret_key_new", "cl_decrypt", "cl_encrypt_secret"} <= set(control_called)
    assert SECRET_FRAME in control_frames
    assert "cipherlm.serving.ckks" in modules
    for module in ("serving.client", "serving.remote", "models.client", "cli.generate", "cli.keygen"):
        assert f"cipherlm.{module}" not in modules


SERVED = [
    ckks.CkksHostedModel, ckks.CkksComputation, ckks.load_modules, ckks._hosted, session.Server,
    session.Session, session.Hosted, refresh.MaskedRefresh, arithmetic.Arithmetic, encrypted.EncryptedTensor,
    keys.KeyStore, sessions.Session, evaluations.Evaluation,
]  # fmt: skip


def names_in(code) -> set[str]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return names | {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


@pytest.mark.parametrize("code", SERVED, ids=lambda code: f"{code.__module__}.{code.__qualname__}")
def test_the_server_s_code_does_not_know_the_secret_key(code):
    forbidden = {"SecretKey", "secret_key", "Client", "InProcess", "decrypt"}
    assert not names_in(code) & forbidden
    assert names_in(session.Client) & forbidden >= {"SecretKey", "secret_key", "decrypt"}


@pytest.mark.slow
def test_nothing_in_the_server_s_memory_tells_a_secret(tmp_path):
    """The memory of the process after a session; the search finds the weights, which belong there."""
    with small.process("all", tmp_path) as server:
        with small.connect(server.url, "all") as model:
            new = small.generate(model, count=NEW)
        needles = small.Needles()
        of_secret_key(needles, small.keys().secret(), 1)
        of_text(needles, "prompt", small.PROMPT)
        ids = small.prompt_ids()[0].tolist()
        of_ids(needles, "prompt's ids", ids)
        of_ids(needles, "text's ids", [*ids, *new])
        with torch.no_grad():
            embedded = small.clear_model().transformer.wte.weight[torch.tensor(ids)].double().numpy()
        of_numbers(needles, "embeddings", embedded)
        control = small.Needles()
        weight = small.clear_model().transformer.h[0].attn.c_proj.weight.detach().double().numpy()
        centred = (weight - weight.mean(-1, keepdims=True)).astype(np.float32)
        control.add(
            "weights", *(row[:8].astype(kind).tobytes() for row in centred for kind in ("<f4", "<f8"))
        )
        memory = memory_of(server.process.pid)
    assert sum(map(len, memory)) > 50e6
    assert control.found(memory) == {"weights"}
    assert needles.found(memory) == set()


def memory_of(pid: int) -> list[bytes]:
    """The writable memory of a child process."""
    if sys.platform != "linux":
        pytest.skip("memory is read through /proc")
    regions = []
    try:
        with Path(f"/proc/{pid}/mem").open("rb", 0) as memory:
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                match = re.match(r"([0-9a-f]+)-([0-9a-f]+) rw", line)
                if match is None:
                    continue
                begin, end = (int(number, 16) for number in match.groups())
                for at in range(begin, end, 1 << 24):
                    memory.seek(at)
                    try:
                        regions.append(memory.read(min(1 << 24, end - at)))
                    except OSError:  # a guard page
                        continue
    except PermissionError:
        pytest.skip("this system does not let a parent read its child's memory")
    return regions
