"""A client's model has all that is not remote, and nothing else; a public prefix costs nothing."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from cipherlm.linear.groups import find_groups, linear_layers, output_embedding, weights_of
from cipherlm.linear.model import LAYERS_NAME, WEIGHTS_NAME, load_client_model, load_groups, save_client_model
from cipherlm.linear.prefix import PublicPrefix, public_prefix_cache

from .architectures import CAUSAL, CONFIGS, WIDTH, ClearProducts, remote, tiny
from .test_integration import BOUND, IDS, call, padded

PREFIX = torch.tensor([1, 20, 30, 40])


def rounded(model: nn.Module) -> nn.Module:
    """Return a model with the embeddings that a client gets: in half precision."""
    for get in ("get_input_embeddings", "get_output_embeddings"):
        layer = getattr(model, get)()
        if isinstance(layer, nn.Embedding | nn.Linear):
            layer.weight.data = layer.weight.data.half().float()
    return model


def export(model: nn.Module, directory, names=None) -> ClearProducts:
    layers = linear_layers(model)
    names = names or [name for name in layers if name != output_embedding(model)]
    groups = find_groups(model, names)
    save_client_model(model, groups, directory)
    assert load_groups(directory) == groups
    return ClearProducts(groups, {group.name: weights_of(layers, group) for group in groups})


@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_client_has_what_is_not_remote(architecture, tmp_path):
    clear = rounded(tiny(architecture))
    clear.config.name_or_path = ""
    model = load_client_model(tmp_path, export(clear, tmp_path))
    assert type(model) is type(clear)
    assert not model.training
    with torch.no_grad():
        expected, found = clear(**call(architecture)), model(**call(architecture))
    for name in ("logits", "last_hidden_state", "pooler_output"):
        if name in expected:
            assert torch.allclose(found[name], expected[name], atol=BOUND, rtol=BOUND), name
    assert not [n for n, p in [*model.named_parameters(), *model.named_buffers()] if p.is_meta]
    # Each embedding is in the file, and in memory, once.
    owned = {p.data_ptr(): p.numel() for p in model.parameters()}
    stored = load_file(tmp_path / WEIGHTS_NAME)
    assert sum(owned.values()) == sum(t.numel() for t in stored.values())
    remote_weights = {f"{name}.weight" for group in load_groups(tmp_path) for name in group.members}
    assert not remote_weights & stored.keys()


def test_a_client_s_model_generates(tmp_path):
    clear = tiny("llama")
    clear.generation_config.max_new_tokens = 5
    model = load_client_model(tmp_path, export(clear, tmp_path), attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    assert torch.equal(model.generate(**padded()), clear.generate(**padded()))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_embeddings_take_half_the_bytes(architecture, tmp_path):
    clear = tiny(architecture)
    model = load_client_model(tmp_path, export(clear, tmp_path))
    name = next(n for n, p in clear.named_parameters() if p is clear.get_input_embeddings().weight)
    halved = {n for n, tensor in load_file(tmp_path / WEIGHTS_NAME).items() if tensor.dtype == torch.float16}
    # Both matrices where they are two, and one where it serves as both.
    assert halved == ({name} if clear.config.tie_word_embeddings else {name, "lm_head.weight"})
    weight, own = clear.get_input_embeddings().weight, model.get_input_embeddings().weight
    assert own.dtype == torch.float32
    assert 0 < (own - weight).abs().max() <= 2**-11 * weight.abs().max()
    if clear.config.tie_word_embeddings:
        assert model.get_output_embeddings().weight is own
    with torch.no_grad():
        expected, found = clear(IDS).logits, model(IDS).logits
    assert (found - expected).abs().max() < 2e-3 * expected.abs().max()
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


def test_embeddings_that_half_precision_cannot_hold_stay(tmp_path):
    clear = tiny("llama")
    clear.get_input_embeddings().weight.data[3, 3] = 1e5
    model = load_client_model(tmp_path, export(clear, tmp_path))
    assert torch.equal(model.get_input_embeddings().weight, clear.get_input_embeddings().weight)


def test_types_and_tied_output_embeddings(tmp_path):
    clear = tiny("qwen2").to(torch.bfloat16)
    model = load_client_model(tmp_path, export(clear, tmp_path, list(linear_layers(clear))))
    assert model.dtype == torch.bfloat16
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert "lm_head" in str(load_groups(tmp_path)[-1].members)
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits.float(), clear(IDS).logits.float(), atol=0.5)


def test_a_model_with_remote_layers_can_be_written_too(tmp_path):
    model = tiny("gpt2")
    _, layers = remote(model)
    save_client_model(model, [layer.product.group for layer in layers.values()], tmp_path)
    assert "transformer.h.0.attn.c_attn.bias" in load_file(tmp_path / WEIGHTS_NAME)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version"),
        ({"groups": []}, "no groups"),
        ({"groups": [{}]}, "fields"),
        ({"architecture": "os"}, "no model class 'os'"),
        ({"architecture": "PretrainedConfig"}, "no model class"),
        ({"architecture": "GPT2LMHeadModel"}, "is damaged"),
        ({"dtype": "int8"}, "no type 'int8'"),
        ({"dtype": None}, "no type"),
        ({"shared": []}, "no shared names"),
        ({"shared": {"lm_head.weight": "nothing"}}, "is not shared"),
        ({"shared": {"nothing": "model.embed_tokens.weight"}}, "is not shared"),
    ],
)
def test_damaged_descriptions_are_refused(change, message, tmp_path):
    products = export(tiny("llama"), tmp_path)
    description = json.loads((tmp_path / LAYERS_NAME).read_text())
    (tmp_path / LAYERS_NAME).write_text(json.dumps({**description, **change}))
    with pytest.raises(ValueError, match=message):
        load_client_model(tmp_path, products)


def test_damaged_files_are_refused(tmp_path):
    products = export(tiny("llama"), tmp_path)
    weights, config = tmp_path / WEIGHTS_NAME, tmp_path / "config.json"
    content = weights.read_bytes()
    for damaged in (b"", content[:100], content[:-4]):
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
            load_client_model(tmp_path, products)
    weights.write_bytes(content)
    values = json.loads(config.read_text())
    for change, message in [
        ({"vocab_size": 65}, "size mismatch"),
        ({"num_hidden_layers": 3}, "lacks model.layers.2"),
        ({"num_hidden_layers": 1}, "no linear layer"),
        ({"hidden_size": "wide"}, "is damaged"),
    ]:
        config.write_text(json.dumps({**values, **change}))
        with pytest.raises(ValueError, match=message):
            load_client_model(tmp_path, products)
    with pytest.raises(FileNotFoundError, match=f"no {LAYERS_NAME}"):
        load_client_model(tmp_path / "elsewhere", products)


@pytest.mark.parametrize("architecture", CAUSAL)
def test_a_public_prefix_costs_nothing(architecture, tmp_path):
    clear, model = tiny(architecture), tiny(architecture)
    public_prefix_cache(clear, PREFIX).save(tmp_path / "prefix")
    prefix = PublicPrefix.load(tmp_path / "prefix")
    products, _ = remote(model)
    rows: list[int] = []
    product = products.product

    def counted(group, x, *, transposed=False):
        rows.append(len(x))
        return product(group, x, transposed=transposed)

    products.product = counted
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    text = torch.tensor([[7, 8, 9]])
    expected = clear.generate(torch.cat([PREFIX[None], text], dim=1), **options)
    assert torch.equal(prefix.generate(model, prefix.split(expected[:, :7]), **options), expected)
    groups = len({name for name, _ in products.calls})
    assert sorted(rows) == [1] * 3 * groups + [3] * groups
    # Once more: a run leaves the prefix as it was.
    assert torch.equal(prefix.generate(model, text, **options), expected)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_a_public_prefix_before_batches_and_beams(architecture):
    clear, model = tiny(architecture), tiny(architecture)
    prefix = public_prefix_cache(clear, PREFIX)
    remote(model)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    options |= {"num_beams": 3, "num_return_sequences": 2}
    found = prefix.generate(model, **padded(), **options)
    for row, (ids, mask) in enumerate(zip(*padded().values(), strict=True)):
        text = torch.cat([PREFIX, ids[mask.bool()]])[None]
        expected = clear.generate(text, attention_mask=torch.ones_like(text), **options)
        assert torch.equal(found[2 * row : 2 * row + 2, -4:], expected[:, -4:])


def test_what_cannot_be_a_public_prefix(tmp_path):
    with pytest.raises(ValueError, match="not a decoder alone"):
        public_prefix_cache(tiny("t5"), PREFIX)
    with pytest.raises(ValueError, match="not a decoder alone"):
        public_prefix_cache(tiny("bert"), PREFIX)
    with pytest.raises(ValueError, match="at least one"):
        public_prefix_cache(tiny("llama"), PREFIX[:0])
    prefix = public_prefix_cache(tiny("llama"), PREFIX)
    for text in (PREFIX[None], torch.tensor([[1, 20, 30, 41, 5]])):
        with pytest.raises(ValueError, match="does not start with the 4 tokens"):
            prefix.split(text)
    file = tmp_path / "prefix"
    PublicPrefix(PREFIX[:3], prefix.layers).save(file)
    with pytest.raises(ValueError, match="has the shape"):
        PublicPrefix.load(file)
    PublicPrefix(PREFIX[None], prefix.layers).save(file)
    with pytest.raises(ValueError, match="is damaged: not the keys"):
        PublicPrefix.load(file)
    file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is damaged"):
        PublicPrefix.load(file)
    assert prefix.layers[0][0].shape == (1, 2, 4, WIDTH // 4)
