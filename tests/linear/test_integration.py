"""Remote linear layers in models of ``transformers``: nothing but the place of the weights may show."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel

from cipherlm.linear.groups import find_groups, linear_layers, output_embedding
from cipherlm.linear.modules import GroupProduct, RemoteLinear, replace
from cipherlm.linear.products import LinearGroup

from .architectures import CAUSAL, CONFIGS, VOCABULARY, WIDTH, remote, tiny

BOUND = 1e-4
IDS = torch.tensor([[5, 9, 17, 33, 8], [12, 40, 7, 21, 50]])


def groups_of(model: nn.Module) -> list[tuple[str, ...]]:
    names = [name for name in linear_layers(model) if name != output_embedding(model)]
    return [group.members for group in find_groups(model, names)]


def padded() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[0, 0, 5, 9, 17], [12, 40, 7, 21, 50]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def call(architecture: str) -> dict[str, torch.Tensor]:
    arguments = padded()
    if architecture == "t5":
        arguments["decoder_input_ids"] = IDS[:, :3]
    return arguments


@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_model_equals_its_clear_self(architecture):
    clear, model = tiny(architecture), tiny(architecture)
    _, layers = remote(model)
    assert layers
    assert all(not layer.state_dict().keys() - {"bias"} for layer in layers.values())
    with torch.no_grad():
        expected, found = clear(**call(architecture)), model(**call(architecture))
    for name in ("logits", "last_hidden_state", "pooler_output"):
        if name in expected:
            assert torch.allclose(found[name], expected[name], atol=BOUND, rtol=BOUND), name
    assert expected.keys() == found.keys()


BEAMS = {"num_beams": 3, "num_return_sequences": 2}


@pytest.mark.parametrize(
    ("architecture", "options"), [*((a, {}) for a in [*CAUSAL, "t5"]), ("llama", BEAMS), ("t5", BEAMS)]
)
def test_generate(architecture, options):
    clear, model = tiny(architecture), tiny(architecture)
    products, _ = remote(model)
    options = {**options, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected, found = clear.generate(**padded(), **options), model.generate(**padded(), **options)
    assert torch.equal(found, expected)
    # With its own cache, the client asks for one row a sequence and token, once a group.
    per_pass = len({name for name, _ in products.calls})
    assert len(products.calls) <= 4 * per_pass


def test_sampling():
    clear, model = tiny("llama"), tiny("llama")
    remote(model)
    texts = []
    for which in (clear, model):
        torch.manual_seed(3)
        texts.append(which.generate(IDS, max_new_tokens=6, do_sample=True, top_k=20, pad_token_id=0))
    assert torch.equal(*texts)


@pytest.mark.parametrize(
    "options",
    [{"prompt_lookup_num_tokens": 3}, {"cache_implementation": "static"}, {"use_cache": False}],
    ids=["lookup", "static", "uncached"],
)
def test_other_ways_to_generate(options):
    clear, model = tiny("llama"), tiny("llama")
    remote(model)
    ids = torch.tensor([[5, 9, 17, 5, 9, 17, 5, 9]])
    options = {**options, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), clear.generate(ids, **options))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_implementations_of_attention(attention):
    clear, model = tiny("llama"), tiny("llama")
    remote(model)
    model.set_attn_implementation(attention)
    with torch.no_grad():
        assert torch.allclose(model(**padded()).logits, clear(**padded()).logits, atol=BOUND, rtol=BOUND)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5"])
def test_types(architecture, dtype):
    clear, model = tiny(architecture).to(dtype), tiny(architecture).to(dtype)
    remote(model)
    with torch.no_grad():
        expected, found = clear(**call(architecture)).logits, model(**call(architecture)).logits
    assert found.dtype == dtype
    # Both round; by no more than the clear model is away from float32.
    exact = tiny(architecture)(**call(architecture)).logits
    distance = (exact - expected).abs().max()
    assert (found - exact).abs().max() < 3 * distance


def test_layers_with_one_input_are_one_group():
    assert groups_of(tiny("llama"))[:4] == [
        tuple(f"model.layers.0.self_attn.{name}_proj" for name in "qkv"),
        ("model.layers.0.self_attn.o_proj",),
        ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"),
        ("model.layers.0.mlp.down_proj",),
    ]
    assert [len(group) for group in groups_of(tiny("gpt2"))] == [1] * 8
    # The MLP of Phi reads what attention reads.
    assert [len(group) for group in groups_of(tiny("phi"))] == [4, 1, 1] * 2
    assert [len(group) for group in groups_of(tiny("bert"))] == [3, 1, 1, 1, 3, 1, 1, 1, 1]
    # Cross-attention of all decoder blocks reads the encoder's output.
    assert [len(group) for group in groups_of(tiny("t5"))].count(4) == 1


def test_one_exchange_a_group_and_no_stale_results():
    model = tiny("llama")
    products, layers = remote(model)
    with torch.no_grad():
        model(IDS)
    assert len(products.calls) == len(set(products.calls)) == 8

    q, k = (layers[f"model.layers.0.self_attn.{name}_proj"] for name in "qk")
    x = torch.randn(1, 2, WIDTH)
    weight = products.weights[q.name]

    def expected(rows: slice) -> torch.Tensor:
        return x @ torch.tensor(weight[rows]).T

    products.calls.clear()
    first = q(x)
    assert torch.allclose(k(x), expected(slice(32, 48)), atol=1e-5)
    assert len(products.calls) == 1
    q(x)
    x.mul_(2)  # the same object, other values
    assert torch.allclose(k(x), expected(slice(32, 48)), atol=1e-5)
    assert len(products.calls) == 3
    assert torch.allclose(q(x), 2 * first, atol=1e-5)  # the other member of the newest product
    assert len(products.calls) == 3
    q(x)  # a member gets its part once
    assert len(products.calls) == 4
    with torch.inference_mode():
        y = torch.randn(1, 2, WIDTH)
        q(y), k(y)
    assert len(products.calls) == 5


def test_results_may_be_changed_in_place():
    model = tiny("llama")
    _, layers = remote(model)
    q, k = (layers[f"model.layers.0.self_attn.{name}_proj"] for name in "qk")
    x = torch.randn(3, WIDTH)
    for grad in (False, True):
        x.requires_grad_(grad)
        untouched = k(x)
        q(x).mul_(0)
        assert torch.equal(k(x), untouched)


def test_no_rows_no_exchange():
    model = tiny("gpt2")
    products, layers = remote(model)
    assert layers["transformer.h.0.mlp.c_fc"](torch.empty(0, 3, WIDTH)).shape == (0, 3, 4 * WIDTH)
    assert not products.calls


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_name_the_layer(value):
    model = tiny("llama")
    products, _ = remote(model)
    embeddings = torch.zeros(1, 2, WIDTH)
    embeddings[0, 1, 3] = value
    with pytest.raises(ValueError, match=r"input of model\.layers\.0\.self_attn\.q_proj has NaN or infinity"):
        model(inputs_embeds=embeddings)
    assert not products.calls


def test_wrong_products_are_refused():
    group = LinearGroup("layer", ("layer",), 4, (6,))

    class Wrong:
        def product(self, group, x, *, transposed=False):
            return np.zeros((1, 5))

    layer = RemoteLinear("layer", GroupProduct(group, Wrong()), None, torch.empty(0))
    with pytest.raises(ValueError, match=r"product of layer has the shape \(1, 5\)"):
        layer(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="layer takes 4 features, not 3"):
        layer(torch.zeros(1, 3))


def test_a_weight_has_a_shape_and_no_values():
    model = tiny("t5").to(torch.bfloat16)
    _, layers = remote(model)
    weight = layers["encoder.block.0.layer.1.DenseReluDense.wo"].weight
    assert (weight.dtype, tuple(weight.shape), weight.device.type) == (torch.bfloat16, (WIDTH, 48), "cpu")
    assert "RemoteWeight" in repr(weight)
    for read in (
        lambda: weight + 1,
        lambda: weight.float(),
        lambda: weight.data,
        lambda: weight[0],
        weight.sum,
    ):
        with pytest.raises(RuntimeError, match=r"weights of encoder\.block\.0\S* are on the server"):
            read()
    with pytest.raises(RuntimeError, match="are on the server"):
        nn.init.zeros_(weight)
    assert layers["encoder.block.0.layer.1.DenseReluDense.wo"].to(torch.float32).weight.dtype == torch.float32


def test_gradients_are_products_with_the_transpose():
    clear, model = tiny("llama"), tiny("llama")
    products, _ = remote(model)
    gradients = []
    for which in (clear, model):
        embeddings = which.get_input_embeddings()(IDS).detach().requires_grad_()
        which(inputs_embeds=embeddings, labels=IDS).loss.backward()
        gradients.append(embeddings.grad)
    assert torch.allclose(*gradients, atol=1e-5, rtol=1e-3)
    backward = [name for name, transposed in products.calls if transposed]
    assert len(backward) == len(set(backward)) == 8


def test_the_output_embedding_can_be_named_although_it_is_tied():
    clear, model = tiny("qwen2"), tiny("qwen2")
    remote(model, [*linear_layers(model)])
    assert isinstance(model.lm_head, RemoteLinear)
    assert tuple(model.get_input_embeddings().weight.shape) == (VOCABULARY, WIDTH)
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, clear(IDS).logits, atol=BOUND, rtol=BOUND)


def test_a_layer_in_two_places():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(4, 4)
            self.other = self.one

        def forward(self, x):
            return self.other(self.one(x))

    model = Twice()
    x = torch.randn(2, 4)
    expected = model(x)
    names = list(linear_layers(model))
    groups = find_groups(model, names, {"x": x})
    assert [group.members for group in groups] == [("one",)]
    remote(model)
    assert model.one is model.other
    assert isinstance(model.one, RemoteLinear)
    assert torch.allclose(model(x), expected, atol=1e-6)


def test_a_model_that_takes_other_inputs(caplog):
    class Strange(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 5)

        def forward(self, points, scale):
            return self.a(points) @ self.b(points).T[:, :3].T * scale

    model = Strange()
    assert [g.members for g in find_groups(model, ["a", "b"])] == [("a",), ("b",)]
    assert "give an example" in caplog.text
    example = {"points": torch.randn(5, 4), "scale": 2.0}
    assert [g.members for g in find_groups(model, ["a", "b"], example)] == [("a", "b")]
    with pytest.raises(TypeError):
        find_groups(model, ["a", "b"], {"points": torch.randn(5, 4)})
    assert model.training


def test_layers_with_a_forward_of_their_own():
    class Same(nn.Linear):
        def forward(self, hidden):
            return hidden @ self.weight.T + self.bias

    class Scaled(nn.Linear):
        def forward(self, hidden):
            return 2 * super().forward(hidden)

    class Pair(nn.Linear):
        def forward(self, hidden, other):
            return super().forward(hidden + other)

    model = nn.ModuleDict({"same": Same(4, 4), "scaled": Scaled(4, 4), "pair": Pair(4, 4)})
    assert list(linear_layers(model)) == ["same"]


def test_weights_that_the_model_reads_itself_stay(caplog):
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.read, self.typed = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            assert self.typed.weight.dtype == x.dtype
            return self.typed(x @ self.read.weight.T)

    model = Reader()
    groups = find_groups(model, ["read", "typed"], {"x": torch.randn(2, 4)})
    assert [group.members for group in groups] == [("typed",)]
    assert "read: the model reads these weights" in caplog.text


def test_other_inputs_than_text(caplog):
    text = CONFIGS["bert"][1].to_dict() | {"architectures": None}
    vision = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    config = CLIPConfig(text_config=text, vision_config={**vision, "image_size": 8, "patch_size": 4})
    sizes = [len(members) for members in groups_of(CLIPModel(config))]
    assert sizes.count(3) == 3
    assert not caplog.text


def test_what_cannot_be_remote_is_refused():
    model = tiny("llama")
    model.model.layers[0].mlp.up_proj.base_layer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"up_proj has an adapter.*merge_and_unload"):
        linear_layers(model)
    model = tiny("llama")
    projection = model.model.layers[0].mlp.up_proj
    projection.weight = nn.Parameter(projection.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"up_proj are quantised"):
        linear_layers(model)
    with torch.device("meta"):
        model = CONFIGS["llama"][0](CONFIGS["llama"][1])
    with pytest.raises(ValueError, match="not in memory"):
        remote(model)
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj have NaN or infinity"):
        remote(model)
    assert "in_proj" not in str(linear_layers(nn.TransformerEncoderLayer(8, 2)))
    assert "self_attn.out_proj" not in linear_layers(nn.TransformerEncoderLayer(8, 2))
    model = tiny("gpt2")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"no linear layer 'transformer\.h\.9"):
        replace(model, [LinearGroup("transformer.h.9", ("transformer.h.9",), 32, (96,))], None)
    assert before.keys() == model.state_dict().keys()


def test_a_copy_of_a_model_has_the_same_server():
    model = tiny("gpt2")
    products, _ = remote(model)
    again = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert len(products.calls) == 16


@pytest.mark.parametrize(
    "values",
    [
        [],
        {"name": "a", "members": ["a"], "in_features": 4},
        {"name": "a", "members": "a", "in_features": 4, "out_features": [3]},
        {"name": "a", "members": ["b"], "in_features": 4, "out_features": [3]},
        {"name": "a", "members": ["a", "a"], "in_features": 4, "out_features": [3, 3]},
        {"name": "a", "members": ["a"], "in_features": 0, "out_features": [3]},
        {"name": "a", "members": ["a"], "in_features": True, "out_features": [3]},
        {"name": "a", "members": ["a"], "in_features": 4, "out_features": [3, 3]},
        {"name": 3, "members": [3], "in_features": 4, "out_features": [3]},
    ],
)
def test_damaged_groups_are_refused(values):
    with pytest.raises(ValueError, match=r"linear layers|members"):
        LinearGroup.from_dict(values)


def test_a_group_in_json():
    group = LinearGroup("a.q", ("a.q", "a.k"), 8, (8, 4))
    assert LinearGroup.from_dict(group.to_dict()) == group
    assert group.rows == 12
