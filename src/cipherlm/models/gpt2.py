"""GPT-2 on tensors that may be encrypted: the classes of the clear model, and its arithmetic.

Two things are rearranged, and change no result: the gain and shift of a normalisation belong to the linear
layer behind it, and whatever adds to the hidden states adds a mean of zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cipherlm.models.architecture import Architecture
from cipherlm.nn.activations import Activation
from cipherlm.nn.blocks import Blocks
from cipherlm.nn.module import Float64, Linear, Module, Weights
from cipherlm.nn.norms import Norm
from cipherlm.nn.rotary import Rotary
from cipherlm.nn.softmax import Softmax
from cipherlm.nn.tensor import Cache, T
from cipherlm.nn.weights import after, centred, joined, layer, part


@dataclass(frozen=True)
class Args:
    """What of a model's configuration its blocks depend on."""

    width: int
    heads: int
    inner: int
    layers: int
    positions: int
    epsilon: float
    activation: str
    scale_scores: bool = True
    scale_by_layer: bool = False
    rope: Rotary | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Args:
        """Read a configuration of transformers. Raises ``ValueError`` for what is not there."""
        if config.get("add_cross_attention"):
            raise ValueError("a GPT-2 with cross-attention cannot be encrypted")
        width, heads = config["n_embd"], config["n_head"]
        if not heads or width % heads:
            raise ValueError(f"{heads} heads do not share a width of {width}")
        return cls(
            width,
            heads,
            config.get("n_inner") or 4 * width,
            config["n_layer"],
            config["n_positions"],
            config.get("layer_norm_epsilon", 1e-5),
            config.get("activation_function", "gelu_new"),
            config.get("scale_attn_weights", True),
            config.get("scale_attn_by_inverse_layer_idx", False),
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Args:
        """Read what ``dataclasses.asdict`` gave."""
        return cls(**values)

    @property
    def head_dim(self) -> int:
        """How many features a head has."""
        return self.width // self.heads


class Attention(Module):
    """Causal self-attention with several heads."""

    def __init__(self, args: Args, index: int) -> None:
        self.heads = args.heads
        self.c_attn = Linear.of(args.width, 3 * args.width)
        self.softmax = Softmax()
        self.c_proj = Linear.of(args.width, args.width)
        # Scores are divided by sqrt(head_dim); anything else goes into the queries.
        self.gain = 1.0 if args.scale_scores else args.head_dim**0.5
        if args.scale_by_layer:
            self.gain /= index + 1

    def __call__(self, x: T, cache: Cache | None = None) -> T:
        """Attend to hidden states, and to the tokens in the cache before them."""
        query, key, value = x.to_heads(self.c_attn, self.heads)
        if cache is not None:
            key, value = cache.extend(key, value)
        return self.softmax(query.scores(key), value) @ self.c_proj

    def sanitize(self, weights: Weights) -> dict[str, Float64]:
        """Return the weights of a ``GPT2Attention`` as they are needed here."""
        c_attn, gain = part(weights, "c_attn"), np.repeat([self.gain, 1.0, 1.0], self.c_proj.weight.shape[0])
        c_attn = layer(c_attn["weight"] * gain, c_attn["bias"] * gain)
        return joined({"c_attn": c_attn, "c_proj": part(weights, "c_proj")})


class MLP(Module):
    """Two linear layers with an activation between them."""

    def __init__(self, args: Args, index: int) -> None:
        self.c_fc = Linear.of(args.width, args.inner)
        self.act = Activation(args.activation)
        self.c_proj = Linear.of(args.inner, args.width)

    def __call__(self, x: T) -> T:
        """Return what is added to the hidden states."""
        return self.act(x @ self.c_fc) @ self.c_proj

    def sanitize(self, weights: Weights) -> dict[str, Float64]:
        """Return the weights of a ``GPT2MLP``."""
        return joined({name: part(weights, name) for name in ("c_fc", "c_proj")})


class Block(Module):
    """Attention and MLP, each behind a layer normalisation and beside the hidden states."""

    def __init__(self, args: Args, index: int) -> None:
        self.ln_1 = Norm(args.epsilon)
        self.attn = Attention(args, index)
        self.ln_2 = Norm(args.epsilon)
        self.mlp = MLP(args, index)

    def __call__(self, x: T, cache: Cache | None = None) -> T:
        """Return the next block's hidden states."""
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))

    def sanitize(self, weights: Weights) -> dict[str, Float64]:
        """Return the weights of a ``GPT2Block`` as they are needed here."""
        attn = self.attn.sanitize(part(weights, "attn"))
        mlp = self.mlp.sanitize(part(weights, "mlp"))
        ln_1, ln_2 = part(weights, "ln_1"), part(weights, "ln_2")
        layers = {
            "attn.c_attn": after(part(attn, "c_attn"), ln_1["weight"], ln_1["bias"]),
            "attn.c_proj": centred(part(attn, "c_proj")),
            "mlp.c_fc": after(part(mlp, "c_fc"), ln_2["weight"], ln_2["bias"]),
            "mlp.c_proj": centred(part(mlp, "c_proj")),
        }
        return joined(layers)


class GPT2(Blocks):
    """All blocks of a GPT-2."""

    def __init__(self, args: Args) -> None:
        super().__init__(Block(args, index) for index in range(args.layers))


ARCHITECTURE = Architecture(
    args=Args,
    blocks="transformer.h",
    parts={"attn": Attention, "mlp": MLP},
    block=Block,
    model=GPT2,
    embedding="transformer.wte",
    norm="transformer.ln_f",
    positions="transformer.wpe",
    layer="Conv1D",
    centred=True,
)
