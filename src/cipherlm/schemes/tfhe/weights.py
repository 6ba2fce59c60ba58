"""The weights of one attention layer, as every scheme takes them from a model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class AttentionWeights:
    """One GPT-2 attention layer in floating point, in the convention ``x @ weight + bias``.

    ``qkv_weight`` (width, 3 * width), ``qkv_bias`` (3 * width,), ``projection_weight`` (width, width),
    ``projection_bias`` (width,).
    """

    qkv_weight: Float64
    qkv_bias: Float64
    projection_weight: Float64
    projection_bias: Float64
    n_heads: int

    @property
    def width(self) -> int:
        """The model's width."""
        return int(self.qkv_weight.shape[0])

    @property
    def head_dim(self) -> int:
        """The width of one head."""
        return self.width // self.n_heads

    def head(self, index: int) -> tuple[Float64, Float64]:
        """Return weights (3, width, head_dim) and biases (3, head_dim) of one head: query, key, value."""
        columns = slice(index * self.head_dim, (index + 1) * self.head_dim)
        weight = self.qkv_weight.reshape(self.width, 3, self.width)[:, :, columns]
        return np.moveaxis(weight, 1, 0), self.qkv_bias.reshape(3, self.width)[:, columns]
