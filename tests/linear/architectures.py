"""Small random models of architectures that no line of this package mentions, and products in the clear."""

import numpy as np
import torch
import transformers as t
from torch import nn

from cipherlm.linear.groups import find_groups, linear_layers, output_embedding, weights_of
from cipherlm.linear.modules import RemoteLinear, replace
from cipherlm.linear.products import Float32, Float64, LinearGroup

WIDTH, HEADS, VOCABULARY = 32, 4, 64

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS: dict[str, tuple[type[nn.Module], t.PretrainedConfig]] = {
    "llama": (t.LlamaForCausalLM, t.LlamaConfig(**_COMMON, num_key_value_heads=2)),
    "qwen2": (t.Qwen2ForCausalLM, t.Qwen2Config(**_COMMON, num_key_value_heads=2, tie_word_embeddings=True)),
    "gpt_neox": (t.GPTNeoXForCausalLM, t.GPTNeoXConfig(**_COMMON)),
    "phi": (t.PhiForCausalLM, t.PhiConfig(**_COMMON)),
    "gemma2": (
        t.Gemma2ForCausalLM,
        t.Gemma2Config(**_COMMON, head_dim=8, num_key_value_heads=2, sliding_window=6),
    ),
    "gpt2": (
        t.GPT2LMHeadModel,
        t.GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=WIDTH,
            n_layer=2,
            n_head=HEADS,
            n_positions=64,
            bos_token_id=1,
            eos_token_id=2,
        ),
    ),
    "bert": (t.BertModel, t.BertConfig(**_COMMON, max_position_embeddings=64)),
    "t5": (
        t.T5ForConditionalGeneration,
        t.T5Config(
            vocab_size=VOCABULARY,
            d_model=WIDTH,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=HEADS,
            feed_forward_proj="gated-gelu",
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=2,
        ),
    ),
}
CAUSAL = ["llama", "qwen2", "gpt_neox", "phi", "gemma2", "gpt2"]


def tiny(architecture: str, *, seed: int = 0) -> nn.Module:
    """Return a random model in evaluation mode, with weights large enough for its texts to vary."""
    model_class, config = CONFIGS[architecture]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config).eval()
        for parameter in model.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.2)
    return model


class ClearProducts:
    """Multiplies with NumPy, and counts."""

    def __init__(self, groups: tuple[LinearGroup, ...], weights: dict[str, Float32]) -> None:
        self.weights = weights
        self.calls: list[tuple[str, bool]] = []

    def product(self, group: str, x: Float64, *, transposed: bool = False) -> Float64:
        self.calls.append((group, transposed))
        matrix = self.weights[group].astype(np.float64)
        return x @ (matrix if transposed else matrix.T)


def make_products(groups: tuple[LinearGroup, ...], weights: dict[str, Float32]) -> ClearProducts:
    return ClearProducts(groups, weights)


def remote(model: nn.Module, names: list[str] | None = None) -> tuple[ClearProducts, dict[str, RemoteLinear]]:
    """Make the linear layers of ``model`` remote in place."""
    layers = linear_layers(model)
    if names is None:
        names = [name for name in layers if name != output_embedding(model)]
    groups = find_groups(model, names)
    products = make_products(groups, {group.name: weights_of(layers, group) for group in groups})
    return products, dict(replace(model, groups, products))
