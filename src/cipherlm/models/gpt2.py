"""GPT-2 on tensors that may be encrypted: the classes of the clear model, and its arithmetic.

``x`` is a :class:`~cipherlm.schemes.ckks.tensor.Tensor`, of ciphertexts, or of clear numbers in a simulation;
the weights are clear. Two things are rearranged, and change no result: the gain and shift of a normalisation
belong to the linear layer behind it, and whatever adds to the hidden states adds a mean of zero.

:class:`Ends` is done by whoever has the text: it makes hidden states of tokens, and logits of hidden states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cipherlm.models.activations import DEFAULT_ACTIVATION, activation
from cipherlm.schemes.ckks.calibration import ExactFunctions
from cipherlm.schemes.ckks.functions import Attend, Functions, Map, Ranges
from cipherlm.schemes.ckks.simulation import SimulatedTensor
from cipherlm.schemes.ckks.tensor import Cache, KeyValue, Linear, T

Float64 = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Attention:
    """Causal self-attention with several heads."""

    n_heads: int
    c_attn: Linear
    c_proj: Linear
    softmax: Attend

    def __call__(self, x: T, cache: Cache | None = None) -> T:
        """Attend to hidden states, and to the tokens in the cache before them."""
        query, key, value = x.to_heads(self.c_attn, self.n_heads)
        if cache is not None:
            key, value = cache.extend(key, value)
        return self.softmax(query.scores(key), value) @ self.c_proj


@dataclass(frozen=True, eq=False)
class MLP:
    """Two linear layers with an activation between them."""

    c_fc: Linear
    c_proj: Linear
    activation: Map

    def __call__(self, x: T) -> T:
        """Return what is added to the hidden states."""
        return self.activation(x @ self.c_fc) @ self.c_proj


@dataclass(frozen=True, eq=False)
class Block:
    """Attention and MLP, each behind a layer normalisation and beside the hidden states."""

    ln_1: Map
    attn: Attention
    ln_2: Map
    mlp: MLP

    def __call__(self, x: T, cache: Cache | None = None) -> T:
        """Return the next block's hidden states."""
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))

    @classmethod
    def from_transformers(cls, block: Any, config: Any) -> Block:
        """Return a ``GPT2Block`` of a model with this configuration, with exact functions."""
        exact = ExactFunctions(config.layer_norm_epsilon, activation(config.activation_function))
        attn = attention_layers(block.attn)
        c_attn = attn[0].after(array(block.ln_1.weight), array(block.ln_1.bias))
        c_fc = linear(block.mlp.c_fc).after(array(block.ln_2.weight), array(block.ln_2.bias))
        return cls(
            exact.ln_1,
            Attention(config.n_head, c_attn, attn[1].centred(), exact.softmax),
            exact.ln_2,
            MLP(c_fc, linear(block.mlp.c_proj).centred(), exact.activation),
        )

    def with_functions(self, functions: Functions) -> Block:
        """Return the block with the same weights and other functions."""
        return Block(
            functions.ln_1,
            replace(self.attn, softmax=functions.softmax),
            functions.ln_2,
            replace(self.mlp, activation=functions.activation),
        )


@dataclass(frozen=True, eq=False)
class GPT2:
    """The blocks of a GPT-2, from embedded tokens to the hidden states before the last normalisation."""

    blocks: tuple[Block, ...]
    epsilon: float
    activation: str = DEFAULT_ACTIVATION
    """By its name in transformers."""

    def __call__(
        self, x: T, caches: Sequence[Cache] | None = None, report: Callable[[int, int], None] | None = None
    ) -> T:
        """Return the last hidden states of centred hidden states (tokens, width).

        ``caches`` are each block's keys and values of the tokens before them. ``report`` hears after each
        block how many of all are done.
        """
        none: list[Cache | None] = [None] * len(self.blocks)
        for index, (block, cache) in enumerate(zip(self.blocks, caches or none, strict=True)):
            x = block(x, cache)
            if report is not None:
                report(index + 1, len(self.blocks))
        return x

    @classmethod
    def from_transformers(cls, model: Any) -> GPT2:
        """Return the blocks of a ``GPT2LMHeadModel`` with exact functions.

        Raises ``ValueError`` for an activation that is none of ``ACTIVATIONS``.
        """
        config = model.config
        blocks = [Block.from_transformers(block, config) for block in model.transformer.h]
        return cls(tuple(blocks), config.layer_norm_epsilon, config.activation_function)

    def keys_values(self, hidden: Float64) -> list[KeyValue]:
        """Return each block's keys and values (heads, tokens, head_dim) for centred clear hidden states.

        They are computed exactly: GPT-2's first token has values far outside the ranges of others, and so
        nothing of it is remembered either.
        """
        model = self._with_functions(self._exact_functions())
        empty = [Cache() for _ in self.blocks]
        model(SimulatedTensor(hidden), empty)
        found = []
        for cache in empty:
            assert cache.past is not None
            key, value = cache.past
            found.append((key.values, value.values))
        return found

    def calibrated(self, texts: Iterable[Float64], prefix: Sequence[KeyValue] | None = None) -> list[Ranges]:
        """Return the ranges met on texts, of each block.

        ``texts`` are centred hidden states (tokens, width), and ``prefix`` the keys and values before each.
        """
        exact = self._exact_functions()
        model = self._with_functions(exact)
        for hidden in texts:
            model(SimulatedTensor(hidden), caches(prefix))
        return [functions.ranges for functions in exact]

    def fitted(self, ranges: Sequence[Ranges], keys: int) -> GPT2:
        """Return the model with polynomials in place of functions, for at most ``keys`` keys to a query."""
        return self._with_functions(
            [own.fit(self.epsilon, keys, activation(self.activation)) for own in ranges]
        )

    def _exact_functions(self) -> list[ExactFunctions]:
        return [ExactFunctions(self.epsilon, activation(self.activation)) for _ in self.blocks]

    def _with_functions(self, functions: Sequence[Functions]) -> GPT2:
        blocks = (block.with_functions(own) for block, own in zip(self.blocks, functions, strict=True))
        return replace(self, blocks=tuple(blocks))


def caches(prefix: Sequence[KeyValue] | None) -> list[Cache] | None:
    """Return a cache for each block, with the keys and values of a clear prefix."""
    return None if prefix is None else [Cache(past) for past in prefix]


@dataclass(frozen=True, eq=False)
class Ends:
    """The parts of GPT-2 on either side of its blocks: embeddings, last normalisation, output embedding."""

    tokens: Float64
    positions: Float64
    gain: Float64
    shift: Float64
    epsilon: float

    @classmethod
    def from_transformers(cls, model: Any) -> Ends:
        """Return the ends of a ``GPT2LMHeadModel``, whose output embedding is that of its input."""
        body = model.transformer
        return cls(
            array(body.wte.weight),
            array(body.wpe.weight),
            array(body.ln_f.weight),
            array(body.ln_f.bias),
            body.ln_f.eps,
        )

    def embed(self, ids: Sequence[int], start: int = 0) -> Float64:
        """Return centred hidden states (tokens, width) of token ids, the first at position ``start``."""
        hidden = self.tokens[list(ids)] + self.positions[start : start + len(ids)]
        centred: Float64 = hidden - hidden.mean(axis=-1, keepdims=True)
        return centred

    def logits(self, hidden: Float64) -> Float64:
        """Return logits (tokens, vocabulary) of the last hidden states."""
        centred = hidden - hidden.mean(axis=-1, keepdims=True)
        normal = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + self.epsilon)
        logits: Float64 = (normal * self.gain + self.shift) @ self.tokens.T
        return logits


def attention_layers(attn: Any) -> tuple[Linear, Linear]:
    """Return both layers of a ``GPT2Attention``, for scores that are divided by ``sqrt(head_dim)``."""
    c_attn, width = linear(attn.c_attn), attn.embed_dim
    factor = 1.0 if attn.scale_attn_weights else math.sqrt(attn.head_dim)
    if attn.scale_attn_by_inverse_layer_idx:
        factor /= attn.layer_idx + 1
    gain = np.repeat([factor, 1.0, 1.0], width)
    return Linear(c_attn.weight * gain, c_attn.bias * gain), linear(attn.c_proj)


def linear(layer: Any) -> Linear:
    """Return the weights of a ``Conv1D``."""
    return Linear(array(layer.weight), array(layer.bias))


def array(parameter: Any) -> Float64:
    """Return a parameter in double precision."""
    values: Float64 = parameter.detach().cpu().double().numpy()
    return values
