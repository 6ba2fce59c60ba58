"""CKKS behind the interface of transformers, on clear numbers."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    StaticCache,
    TextStreamer,
    set_seed,
)
from transformers.activations import ACT2FN

from cipherlm import (
    EncryptedModel,
    EncryptionConfig,
    get_encrypted_model,
    load_model,
    load_tokenizer,
)
from cipherlm.evaluation.texts import calibration_sentences, encode, evaluation_sentences
from cipherlm.models.backends import Simulated, TextLost
from cipherlm.models.ckks import CkksModel
from cipherlm.models.remote import NotCalibratedError
from cipherlm.nn.activations import ACTIVATIONS, activation, fitted_curve
from cipherlm.nn.clear import ClearTensor

ATTENTION, MLP, BLOCK = "transformer.h.0.attn", "transformer.h.0.mlp", "transformer.h.0"
WHOLE = "transformer.h"
VOCABULARY, CONTEXT = 61, 20
BOS = 3


def new_model(**changes) -> GPT2LMHeadModel:
    """Return a small GPT-2 with random weights, always the same."""
    set_seed(7)
    shape = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 24, "vocab_size": VOCABULARY}
    fixed = {**shape, "bos_token_id": BOS, "eos_token_id": None, "initializer_range": 0.15}
    model = GPT2LMHeadModel(GPT2Config(**{**fixed, **changes})).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.2)
    return model


def ids(batch: int = 1, tokens: int = 6, seed: int = 0, prefix: tuple[int, ...] = (BOS,)) -> torch.Tensor:
    """Return texts of so many tokens, the prefix among them."""
    generator = torch.Generator().manual_seed(seed)
    texts = torch.randint(0, VOCABULARY, (batch, tokens), generator=generator)
    texts[:, : len(prefix)] = torch.tensor(prefix)[:tokens]
    return texts


def config(target="all", **changes) -> EncryptionConfig:
    return EncryptionConfig(target, scheme="ckks", **{"tokens": 4, "context": CONTEXT, **changes})


def encrypted(target="all", prefix=None, **changes) -> EncryptedModel:
    return get_encrypted_model(new_model(**changes), config(target, prefix=prefix))


def calibrated(target="all", mode="disable", prefix=None, **changes) -> EncryptedModel:
    model = encrypted(target, prefix, **changes)
    model.calibrate(ids(40, CONTEXT, seed=9, prefix=tuple(prefix or (BOS,))))
    model.set_fhe_mode(mode)
    return model


class Server:
    """A backend that keeps account of what it is asked, and computes on clear numbers."""

    def __init__(self, model: EncryptedModel):
        self.computing = Simulated(model.placement.modules, model.placement.geometry, noise=False)
        self.calls: list[tuple[str, int, int]] = []
        self.errors: list[Exception] = []

    def evaluate(self, name, hidden, start, report=None):
        self.calls.append((name, start, len(hidden)))
        if self.errors:
            raise self.errors.pop()
        return self.computing.evaluate(name, hidden, start, report)

    @property
    def rows(self) -> list[tuple[int, int]]:
        """Start and count of the calls since this was asked last."""
        rows, self.calls = [call[1:] for call in self.calls], []
        return rows


def served(target="all", **changes) -> tuple[EncryptedModel, Server]:
    model = calibrated(target, "execute", **changes)
    server = Server(model)
    model.connect(server)
    return model, server


def logits(model, input_ids, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids, **kwargs).logits


def near(one: torch.Tensor, other: torch.Tensor, tolerance: float = 5e-3) -> bool:
    return float((one - other).detach().abs().max()) < tolerance


# The encrypted model is the clear one


TARGETS = [
    "all",
    BLOCK,
    "transformer.h.1",
    [BLOCK, "transformer.h.1"],
    ["attn"],
    ["mlp"],
    [ATTENTION, MLP, "transformer.h.1"],
]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("mode", ["disable", "simulate"])
def test_same_logits_as_the_clear_model(target, mode):
    model, texts = calibrated(target, mode), ids(3, 9, seed=1)
    result, expected = logits(model, texts), logits(new_model(), texts)
    assert near(result, expected)
    assert not torch.equal(result[:, 1:], expected[:, 1:])


@pytest.mark.parametrize("target", ["all", BLOCK, ATTENTION, MLP])
def test_the_prefix_is_computed_as_in_the_clear(target):
    texts = ids(1, 5)
    result, expected = logits(calibrated(target), texts), logits(new_model(), texts)
    assert near(result[:, :1], expected[:, :1], 1e-5)
    assert near(logits(calibrated(target), texts[:, :1]), expected[:, :1], 1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"scale_attn_by_inverse_layer_idx": True, "attn_implementation": "eager"},
        {"scale_attn_weights": False, "attn_implementation": "eager"},
        {"n_inner": 48},
    ],
)
@pytest.mark.parametrize("target", ["all", ["transformer.h.1"], ["attn", "mlp"]])
def test_other_kinds_of_gpt2(changes, target):
    texts = ids(2, 7, seed=2)
    assert near(logits(calibrated(target, **changes), texts), logits(new_model(**changes), texts))


@pytest.mark.parametrize("target", ["all", ["attn"], [BLOCK]])
def test_a_longer_prefix(target):
    prefix = [5, 0, 8]
    model, texts = calibrated(target, prefix=prefix), ids(2, 9, seed=3, prefix=(5, 0, 8))
    assert model.prefix == prefix
    assert near(logits(model, texts), logits(new_model(), texts))
    for tokens in (1, 2, 3):
        assert near(logits(model, texts[:, :tokens]), logits(new_model(), texts[:, :tokens]), 1e-5)


def test_a_block_changes_nothing_but_the_mean_of_hidden_states():
    model, clear, texts = calibrated(BLOCK), new_model(), ids(2, 8)
    seen = []
    for each in (model, clear):
        each.transformer.h[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        logits(each, texts)
    difference = seen[0] - seen[1]
    assert near(difference, difference.mean(-1, keepdim=True).expand_as(difference), 1e-3)
    # And its mean is that of the input, not none.
    embedded = model.transformer.wte(texts) + model.transformer.wpe(torch.arange(8))
    assert near(seen[0][:, 1:].mean(-1), embedded[:, 1:].mean(-1), 1e-3)


def test_other_precisions():
    clear, model = new_model().to(torch.bfloat16), calibrated("all").to(torch.bfloat16)
    result = logits(model, ids(1, 5))
    assert result.dtype == torch.bfloat16
    assert near(result, logits(clear, ids(1, 5)), 0.5)


@pytest.mark.parametrize("target", TARGETS)
def test_it_is_still_the_same_transformers_model(target):
    clear = new_model()
    names, parameters = list(clear.state_dict()), set(map(id, clear.parameters()))
    model = get_encrypted_model(clear, config(target))
    assert model is clear
    assert list(model.state_dict()) == names
    assert set(map(id, model.parameters())) == parameters
    assert type(model)._sample is GPT2LMHeadModel._sample  # which generate calls
    assert "scheme=ckks" in repr(model)
    model.load_state_dict(new_model().state_dict())


@pytest.mark.parametrize("target", TARGETS)
def test_in_clear(target):
    model = encrypted(target)
    texts = ids(2, 7, prefix=())
    with model.in_clear():
        assert torch.equal(logits(model, texts), logits(new_model(), texts))
        assert model.generate(texts, max_new_tokens=16, do_sample=False).shape == (2, 23)
    with pytest.raises(NotCalibratedError):
        model(ids())


# Generation


@pytest.mark.parametrize("target", ["all", [BLOCK], ["attn", "mlp"]])
def test_generate_greedy(target):
    model, server = served(target)
    expected = new_model().generate(ids(), max_new_tokens=5, do_sample=False)
    remote = [name for name in model.encrypted_modules if not name.endswith("mlp")]
    # Nine tokens are evaluated, and at a server that is not to learn how many there are, twelve.
    # Its prompt's end then looks like the tokens behind it.
    for options, prompt, tokens in (({}, 3, 12), ({"reveal_length": True}, 5, 9)):
        assert torch.equal(model.generate(ids(), max_new_tokens=5, do_sample=False, **options), expected)
        for name in remote:
            rows = [call[1:] for call in server.calls if call[0] == name]
            assert rows == [(1, prompt), *((1 + index, 1) for index in range(prompt, tokens))]
        # An MLP knows no other tokens: each piece that has room in a ciphertext is a text of its own.
        for name in set(model.encrypted_modules) - set(remote):
            rows = [call[1:] for call in server.calls if call[0] == name]
            assert rows == [(1, 3), (1, 2), *[(1, 1)] * (tokens - 5)]
        server.calls.clear()


def test_generate_sampled():
    model, clear = calibrated(), new_model()
    arguments = {"max_new_tokens": 6, "do_sample": True, "temperature": 0.7, "top_k": 5}
    set_seed(1)
    expected = clear.generate(ids(), **arguments)
    set_seed(1)
    assert torch.equal(model.generate(ids(), **arguments), expected)


def test_generate_in_batches_and_beams():
    model, clear = calibrated(), new_model()
    for arguments in ({"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}):
        arguments = {**arguments, "max_new_tokens": 3, "do_sample": False}
        mask = torch.ones_like(ids(2))
        expected = clear.generate(ids(2), attention_mask=mask, **arguments)
        assert torch.equal(model.generate(ids(2), attention_mask=mask, **arguments), expected)


def test_generate_with_a_streamer(capsys):
    model = calibrated()
    model.generate(ids(), max_new_tokens=3, do_sample=False, streamer=TextStreamer(load_tokenizer("tiny")))
    assert capsys.readouterr().out


# What a text has seen already


@pytest.mark.parametrize("target", ["all", [BLOCK], ["attn", "mlp"]])
def test_rows_one_by_one_give_what_rows_at_once_give(target):
    model, whole = calibrated(target), calibrated(target)
    texts = ids(1, 12, seed=4)
    for tokens in range(1, 13):
        result = logits(model, texts[:, :tokens])
        assert near(result, logits(whole, texts)[:, :tokens], 1e-4)


def test_only_new_rows_are_sent():
    model, server = served()
    text, cache = ids(1, 10), DynamicCache()
    expected = logits(new_model(), text)
    assert near(logits(model, text[:, :1], past_key_values=cache), expected[:, :1])
    assert server.rows == []  # the prefix alone
    assert near(logits(model, text[:, 1:6], past_key_values=cache), expected[:, 1:6])
    assert server.rows == [(1, 5)]
    assert near(logits(model, text[:, 6:], past_key_values=cache), expected[:, 6:])
    assert server.rows == [(6, 4)]
    changed = text.clone()
    changed[0, 6:] += 1
    # The server drops what it has more than the text.
    for kept, rows in ((8, [(8, 2)]), (8, [(8, 2)]), (3, [(3, 7)]), (1, [(1, 9)])):
        cache.crop(kept - cache.get_seq_length())
        now = torch.cat([text[:, : min(kept, 8)], changed[:, min(kept, 8) :]], dim=1)
        expected_now = logits(new_model(), now)[:, kept:]
        assert near(logits(model, now[:, kept:], past_key_values=cache), expected_now)
        assert server.rows == rows
    assert near(logits(model, text), expected)  # without a cache, a text is always new
    assert server.rows == [(1, 9)]


def test_texts_of_a_batch_are_sent_in_turn():
    """A server has one text at a time: of several, each is sent whole."""
    model, server = served()
    texts, cache = ids(2, 8), DynamicCache()
    expected = logits(new_model(), texts)
    assert near(logits(model, texts[:, :6], past_key_values=cache), expected[:, :6])
    assert server.rows == [(1, 5), (1, 5)]
    assert near(logits(model, texts[:, 6:], past_key_values=cache), expected[:, 6:])
    assert server.rows == [(1, 7), (1, 7)]


def test_a_reordered_cache_is_another_text():
    """Beam search exchanges the texts of a cache: what was sent is then no longer what it says."""
    model, _ = served()
    texts, cache = ids(2, 8), DynamicCache()
    logits(model, texts[:, :6], past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    swapped = texts.flip(0)
    got = logits(model, swapped[:, 6:], past_key_values=cache)
    assert near(got, logits(new_model(), swapped)[:, 6:])


def test_what_failed_starts_anew():
    model, server = served()
    text, cache = ids(1, 8), DynamicCache()
    logits(model, text[:, :6], past_key_values=cache)
    server.errors.append(ConnectionError("gone"))
    with pytest.raises(ConnectionError):
        logits(model, text[:, 6:], past_key_values=cache)
    assert server.rows == [(1, 5), (6, 2)]
    assert cache.get_seq_length() == 6
    assert near(logits(model, text[:, 6:], past_key_values=cache), logits(new_model(), text)[:, 6:])
    assert server.rows == [(1, 7)]


def test_a_text_that_the_server_has_lost_is_sent_again():
    model, server = served()
    text, cache = ids(1, 8), DynamicCache()
    logits(model, text[:, :6], past_key_values=cache)
    server.errors.append(TextLost())
    assert near(logits(model, text[:, 6:], past_key_values=cache), logits(new_model(), text)[:, 6:])
    assert server.rows == [(1, 5), (6, 2), (1, 7)]
    server.errors += [TextLost(), TextLost()]
    with pytest.raises(TextLost):  # a session that is lost once more is no passing failure
        logits(model, ids(1, 8, seed=1))


def test_another_mode_or_backend_starts_anew():
    model, server = served()
    logits(model, ids())
    model.set_fhe_mode("simulate")
    logits(model, ids())
    model.set_fhe_mode("execute")
    logits(model, ids())
    other = Server(model)
    model.connect(other)
    logits(model, ids())
    assert (server.rows, other.rows) == ([(1, 5), (1, 5)], [(1, 5)])


def test_calibration_starts_anew():
    model, server = served()
    logits(model, ids())
    model.calibrate(ids(30, CONTEXT, seed=5))
    logits(model, ids())
    assert server.rows == [(1, 5), (1, 5)]


def test_a_backend_that_returns_something_else():
    model, server = served()
    server.computing.evaluate = lambda name, hidden, start, report: hidden[:, :3]
    with pytest.raises(ValueError, match=r"transformer\.h: \(5, 3\) came back"):
        logits(model, ids())


def test_progress_of_blocks():
    class Heard:
        def __init__(self):
            self.steps, self.details = [], []

        def __call__(self, step):
            self.steps.append(step)
            return contextlib.nullcontext()

        def detail(self, text):
            self.details.append(text)

    heard = Heard()
    model = get_encrypted_model(new_model(), config(), progress=heard)
    model.calibrate(ids(30, CONTEXT, seed=9))
    logits(model, ids())
    assert heard.steps == []
    model.set_fhe_mode("execute")
    model.connect(Server(model))
    logits(model, ids(1, 4))  # one chunk
    assert (heard.steps, heard.details) == (["evaluating transformer.h"], ["block 2 of 2"])


# Calls that cannot be right


def fails(model, message, *args, **kwargs):
    with pytest.raises(ValueError, match=message):
        model(*args, **kwargs)


@pytest.mark.parametrize("target", ["all", [MLP]])
def test_wrong_calls(target):
    model, server = served(target)
    text = ids()
    fails(model, r"does not start with the public prefix \[3\]: .*with_prefix", ids(prefix=(4,)))
    fails(model, "does not start", torch.cat([text, ids(prefix=(4,))]))
    fails(model, "takes input_ids, and no inputs_embeds", inputs_embeds=torch.zeros(1, 4, 32))
    fails(model, "no token_type_ids", text, token_type_ids=text)
    fails(model, "takes input_ids, as a tensor")
    fails(model, "positions from 0", text, position_ids=torch.arange(1, 7)[None])
    cache = StaticCache(config=new_model().config, max_cache_len=8)
    fails(model, "takes a DynamicCache", text, past_key_values=cache)
    fails(model, f"{CONTEXT + 1} tokens are more than the context of {CONTEXT}", ids(1, CONTEXT + 1))
    for position in (0, 5):
        mask = torch.ones_like(text)
        mask[0, position] = 0
        fails(model, "hides some", text, attention_mask=mask)
    with pytest.raises(ValueError, match="does not start"):
        model.generate(ids(prefix=(4,)), max_new_tokens=1)
    assert server.rows == []
    assert logits(model, text, position_ids=torch.arange(6)[None]).shape == (1, 6, VOCABULARY)
    assert logits(model, text, attention_mask=torch.ones_like(text)).shape == (1, 6, VOCABULARY)
    with pytest.raises(RuntimeError, match=r"model\.eval\(\)"):
        model.train()(ids(seed=4))


def test_with_prefix():
    model = encrypted(prefix=[7, 8])
    assert model.with_prefix(torch.tensor([[1], [2]])).tolist() == [[7, 8, 1], [7, 8, 2]]


@pytest.mark.parametrize("arguments", [{"max_new_tokens": 16}, {"max_length": 22}])
def test_generating_too_much_fails_before_anything_runs(arguments):
    model, server = served()
    with pytest.raises(ValueError, match="tokens are more than the context of 20"):
        model.generate(ids(), do_sample=False, **arguments)
    assert server.rows == []
    # The last token that is generated is not read.
    assert model.generate(ids(), do_sample=False, max_new_tokens=15).shape == (1, 21)


def test_nothing_is_calibrated():
    model = encrypted()
    for call in (model, model.generate):
        with pytest.raises(NotCalibratedError, match=r"transformer\.h is not calibrated: call compile\("):
            call(ids())
    for call in (model.compile, model.make_keys):
        with pytest.raises(NotCalibratedError, match=r"call compile\(calibration_ids\)"):
            call()
    assert not model.is_calibrated


def test_what_is_for_ckks_only():
    model = get_encrypted_model(new_model(), EncryptionConfig(ATTENTION, scheme="tfhe"))
    assert not isinstance(model, CkksModel)
    assert model.prefix == []
    assert not any(hasattr(model, name) for name in ("connect", "fingerprint", "placement"))


# Choosing modules


@pytest.mark.parametrize(
    ("target", "names"),
    [
        ("all", [WHOLE]),
        (["all"], [WHOLE]),
        (WHOLE, [WHOLE]),
        ("mlp", ["transformer.h.0.mlp", "transformer.h.1.mlp"]),
        (r"transformer\.h\.\d", ["transformer.h.0", "transformer.h.1"]),
        (["h.1", MLP], ["transformer.h.0.mlp", "transformer.h.1"]),
    ],
)
def test_targets(target, names):
    model = encrypted(target)
    assert list(model.encrypted_modules) == names == list(model.remote_modules)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("transformer.h.9", r"no attention module, MLP or block '.*9'; did you mean"),
        (["transformer.h.0.ln_1"], "'transformer.h.0.ln_1' cannot be encrypted, only attention"),
        ([BLOCK, ATTENTION], "transformer.h.0.attn lies in transformer.h.0"),
        ([WHOLE, BLOCK], "transformer.h.0 lies in transformer.h"),
    ],
)
def test_targets_that_cannot_be(target, message):
    clear = new_model()
    with pytest.raises(ValueError, match=message):
        get_encrypted_model(clear, config(target))
    assert type(clear) is GPT2LMHeadModel
    assert torch.equal(logits(clear, ids()), logits(new_model(), ids()))


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"bos_token_id": None}, {}, "give prefix="),
        ({}, {"prefix": [VOCABULARY]}, "token 61 is not one of the model's 61"),
        ({}, {"context": 25}, "context=25 is more than the 24 tokens"),
        ({}, {"tokens": 6}, "power of two"),
        ({}, {"tokens": 16}, "16 tokens side by side"),
        ({"add_cross_attention": True}, {}, "cross-attention"),
    ],
)
def test_models_that_cannot_be(changes, settings, message):
    clear = new_model(**changes)
    with pytest.raises(ValueError, match=message):
        get_encrypted_model(clear, config(**settings))
    assert type(clear) is GPT2LMHeadModel


SMOOTH, KINKED = 2e-4, 5e-3  # errors, next to the largest logit


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        *((name, SMOOTH) for name in ("gelu", "gelu_pytorch_tanh", "mish", "quick_gelu", "silu", "tanh")),
        *((name, KINKED) for name in ("relu", "leaky_relu")),
    ],
)
def test_another_activation(name, tolerance):
    clear = logits(new_model(activation_function=name), ids())
    assert near(
        logits(calibrated("all", "simulate", activation_function=name), ids()),
        clear,
        tolerance * clear.abs().max(),
    )


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name in ACT2FN])
def test_every_listed_activation_has_a_polynomial(name):
    function = activation(name)
    x = torch.linspace(-6, 5, 999, dtype=torch.float64)
    expected = ACT2FN[name](x).numpy()
    assert np.allclose(function(x.numpy()), expected, rtol=0, atol=1e-12)
    curve = fitted_curve((-6.0, 5.0), function)
    assert np.abs(curve(ClearTensor(x.numpy())).values - expected).max() < 0.01 * np.abs(expected).max()


def test_an_activation_that_has_no_polynomial():
    """One with weights of its own: refused before anything changes, unless it stays in the clear."""
    for target in ("all", [MLP]):
        clear = new_model(activation_function="prelu")
        with pytest.raises(ValueError, match=r"'prelu' cannot be .* these can: gelu, .*relu.*, tanh"):
            get_encrypted_model(clear, config(target))
        assert type(clear) is GPT2LMHeadModel
    assert near(
        logits(calibrated(ATTENTION, activation_function="prelu"), ids()),
        logits(new_model(activation_function="prelu"), ids()),
    )


@pytest.mark.parametrize("name", ["relu", "gelu"])
def test_another_activation_on_ciphertexts(name):
    model = calibrated([MLP], "execute", activation_function=name)
    clear = logits(new_model(activation_function=name), ids())
    assert near(logits(model, ids()), clear, KINKED * clear.abs().max())


def test_weights_in_another_form():
    clear = new_model()
    clear.transformer.h[1].mlp.c_fc = torch.nn.Linear(32, 128)
    with pytest.raises(ValueError, match="not plain"):
        get_encrypted_model(clear, config())


def test_modes_of_modules():
    model = calibrated([ATTENTION, "transformer.h.1"])
    model.set_fhe_mode("simulate", modules="h.1")
    assert model.fhe_mode == "mixed"
    with pytest.raises(ValueError, match="no encrypted module 'mlp'"):
        model.set_fhe_mode("simulate", modules="mlp")


# Calibrating


def test_compile_calibrates_once(capsys):
    model = encrypted([BLOCK, MLP.replace("0", "1")])
    assert model.compile(ids(20, CONTEXT)) is None
    assert capsys.readouterr().out == f"Fitted 5 functions for contexts of up to {CONTEXT} tokens\n"
    ranges = {name: module.ranges for name, module in model.remote_modules.items()}
    model.compile(ids(20, 5, seed=3), tokens=CONTEXT)
    assert {name: module.ranges for name, module in model.remote_modules.items()} == ranges
    model.calibrate(ids(20, 5, seed=3))
    assert {name: module.ranges for name, module in model.remote_modules.items()} != ranges
    with pytest.raises(ValueError, match=f"tokens={CONTEXT + 1} is more than .*context={CONTEXT}"):
        model.compile(tokens=CONTEXT + 1)
    with pytest.raises(ValueError, match="must be an integer from 1 to 24"):
        model.compile(tokens=25)


def test_the_prefix_is_put_before_texts_that_lack_it():
    one, other = encrypted(), encrypted()
    texts = ids(20, 10, seed=2)
    one.calibrate(texts)
    other.calibrate([texts[:10], texts[10:, 1:]])
    assert one.remote_modules[WHOLE].ranges == other.remote_modules[WHOLE].ranges


def test_bad_calibration():
    model = encrypted()
    for calibration, message in (
        (ids(1, 24, prefix=()), "25 tokens with the prefix"),
        (ids(1, 1), "nothing behind the prefix"),
        (torch.ones(1, 4), "must be integers"),
    ):
        with pytest.raises(ValueError, match=message):
            model.calibrate(calibration)
    assert not model.is_calibrated


def test_ranges_are_those_of_hidden_states_behind_the_prefix():
    model = calibrated(MLP)
    ((low, high),) = model.remote_modules[MLP].ranges.values()
    clear = new_model()
    seen = []
    clear.transformer.h[0].mlp.c_fc.register_forward_hook(lambda *call: seen.append(call[2][:, 1:]))
    logits(clear, ids(40, CONTEXT, seed=9))
    assert low == pytest.approx(1.25 * float(seen[0].min()), rel=1e-4)
    assert high == pytest.approx(1.25 * float(seen[0].max()), rel=1e-4)


# Saving and loading


@pytest.mark.parametrize("target", TARGETS)
def test_save_and_load(target, tmp_path):
    model = calibrated(target)
    model.save_pretrained(tmp_path)
    loaded = EncryptedModel.from_pretrained(tmp_path)
    assert loaded.encryption_config == model.encryption_config
    assert loaded.fingerprint == model.fingerprint
    assert torch.equal(logits(loaded, ids(2, 9)), logits(model, ids(2, 9)))


def test_the_directory_is_a_clear_model_too(tmp_path):
    calibrated().save_pretrained(tmp_path)
    clear = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(clear) is GPT2LMHeadModel
    assert torch.equal(logits(clear, ids()), logits(new_model(), ids()))


def test_save_before_calibration(tmp_path):
    calibrated().save_pretrained(tmp_path)
    encrypted().save_pretrained(tmp_path)
    assert not EncryptedModel.from_pretrained(tmp_path).is_calibrated


def test_load_damaged(tmp_path):
    calibrated([BLOCK, "transformer.h.1.mlp"]).save_pretrained(tmp_path)
    path = tmp_path / "calibration.json"
    whole = json.loads(path.read_text())

    def refused(message, content=None, **changes):
        path.write_text(json.dumps({**whole, **changes}) if content is None else content)
        with pytest.raises(ValueError, match=rf"calibration\.json {message}"):
            EncryptedModel.from_pretrained(tmp_path)

    block, mlp = whole["modules"].values()
    for content in ("", "{", "[]", "{}", json.dumps(whole)[:-9]):
        refused("is damaged", content)
    refused("is damaged: version 1 is not known: calibrate again", version=1)
    refused("is damaged: transformer.h.1.mlp needs 1 ranges: act.inputs", modules={"transformer.h.0": block})
    refused("is damaged: .* needs 5 ranges: ln_1.squares", modules={**whole["modules"], BLOCK: mlp})
    for bad in ([1, 0], [0], "ab", [0, float("nan")], [0, None], None):
        ranges = {"act.inputs": bad}
        refused("is damaged: .* is not a range", modules={**whole["modules"], "transformer.h.1.mlp": ranges})
    refused("does not fit the model or its configuration", fingerprint="0" * 64)
    refused("does not fit the model or its configuration", prefix=[4])


@pytest.mark.parametrize("other", [{"layer_norm_epsilon": 1e-4}, {"scale_attn_weights": False}, {"seed": 1}])
def test_load_with_another_model(other, tmp_path):
    calibrated().save_pretrained(tmp_path)
    changed = new_model(**{key: value for key, value in other.items() if key != "seed"})
    if "seed" in other:
        with torch.no_grad():
            changed.transformer.h[1].mlp.c_fc.weight[0, 0] += 1e-3
    changed.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"calibration\.json does not fit"):
        EncryptedModel.from_pretrained(tmp_path)


def test_a_backend_has_to_go_on_where_a_text_ended():
    _, server = served()
    rows = np.zeros((2, 32))
    with pytest.raises(ValueError, match="from position 5 on, where 1 was expected"):
        server.computing.evaluate(WHOLE, rows, 5)


def test_short_texts_serve_long_contexts():
    """Calibration joins sentences: attention to many keys meets other scores than to few."""
    tokenizer, clear = load_tokenizer("tiny"), load_model("tiny")
    model = get_encrypted_model(load_model("tiny"), EncryptionConfig("all", scheme="ckks", context=192))
    model.calibrate(encode(tokenizer, calibration_sentences()))
    text = tokenizer(" ".join(evaluation_sentences()[:20]))["input_ids"][:191]
    model.set_fhe_mode("simulate")
    texts = model.with_prefix(torch.tensor([text]))
    got, expected = (logits(one, texts)[0, 1:].double().numpy() for one in (model, clear))
    assert len(got) == 191
    assert np.mean(got.argmax(-1) == expected.argmax(-1)) >= 0.99
    assert np.abs(got - expected).max() < 0.3
