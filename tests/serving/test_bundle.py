"""Bundles: what is in them, what is not, and what happens to damaged ones."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers.activations import ACT2FN

from cipherlm import EncryptionConfig, get_encrypted_model
from cipherlm.models.backends import Simulated
from cipherlm.schemes.ckks.session import Hosted
from cipherlm.serving.bundle import (
    BUNDLE_NAME,
    Bundle,
    BundleError,
    client_description,
    export,
    generate_keys,
    load_hosted_model,
)
from cipherlm.serving.ckks import (
    MODULES_NAME,
    RemotePart,
    geometry_of,
    load_modules,
    parameters_of,
    save_modules,
)
from cipherlm.serving.linear_bundle import export_linear
from cipherlm.serving.remote import RemoteModel

from . import small
from .small import at_home  # noqa: F401

PLACEMENTS = [
    pytest.param(name, marks=() if name in ("all", "hybrid") else pytest.mark.slow) for name in small.TARGETS
]


@pytest.fixture
def copy(tmp_path):
    """Return a function that copies a bundle of a placement to where it may be damaged."""

    def copied(party: str, placement: str = "hybrid") -> Path:
        return Path(shutil.copytree(small.exported(placement) / party, tmp_path / party))

    return copied


def about(directory: Path) -> dict:
    return json.loads((directory / BUNDLE_NAME).read_text())


def rewrite(directory: Path, **changes) -> None:
    """Change a bundle's description, and make its list of files that of the files there are."""
    files = {
        name: hashlib.sha256((directory / name).read_bytes()).hexdigest()
        for name in about(directory)["files"]
    }
    (directory / BUNDLE_NAME).write_text(json.dumps({**about(directory), "files": files, **changes}))


# What is in them.


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_server_s_bundle_computes_what_the_model_does(placement):
    """All that the server reads is in its bundle: without noise, it gives the numbers of the model here."""
    root = small.exported(placement)
    facts = Bundle.load(root / "server", "server").about
    geometry = geometry_of(facts)
    assert geometry == small.GEOMETRY
    backend = Simulated(load_modules(root / "server", geometry), geometry, noise=False)
    model = small.encrypted_model(placement)
    hidden = 0.4 * np.random.default_rng(1).normal(size=(5, small.WIDTH))  # as large as embeddings
    hidden -= hidden.mean(1, keepdims=True)
    exact = {name: module.exact for name, module in model.remote_modules.items()}
    assert list(exact) == facts["modules"]
    modules = {
        name: Hosted(own.module.fitted(model.remote_modules[name].ranges, small.CONTEXT), own.prefixes)
        for name, own in exact.items()
    }
    expected = Simulated(modules, geometry, noise=False)
    for name in exact:
        ours, theirs = (side.evaluate(name, hidden, 1) for side in (expected, backend))
        assert np.abs(ours).max() > 0.1
        assert np.abs(ours - theirs).max() < 1e-5 * np.abs(ours).max()  # weights are in single precision


@pytest.mark.parametrize("target", ["all", ["transformer.h.0.mlp"]])
def test_a_server_knows_the_activation(target, tmp_path):
    clear = small.clear_model()
    clear.config.activation_function = "quick_gelu"
    clear.transformer.h[0].mlp.act = ACT2FN["quick_gelu"]
    model = get_encrypted_model(
        clear, EncryptionConfig(target, scheme="ckks", tokens=small.TOKENS, context=small.CONTEXT)
    )
    model.compile([small.prompt_ids("The old man looked at the sea and saw a ship")])
    ((name, module),) = model.remote_modules.items()
    part = RemotePart(module.exact.module, module.exact.prefixes, module.ranges)
    save_modules(tmp_path, "gpt2", model.placement.args, {name: part})
    hidden = 0.1 * np.random.default_rng(1).normal(size=(3, small.WIDTH))
    hidden -= hidden.mean(1, keepdims=True)
    expected = model.placement.backend("disable").evaluate(name, hidden, 1)
    served = Simulated(load_modules(tmp_path, small.GEOMETRY), small.GEOMETRY, noise=False)
    assert np.abs(served.evaluate(name, hidden, 1) - expected).max() < 1e-5 * np.abs(expected).max()
    (tmp_path / MODULES_NAME).write_text((tmp_path / MODULES_NAME).read_text().replace("quick_gelu", "prelu"))
    with pytest.raises(ValueError, match="'prelu' cannot be computed on ciphertexts"):
        load_modules(tmp_path, small.GEOMETRY)


@pytest.mark.parametrize("placement", ["all", "linear"])
def test_a_server_needs_neither_torch_nor_transformers(placement, tmp_path):
    """Nor does it import them: it starts in the time that its weights take."""
    if placement == "linear":
        root = tmp_path / "linear"
        export_linear(small.clear_model(), EncryptionConfig("linear"), root, small.tokenizer(), name="small")
    else:
        root = small.exported(placement)
    program = (
        "import sys, cipherlm.serving.run, cipherlm.serving.app, cipherlm.cli.serve\n"
        "from cipherlm.serving.bundle import load_hosted_model\n"
        "load_hosted_model(sys.argv[1])\n"
        "print(*[name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(root / "server")], capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == []


def test_both_parties_say_the_same(copy):
    root = small.exported("all")
    server, client = (Bundle.load(root / party, party) for party in ("server", "client"))
    description = load_hosted_model(root / "server").description
    assert client.about["description"] == description
    assert server.about["fingerprint"] == client.about["fingerprint"] == description["fingerprint"]
    assert client_description(root / "client") == {**description, "bundle": str(root / "client")}
    # Everything that lies there is in the list.
    for party in (server, client):
        there = {path.name for path in party.directory.iterdir()} - {BUNDLE_NAME}
        assert there == set(party.about["files"])
        assert not any(path.suffix in (".pkl", ".pt", ".bin") for path in party.directory.rglob("*"))
    # Two exports of one model are one model, other weights or ranges are another.
    assert small.hosted("all").description["fingerprint"] == description["fingerprint"]
    assert small.hosted("hybrid").description["fingerprint"] != description["fingerprint"]


def test_a_client_s_embedding_is_in_half_precision():
    state = load_file(small.exported("all") / "client" / "model.safetensors")
    weight = small.clear_model().transformer.wte.weight.detach().numpy()
    assert np.array_equal(state.pop("transformer.wte.weight"), weight.astype(np.float16))
    assert {array.dtype for array in state.values()} == {np.dtype(np.float32)}


def test_an_export_is_repeatable_and_never_overwrites(tmp_path):
    model = small.encrypted_model("hybrid")
    said = export(model, tmp_path / "again", small.tokenizer(), name="small hybrid")
    assert said == small.hosted("hybrid").description
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        export(model, tmp_path / "there", small.tokenizer(), name="x")
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["mine"]
    with pytest.raises(ValueError, match="not empty"):
        export(model, tmp_path / "there" / "mine", small.tokenizer(), name="x")
    raw = get_encrypted_model(small.clear_model(), EncryptionConfig("all", scheme="ckks", tokens=4))
    with pytest.raises(RuntimeError, match="not calibrated"):
        export(raw, tmp_path / "raw", small.tokenizer(), name="x")
    assert not (tmp_path / "raw").exists()


# What is not.

ATTENTION, MLP, NORMS = ("attn.",), ("mlp.",), ("ln_1.", "ln_2.")
REMOTE = {
    "all": ATTENTION + MLP + NORMS,
    "block": ATTENTION + MLP + NORMS,
    "attention": ATTENTION,
    "mlp": MLP,
    "hybrid": ATTENTION + MLP,
}


def matrices(placement: str) -> dict[str, np.ndarray]:
    """The remote weights, as they are, folded with the normalisation before them, and centred."""
    state = {
        name.removeprefix("transformer.h.0."): tensor.detach().double().numpy()
        for name, tensor in small.clear_model().named_parameters()
        if name.startswith("transformer.h.0.")
    }
    found = {name: array for name, array in state.items() if name.startswith(REMOTE[placement])}
    for norm, layer in (("ln_1", "attn.c_attn"), ("ln_2", "mlp.c_fc")):
        if f"{layer}.weight" in found:
            gain, shift = state[f"{norm}.weight"], state[f"{norm}.bias"]
            weight, bias = state[f"{layer}.weight"], state[f"{layer}.bias"]
            found[f"{layer}.weight folded"] = gain[:, None] * weight
            found[f"{layer}.bias folded"] = bias + shift @ weight
    for name in list(found):
        if ".c_proj." in name:
            found[f"{name} centred"] = found[name] - found[name].mean(-1, keepdims=True)
    return found


def lines(array: np.ndarray) -> list[np.ndarray]:
    """Rows and columns of at least eight numbers."""
    tables = [array, array.T] if array.ndim == 2 else [array[None]]
    return [np.ascontiguousarray(line) for table in tables for line in table if len(line) >= 8]


def bytes_found(array: np.ndarray, files: list[bytes]) -> int:
    """How many lines are in a file, as numbers of any float type."""
    kinds = [line[:8].astype(kind).tobytes() for line in lines(array) for kind in ("<f2", "<f4", "<f8")]
    kinds += [
        (line[:8].astype("<f4").view("<u4") >> 16).astype("<u2").tobytes() for line in lines(array)
    ]  # bfloat16
    return sum(any(kind in file for file in files) for kind in kinds)


def values_found(array: np.ndarray, tensors: list[np.ndarray]) -> int:
    """How many lines are in a tensor to 1e-4, times any factor: six numbers have five ratios."""
    values = np.concatenate([np.append(line, np.nan) for tensor in tensors for line in lines(tensor)])
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = values[1:] / values[:-1]
    order = np.argsort(ratios)
    ordered = ratios[order]
    count = 0
    for line in lines(array):
        wanted = line[1:6] / line[:5]
        low, high = sorted((wanted[0] * (1 - 1e-4), wanted[0] * (1 + 1e-4)))
        at = order[np.searchsorted(ordered, low) : np.searchsorted(ordered, high)]
        at = at[at < len(ratios) - 5]
        count += any(np.allclose(ratios[i : i + 5], wanted, rtol=1e-4, atol=0) for i in at)
    return count


def searched(directory: Path) -> tuple[list[bytes], list[np.ndarray]]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    tensors = [
        np.asarray(tensor, np.float64)
        for path in files
        if path.suffix == ".safetensors"
        for tensor in load_file(path).values()
    ]
    return [path.read_bytes() for path in files], [tensor for tensor in tensors if max(tensor.shape) >= 8]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_no_remote_weight_is_in_the_client_s_bundle(placement):
    files, tensors = searched(small.exported(placement) / "client")
    for name, array in matrices(placement).items():
        assert bytes_found(array, files) == 0, name
        assert values_found(array, tensors) == 0, name
    # The search finds what is there: the client's own weights, and at the server the remote ones.
    embedding = small.clear_model().transformer.wpe.weight.detach().double().numpy()
    assert bytes_found(embedding, files) == len(embedding)  # it is kept row by row
    assert values_found(3 * embedding[:40], tensors) >= 40
    files, tensors = searched(small.exported(placement) / "server")
    for layer in ("attn.c_attn.weight", "mlp.c_fc.weight"):
        if layer in matrices(placement):
            as_kept = f"{layer} folded" if placement in ("all", "block") else layer
            weight = matrices(placement)[as_kept]
            assert values_found(weight, tensors) == sum(weight.shape)


def test_a_client_s_bundle_says_nothing_of_ranges():
    """The ranges of the polynomials are of the weights and the calibration text."""
    ranges = json.loads((small.exported("all") / "server" / "modules.json").read_text())
    found = ranges["modules"]["transformer.h"]["ranges"].values()
    numbers = [repr(number)[:8] for pair in found for number in pair]
    assert len(numbers) == 10
    files = [path.read_text("latin-1") for path in (small.exported("all") / "client").rglob("*.json")]
    assert not any(number in file for number in numbers for file in files)


# Damage.


def load_client(directory: Path, url: str) -> None:
    RemoteModel.connect(url, bundle=directory, keys=small.unused()).close()


@pytest.mark.parametrize("party", ["server", "client"])
def test_every_file_is_checked(copy, party):
    directory = copy(party)
    for name in about(directory)["files"]:
        path = directory / name
        content = path.read_bytes()
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 1
        for damaged in (None, b"", content[:-1], content + b"\0", bytes(flipped)):
            if damaged is None:
                path.unlink()
            else:
                path.write_bytes(damaged)
            with pytest.raises(BundleError, match=f"{name} is missing or damaged"):
                Bundle.load(directory, party)
        path.write_bytes(content)
    Bundle.load(directory, party)


def other(**changes) -> dict:
    """Parameters of another geometry."""
    parameters = parameters_of(small.GEOMETRY)
    return {**parameters, "geometry": {**parameters["geometry"], **changes}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version 2.*export the model again"),
        ({"version": "1"}, "version '1'"),
        ({"format": "zip"}, "damaged: not a bundle"),
        ({"party": "client"}, "is for the client, not for the server"),
        ({"files": {"../client/config.json": "0"}}, "list of files"),
        ({"files": {"/etc/passwd": "0"}}, "list of files"),
        ({"files": []}, "list of files"),
        ({"files": {"gone": "0"}}, "gone is missing or damaged"),
        ({"scheme": "bgv"}, "scheme 'bgv'"),
        ({"scheme": "tfhe"}, "cannot be served"),
        ({"parameters": None}, "cannot be served: not the geometry"),
        ({"parameters": {"geometry": {}}}, "cannot be served: not the geometry"),
        ({"parameters": other(tokens=3)}, "cannot be served"),
        ({"parameters": other(log_degree=15)}, "cannot be served: ring degree"),
        ({"parameters": other(heads=1)}, "another version of CipherLM"),
        ({"parameters": {**other(), "digest": "00"}}, "another version of CipherLM"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_description_of_something_else(copy, changes, message):
    directory = copy("server")
    rewrite(directory, **changes)
    with pytest.raises(BundleError, match=message):
        load_hosted_model(directory)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00\xff", "{" * 100_000, " " * (5 << 20)])
def test_a_description_that_is_none(copy, text):
    directory = copy("client")
    (directory / BUNDLE_NAME).write_text(text, "latin-1")
    with pytest.raises(BundleError, match=r"bundle.json is damaged"):
        Bundle.load(directory, "client")


def test_a_description_that_lacks_something(copy):
    directory = copy("server")
    for name in ("scheme", "parameters", "fingerprint", "name"):
        whole = about(directory)
        (directory / BUNDLE_NAME).write_text(
            json.dumps({key: value for key, value in whole.items() if key != name})
        )
        with pytest.raises(BundleError):
            load_hosted_model(directory)
        (directory / BUNDLE_NAME).write_text(json.dumps(whole))
    load_hosted_model(directory)


def test_no_bundle_at_all(tmp_path):
    with pytest.raises(BundleError, match="is no bundle: `cipherlm export`"):
        load_hosted_model(tmp_path)
    with pytest.raises(BundleError, match=r"is no bundle: try .*server"):
        load_hosted_model(small.exported("hybrid"))
    with pytest.raises(BundleError, match="is for the client"):
        load_hosted_model(small.exported("hybrid") / "client")


def test_server_files_that_do_not_fit_together(copy):
    """Their list of files is right, and what is in them is wrong."""
    directory = copy("server", "all")
    weights, modules = directory / "weights.safetensors", directory / "modules.json"
    arrays, facts = load_file(weights), json.loads(modules.read_text())

    def refused(message: str) -> None:
        rewrite(directory)
        with pytest.raises(BundleError, match=message):
            load_hosted_model(directory)
        save_file(arrays, weights)
        modules.write_text(json.dumps(facts))

    for name in arrays:
        save_file({key: array for key, array in arrays.items() if key != name}, weights)
        refused("cannot be served")
    save_file({key: array[..., :-1].copy() for key, array in arrays.items()}, weights)
    refused("cannot be served")
    weights.write_bytes(b"nothing")
    refused("cannot be served")
    args, (name, about) = facts["args"], *facts["modules"].items()
    for changes in (
        {"version": 1}, {"model_type": "pickle"}, {"args": {**args, "layers": 3}}, {"args": {**args, "x": 1}},
        {"args": {**args, "width": 16}}, {"modules": {"transformer.x": about}}, {"modules": {name: {}}},
        {"modules": {name: {"ranges": {}}}},
        {"modules": {name: {"ranges": {**about["ranges"], "x": [0, 1]}}}},
        {"modules": {name: {"ranges": {key: [0] for key in about["ranges"]}}}},
    ):  # fmt: skip
        modules.write_text(json.dumps({**facts, **changes}))
        refused("cannot be served")
    for text in ("", "[]", "1", '{"transformer.h": 1}'):
        modules.write_text(text)
        refused("cannot be served")
    rewrite(directory)
    load_hosted_model(directory)


def test_client_files_that_do_not_fit_together(copy, tmp_path):
    directory = copy("client")
    with small.serving("hybrid", tmp_path / "data") as (url, _):

        def refused(name: str, content: bytes) -> None:
            original = (directory / name).read_bytes()
            (directory / name).write_bytes(content)
            rewrite(directory)
            with pytest.raises(BundleError, match=r"damaged|another model"):
                load_client(directory, url)
            (directory / name).write_bytes(original)
            rewrite(directory)

        state = (directory / "model.safetensors").read_bytes()
        refused("model.safetensors", b"")
        refused("model.safetensors", state[:-8])
        save_file({"transformer.wte.weight": np.zeros((4, 4), np.float32)}, tmp_path / "wrong")
        refused("model.safetensors", (tmp_path / "wrong").read_bytes())
        save_file({}, tmp_path / "wrong")
        refused("remote.safetensors", (tmp_path / "wrong").read_bytes())
        save_file(
            {f"transformer.h.0.{name}": np.zeros((2, 32), np.float32) for name in ("attn", "mlp")},
            tmp_path / "wrong",
        )
        refused("remote.safetensors", (tmp_path / "wrong").read_bytes())
        refused("encryption_config.json", b"{}")
        refused("encryption_config.json", b'{"version": 2, "target_modules": "all", "scheme": "tfhe"}')
        refused("config.json", b"{}")
        refused("config.json", b"nothing")


@pytest.mark.parametrize(
    "description",
    [
        {}, {"scheme": "x"}, {"scheme": "ckks"}, {"scheme": "ckks", "parameters": {"heads": 1}},
        {"scheme": "ckks", "parameters": {"geometry": []}},
        {"scheme": "ckks", "parameters": other(heads=10**9)},
        {"scheme": "ckks", "parameters": other(heads=1)}, {"scheme": "tfhe"},
    ],
)  # fmt: skip
def test_no_keys_for_nonsense(description):
    with pytest.raises(ValueError, match=r"not known|geometry|integer|bundle|version"):
        generate_keys(description, lambda text: pytest.fail("a key was made"))


# Texts.


@pytest.mark.slow
def test_remote_text_is_the_clear_model_s(tmp_path):
    """Everything encrypted: over the network, in this process, and in the clear."""
    with small.serving("all", tmp_path) as (url, _), small.connect(url, "all") as remote:
        assert small.generate(remote) == small.continuation()


def test_remote_text_of_a_hybrid_placement(tmp_path):
    with small.serving("hybrid", tmp_path) as (url, _), small.connect(url, "hybrid") as remote:
        assert small.generate(remote, count=1) == small.continuation(count=1)


@pytest.mark.slow
@pytest.mark.parametrize("placement", small.TARGETS)
@pytest.mark.parametrize("text", ["The old man looked", "Once there was a little girl who"])
def test_remote_text_in_every_placement(tmp_path, placement, text):
    """Longer than one ciphertext; RemoteModel, the model with a server in this process, the clear model."""
    room = min(3, small.CONTEXT - 1 - small.prompt_ids(text).shape[1])
    expected = small.continuation(text, room)
    with small.serving(placement, tmp_path) as (url, _), small.connect(url, placement) as remote:
        assert small.generate(remote, text, room) == expected
        logits = remote.model(remote.model.with_prefix(small.prompt_ids(text))).logits
    local = small.encrypted_model(placement)
    local.set_fhe_mode("execute")
    ids = local.with_prefix(small.prompt_ids(text))
    with torch.inference_mode():
        assert (
            local.generate(ids, max_new_tokens=room, do_sample=False)[0, ids.shape[1] :].tolist() == expected
        )
        # Of two encryptions, which differ by their noise.
        assert (local(ids).logits - logits).abs().max() < 1e-2
