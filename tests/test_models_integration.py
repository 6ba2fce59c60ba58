"""The integration with transformers, around attention that is exact: nothing it does may show."""

import contextlib
import json
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    set_seed,
)

from cipherlm import (
    EncryptedModel,
    EncryptionConfig,
    MultiHeadsQGPT2Model,
    SingleHeadQGPT2Model,
    get_encrypted_model,
)
from cipherlm.models.tfhe import TfheModel
from cipherlm.schemes.tfhe.attention import AttentionWeights
from cipherlm.schemes.tfhe.errors import NotCompiledError, TooManyTokensError

ATTENTION = "transformer.h.0.attn"
OTHER = "transformer.h.1.attn"
WIDTH, HEADS, POSITIONS = 32, 4, 24


@dataclass
class ExactAttention:
    """Has the interface of a ``QuantizedAttention``, and the float layer's values."""

    weights: AttentionWeights
    heads: tuple[int, ...]
    project: bool
    n_bits: int
    calls: int = 0

    width = WIDTH
    head_dim = WIDTH // HEADS

    @classmethod
    def calibrate(cls, weights, inputs, *, heads, n_bits):
        assert all(x.ndim == 2 and x.shape[1] == WIDTH and x.dtype == np.float64 for x in inputs)
        chosen = tuple(range(weights.n_heads)) if heads is None else tuple(heads)
        return cls(weights, chosen, heads is None, n_bits)

    def __call__(self, x):
        self.calls += 1
        w, tokens = self.weights, x.shape[0]
        qkv = (x @ w.qkv_weight + w.qkv_bias).reshape(tokens, 3, w.n_heads, -1)
        outputs = []
        for head in self.heads:
            query, key, value = qkv[:, :, head].swapaxes(0, 1)
            scores = query @ key.T / np.sqrt(self.head_dim)
            scores = np.where(np.tri(tokens, dtype=bool), np.exp(scores), 0.0)
            outputs.append(scores / scores.sum(axis=1, keepdims=True) @ value)
        together = np.concatenate(outputs, axis=1)
        return together @ w.projection_weight + w.projection_bias if self.project else together

    def to_arrays(self):
        names = ("qkv_weight", "qkv_bias", "projection_weight", "projection_bias")
        arrays = {name: np.asarray(getattr(self.weights, name)) for name in names}
        return {**arrays, "heads": np.array(self.heads), "scalars": np.array([self.project, self.n_bits])}

    @classmethod
    def from_arrays(cls, arrays):
        arrays = dict(arrays)
        try:
            heads, (project, n_bits) = arrays.pop("heads"), arrays.pop("scalars")
            weights = AttentionWeights(**arrays, n_heads=HEADS)
        except (KeyError, TypeError) as error:
            raise ValueError(f"missing {error}") from error
        return cls(weights, tuple(heads.tolist()), bool(project), int(n_bits))


@dataclass
class ExactCircuit:
    attention: ExactAttention
    tokens: int
    runs: list[str]

    statistics = SimpleNamespace(max_bit_width=11)

    @classmethod
    def compile(cls, attention, tokens, *, p_error, progress):
        with progress("compiling"):
            return cls(attention, tokens, [])

    def keygen(self, *, force=False):
        return 0.0

    def simulate(self, x):
        self.runs.append("simulate")
        return self.attention(x)

    def execute(self, x):
        self.runs.append("execute")
        return self.attention(x)


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    monkeypatch.setattr("cipherlm.models.tfhe.QuantizedAttention", ExactAttention)
    monkeypatch.setattr("cipherlm.models.storage.QuantizedAttention", ExactAttention)
    monkeypatch.setattr("cipherlm.models.tfhe.AttentionCircuit", ExactCircuit)


def new_model(**changes) -> GPT2LMHeadModel:
    """Return a small GPT-2 with random weights, large enough that attention matters, always the same."""
    set_seed(7)
    shape = {"n_layer": 2, "n_embd": WIDTH, "n_head": HEADS, "n_positions": POSITIONS, "vocab_size": 61}
    fixed = {**shape, "bos_token_id": 0, "eos_token_id": None, "initializer_range": 0.3}
    model = GPT2LMHeadModel(GPT2Config(**{**fixed, **changes})).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.2)
    return model


def ids(batch: int = 1, tokens: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 61, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def encrypted(target: str | list[str] = ATTENTION, heads=None, **changes) -> EncryptedModel:
    return get_encrypted_model(new_model(**changes), EncryptionConfig(target, scheme="tfhe", heads=heads))


def compiled(target: str | list[str] = ATTENTION, heads=None, tokens=8, mode="execute", **changes):
    model = encrypted(target, heads, **changes)
    model.compile(ids(2), tokens=tokens)
    model.set_fhe_mode(mode)
    return model


def logits(model, input_ids, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids, **kwargs).logits


def runs(model) -> list[str]:
    return [run for module in model.encrypted_modules.values() for run in module.circuit.runs]


# The encrypted model is the clear one


@pytest.mark.parametrize("heads", [None, [0], [3, 1], [0, 1, 2, 3]])
@pytest.mark.parametrize("mode", ["disable", "simulate", "execute"])
def test_same_logits_as_the_clear_model(heads, mode):
    model = compiled(heads=heads, mode=mode)
    assert torch.allclose(logits(model, ids(3)), logits(new_model(), ids(3)), atol=1e-4)
    assert runs(model) == ([] if mode == "disable" else [mode] * 3)


@pytest.mark.parametrize("name", ["gelu", "gelu_pytorch_tanh", "relu", "silu", "prelu"])
def test_any_activation_stays_in_the_clear(name):
    model, clear = compiled(activation_function=name), new_model(activation_function=name)
    assert torch.allclose(logits(model, ids(3)), logits(clear, ids(3)), atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        # transformers 4 heeds these two in its eager attention only.
        {"scale_attn_by_inverse_layer_idx": True, "attn_implementation": "eager"},
        {"scale_attn_weights": False, "attn_implementation": "eager"},
        {"reorder_and_upcast_attn": True, "attn_implementation": "eager"},
        {"attn_implementation": "eager"},
        {"attn_implementation": "sdpa"},
    ],
)
@pytest.mark.parametrize("heads", [None, [1]])
def test_whatever_the_clear_model_s_attention(changes, heads):
    model = compiled([ATTENTION, OTHER], heads, **changes)
    assert torch.allclose(logits(model, ids(2)), logits(new_model(**changes), ids(2)), atol=1e-4)


def test_other_precisions():
    clear, model = new_model().to(torch.bfloat16), compiled(heads=[1]).to(torch.bfloat16)
    assert logits(model, ids()).dtype == torch.bfloat16
    assert torch.allclose(logits(model, ids()), logits(clear, ids()), atol=0.2)


def test_it_is_still_the_same_transformers_model():
    clear = new_model()
    names, parameters = list(clear.state_dict()), set(map(id, clear.parameters()))
    model = get_encrypted_model(clear, EncryptionConfig(ATTENTION, scheme="tfhe"))
    assert model is clear
    assert isinstance(model, GPT2LMHeadModel)
    assert list(model.state_dict()) == names
    assert set(map(id, model.parameters())) == parameters
    assert type(model)._sample is GPT2LMHeadModel._sample  # which generate calls
    assert "heads=all" in repr(model)
    model.load_state_dict(new_model().state_dict())


def test_generate_greedy():
    clear = new_model()
    model = compiled([ATTENTION, OTHER], heads=[0, 2], tokens=9)
    expected = clear.generate(ids(), max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(ids(), max_new_tokens=4, do_sample=False), expected)
    assert runs(model) == ["execute"] * 8
    assert clear.generation_config.use_cache is not False


def test_generate_sampled():
    model, clear = compiled(), new_model()
    arguments = {"max_new_tokens": 3, "do_sample": True, "temperature": 0.7, "top_k": 5}
    set_seed(1)
    expected = clear.generate(ids(), **arguments)
    set_seed(1)
    assert torch.equal(model.generate(ids(), **arguments), expected)


def test_generate_in_batches_and_beams():
    model, clear = compiled(), new_model()
    for arguments in ({"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}):
        arguments = {**arguments, "max_new_tokens": 3, "do_sample": False}
        mask = torch.ones_like(ids(2))
        expected = clear.generate(ids(2), attention_mask=mask, **arguments)
        assert torch.equal(model.generate(ids(2), attention_mask=mask, **arguments), expected)


def test_shorter_sequences_use_the_same_circuit():
    model = compiled(tokens=8)
    for tokens in (1, 2, 8):
        expected = logits(new_model(), ids(tokens=tokens))
        assert torch.allclose(logits(model, ids(tokens=tokens)), expected, atol=1e-4)


def test_in_clear():
    model = encrypted([ATTENTION, OTHER])
    with model.in_clear():
        assert torch.allclose(logits(model, ids(2)), logits(new_model(), ids(2)), atol=1e-4)
        assert model.generate(ids(), max_new_tokens=12, do_sample=False).shape == (1, 18)
    with pytest.raises(NotCompiledError):
        model(ids())


# Choosing modules and modes


@pytest.mark.parametrize(
    ("target", "names"),
    [
        (ATTENTION, [ATTENTION]),
        ([OTHER, ATTENTION, "h.0.attn"], [ATTENTION, OTHER]),
        ("h.1.attn", [OTHER]),
        (["attn"], [ATTENTION, OTHER]),
        (r"transformer\.h\.\d\.attn", [ATTENTION, OTHER]),
        (r".*\.1\.attn", [OTHER]),
    ],
)
def test_targets(target, names):
    assert list(encrypted(target).encrypted_modules) == names


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("transformer.h.9.attn", r"no attention module '.*9\.attn'; did you mean 'transformer\.h\."),
        (["transformer.h.0.atn"], r"did you mean 'transformer\.h\.0\.attn'"),
        ([ATTENTION, "nothing"], r"'nothing' \(attention modules of this model: transformer\.h\.0\.attn, "),
        (r".*\.9\.attn", "no attention module"),
        ("[", "no attention module"),
        (["transformer.h.0.mlp"], "'transformer.h.0.mlp' cannot be encrypted, only attention"),
        ([r"transformer\.h\.0\.attn"], "no attention module"),
    ],
)
def test_unknown_targets(target, message):
    clear = new_model()
    with pytest.raises(ValueError, match=message):
        get_encrypted_model(clear, EncryptionConfig(target, scheme="tfhe"))
    assert_untouched(clear)


def test_unknown_head():
    clear = new_model()
    with pytest.raises(ValueError, match=r"transformer\.h\.0\.attn has heads 0 to 3, no head 4"):
        get_encrypted_model(clear, EncryptionConfig(["attn"], heads=[0, 4]))
    assert_untouched(clear)


def assert_untouched(model):
    assert type(model) is GPT2LMHeadModel
    assert model.config.use_cache is True
    assert torch.equal(logits(model, ids()), logits(new_model(), ids()))


def test_unsupported_models():
    config = EncryptionConfig(["attn"], scheme="tfhe")
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    with pytest.raises(ValueError, match="architecture 'llama' with scheme='tfhe'; supported: gpt2"):
        get_encrypted_model(LlamaForCausalLM(LlamaConfig(**shape, vocab_size=8)), config)
    with pytest.raises(ValueError, match="cannot encrypt the architecture 'Linear'"):
        get_encrypted_model(torch.nn.Linear(2, 2), config)
    with pytest.raises(ValueError, match="only a GPT2LMHeadModel"):
        get_encrypted_model(GPT2Model(new_model().config), config)
    with pytest.raises(ValueError, match="encrypted already"):
        get_encrypted_model(encrypted(), config)


def test_weights_in_another_form():
    clear = new_model()
    clear.transformer.h[0].attn.c_attn = torch.nn.Linear(WIDTH, 3 * WIDTH)
    with pytest.raises(ValueError, match="not plain"):
        get_encrypted_model(clear, EncryptionConfig(ATTENTION, scheme="tfhe"))


def test_modes_of_modules():
    model = compiled(["attn"], mode="disable")
    assert model.fhe_mode == "disable"
    model.set_fhe_mode("execute", modules=OTHER)
    assert model.fhe_mode == "mixed"
    model(ids())
    assert runs(model) == ["execute"]
    model.set_fhe_mode(fhe="simulate")
    assert model.fhe_mode == "simulate"
    model(ids())
    assert runs(model) == ["simulate", "execute", "simulate"]


def test_unknown_modes():
    model = encrypted()
    with pytest.raises(ValueError, match="no mode 'fast': choose one of 'disable', 'simulate', 'execute'"):
        model.set_fhe_mode("fast")
    with pytest.raises(ValueError, match="no attention module"):
        model.set_fhe_mode("execute", modules=[ATTENTION, OTHER])
    assert model.fhe_mode == "disable"


# Calibrating and compiling


def test_compile_prints_and_returns_the_circuit(capsys):
    model = encrypted()
    circuit = model.compile(ids(tokens=5))
    assert capsys.readouterr().out == "Circuit compiled with 11 bit-width\n"
    assert circuit is model.encrypted_modules[ATTENTION].circuit
    assert circuit.tokens == 5


def test_compile_several(capsys):
    circuits = encrypted(["attn"]).compile([ids(tokens=4), ids(tokens=7)[0]])
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"Circuit compiled with 11 bit-width ({name})" for name in (ATTENTION, OTHER)]
    assert {name: circuit.tokens for name, circuit in circuits.items()} == {ATTENTION: 7, OTHER: 7}


def test_calibration_sees_the_clear_hidden_states(monkeypatch):
    seen = []

    def calibrate(weights, inputs, *, heads, n_bits):
        seen.append(inputs)
        return ExactAttention(weights, (0,), False, n_bits)

    monkeypatch.setattr(ExactAttention, "calibrate", calibrate)
    model = encrypted(["attn"], heads=[0])
    model.calibrate([ids(2), ids(tokens=3, seed=1)[0]])
    clear = new_model()
    for block, inputs in enumerate(seen):
        expected = []
        norm = clear.transformer.h[block].ln_1
        hook = norm.register_forward_hook(lambda *args, to=expected: to.extend(args[2].numpy()))
        logits(clear, ids(2))
        logits(clear, ids(tokens=3, seed=1))
        hook.remove()
        assert [x.shape for x in inputs] == [(6, WIDTH), (6, WIDTH), (3, WIDTH)]
        assert all(np.allclose(x, y, atol=1e-4) for x, y in zip(inputs, expected, strict=True))


def test_parameters_are_frozen():
    model = encrypted()
    model.calibrate(ids(2))
    module = model.encrypted_modules[ATTENTION]
    frozen = module.quantized
    model(ids(seed=3))
    model.compile(ids(2, tokens=3, seed=5))
    assert module.quantized is frozen
    assert module.circuit.tokens == 3
    model.compile(tokens=4)
    assert module.quantized is frozen
    model.calibrate(ids(2, seed=5))
    assert module.quantized is not frozen
    assert module.circuit is None


def test_nothing_is_calibrated():
    model = encrypted()
    for call in (model, model.generate):
        with pytest.raises(NotCompiledError, match=r"h\.0\.attn is not calibrated: call compile\("):
            call(ids())
    with pytest.raises(NotCompiledError, match=r"call compile\(calibration_ids\)"):
        model.compile(tokens=4)
    assert not model.is_calibrated


def test_nothing_is_compiled():
    model = encrypted(["attn"])
    model.calibrate(ids(2))
    model(ids())
    for mode in ("simulate", "execute"):
        model.set_fhe_mode(mode)
        with pytest.raises(NotCompiledError, match=rf'no circuit for the mode "{mode}": call compile\(\)'):
            model(ids())


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], "must be token ids"),
        ("text", "must be token ids"),
        ([[1, 2, 3]], "must be token ids"),
        (torch.tensor(1), "must be token ids"),
        (torch.ones(1, 4), "must be integers"),
        (torch.ones(1, 0, dtype=torch.long), "without tokens"),
        (torch.ones(1, POSITIONS + 1, dtype=torch.long), "25 tokens, the model at most 24"),
        (torch.tensor([[0, 61]]), "between 0 and 60"),
        (torch.tensor([[0, -1]]), "between 0 and 60"),
    ],
)
def test_bad_calibration(calibration, message):
    model = encrypted()
    for call in (model.calibrate, model.compile):
        with pytest.raises(ValueError, match=message):
            call(calibration)
    assert not model.is_calibrated


@pytest.mark.parametrize("tokens", [0, -1, POSITIONS + 1, 2.0, True])
def test_bad_length(tokens):
    model = encrypted()
    with pytest.raises(ValueError, match="tokens must be an integer from 1 to 24"):
        model.compile(ids(), tokens=tokens)
    assert not model.is_calibrated


def test_no_length():
    model = encrypted()
    model.calibrate(ids())
    with pytest.raises(ValueError, match=r"compile\(tokens=\.\.\.\)"):
        model.compile()


def test_a_failed_compilation_leaves_the_circuits(monkeypatch):
    model = compiled(["attn"], tokens=8)
    before = [module.circuit for module in model.encrypted_modules.values()]
    compile_one = ExactCircuit.compile

    def fail_at_second(attention, tokens, **kwargs):
        if attention is model.encrypted_modules[OTHER].quantized:
            raise RuntimeError("too wide")
        return compile_one(attention, tokens, **kwargs)

    monkeypatch.setattr(ExactCircuit, "compile", fail_at_second)
    with pytest.raises(RuntimeError, match="too wide"):
        model.compile(tokens=12)
    assert [module.circuit for module in model.encrypted_modules.values()] == before


def test_progress_hears_of_each_step():
    steps = []

    def progress(step):
        steps.append(step)
        return contextlib.nullcontext()

    model = get_encrypted_model(new_model(), EncryptionConfig(ATTENTION, scheme="tfhe"), progress=progress)
    model.compile(ids())
    assert steps == ["compiling"]


# Calls that cannot be right


@pytest.mark.parametrize("mode", ["simulate", "execute"])
def test_too_long(mode):
    model = compiled(tokens=8, mode=mode)
    with pytest.raises(TooManyTokensError, match=r"9 tokens .* compiled for 8: compile with tokens=9"):
        model(ids(tokens=9))
    assert runs(model) == []
    model.set_fhe_mode("disable")
    assert logits(model, ids(tokens=POSITIONS)).shape[1] == POSITIONS


@pytest.mark.parametrize("arguments", [{"max_new_tokens": 4}, {"max_length": 10}, {}])
def test_generating_too_much_fails_before_anything_runs(arguments):
    model = compiled(tokens=8)
    with pytest.raises(TooManyTokensError, match="tokens do not fit a circuit compiled for 8"):
        model.generate(ids(), do_sample=False, **arguments)
    assert runs(model) == []
    # The last token that is generated is not read.
    assert model.generate(ids(), do_sample=False, max_new_tokens=3).shape == (1, 9)


def test_no_cache():
    model = compiled()
    assert model.config.use_cache is False
    assert model.generation_config.use_cache is False
    for call in (
        lambda: model(ids(), use_cache=True),
        lambda: model(ids(), past_key_values=DynamicCache()),
        lambda: model.generate(ids(), use_cache=True, max_new_tokens=2),
    ):
        with pytest.raises(ValueError, match="no key-value cache: call with use_cache=False"):
            call()
    assert runs(model) == []


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_masks(implementation):
    model = compiled(attn_implementation=implementation)
    ones = torch.ones(2, 6, dtype=torch.long)
    assert torch.equal(logits(model, ids(2), attention_mask=ones), logits(model, ids(2)))
    before = runs(model)
    for position in (0, 5):
        padded = ones.clone()
        padded[1, position] = 0
        with pytest.raises(ValueError, match="hides some "):
            model(ids(2), attention_mask=padded)
    with pytest.raises(ValueError, match="hides some "):
        model.generate(ids(2), attention_mask=padded, max_new_tokens=1)
    assert runs(model) == before


def test_no_training():
    model = compiled().train()
    with pytest.raises(RuntimeError, match=r"cannot be trained: call model\.eval\(\)"):
        model(ids())


# Saving and loading


@pytest.mark.parametrize("heads", [None, [2, 0]])
def test_save_and_load(heads, tmp_path):
    model = compiled([ATTENTION, OTHER], heads, mode="disable")
    model.save_pretrained(tmp_path)
    loaded = EncryptedModel.from_pretrained(tmp_path)
    assert loaded.encryption_config == model.encryption_config
    assert loaded.is_calibrated
    assert torch.equal(logits(loaded, ids(2)), logits(model, ids(2)))
    assert loaded.compile(tokens=3)[OTHER].tokens == 3
    assert type(model) is type(loaded)
    assert isinstance(loaded, TfheModel)


def test_the_directory_is_a_clear_model_too(tmp_path):
    model = compiled()
    model.save_pretrained(tmp_path)
    clear = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(clear) is GPT2LMHeadModel
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["GPT2LMHeadModel"]
    assert torch.equal(logits(clear, ids()), logits(new_model(), ids()))
    assert not [path for path in tmp_path.iterdir() if path.suffix not in (".json", ".safetensors")]


def test_save_before_calibration(tmp_path):
    compiled().save_pretrained(tmp_path)
    encrypted().save_pretrained(tmp_path)
    loaded = EncryptedModel.from_pretrained(tmp_path)
    assert not loaded.is_calibrated
    with pytest.raises(NotCompiledError):
        loaded(ids())


def test_load_from_a_clear_directory(tmp_path):
    new_model().save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no encryption_config\.json"):
        EncryptedModel.from_pretrained(tmp_path)


def test_load_damaged(tmp_path):
    compiled(["attn"]).save_pretrained(tmp_path)
    path = tmp_path / "quantisation.safetensors"
    whole, arrays = path.read_bytes(), load_file(path)

    def fails(message):
        with pytest.raises(ValueError, match=rf"quantisation\.safetensors {message}"):
            EncryptedModel.from_pretrained(tmp_path)

    for content in (b"", whole[:40], whole[:-10], b"\xff" * 100):
        path.write_bytes(content)
        fails("is damaged")
    save_file({name: a for name, a in arrays.items() if not name.endswith("h.1.attn.heads")}, path)
    fails(r"is damaged: transformer\.h\.1\.attn: missing")
    save_file({name: a for name, a in arrays.items() if ".h.0." in name}, path)
    fails(r"is damaged: nothing in it for transformer\.h\.1\.attn")
    path.write_bytes(whole)
    config = tmp_path / "encryption_config.json"
    config.write_text(config.read_text().replace('"n_bits": 4', '"n_bits": 5'))
    fails("does not fit")


def test_load_with_a_name_that_is_not_there(tmp_path):
    compiled().save_pretrained(tmp_path)
    config = tmp_path / "encryption_config.json"
    config.write_text(config.read_text().replace("h.0", "h.7"))
    with pytest.raises(ValueError, match="no attention module"):
        EncryptedModel.from_pretrained(tmp_path)


# The published calls


@pytest.fixture
def gpt2_model(tmp_path) -> str:
    """The directory of a clear model."""
    new_model().save_pretrained(tmp_path / "gpt2_model")
    return str(tmp_path / "gpt2_model")


@pytest.mark.parametrize(("published", "heads"), [(SingleHeadQGPT2Model, [0]), (MultiHeadsQGPT2Model, None)])
def test_published_calls(published, heads, gpt2_model, capsys):
    model = published.from_pretrained(gpt2_model, n_bits=5, use_cache=False)
    assert type(model) is published
    assert model.encryption_config == EncryptionConfig([ATTENTION], n_bits=5, heads=heads)
    model.set_fhe_mode(fhe="disable")
    with pytest.raises(NotCompiledError, match=r"call compile\(calibration_ids\) first"):
        model.generate(ids(), max_new_tokens=1)
    circuit = model.compile(ids(tokens=8))
    assert "Circuit compiled with 11 bit-width" in capsys.readouterr().out
    assert circuit.tokens == 8
    expected = new_model().generate(ids(), max_new_tokens=2, do_sample=False)
    for mode in ("disable", "simulate", "execute"):
        model.set_fhe_mode(mode)
        assert torch.equal(model.generate(ids(), max_new_tokens=2, do_sample=False), expected)


def test_published_choices(gpt2_model):
    single = SingleHeadQGPT2Model.from_pretrained(gpt2_model, layer=1, head=3)
    assert single.encryption_config == EncryptionConfig([OTHER], heads=[3])
    assert list(MultiHeadsQGPT2Model.from_pretrained(gpt2_model, layer=1).encrypted_modules) == [OTHER]
    for arguments, message in (
        ({"use_cache": True}, "use_cache=False"),
        ({"layer": 2}, "no attention module"),
        ({"head": 4}, "heads 0 to 3"),
        ({"head": -1}, "numbered from 0"),
        ({"n_bits": 9}, "from 2 to 8"),
    ):
        with pytest.raises(ValueError, match=message):
            SingleHeadQGPT2Model.from_pretrained(gpt2_model, **arguments)


def test_published_save_and_load(gpt2_model, tmp_path):
    model = SingleHeadQGPT2Model.from_pretrained(gpt2_model, head=2)
    model.calibrate(ids(2))
    model.save_pretrained(tmp_path / "saved")
    loaded = SingleHeadQGPT2Model.from_pretrained(tmp_path / "saved", head=2)
    assert type(loaded) is SingleHeadQGPT2Model
    assert torch.equal(logits(loaded, ids()), logits(model, ids()))
    with pytest.raises(ValueError, match=r"was saved with .*heads=\[2\].*not what this call"):
        SingleHeadQGPT2Model.from_pretrained(tmp_path / "saved", head=1)
    assert EncryptedModel.from_pretrained(tmp_path / "saved").is_calibrated
