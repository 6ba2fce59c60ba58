"""Models in llama.cpp's format load as the models that they were written from."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

from cipherlm import EncryptionConfig, get_encrypted_model, load_model, load_tokenizer
from cipherlm.cli import main

WIDTH, BLOCKS, HEADS, POSITIONS, INNER = 32, 2, 4, 48, 96
TEXT = "The old man looked at the sea"


@pytest.fixture(scope="module")
def clear() -> GPT2LMHeadModel:
    set_seed(3)
    shape = {"n_embd": WIDTH, "n_layer": BLOCKS, "n_head": HEADS, "n_positions": POSITIONS, "n_inner": INNER}
    config = GPT2Config(**shape, vocab_size=4096, bos_token_id=0, eos_token_id=0, initializer_range=0.2)
    return GPT2LMHeadModel(config).eval()


def write(path: Path, model: GPT2LMHeadModel, *, quantized: bool = False) -> None:
    """Write a GPT-2 with the embedded model's tokeniser as llama.cpp's converter does."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    tokenizer, config = load_tokenizer("tiny"), model.config
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_inner)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    pairs = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(pairs["vocab"], key=pairs["vocab"].get))
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in pairs["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config.n_layer)
    for key, tensor in model.transformer.state_dict().items():
        module, _, kind = key.rpartition(".")
        linear = kind == "weight" and module.endswith(("c_attn", "c_proj", "c_fc"))
        values = np.ascontiguousarray(tensor.T if linear else tensor, np.float32)
        if linear and quantized:
            q8 = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{names.get_name(module)}.{kind}", gguf.quantize(values, q8), raw_dtype=q8)
        else:
            writer.add_tensor(f"{names.get_name(module)}.{kind}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids).logits


@pytest.mark.parametrize("where", ["file", "directory", "beside a configuration"])
def test_a_gguf_model_is_the_model(tmp_path, clear, where):
    write(tmp_path / "small.gguf", clear)
    if where == "beside a configuration":
        clear.config.save_pretrained(tmp_path)
    name = tmp_path / "small.gguf" if where == "file" else tmp_path
    model, tokenizer = load_model(name), load_tokenizer(name)
    assert (model.config.n_positions, model.config.n_inner, model.training) == (POSITIONS, INNER, False)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    assert torch.equal(ids, load_tokenizer("tiny")(TEXT, return_tensors="pt").input_ids)
    assert torch.allclose(logits(model, ids), logits(clear, ids), atol=1e-5)


@pytest.mark.parametrize("terminal", [False, True])
def test_the_bar_is_for_terminals(tmp_path, clear, capsys, monkeypatch, terminal):
    write(tmp_path / "small.gguf", clear)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    load_model(tmp_path)
    assert ("GGUF tensors" in capsys.readouterr().err) == terminal


def test_a_quantized_gguf_model_is_encrypted(tmp_path, clear):
    write(tmp_path / "small.gguf", clear, quantized=True)
    loaded, tokenizer = load_model(tmp_path), load_tokenizer(tmp_path)
    ids = tokenizer("The old man", return_tensors="pt").input_ids
    expected = logits(clear, ids)
    assert 1e-5 < (logits(loaded, ids) - expected).abs().max() < 0.05 * expected.abs().max()
    config = EncryptionConfig("all", scheme="ckks", tokens=4, context=12)
    model = get_encrypted_model(load_model(tmp_path), config)
    model.calibrate(tokenizer(TEXT, return_tensors="pt").input_ids)
    model.set_fhe_mode("simulate")
    behind = model.with_prefix(ids)
    assert torch.allclose(logits(model, behind), logits(loaded, behind), atol=5e-3)


def test_weights_of_transformers_come_first(tmp_path, clear):
    (tmp_path / "small.gguf").write_bytes(b"not read")
    clear.save_pretrained(tmp_path)
    assert load_model(tmp_path).config.n_inner == INNER


def test_several_models_in_a_directory(tmp_path):
    for name in ("one.gguf", "two.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"several models: give one as a file \(one\.gguf, two\.gguf\)"):
        load_model(tmp_path)


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_no_such_file(load, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        load(tmp_path / "small.gguf")


@pytest.mark.parametrize("left", [3, 40, 5_000, 200_000, -1_000])
def test_a_damaged_file(tmp_path, clear, left):
    path = tmp_path / "small.gguf"
    write(path, clear)
    path.write_bytes(path.read_bytes()[:left])
    for load in (load_model, load_tokenizer):
        with pytest.raises(ValueError, match="is damaged or of another version") as caught:
            load(path)
        assert "\n" not in str(caught.value)


def test_packages_that_are_not_installed(tmp_path, monkeypatch, capsys):
    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("cipherlm.models.gguf.find_spec", lambda name: None if name == "accelerate" else name)
    assert main(["generate", "x", "--model", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith('is a GGUF file, which needs accelerate: pip install "cipherlm[gguf]"')
