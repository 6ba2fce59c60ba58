"""A circuit in two parties: what passes between them, what is refused, and what neither of them has."""

import dataclasses
import itertools
import json
import shutil
import struct
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cipherlm.schemes.tfhe.attention import QuantizedAttention
from cipherlm.schemes.tfhe.circuit import AttentionCircuit
from cipherlm.schemes.tfhe.client import ClientCircuit
from cipherlm.schemes.tfhe.errors import TooManyTokensError
from cipherlm.schemes.tfhe.library import load_server
from cipherlm.schemes.tfhe.lookup import lookup
from cipherlm.schemes.tfhe.messages import HEADER_BYTES, Header, Kind, Layout, seal
from cipherlm.schemes.tfhe.quantization import InputQuantizer, OutputDequantizer
from cipherlm.schemes.tfhe.server import ServerCircuit
from tests.tfhe.conftest import random_rows

TOKENS = 2
NAME = "transformer.h.0.attn"


def root_mean_square(values):
    return float(np.sqrt(np.mean(np.square(values))))


@pytest.fixture(scope="module")
def attention(small_layer, calibration):
    return QuantizedAttention.calibrate(small_layer, calibration, heads=[1], n_bits=3)


@pytest.fixture(scope="module")
def circuit(attention, tmp_path_factory):
    pytest.importorskip("concrete.fhe")
    return AttentionCircuit.compile(attention, TOKENS, cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def folder(circuit, tmp_path_factory):
    """Both parties' files."""
    folder = tmp_path_factory.mktemp("parties")
    server, client = circuit.split()
    server.save(folder / "server", NAME)
    client.save(folder / "client", NAME)
    return folder


@pytest.fixture(scope="module")
def server(folder):
    return ServerCircuit.load(folder / "server", NAME)


@pytest.fixture(scope="module")
def client(folder):
    loaded = ClientCircuit.load(folder / "client", NAME)
    loaded.keygen()
    return loaded


@pytest.fixture(scope="module")
def evaluation_keys(client):
    return client.evaluation_keys()


@pytest.fixture(scope="module")
def keys(server, evaluation_keys):
    return server.load_keys(evaluation_keys)


@pytest.fixture(scope="module")
def ciphertext(client):
    return client.encrypt(random_rows(16, TOKENS, 1))


@pytest.fixture(scope="module")
def result(server, ciphertext, keys):
    return server.run(ciphertext, keys)


def flip(message: bytes, position: int) -> bytes:
    changed = bytearray(message)
    changed[position] ^= 0x10
    return bytes(changed)


def relabel(message: bytes, body: bytes | None = None, **changes) -> bytes:
    """Give a message another body with a label that fits it, as a sender of ill will would."""
    header = Header.unpack(message)
    body = message[HEADER_BYTES:] if body is None else body
    sealed = seal(header.kind, header.circuit.hex(), header.keys, body)
    return dataclasses.replace(Header.unpack(sealed), **changes).pack() + body


def test_parties_compute_what_one_process_does(circuit, attention, server, client, keys):
    """Bounds: half of the result's size from the run in one process, a third from the clear integers.

    Six inputs gave 0.13 from the clear integers, 0.06 to 0.26 one by one.
    """
    rows = [random_rows(16, TOKENS, seed) for seed in range(2)]
    parties = np.concatenate([client.decrypt(server.run(client.encrypt(x), keys)) for x in rows])
    together = np.concatenate([circuit.execute(x) for x in rows])
    clear = np.concatenate([attention(x) for x in rows])
    assert root_mean_square(parties - clear) < 0.35 * root_mean_square(clear)
    assert root_mean_square(parties - together) < 0.5 * root_mean_square(clear)


def test_a_shorter_input_is_padded(attention, server, client, keys):
    x = random_rows(16, 1, 5)
    decrypted = client.decrypt(server.run(client.encrypt(x), keys))
    assert decrypted.shape == (TOKENS, 4)
    assert root_mean_square(decrypted[:1] - attention(x)) < 0.6 * root_mean_square(attention(x))


def test_keys_come_as_bytes_a_path_or_an_open_file(server, client, ciphertext, evaluation_keys, tmp_path):
    path = tmp_path / "keys"
    path.write_bytes(evaluation_keys)
    expected = client.decrypt(server.run(ciphertext, evaluation_keys))
    assert np.array_equal(client.decrypt(server.run(ciphertext, path)), expected)
    with path.open("rb") as file:
        assert server.load_keys(file).fingerprint == Header.unpack(ciphertext).keys
        assert file.tell() == len(evaluation_keys)


def test_keys_saved_and_loaded_decrypt_what_was_encrypted_before(folder, client, result):
    again = ClientCircuit.load(folder / "client", NAME)
    with pytest.raises(RuntimeError, match="no keys yet"):
        again.decrypt(result)
    again.load_secret_keys(client.secret_keys())
    assert np.array_equal(again.decrypt(result), client.decrypt(result))
    assert again.evaluation_keys() == client.evaluation_keys()


def test_two_runs_at_once_do_not_disturb_each_other_or_stop_the_process(server, client, keys):
    """Concrete releases the interpreter's lock in a run: other threads go on meanwhile."""
    inputs = [client.encrypt(random_rows(16, TOKENS, seed)) for seed in range(2)]
    expected = [client.decrypt(server.run(ciphertext, keys)) for ciphertext in inputs]
    results: dict[int, bytes] = {}

    def run(index: int) -> None:
        results[index] = server.run(inputs[index], keys)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    steps = 0
    while any(thread.is_alive() for thread in threads):
        time.sleep(0.001)
        steps += 1
    assert steps > 10
    assert all(np.array_equal(client.decrypt(results[index]), expected[index]) for index in range(2))


@pytest.mark.parametrize("which", ["keys", "input", "result", "secret"])
def test_damaged_bytes_are_refused(server, client, keys, evaluation_keys, ciphertext, result, which):
    """Cut short, longer, or with a bit flipped: in the label, the structure and the numbers."""
    message, read = {
        "keys": (evaluation_keys, server.load_keys),
        "input": (ciphertext, lambda data: server.run(data, keys)),
        "result": (result, client.decrypt),
        "secret": (client.secret_keys(), client.load_secret_keys),
    }[which]
    size = len(message)
    cuts = [
        0,
        1,
        7,
        HEADER_BYTES - 1,
        HEADER_BYTES,
        HEADER_BYTES + 8,
        HEADER_BYTES + 300,
        size // 2,
        size - 1,
    ]
    for cut in cuts:
        with pytest.raises(ValueError, match=r"cut off|body of"):
            read(message[:cut])
    if which != "secret":
        with pytest.raises(ValueError, match="followed by something else"):
            read(message + b"\0")
    changes = [0, 8, 12, 44, 76, 108, HEADER_BYTES, HEADER_BYTES + 4, HEADER_BYTES + 40, size // 2, size - 1]
    for position in changes:
        with pytest.raises(ValueError, match=r"message|circuit|keys"):
            read(flip(message, position))


@pytest.mark.parametrize("which", ["keys", "input", "result"])
def test_a_right_label_does_not_excuse_a_wrong_structure(
    server, client, keys, evaluation_keys, ciphertext, result, which
):
    """Anyone can compute a checksum: every word outside of the numbers must still be the right one."""
    message, layout, read = {
        "keys": (evaluation_keys, server.description.keys, server.load_keys),
        "input": (ciphertext, server.description.inputs, lambda data: server.run(data, keys)),
        "result": (result, client.description.results, client.decrypt),
    }[which]
    body = message[HEADER_BYTES:]
    edges = [0, *(edge for span in layout.spans for edge in span), layout.size]
    fixed = [p for start, end in zip(edges[::2], edges[1::2], strict=True) for p in range(start, end, 8)]
    fixed = fixed if which != "keys" else fixed[::8]  # each of these is 48 MB to hash
    assert len(fixed) > 5
    for position in fixed:
        with pytest.raises(ValueError, match="structure"):
            read(relabel(message, flip(body, position)))
    for other in (body[:-8], body + bytes(8), b""):
        with pytest.raises(ValueError, match="body of"):
            read(relabel(message, other))
    with pytest.raises(ValueError, match="body of"):
        read(relabel(message, size=1 << 62))


def test_any_numbers_in_the_right_structure_only_give_nonsense(server, client, evaluation_keys, ciphertext):
    """So nothing else has to be checked: keys and an input of random numbers run like others."""
    rng = np.random.default_rng(3)

    def nonsense(message: bytes, layout: Layout) -> bytes:
        body = bytearray(message[HEADER_BYTES:])
        for start, end in layout.spans:
            body[start:end] = rng.bytes(end - start)
        return bytes(body)

    body = nonsense(evaluation_keys, server.description.keys)
    with pytest.raises(ValueError, match="labelled as other keys"):
        server.load_keys(relabel(evaluation_keys, body))
    label = Header.unpack(relabel(evaluation_keys, body)).digest
    keys = server.load_keys(relabel(evaluation_keys, body, keys=label))
    ciphertext = relabel(ciphertext, nonsense(ciphertext, server.description.inputs), keys=label)
    result = server.run(ciphertext, keys)
    assert client.decrypt(relabel(result, keys=client._fingerprint)).shape == (TOKENS, 4)


def test_messages_of_another_kind_or_client_are_refused(server, client, keys, ciphertext, folder, result):
    with pytest.raises(ValueError, match="holds a result, not an input"):
        server.run(result, keys)
    with pytest.raises(ValueError, match="holds an input, not a result"):
        client.decrypt(ciphertext)
    with pytest.raises(ValueError, match="holds an input, not evaluation keys"):
        server.load_keys(ciphertext)
    with pytest.raises(ValueError, match="holds secret keys, not evaluation keys"):
        server.load_keys(client.secret_keys())
    stranger = ClientCircuit.load(folder / "client", NAME)
    stranger.keygen()
    with pytest.raises(ValueError, match="encrypted under other keys"):
        server.run(stranger.encrypt(random_rows(16, TOKENS, 1)), keys)
    with pytest.raises(ValueError, match="encrypted under other keys"):
        stranger.decrypt(result)


def test_keys_and_inputs_of_another_circuit_are_refused(
    server, client, keys, ciphertext, evaluation_keys, small_layer, calibration
):
    """Concrete would abort the process over keys of other parameters."""
    other = QuantizedAttention.calibrate(small_layer, calibration, heads=[0], n_bits=2)
    compiled = AttentionCircuit.compile(other, TOKENS, cache_dir=None)
    description = dataclasses.replace(client.description, fingerprint="ab" * 32)
    specs = json.loads(compiled._client.specs.serialize())
    stranger = ClientCircuit(description, specs, other.quantizer, other.dequantizer)
    stranger.keygen()
    other_keys = stranger.evaluation_keys()
    with pytest.raises(ValueError, match="of another circuit"):
        server.load_keys(other_keys)
    with pytest.raises(ValueError, match="of another circuit"):
        client.load_secret_keys(stranger.secret_keys())
    with pytest.raises(ValueError, match="another circuit's"):
        server.run(ciphertext, dataclasses.replace(keys, circuit="ab" * 32))
    with pytest.raises(ValueError, match="of another circuit"):
        server.run(stranger.encrypt(random_rows(16, TOKENS, 1)), keys)
    # With a forged label their sizes give them away.
    circuit = Header.unpack(evaluation_keys).circuit
    with pytest.raises(ValueError, match="body of"):
        server.load_keys(relabel(other_keys, circuit=circuit))


def test_equal_circuits_have_equal_names_and_others_do_not(circuit, attention, server):
    """Exporting again leaves clients' keys valid."""
    again = AttentionCircuit.compile(attention, TOKENS, cache_dir=None)
    assert again.fingerprint == circuit.fingerprint == server.description.fingerprint
    assert dataclasses.replace(circuit, tokens=TOKENS + 1).fingerprint != circuit.fingerprint


def test_inputs_of_another_shape_are_refused(client):
    with pytest.raises(TooManyTokensError, match="3 tokens do not fit"):
        client.encrypt(random_rows(16, 3, 0))
    for x in (random_rows(8, 2, 0), np.zeros((0, 16)), np.zeros(16)):
        with pytest.raises(ValueError, match=r"must be \(tokens, 16\)"):
            client.encrypt(x)


def secrets_of(serialized: bytes, dimensions: list[int]) -> list[np.ndarray]:
    """Find secret keys in Concrete's bytes: runs of words that are 0 or 1, as long as a key."""
    words = np.frombuffer(serialized[: len(serialized) // 8 * 8], dtype="<u8")
    edges = np.flatnonzero(np.diff(np.concatenate([[0], words < 2, [0]]).astype(np.int8))).reshape(-1, 2)
    return [words[start:end] for start, end in edges if end - start >= min(dimensions)]


def test_the_server_gets_no_secret_key(client, evaluation_keys, ciphertext, folder):
    """The same search that finds every secret key in the client's own file finds none in what it sends."""
    specs = json.loads((folder / "client" / f"{NAME}.json").read_text())["specs"]
    dimensions = [key["params"]["lweDimension"] for key in specs["keyset"]["lweSecretKeys"]]
    secrets = secrets_of(client.secret_keys()[HEADER_BYTES:], dimensions)
    assert len(secrets) == len(dimensions) >= 2
    assert sum(map(len, secrets)) >= sum(dimensions)
    for sent in (evaluation_keys, ciphertext):
        assert not secrets_of(sent[HEADER_BYTES:], dimensions)
        for secret in secrets:
            middle = secret[100:356].astype(np.uint8)
            forms = [middle.tobytes(), np.packbits(middle).tobytes()]
            forms += [np.packbits(middle, bitorder="little").tobytes()]
            forms += [middle.astype(kind).tobytes() for kind in ("<u2", "<u4", "<u8")]
            assert not any(form in sent for form in forms)


def weights_of(attention: QuantizedAttention, layer) -> dict[str, np.ndarray]:
    """Return all that the client must not have: the head's weights, and what they were quantised to."""
    arrays = {name: array for name, array in attention.to_arrays().items() if name.startswith("head.")}
    known = {f"head.{head}.{name}" for head in attention.heads for name in ("output_unit", "rotation")}
    weight, bias = layer.head(attention.heads[0])
    secret = {name: array for name, array in arrays.items() if name not in known and array.size > 3}
    return secret | {"weight": weight, "transposed": np.swapaxes(weight, 1, 2), "bias": bias}


def contains(content: bytes, array: np.ndarray) -> bool:
    """Say whether four neighbouring values of ``array`` lie in ``content``, in any type they fit."""
    values = np.ascontiguousarray(array).reshape(-1)
    for kind in ("<f4", "<f8", "<f2", "i1", "<i2", "<i4", "<i8"):
        converted = values.astype(kind)
        if not np.allclose(converted.astype(np.float64), values, rtol=1e-2, atol=0):
            continue
        for start in range(0, len(values) - 3, 4):
            four = converted[start : start + 4]
            if len(set(four.tolist())) > 2 and four.tobytes() in content:
                return True
    return False


def test_the_client_gets_no_weight(folder, attention, small_layer, tmp_path):
    weights = weights_of(attention, small_layer)
    save_file(attention.to_arrays(), tmp_path / "control.safetensors")
    save_file({"weight": small_layer.qkv_weight}, tmp_path / "clear.safetensors")
    control = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    found = {name for name, array in weights.items() if any(contains(c, array) for c in control)}
    assert found >= {name for name in weights if name.startswith("head.")} | {"weight"}
    files = sorted((folder / "client").iterdir())
    assert [path.name for path in files] == [f"{NAME}.json", f"{NAME}.safetensors"]
    for path in files:
        assert not [name for name, array in weights.items() if contains(path.read_bytes(), array)]
    # Nor as numbers of any notation or order.
    arrays = load_file(files[1])
    assert {name: array.size for name, array in arrays.items()} == {
        "channel_scale": 16, "largest_norm": 1, "output_scale": 4, "rotations": 16,
    }  # fmt: skip
    numbers = np.concatenate([array.reshape(-1) for array in arrays.values()])
    for array in weights.values():
        for scale in (1.0, -1.0):
            assert not np.isclose(scale * array.reshape(-1, 1), numbers, rtol=1e-7, atol=0).any()


def test_the_rotation_is_of_chance_and_not_of_the_weights(attention, small_layer, calibration):
    other = dataclasses.replace(small_layer, qkv_weight=small_layer.qkv_weight[::-1].copy())
    rotated = QuantizedAttention.calibrate(other, calibration, heads=[1], n_bits=3)
    assert np.array_equal(rotated.dequantizer.rotations, attention.dequantizer.rotations)


@pytest.mark.parametrize("heads", [[2], [1, 3], None])
def test_the_client_dequantises_as_the_circuit_is_read(small_layer, calibration, heads):
    attention = QuantizedAttention.calibrate(small_layer, calibration, heads=heads, n_bits=6)
    x = random_rows(16, 4, 0)
    integers = attention.circuit(attention.quantizer(x), lookup)
    assert np.array_equal(attention.dequantizer(integers), attention(x))


def test_files_hold_no_pickle_and_another_archive_is_refused(folder, server, tmp_path):
    """Concrete would unpickle the configuration of an archive with a program in MLIR."""
    archive = folder / "server" / f"{NAME}.zip"
    with zipfile.ZipFile(archive) as contents:
        names = set(contents.namelist())
        assert "circuit.mlir" not in names
        texts = [contents.read(name) for name in names if name.endswith(".json")]
    assert all(json.loads(text) is None or b"py/" not in text for text in texts)
    shutil.copytree(folder / "server", tmp_path / "server")
    with zipfile.ZipFile(tmp_path / "server" / archive.name, "a") as contents:
        contents.writestr("circuit.mlir", "module {}")
    with pytest.raises(ValueError, match="missing or damaged"):
        ServerCircuit.load(tmp_path / "server", NAME)
    with pytest.raises(ValueError, match=r"holds 'circuit\.mlir'"):
        load_server(tmp_path / "server" / archive.name)
    (tmp_path / "other.zip").write_bytes(b"PK" + bytes(30))
    with pytest.raises(ValueError, match="not a compiled circuit"):
        load_server(tmp_path / "other.zip")


def test_unpacked_archives_do_not_stay_behind(folder):
    loaded = ServerCircuit.load(folder / "server", NAME)
    unpacked = Path(loaded._server._library.get_output_dir_path())
    assert unpacked.is_dir()
    del loaded
    assert not unpacked.exists()


@pytest.mark.parametrize("party", ["server", "client"])
def test_damaged_files_are_refused_by_name(folder, party, tmp_path):
    load = {"server": ServerCircuit.load, "client": ClientCircuit.load}[party]
    for path in sorted((folder / party).iterdir()):
        copy = tmp_path / path.stem / path.suffix[1:]
        shutil.copytree(folder / party, copy)
        (copy / path.name).write_bytes(flip(path.read_bytes(), 1))
        with pytest.raises(ValueError, match=path.name.replace(".", r"\.")):
            load(copy, NAME)
        (copy / path.name).unlink()
        with pytest.raises(ValueError, match=path.name.replace(".", r"\.")):
            load(copy, NAME)


@pytest.mark.parametrize(
    ("party", "change", "message"),
    [
        ("server", {"concrete_version": "1.0.0"}, r"compiled with Concrete 1\.0\.0"),
        ("server", {"machine": "Plan9 mips"}, "compiled for Plan9 mips"),
        ("client", {"concrete_version": "1.0.0"}, r"concrete-python==1\.0\.0"),
        ("client", {"tokens": 0}, "not as it was written"),
        ("client", {"tokens": "2"}, "not as it was written"),
        ("client", {"fingerprint": "g" * 64}, "not as it was written"),
        ("client", {"outputs": 5}, "another shape"),
        ("client", {"width": 15}, "another shape"),
        ("client", {"keys": {"size": 1}}, "layout is not as it was written"),
        ("client", {"keys": {"size": 8, "spans": [[4, 2]], "sha256": ""}}, "out of order"),
    ],
)
def test_descriptions_that_do_not_fit_are_refused(folder, party, change, message, tmp_path):
    load = {"server": ServerCircuit.load, "client": ClientCircuit.load}[party]
    shutil.copytree(folder / party, tmp_path / party)
    path = tmp_path / party / f"{NAME}.json"
    values = json.loads(path.read_text())
    values["circuit"] |= change
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        load(tmp_path / party, NAME)


def test_the_client_of_another_machine_is_welcome(folder, tmp_path):
    """Only the server's part is native code."""
    shutil.copytree(folder / "client", tmp_path / "client")
    path = tmp_path / "client" / f"{NAME}.json"
    values = json.loads(path.read_text())
    values["circuit"]["machine"] = "Darwin arm64"
    path.write_text(json.dumps(values))
    assert ClientCircuit.load(tmp_path / "client", NAME).description.machine == "Darwin arm64"


def test_layouts_are_found_and_checked():
    rng = np.random.default_rng(0)

    def message() -> bytes:
        return b"".join([bytes(16), rng.bytes(80), b"constant", rng.bytes(24), bytes(8)])

    one, other = message(), message()
    layout = Layout.between(one, other)
    assert layout.spans == ((16, 96), (104, 128))
    assert Layout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout
    layout.check(message())
    for position in itertools.chain(range(16), range(96, 104), range(128, 136)):
        with pytest.raises(ValueError, match="structure"):
            layout.check(flip(one, position))
    for wrong in (one[:-8], one + bytes(8)):
        with pytest.raises(ValueError, match="structure"):
            layout.check(wrong)
    with pytest.raises(ValueError, match="length"):
        Layout.between(one, one + bytes(8))


def test_labels_of_unknown_kinds_and_versions_are_refused():
    message = seal(Kind.INPUT, "ab" * 32, bytes(32), b"body")
    assert Header.unpack(message).kind is Kind.INPUT
    with pytest.raises(ValueError, match="unknown kind, 9"):
        Header.unpack(message[:8] + struct.pack("<I", 9) + message[12:])
    with pytest.raises(ValueError, match="another version's"):
        Header.unpack(message[:7] + b"\x02" + message[8:])


def test_quantisers_need_no_circuit():
    """What both parties share works without Concrete."""
    quantizer = InputQuantizer(3, np.ones(4), 100.0)
    padded = quantizer.padded(np.full((1, 4), 2.2), 3)
    assert padded.tolist() == [[2] * 4, [0] * 4, [0] * 4]
    with pytest.raises(TooManyTokensError):
        quantizer.padded(np.zeros((4, 4)), 3)
    rotations = np.array([[[0.0, -1.0], [1.0, 0.0]], np.eye(2)])
    dequantizer = OutputDequantizer(np.array([1.0, 1.0, 2.0, 2.0]), rotations)
    assert dequantizer(np.array([[1, 2, 3, 4]])).tolist() == [[-2.0, 1.0, 6.0, 8.0]]


@pytest.mark.slow
def test_all_heads_with_the_projection_in_two_parties(small_layer, calibration, tmp_path):
    """Bound: half of the size of the clear result. The client has the ranges of channels, no rotations."""
    pytest.importorskip("concrete.fhe")
    attention = QuantizedAttention.calibrate(small_layer, calibration, heads=None, n_bits=3)
    server, client = AttentionCircuit.compile(attention, 2, cache_dir=None).split()
    server.save(tmp_path / "server", "attn")
    _, scales = client.save(tmp_path / "client", "attn")[::-1]
    assert set(load_file(scales)) == {"channel_scale", "largest_norm", "output_scale"}
    client = ClientCircuit.load(tmp_path / "client", "attn")
    client.keygen()
    x = random_rows(16, 2, 1)
    result = ServerCircuit.load(tmp_path / "server", "attn").run(client.encrypt(x), client.evaluation_keys())
    clear = attention(x)
    assert client.decrypt(result).shape == (2, 16)
    assert root_mean_square(client.decrypt(result) - clear) < 0.5 * root_mean_square(clear)
