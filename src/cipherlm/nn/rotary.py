"""Rotary position embeddings (Su et al., "RoFormer", 2021), with their scalings for long contexts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]

SCALINGS = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Rotary:
    """Feature j and feature j + head_dim / 2 are rotated together, by ``position * frequencies[j]``.

    ``factor`` multiplies both.
    """

    frequencies: tuple[float, ...]
    factor: float = 1.0

    @classmethod
    def of(cls, head_dim: int, positions: int, parameters: Mapping[str, Any]) -> Rotary:
        """Return what ``rope_parameters`` of a configuration of transformers say.

        ``positions`` are the model's ``max_position_embeddings``. Raises ``ValueError`` for an odd head_dim
        and for a scaling that is none of :data:`SCALINGS`.
        """
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if kind not in SCALINGS:
            raise ValueError(f"the RoPE scaling {kind!r} is not there; these are: {', '.join(SCALINGS)}")
        partial = parameters.get("partial_rotary_factor")
        if head_dim % 2 or partial not in (None, 1, 1.0):
            raise ValueError("RoPE on a part of a head's features, or on an odd number, is not there")
        theta = float(parameters["rope_theta"])
        plain = theta ** -(np.arange(0, head_dim, 2) / head_dim)
        if kind == "default":
            return cls(tuple(plain.tolist()))
        stretch = float(parameters["factor"])
        if kind == "linear":
            return cls(tuple((plain / stretch).tolist()))
        if kind == "llama3":
            return cls(tuple(_by_wavelength(plain, stretch, parameters).tolist()))
        return _yarn(plain, stretch, theta, head_dim, positions, parameters)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Rotary:
        """Read what ``dataclasses.asdict`` gave."""
        return cls(tuple(map(float, values["frequencies"])), float(values["factor"]))

    def factors(self, positions: NDArray[np.int_]) -> tuple[Float64, Float64]:
        """Return what features and their :meth:`half_turn` are multiplied by, both (positions, head_dim)."""
        angles = np.outer(positions, [*self.frequencies, *self.frequencies])
        return self.factor * np.cos(angles), self.factor * np.sin(angles)

    @staticmethod
    def half_turn(values: Float64) -> Float64:
        """Return features (..., head_dim) rotated by a right angle: ``(-second half, first half)``."""
        first, second = np.split(values, 2, axis=-1)
        return np.concatenate([-second, first], axis=-1)


def _by_wavelength(plain: Float64, stretch: float, parameters: Mapping[str, Any]) -> Float64:
    """Return frequencies as Llama 3.1 scales them: long waves are stretched, short ones are not."""
    low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
    turns = float(parameters["original_max_position_embeddings"]) * plain / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    scaled: Float64 = (1 - kept) * plain / stretch + kept * plain
    return scaled


def _yarn(
    plain: Float64,
    stretch: float,
    theta: float,
    head_dim: int,
    positions: int,
    parameters: Mapping[str, Any],
) -> Rotary:
    """Return frequencies and factor after Peng et al., "YaRN" (2023), section 3."""
    original = float(parameters.get("original_max_position_embeddings") or positions)

    def dimension(turns: float) -> float:
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension(float(parameters.get("beta_fast") or 32))
    high = dimension(float(parameters.get("beta_slow") or 1))
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    stretched = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 1e-3), 0, 1)
    frequencies = stretched * plain / stretch + (1 - stretched) * plain
    factor = parameters.get("attention_factor")
    if factor is None:
        whole, parts = parameters.get("mscale"), parameters.get("mscale_all_dim")
        factor = (
            _temperature(stretch, whole) / _temperature(stretch, parts)
            if whole and parts
            else _temperature(stretch, 1.0)
        )
    return Rotary(tuple(frequencies.tolist()), float(factor))


def _temperature(stretch: float, scale: float) -> float:
    return 0.1 * scale * math.log(stretch) + 1.0 if stretch > 1 else 1.0
