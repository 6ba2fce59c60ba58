"""Llama and what is built like it, on tensors that may be encrypted: Qwen2 with its biases, Mistral.

The gain of a normalisation belongs to the linear layer behind it, and a head of keys and values that several
queries share is repeated for each; neither changes a result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cipherlm.models.architecture import Architecture
from cipherlm.nn.activations import Gate
from cipherlm.nn.blocks import Blocks
from cipherlm.nn.module import Float64, Linear, Module, Weights
from cipherlm.nn.norms import Norm
from cipherlm.nn.rotary import Rotary
from cipherlm.nn.softmax import Softmax
from cipherlm.nn.tensor import Cache, T
from cipherlm.nn.weights import after, joined, layer, part


@dataclass(frozen=True)
class Args:
    """What of a model's configuration its blocks depend on."""

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    layers: int
    positions: int
    epsilon: float
    activation: str
    rope: Rotary

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Args:
        """Read a configuration of transformers. Raises ``ValueError`` for what is not there."""
        sliding = set(config.get("layer_types") or ()) - {"full_attention"}
        if sliding or (config.get("sliding_window") and config.get("use_sliding_window", True)):
            raise ValueError("attention in a sliding window cannot be encrypted")
        width, heads = config["hidden_size"], config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads") or heads
        if not heads or heads % kv_heads:
            raise ValueError(f"{heads} heads do not share {kv_heads} heads of keys and values")
        head_dim, positions = config.get("head_dim") or width // heads, config["max_position_embeddings"]
        # Before transformers 5, theta was a field of its own.
        parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
        theta = config.get("rope_theta") or 10000.0
        return cls(
            width,
            heads,
            kv_heads,
            head_dim,
            config["intermediate_size"],
            config["num_hidden_layers"],
            positions,
            config["rms_norm_eps"],
            config["hidden_act"],
            Rotary.of(head_dim, positions, {"rope_theta": theta, **parameters}),
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Args:
        """Read what ``dataclasses.asdict`` gave."""
        return cls(**{**values, "rope": Rotary.from_dict(values["rope"])})


class Attention(Module):
    """Causal self-attention, with rotary positions; several queries may share a key and a value."""

    def __init__(self, args: Args, index: int) -> None:
        self.heads, self.head_dim, self.shared = args.heads, args.head_dim, args.heads // args.kv_heads
        self.qkv_proj = Linear.of(args.width, 3 * args.heads * args.head_dim)
        self.rope = args.rope
        self.softmax = Softmax()
        self.o_proj = Linear.of(args.heads * args.head_dim, args.width)

    def __call__(self, x: T, cache: Cache | None = None) -> T:
        """Attend to hidden states, and to the tokens in the cache before them."""
        query, key, value = x.to_heads(self.qkv_proj, self.heads)
        query, key = query.rotary(self.rope), key.rotary(self.rope)
        if cache is not None:
            key, value = cache.extend(key, value)
        return self.softmax(query.scores(key), value) @ self.o_proj

    def sanitize(self, weights: Weights) -> dict[str, Float64]:
        """Return the weights of a ``LlamaAttention`` as they are needed here."""
        query, key, value = (linear(weights, f"{name}_proj") for name in "qkv")
        layers = [query, self._repeated(key), self._repeated(value)]
        qkv = layer(*(np.concatenate([one[kind] for one in layers], axis=-1) for kind in ("weight", "bias")))
        return joined({"qkv_proj": qkv, "o_proj": linear(weights, "o_proj")})

    def _repeated(self, weights: Weights) -> dict[str, Float64]:
        def repeat(values: Float64) -> Float64:
            heads = values.reshape(*values.shape[:-1], -1, self.head_dim)
            return np.repeat(heads, self.shared, axis=-2).reshape(*values.shape[:-1], -1)

        return layer(repeat(weights["weight"]), repeat(weights["bias"]))


class MLP(Module):
    """SwiGLU: two linear layers side by side, one of which gates the other, and a third."""

    def __init__(self, args: Args, index: int) -> None:
        self.gate_proj = Linear.of(args.width, args.inner)
        self.up_proj = Linear.of(args.width, args.inner)
        self.act = Gate(args.activation)
        self.down_proj = Linear.of(args.inner, args.width)

    def __call__(self, x: T) -> T:
        """Return what is added to the hidden states."""
        return self.act(x @ self.gate_proj, x @ self.up_proj) @ self.down_proj

    def sanitize(self, weights: Weights) -> dict[str, Float64]:
        """Return the weights of a ``LlamaMLP``."""
        return joined({name: linear(weights, name) for name in ("gate_proj", "up_proj", "down_proj")})


class Block(Module):
    """Attention and MLP, each behind an RMS normalisation and beside the hidden states."""

    def __init__(self, args: Args, index: int) -> None:
        self.input_layernorm = Norm(args.epsilon)
        self.self_attn = Attention(args, index)
        self.post_attention_layernorm = Norm(args.epsilon)
        self.mlp = MLP(args, index)

    def __call__(self, x: T, cache: Cache | None = None) -> T:
        """Return the next block's hidden states."""
        x = x + self.self_attn(self.input_layernorm(x), cache)
        return x + self.mlp(self.post_attention_layernorm(x))

    def sanitize(self, weights: Weights) -> dict[str, Float64]:
        """Return the weights of a ``LlamaDecoderLayer`` as they are needed here."""
        attn = self.self_attn.sanitize(part(weights, "self_attn"))
        mlp = self.mlp.sanitize(part(weights, "mlp"))
        first, second = (part(weights, f"{name}_layernorm") for name in ("input", "post_attention"))
        layers = {
            "self_attn.qkv_proj": after(part(attn, "qkv_proj"), first["weight"]),
            "self_attn.o_proj": part(attn, "o_proj"),
            "mlp.gate_proj": after(part(mlp, "gate_proj"), second["weight"]),
            "mlp.up_proj": after(part(mlp, "up_proj"), second["weight"]),
            "mlp.down_proj": part(mlp, "down_proj"),
        }
        return joined(layers)


class Llama(Blocks):
    """All blocks of a Llama."""

    def __init__(self, args: Args) -> None:
        super().__init__(Block(args, index) for index in range(args.layers))


def linear(weights: Weights, name: str) -> dict[str, Float64]:
    """Return those of a ``torch.nn.Linear``, which keeps its outputs first and may lack a bias."""
    own = part(weights, name)
    return layer(own["weight"].T, own.get("bias"))


ARCHITECTURE = Architecture(
    args=Args,
    blocks="model.layers",
    parts={"self_attn": Attention, "mlp": MLP},
    block=Block,
    model=Llama,
    embedding="model.embed_tokens",
    norm="model.norm",
)
