"""TFHE behind the seam of serving: a GPT-2 exported, hosted, and evaluated without its weights."""

import json
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

from cipherlm import EncryptionConfig, get_encrypted_model
from cipherlm.models.client import client_state_dict
from cipherlm.schemes.tfhe.errors import NotCompiledError, TooManyTokensError
from cipherlm.schemes.tfhe.files import sha256_of
from cipherlm.serving.client import Connection
from cipherlm.serving.computation import Cancelled, Computation, HostedModel
from cipherlm.serving.errors import ServerError, SessionLost
from cipherlm.serving.keys import KeyStore
from cipherlm.serving.run import create_server, running
from cipherlm.serving.service import Service
from cipherlm.serving.tfhe import TfheBackend, TfheHostedModel, export_tfhe

MODULES = ["transformer.h.0.attn", "transformer.h.1.attn"]
TOKENS, WIDTH, HEAD_DIM = 2, 16, 4


def small_model() -> GPT2LMHeadModel:
    set_seed(3)
    config = GPT2Config(
        n_layer=3, n_embd=WIDTH, n_head=4, n_positions=8, vocab_size=31, initializer_range=0.3,
        bos_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def encryption(heads: list[int] | None) -> EncryptionConfig:
    return EncryptionConfig(MODULES, heads=heads, n_bits=2)


class Direct:
    """A connection without a network: the other side is a computation in this process."""

    def __init__(self, computation: Computation) -> None:
        self.computation = computation
        self.seen: list[bytes] = []
        self.reported: list[tuple[int, int]] = []

    def evaluate(self, module, start, count, inputs, refresh, report):
        self.seen += inputs

        def both(done, total):
            self.reported.append((done, total))
            if report is not None:
                report(done, total)

        results = self.computation.evaluate(module, start, count, inputs, refresh, both)
        self.seen += results
        return results


@pytest.fixture(scope="module")
def compiled():
    pytest.importorskip("concrete.fhe")
    model = get_encrypted_model(small_model(), encryption([2]))
    model.calibrate(torch.randint(0, 31, (20, 6), generator=torch.Generator().manual_seed(0)))
    return model


@pytest.fixture(scope="module")
def exported(compiled, tmp_path_factory):
    """The directory and what a bundle would say of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        compiled.compile(tokens=TOKENS)
    directory = tmp_path_factory.mktemp("bundle")
    return directory, export_tfhe(compiled, directory)


@pytest.fixture(scope="module")
def hosted(exported):
    return TfheHostedModel.load(exported[0] / "server", "tiny")


@pytest.fixture(scope="module")
def backend(exported):
    loaded = TfheBackend.load(exported[0] / "client")
    loaded.keygen()
    return loaded


@pytest.fixture(scope="module")
def key_file(backend, tmp_path_factory):
    path = tmp_path_factory.mktemp("keys") / "evaluation"
    backend.write_evaluation_keys(path)
    return path


@pytest.fixture
def connected(hosted, backend, key_file):
    backend.connection = Direct(hosted.open({"evaluation": key_file}))
    return backend


def hidden(tokens: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(tokens, WIDTH))
    return (rows - rows.mean(-1, keepdims=True)) / rows.std(-1, keepdims=True)


def root_mean_square(values) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def no_exchange(_request: bytes) -> bytes:
    raise AssertionError("TFHE refreshes nothing")


def unheard(_done: int, _total: int) -> None:
    pass


def test_the_export_says_what_it_wrote(exported):
    directory, said = exported
    assert said["scheme"] == "tfhe"
    assert said["modules"] == MODULES
    for party, suffixes in (("server", (".json", ".zip")), ("client", (".json", ".safetensors"))):
        written = {
            p.relative_to(directory / party).as_posix(): sha256_of(p)
            for p in (directory / party).rglob("*")
            if p.is_file()
        }
        assert written == said[party]
        assert set(written) == {f"circuits/{module}{suffix}" for module in MODULES for suffix in suffixes}
    json.dumps(said)


def test_the_description_is_public_json(hosted, backend, exported, key_file):
    description: dict = hosted.description
    assert json.loads(json.dumps(description)) == description
    assert description["scheme"] == "tfhe"
    assert description["name"] == "tiny"
    assert description["modules"] == MODULES
    assert description["max_tokens"] == TOKENS
    assert description["fingerprint"] == backend.fingerprint == exported[1]["fingerprint"]
    assert description["keys"] == {"evaluation": key_file.stat().st_size}
    assert description["parameters"][MODULES[0]]["outputs"] == HEAD_DIM


def test_both_sides_fit_the_seam(hosted, key_file):
    model: HostedModel = hosted
    computation: Computation = model.open({"evaluation": key_file})
    computation.close()
    with pytest.raises(ValueError, match="no module"):
        computation.evaluate(MODULES[0], 0, 1, [b""], no_exchange, unheard)


def test_the_server_computes_what_the_model_would(connected, compiled):
    """Two bits are coarse, and lookups round approximately: 0.2 to 0.62 of the clear integers' size was seen.

    An output that has nothing to do with the input would be off by 1 if it is zero, and by 1.4 otherwise.
    """
    for module in MODULES:
        quantized = compiled.encrypted_modules[module].quantized
        rows = [hidden(TOKENS, seed) for seed in range(3)]
        clear = np.concatenate([quantized(x) for x in rows])
        remote = np.concatenate([connected.evaluate(module, x, 0) for x in rows])
        assert remote.shape == clear.shape == (3 * TOKENS, HEAD_DIM)
        assert root_mean_square(remote - clear) < 0.85 * root_mean_square(clear)
    assert connected.evaluate(MODULES[0], hidden(1)).shape == (1, HEAD_DIM)
    reports: list[tuple[int, int]] = []
    connected.evaluate(MODULES[0], hidden(1), 0, lambda done, total: reports.append((done, total)))
    assert reports == [(0, 1), (1, 1)]


def test_messages_are_as_long_as_the_server_says(connected, hosted):
    connected.evaluate(MODULES[1], hidden(TOKENS))
    assert max(map(len, connected.connection.seen)) == hosted.description["message_bytes"]


def test_what_a_client_gets_wrong_is_a_value_error(hosted, backend, key_file):
    computation = hosted.open({"evaluation": key_file})
    ciphertext = backend.circuits[MODULES[0]].encrypt(hidden(TOKENS))
    for module, start, count, inputs, message in (
        ("transformer.h.2.attn", 0, 1, [ciphertext], "no module"),
        (MODULES[0], 1, 1, [ciphertext], "start must be 0"),
        (MODULES[0], 0, 0, [ciphertext], "takes 1 to 2 tokens, not 0"),
        (MODULES[0], 0, 3, [ciphertext], "takes 1 to 2 tokens, not 3"),
        (MODULES[0], 0, 2, [], "takes one ciphertext"),
        (MODULES[0], 0, 2, [ciphertext] * 2, "takes one ciphertext"),
        (MODULES[0], 0, 2, [b""], "cut off"),
        (MODULES[0], 0, 2, [ciphertext[:-1]], "cut off"),
        (MODULES[0], 0, 2, [ciphertext[:200] + b"?" + ciphertext[201:]], "checksum"),
        (MODULES[1], 0, 2, [ciphertext], "of another circuit"),
    ):
        with pytest.raises(ValueError, match=message):
            computation.evaluate(module, start, count, inputs, no_exchange, unheard)


def test_a_client_that_has_gone_keeps_no_machine_busy(hosted, backend, key_file):
    computation = hosted.open({"evaluation": key_file})

    def cancelled(_done: int, _total: int) -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        computation.evaluate(MODULES[0], 0, 1, [b"not even read"], no_exchange, cancelled)


def test_damaged_and_incomplete_keys_are_refused(hosted, backend, key_file, tmp_path):
    content = key_file.read_bytes()
    first = len(backend.circuits[MODULES[0]].evaluation_keys())
    path = tmp_path / "keys"
    for changed, message in (
        (b"", "cut off"),
        (content[:1000], "cut off"),
        (content[:first], rf"{MODULES[1]} are refused: the message is cut off"),
        (content[:-1], "cut off"),
        (content + b"\0", "followed by something else"),
        (content[first:] + content[:first], "another circuit"),
        (content[: first // 2] + bytes([content[first // 2] ^ 1]) + content[first // 2 + 1 :], "checksum"),
    ):
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=message):
            hosted.open({"evaluation": path})
    for kinds in ({}, {"public": key_file}, {"evaluation": key_file, "public": key_file}):
        with pytest.raises(ValueError, match="kind 'evaluation'"):
            hosted.open(kinds)


def test_keys_are_saved_privately_and_loaded(backend, exported, connected, tmp_path):
    path = tmp_path / "keys" / "secret"
    backend.save_keys(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    again = TfheBackend.load(exported[0] / "client", connected.connection)
    assert not again.keys_ready
    with pytest.raises(RuntimeError, match="no keys yet"):
        again.evaluate(MODULES[0], hidden(1))
    again.load_keys(path)
    assert again.keys_ready
    assert again.evaluate(MODULES[0], hidden(1)).shape == (1, HEAD_DIM)
    content = path.read_bytes()
    for damaged in (content[:-9], content + b"\0", bytes(100)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="does not hold the keys of this model"):
            again.load_keys(path)


def test_the_backend_refuses_what_cannot_run(backend, connected):
    with pytest.raises(ValueError, match="no module"):
        connected.evaluate("transformer.h.2.attn", hidden(1))
    with pytest.raises(ValueError, match="start must be 0"):
        connected.evaluate(MODULES[0], hidden(1), 1)
    with pytest.raises(TooManyTokensError):
        connected.evaluate(MODULES[0], hidden(3))
    sent = len(connected.connection.seen)
    assert sent == 0
    backend.connection = None
    with pytest.raises(RuntimeError, match="no connection"):
        backend.evaluate(MODULES[0], hidden(1))


def test_a_lost_session_is_opened_again(backend, connected):
    """It had nothing to remember, so nothing has to be sent again but the ciphertext."""
    direct = connected.connection

    class Lossy:
        losses = reopened = 0

        def evaluate(self, *arguments):
            if self.losses > self.reopened - 1:
                raise SessionLost("gone")
            return direct.evaluate(*arguments)

        def reopen(self):
            self.reopened += 1

    backend.connection = lossy = Lossy()
    assert backend.evaluate(MODULES[0], hidden(1)).shape == (1, HEAD_DIM)
    assert lossy.reopened == 1
    lossy.losses = 9
    with pytest.raises(SessionLost):
        backend.evaluate(MODULES[0], hidden(1))


def test_over_the_network(hosted, backend, connected, key_file, tmp_path):
    """A real server and a real client: the same numbers as without, for the same ciphertext.

    That holds within a process, which chooses its Fourier transforms, and so their rounding, once.
    """
    store = KeyStore(tmp_path, hosted.description["keys"], 1 << 30)
    direct = connected.connection
    with running(create_server(Service(hosted, store), port=0)) as url:
        remote = Connection(url, model=backend.fingerprint)
        try:
            remote.open({"evaluation": remote.upload("evaluation", key_file)})
            ciphertext = backend.circuits[MODULES[1]].encrypt(hidden(TOKENS))
            arguments = (MODULES[1], 0, TOKENS, [ciphertext], no_exchange, None)
            results = [connection.evaluate(*arguments)[0] for connection in (remote, direct)]
            decrypted = [backend.circuits[MODULES[1]].decrypt(result) for result in results]
            assert np.array_equal(*decrypted)
            backend.connection = remote
            assert backend.evaluate(MODULES[0], hidden(1)).shape == (1, HEAD_DIM)
            with pytest.raises(ServerError, match="checksum"):
                remote.evaluate(MODULES[1], 0, 1, [ciphertext[:300] + b"?" + ciphertext[301:]], no_exchange)
            damaged = key_file.read_bytes()[:-1]
            with pytest.raises(ServerError, match="cut off"):
                remote.open({"evaluation": remote.upload("evaluation", damaged)})
        finally:
            remote.close()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([], "0 results"),
        ([b""], "cut off"),
        ([b"x" * 500], "not one of CipherLM's"),
        ("echo", "holds an input"),
    ],
)
def test_a_server_that_answers_nonsense_is_refused(backend, answer, message):
    class Nonsense:
        def evaluate(self, module, start, count, inputs, refresh, report):
            with pytest.raises(ValueError, match="TFHE never needs"):
                refresh(b"")
            return inputs if answer == "echo" else answer

    backend.connection = Nonsense()
    with pytest.raises(ValueError, match=message):
        backend.evaluate(MODULES[0], hidden(1))


def test_directories_without_circuits_are_refused(exported, tmp_path):
    for load in (TfheHostedModel.load, TfheBackend.load):
        with pytest.raises(ValueError, match="holds no TFHE circuits"):
            load(tmp_path)
    with pytest.raises(ValueError, match="cipherlm-tfhe-server"):
        TfheHostedModel.load(exported[0] / "client")
    with pytest.raises(ValueError, match="cipherlm-tfhe-client"):
        TfheBackend.load(exported[0] / "server")
    with pytest.raises(ValueError, match="no circuit to serve"):
        TfheHostedModel({})


def test_a_model_that_is_not_compiled_is_not_exported(tmp_path):
    model = get_encrypted_model(small_model(), encryption([0]))
    with pytest.raises(NotCompiledError, match=MODULES[0]):
        export_tfhe(model, tmp_path)
    assert not any(tmp_path.iterdir())


def head_columns(head: int) -> np.ndarray:
    return np.concatenate(
        [np.arange(HEAD_DIM) + part * WIDTH + head * HEAD_DIM for part in range(3)]
    )  # queries, keys, values


def test_the_client_keeps_the_weights_of_clear_heads_alone(tmp_path):
    model = small_model()
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = client_state_dict(model, encryption([2, 0]))
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in original.items())
    assert set(original) - set(state) == {"lm_head.weight"}
    secret = np.concatenate([head_columns(2), head_columns(0)])
    for name, tensor in state.items():
        if not name.startswith(tuple(f"{module}.c_attn" for module in MODULES)):
            assert torch.equal(tensor, original[name])
            continue
        others = np.setdiff1d(np.arange(3 * WIDTH), secret)
        assert not tensor[..., secret].any()
        assert torch.equal(tensor[..., others], original[name][..., others])
        assert original[name][..., secret].any() or name.endswith("bias")
    # It is a state dict that a clear model loads.
    loaded = GPT2LMHeadModel(model.config)
    missing, unexpected = loaded.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])


def test_the_client_keeps_nothing_of_modules_that_are_encrypted_whole():
    model = small_model()
    state = client_state_dict(model, encryption(None))
    assert not [name for name in state if name.startswith(tuple(f"{module}." for module in MODULES))]
    assert "transformer.h.2.attn.c_attn.weight" in state
    assert set(model.state_dict()) - set(state) >= {f"{module}.c_proj.weight" for module in MODULES}


def test_the_state_is_the_same_from_a_clear_and_an_encrypted_model():
    clear = client_state_dict(small_model(), encryption([2]))
    encrypted = client_state_dict(get_encrypted_model(small_model(), encryption([2])), encryption([2]))
    assert set(clear) == set(encrypted)
    assert all(torch.equal(clear[name], encrypted[name]) for name in clear)


def test_a_head_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="heads 0 to 3, no head 4"):
        client_state_dict(small_model(), encryption([4]))
    with pytest.raises(ValueError, match="no attention module"):
        client_state_dict(small_model(), EncryptionConfig("transformer.h.7.attn", scheme="tfhe"))


def test_no_remote_weight_is_in_the_client_s_files(exported, compiled, tmp_path):
    """Rows and columns of the encrypted heads' matrices, in both float types; the server's archive is code.

    The search finds the clear heads' weights in the same files, which belong there.
    """
    save_file(client_state_dict(compiled, encryption([2])), tmp_path / "model.safetensors")
    content = [
        path.read_bytes() for path in [*(exported[0] / "client").rglob("*.*"), tmp_path / "model.safetensors"]
    ]

    def found(weight: np.ndarray) -> int:
        pieces = [
            np.ascontiguousarray(line[:HEAD_DIM]).astype(kind).tobytes()
            for matrix in (weight, weight.T)
            for line in matrix
            for kind in ("<f4", "<f8", "<f2")
        ]
        return sum(piece in file for piece in pieces for file in content)

    for module in MODULES:
        weight = compiled.get_submodule(module).c_attn.weight.detach().numpy()
        for part in range(3):
            columns = head_columns(2).reshape(3, HEAD_DIM)[part]
            assert found(weight[:, columns]) == 0
            assert found(weight[:, columns + HEAD_DIM]) >= WIDTH
        for name, array in compiled.get_submodule(module).quantized.to_arrays().items():
            if array.ndim != 2 or "rotation" in name:
                continue
            rows = [row for row in array if np.count_nonzero(row) > 1]  # of two bits, many weights are zero
            assert len(rows) > 3
            assert not any(row.tobytes() in file for row in rows for file in content)
    assert set(load_file(tmp_path / "model.safetensors")) == set(client_state_dict(compiled, encryption([2])))


def test_a_session_needs_a_path(hosted):
    with pytest.raises(FileNotFoundError):
        hosted.open({"evaluation": Path("nowhere")})
