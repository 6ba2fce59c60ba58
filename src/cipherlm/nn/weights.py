"""Weights by name, rearranged without a change of what a model computes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from cipherlm.nn.module import Float64, Weights


def part(weights: Weights, name: str) -> dict[str, Float64]:
    """Return the weights of the part ``name``, by their names there."""
    start = f"{name}."
    return {
        key[len(start) :]: np.asarray(value, np.float64)
        for key, value in weights.items()
        if key.startswith(start)
    }


def joined(parts: Mapping[str, Weights]) -> dict[str, Float64]:
    """Return the weights of several parts, by their names in the whole."""
    return {
        f"{name}.{key}": np.asarray(value, np.float64)
        for name, weights in parts.items()
        for key, value in weights.items()
    }


def layer(weight: Float64, bias: Float64 | None = None) -> dict[str, Float64]:
    """Return the weights of a linear layer, (inputs, outputs) and (outputs,)."""
    return {"weight": weight, "bias": np.zeros(weight.shape[1]) if bias is None else bias}


def after(weights: Weights, gain: Float64, shift: Float64 | None = None) -> dict[str, Float64]:
    """Return those of a layer with ``x * gain + shift`` before it folded in, both (inputs,)."""
    weight, bias = weights["weight"], weights["bias"]
    return layer(gain[:, None] * weight, bias if shift is None else bias + shift @ weight)


def centred(weights: Weights) -> dict[str, Float64]:
    """Return those of a layer whose outputs have their mean taken off, which layer normalisation ignores."""
    weight, bias = weights["weight"], weights["bias"]
    return layer(weight - weight.mean(axis=1, keepdims=True), bias - bias.mean())
