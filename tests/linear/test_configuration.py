"""Linear layers by configuration: which, in which mode, saved and loaded."""

import copy

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from cipherlm import EncryptedLinearModel, EncryptedModel, EncryptionConfig, get_encrypted_model
from cipherlm.models.targets import find_linear, match

from .architectures import CONFIGS, tiny
from .test_integration import BOUND, IDS, call, padded

LINEAR = EncryptionConfig(target_modules="linear")


class Noisy:
    """Exact products and a known error, so that one sees who multiplies."""

    def __init__(self, model: EncryptedLinearModel, error: float = 0.0) -> None:
        self.weights, self.error, self.rows = model._weights, error, 0

    def product(self, group, x, *, transposed=False):
        self.rows += len(x)
        matrix = self.weights[group].astype(np.float64)
        return x @ (matrix if transposed else matrix.T) + self.error


def test_linear_means_ckks():
    assert LINEAR.scheme == "ckks"
    assert EncryptionConfig.from_dict(LINEAR.to_dict()) == LINEAR
    with pytest.raises(ValueError, match=r"is for scheme=.ckks.|n_bits means nothing"):
        EncryptionConfig(target_modules="linear", n_bits=5)


@pytest.mark.parametrize(
    ("architecture", "targets", "count"),
    [
        ("llama", "linear", 14),
        ("llama", ["linear"], 14),
        ("llama", ["q_proj", "v_proj"], 4),
        ("llama", "layers.*.mlp.*", 6),
        ("llama", ["model.layers.0.*", "o_proj"], 8),
        ("llama", ["layers.[1-9].*_proj"], 7),
        ("llama", r".*layers\.\d+\.(self_attn|mlp)\.(q|up)_proj", 4),
        ("llama", ["lm_head"], 1),
        ("gpt2", "linear", 8),
        ("gpt2", ["c_attn"], 2),
        ("gpt2", "c_proj", 4),
        ("gpt2", ["mlp.c_*"], 4),
        ("bert", "linear", 13),
        ("t5", "linear", 2 * 7 + 2 * 11),
    ],
)
def test_names_of_layers(architecture, targets, count):
    model = get_encrypted_model(tiny(architecture), EncryptionConfig(targets, scheme="ckks"))
    assert isinstance(model, EncryptedLinearModel)
    assert len(model.remote_modules) == count
    with torch.no_grad():
        expected = tiny(architecture)(**call(architecture))[0]
        assert torch.allclose(model(**call(architecture))[0], expected, atol=BOUND, rtol=BOUND)


def test_names_of_modules_that_hold_linear_layers_stay_what_they_were():
    for targets in ("all", ["attn"], ["transformer.h.0.mlp"], "transformer.h.1", r"transformer\.h\.0\..*"):
        config = EncryptionConfig(targets, scheme="ckks")
        try:
            model = get_encrypted_model(tiny("gpt2"), config)
        except ValueError as error:
            assert "lies in" in str(error) or "encrypt" in str(error)  # noqa: PT017
        else:
            assert isinstance(model, EncryptedModel)


@pytest.mark.parametrize(
    ("architecture", "config", "message"),
    [
        ("llama", EncryptionConfig(["q_porj"], scheme="ckks"), "no linear layer 'q_porj'; did you mean"),
        (
            "llama",
            EncryptionConfig(["embed_tokens"], scheme="ckks"),
            "'embed_tokens' cannot be encrypted, only linear",
        ),
        ("llama", EncryptionConfig(["q_proj"], scheme="tfhe"), 'supported: gpt2.*target_modules="linear"'),
        ("phi", EncryptionConfig("all", scheme="ckks"), 'supported: gpt2, llama.*target_modules="linear"'),
        ("gpt2", EncryptionConfig(["q_proj"], scheme="ckks"), "no attention module, MLP or block 'q_proj'"),
    ],
)
def test_names_that_fit_nothing(architecture, config, message):
    model = tiny(architecture)
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        get_encrypted_model(model, config)
    assert [type(module) for module in model.modules()] == before


def test_models_without_linear_layers():
    with pytest.raises(ValueError, match="Embedding has no linear layers"):
        find_linear(torch.nn.Embedding(2, 3), LINEAR)
    model = get_encrypted_model(tiny("llama"), LINEAR)
    with pytest.raises(ValueError, match="encrypted already"):
        get_encrypted_model(model, LINEAR)


def test_patterns_in_names():
    names = ["h.0.q", "h.1.q", "h.10.k"]
    assert match(["h.?.*"], names) == ["h.0.q", "h.1.q"]
    assert match("h.1*", names) == ["h.1.q", "h.10.k"]
    assert match(["q"], names) == ["h.0.q", "h.1.q"]
    with pytest.raises(ValueError, match="no attention module"):
        match(["[ab]"], names)


def test_the_model_stays_what_it_was():
    clear = tiny("llama")
    model = get_encrypted_model(clear, LINEAR)
    assert model is clear
    assert isinstance(model, CONFIGS["llama"][0])
    assert str(type(model)) == str(CONFIGS["llama"][0])
    assert model.fhe_mode == "disable"
    assert sum(p.numel() for p in model.parameters()) == 2 * 64 * 32 + 5 * 32  # embeddings and norms
    bert = get_encrypted_model(tiny("bert"), LINEAR)
    found = bert(IDS, output_hidden_states=True)
    assert len(found.hidden_states) == 3


def test_modes_and_connections():
    model = get_encrypted_model(tiny("llama"), LINEAR)
    with torch.no_grad():
        clear = model(IDS).logits
    products = Noisy(model, error=0.1)
    model.connect(products)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, clear)
    model.set_fhe_mode("execute", ["layers.1.*.q_proj", "down_proj"])
    assert model.fhe_mode == "mixed"
    with torch.no_grad():
        assert not torch.allclose(model(IDS).logits, clear, atol=1e-3)
        # k and v of block 1 share their product with q; down_proj of both blocks.
        assert products.rows == 3 * IDS.numel()
        with model.in_clear():
            assert torch.equal(model(IDS).logits, clear)
    assert model.fhe_mode == "mixed"
    model.set_fhe_mode("execute")
    assert model.fhe_mode == "execute"
    model.connect(Noisy(model))
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, clear, atol=BOUND, rtol=BOUND)
    with pytest.raises(ValueError, match="no mode 'fast'"):
        model.set_fhe_mode("fast")
    with pytest.raises(ValueError, match="no linear layer 'lm_head'"):
        model.set_fhe_mode("execute", "lm_head")


@pytest.mark.parametrize(("architecture", "auto"), [
    ("llama", AutoModelForCausalLM), ("qwen2", AutoModelForCausalLM), ("gpt2", AutoModelForCausalLM),
    ("t5", AutoModelForSeq2SeqLM),
])  # fmt: skip
def test_saved_and_loaded(architecture, auto, tmp_path):
    targets = "linear" if architecture != "qwen2" else ["lm_head", "q_proj", "k_proj"]
    clear = tiny(architecture).to(torch.bfloat16)
    model = get_encrypted_model(copy.deepcopy(clear), EncryptionConfig(targets, scheme="ckks"))
    model.save_pretrained(tmp_path)
    again = auto.from_pretrained(tmp_path, dtype="auto")
    assert type(again) is type(clear)
    for name, tensor in clear.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    loaded = EncryptedLinearModel.from_pretrained(tmp_path, attn_implementation="eager")
    assert loaded.encryption_config == model.encryption_config
    assert loaded.groups == model.groups
    assert loaded.config._attn_implementation == "eager"
    # transformers loads some buffers in single precision, which .to() above has rounded.
    again.set_attn_implementation("eager")
    again = get_encrypted_model(again, model.encryption_config)
    with torch.no_grad():
        assert torch.equal(loaded(**call(architecture))[0], again(**call(architecture))[0])


def test_a_model_that_was_quantised_in_its_file_only(tmp_path):
    clear = tiny("llama")
    # As transformers leaves a model that it has read from a GGUF file.
    clear.is_quantized, clear.hf_quantizer = True, object()
    clear.config.quantization_config = {"quant_method": "gguf"}
    model = get_encrypted_model(clear, LINEAR)
    assert not model.is_quantized
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    EncryptedLinearModel.from_pretrained(tmp_path)


def test_only_encrypted_models_are_loaded(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no encryption_config\.json"):
        EncryptedLinearModel.from_pretrained(tmp_path)


def test_copies_keep_their_modes():
    model = get_encrypted_model(tiny("gpt2"), LINEAR)
    again = copy.deepcopy(model)
    again.connect(Noisy(model, error=1.0))
    again.set_fhe_mode("execute")
    assert (model.fhe_mode, again.fhe_mode) == ("disable", "execute")
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    expected = tiny("gpt2").generate(**padded(), **options)
    assert torch.equal(model.generate(**padded(), **options), expected)
