"""The integration with real quantisation, and with real circuits where Concrete is installed."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

from cipherlm import (
    EncryptedModel,
    EncryptionConfig,
    MultiHeadsQGPT2Model,
    SingleHeadQGPT2Model,
    get_encrypted_model,
    load_model,
    load_tokenizer,
)
from cipherlm.schemes.tfhe.errors import TooManyTokensError

ATTENTION = "transformer.h.0.attn"


@pytest.fixture
def concrete() -> None:
    pytest.importorskip("concrete.fhe", reason="Concrete, the tfhe extra, is not installed")


def small_model() -> GPT2LMHeadModel:
    """Return a GPT-2 of width 32 with random weights, large enough that attention matters."""
    set_seed(7)
    config = GPT2Config(
        n_layer=2, n_embd=32, n_head=4, n_positions=24, vocab_size=61, initializer_range=0.3,
        bos_token_id=0, eos_token_id=None,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.2)
    return model


def ids(batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 61, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def logits(model, input_ids) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids).logits


def encrypted(heads, n_bits: int, target=ATTENTION) -> EncryptedModel:
    model = get_encrypted_model(small_model(), EncryptionConfig(target, heads=heads, n_bits=n_bits))
    model.calibrate(ids(30, 8))
    return model


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result - expected).norm() / expected.norm())


@pytest.mark.parametrize("heads", [None, [0], [3, 1]])
def test_eight_bits_are_close_to_the_clear_model(heads):
    clear, test_ids = small_model(), ids(5, 8, seed=1)
    errors = [
        relative_error(logits(encrypted(heads, n_bits), test_ids), logits(clear, test_ids))
        for n_bits in (4, 8)
    ]
    assert errors[1] < 0.05
    assert errors[1] < errors[0]


def test_both_blocks():
    model, test_ids = encrypted(None, 8, ["attn"]), ids(5, 8, seed=1)
    assert relative_error(logits(model, test_ids), logits(small_model(), test_ids)) < 0.08


@pytest.mark.parametrize("heads", [None, [2, 0]])
def test_save_and_load(heads, tmp_path):
    model, test_ids = encrypted(heads, 5, ["attn"]), ids(2, 8, seed=1)
    model.save_pretrained(tmp_path)
    loaded = EncryptedModel.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, test_ids), logits(model, test_ids))
    for name, module in loaded.encrypted_modules.items():
        assert module.quantized.fingerprint() == model.encrypted_modules[name].quantized.fingerprint()


def test_calibration_needs_two_tokens():
    model = get_encrypted_model(small_model(), EncryptionConfig(ATTENTION, scheme="tfhe"))
    with pytest.raises(ValueError, match="two tokens"):
        model.calibrate(ids(3, 1))
    assert not model.is_calibrated


def calibrated_tiny(published, n_bits: int):
    """Return the embedded model, one of its modules encrypted, and token ids to continue."""
    tokenizer = load_tokenizer("tiny")
    sentences = [
        "<|endoftext|>The rain had stopped before they came to the bridge, and the river was quiet.",
        "<|endoftext|>He opened the letter slowly, read it twice, and put it into the fire.",
        "<|endoftext|>My sister had never seen the sea, and she ran down to it with a cry.",
    ]
    model = published.from_pretrained("tiny", n_bits=n_bits)
    model.calibrate([tokenizer(text, return_tensors="pt")["input_ids"] for text in sentences])
    return model, tokenizer("The old man looked at the", return_tensors="pt")["input_ids"]


@pytest.mark.parametrize("published", [SingleHeadQGPT2Model, MultiHeadsQGPT2Model])
def test_the_embedded_model_writes_the_same_text(published):
    model, prompt = calibrated_tiny(published, 8)
    expected = load_model("tiny").generate(prompt, max_new_tokens=5, do_sample=False)
    assert torch.equal(model.generate(prompt, max_new_tokens=5, do_sample=False), expected)


def test_simulated_and_encrypted_runs_agree_with_the_quantised_one(concrete, capsys):
    model, test_ids = encrypted([1], 3), ids(1, 2, seed=1)
    circuit = model.compile(tokens=2)
    bits = circuit.statistics.max_bit_width
    assert capsys.readouterr().out == f"Circuit compiled with {bits} bit-width\n"
    quantised = logits(model, test_ids)
    for mode in ("simulate", "execute"):
        model.set_fhe_mode(mode)
        assert relative_error(logits(model, test_ids), quantised) < 0.1
        # A shorter input is padded, and must not come out differently for it.
        assert relative_error(logits(model, test_ids[:, :1]), quantised[:, :1]) < 0.1
    assert circuit.last_run.execute_seconds > 0
    with pytest.raises(TooManyTokensError, match="3 tokens"):
        model.generate(test_ids, max_new_tokens=2, do_sample=False)
    assert model.generate(test_ids, max_new_tokens=1, do_sample=False).shape == (1, 3)


@pytest.mark.slow
@pytest.mark.parametrize("published", [SingleHeadQGPT2Model, MultiHeadsQGPT2Model])
def test_the_embedded_model_generates_on_ciphertexts(published, concrete):
    model, prompt = calibrated_tiny(published, 4)
    prompt = prompt[:, :2]
    model.compile(tokens=3)
    steps = []
    for mode in ("disable", "execute"):
        model.set_fhe_mode(mode)
        output = model.generate(
            prompt, max_new_tokens=2, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        assert output.sequences.shape == (1, 4)
        steps.append(output.logits[0])
    assert relative_error(steps[1], steps[0]) < 0.1


@pytest.mark.slow
def test_two_circuits(concrete):
    model, test_ids = encrypted([0], 4, ["attn"]), ids(2, 3, seed=1)
    assert len(model.compile(tokens=3)) == 2
    quantised = logits(model, test_ids)
    model.set_fhe_mode("execute")
    assert relative_error(logits(model, test_ids), quantised) < 0.1
