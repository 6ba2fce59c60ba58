"""Symmetric post-training quantisation: integers on the circuit's side, scales on the client's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cipherlm.schemes.tfhe.errors import TooManyTokensError

FloatArray = NDArray[np.floating[Any]]
IntArray = NDArray[np.int64]

MIN_BITS, MAX_BITS = 2, 8


def largest_level(n_bits: int) -> int:
    """Return the largest integer of a symmetric ``n_bits`` quantiser: 7 for 4 bits, so levels -7 to 7."""
    return (1 << (n_bits - 1)) - 1


def check_bits(n_bits: int) -> None:
    """Raise ``ValueError`` unless ``n_bits`` is an integer from 2 to 8."""
    if isinstance(n_bits, bool) or not isinstance(n_bits, (int, np.integer)):
        raise ValueError(f"n_bits must be an integer from {MIN_BITS} to {MAX_BITS}, not {n_bits!r}")
    if not MIN_BITS <= n_bits <= MAX_BITS:
        raise ValueError(f"n_bits must be from {MIN_BITS} to {MAX_BITS}, not {n_bits}")


def _best_scale(values: FloatArray, importance: FloatArray, n_bits: int) -> FloatArray:
    """Return, per column, the step with the least weighted squared error among 40 clipping points."""
    top = largest_level(n_bits)
    widest = np.maximum(np.abs(values).max(axis=0), 1e-12)
    best_error = np.full(values.shape[1], np.inf)
    best = widest / top
    for fraction in np.linspace(1.0, 0.35, 40):
        step = widest * fraction / top
        rounded = np.clip(np.rint(values / step), -top, top) * step
        error = (importance[:, None] * (values - rounded) ** 2).sum(axis=0)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        best = np.where(better, step, best)
    chosen: FloatArray = best
    return chosen


def quantize_weight(
    weight: FloatArray, gram: FloatArray, n_bits: int
) -> tuple[IntArray, NDArray[np.float64]]:
    """Quantise ``weight`` (inputs, outputs) with one scale per output channel.

    ``gram`` (inputs, inputs) is ``X.T @ X / tokens`` of the layer's inputs on calibration text. Inputs are
    rounded one after the other and the error of each is passed on to those not yet rounded, so that the
    layer's *output* keeps close (GPTQ, Frantar et al. 2022, algorithm 1, without its blocks).

    Returns the integers (inputs, outputs) and the scales (outputs,): ``weight`` is about integers * scales.
    """
    top = largest_level(n_bits)
    remaining = weight.astype(np.float64).copy()
    scale = _best_scale(remaining, np.diag(gram), n_bits)
    damping = 0.01 * float(np.mean(np.diag(gram))) + 1e-12
    inverse = np.linalg.inv(gram + damping * np.eye(len(gram)))
    passing_on = np.linalg.cholesky((inverse + inverse.T) / 2).T
    integers = np.zeros(weight.shape, dtype=np.int64)
    for row in np.arange(len(remaining)):
        integers[row] = np.clip(np.rint(remaining[row] / scale), -top, top)
        error = (remaining[row] - integers[row] * scale) / passing_on[row, row]
        remaining[row + 1 :] -= np.outer(passing_on[row, row + 1 :], error)
    return integers, scale


@dataclass(frozen=True)
class InputQuantizer:
    """The client's quantiser of hidden states: one step for the tensor, channels equalised before it.

    ``channel_scale`` (width,) is the root mean square of each channel on calibration text, times the
    tensor's step. Its inverse is folded into the weights (SmoothQuant, Xiao et al. 2023, section 4, with the
    whole difficulty migrated to the weights), so that small channels keep as many levels as large ones.

    ``largest_norm`` is the longest row of calibration text, in steps. A longer row is scaled back to it, so
    that no input drives the sums behind the quantiser far out of their calibrated ranges. What a layer norm
    puts out has one length, and is left alone.
    """

    n_bits: int
    channel_scale: NDArray[np.float64]
    largest_norm: float

    @classmethod
    def calibrate(cls, rows: FloatArray, n_bits: int) -> InputQuantizer:
        """Choose the scales on ``rows`` (tokens, width) of real hidden states."""
        spread = np.sqrt((rows.astype(np.float64) ** 2).mean(axis=0))
        spread = np.maximum(spread, 1e-6 * max(float(spread.max()), 1e-9))
        step = _best_scale((rows / spread).reshape(-1, 1), np.ones(rows.size), n_bits)[0]
        scale = spread * step
        return cls(n_bits, scale, float(np.linalg.norm(rows / scale, axis=1).max()))

    def __call__(self, rows: FloatArray) -> IntArray:
        """Quantise ``rows`` (..., width); what lies outside the range saturates."""
        top = largest_level(self.n_bits)
        limit = 1e6 * top  # keeps infinities out of the norm
        scaled = np.nan_to_num(rows / self.channel_scale, nan=0.0, posinf=limit, neginf=-limit)
        norm = np.linalg.norm(scaled, axis=-1, keepdims=True)
        scaled = scaled * np.minimum(1.0, self.largest_norm / np.maximum(norm, 1e-300))
        levels: IntArray = np.clip(np.rint(scaled), -top, top).astype(np.int64)
        return levels

    def padded(self, rows: FloatArray, tokens: int) -> IntArray:
        """Quantise ``rows`` (t, width), t at most ``tokens``, and put zeros behind, up to ``tokens`` rows.

        Raises ``TooManyTokensError``. Causality keeps the zeros out of the rows before them.
        """
        if len(rows) > tokens:
            raise TooManyTokensError(len(rows), tokens)
        return np.concatenate([self(rows), np.zeros((tokens - len(rows), rows.shape[1]), dtype=np.int64)])

    def dequantize(self, integers: IntArray) -> NDArray[np.float64]:
        """Return the real values that ``integers`` (..., width) stand for."""
        values: NDArray[np.float64] = integers * self.channel_scale
        return values


@dataclass(frozen=True)
class OutputDequantizer:
    """The client's reading of a circuit's result. Nothing in it comes from the layer's weights but ranges.

    ``scale`` (outputs,) is the step of each output channel. ``rotations`` (heads, head_dim, head_dim), where
    the result is heads and not their projection, undoes the random rotation of each head's values.
    """

    scale: NDArray[np.float64]
    rotations: NDArray[np.float64] | None

    def __call__(self, integers: IntArray) -> NDArray[np.float64]:
        """Turn the circuit's integers (..., outputs) into the layer's real values."""
        values: NDArray[np.float64] = integers * self.scale
        if self.rotations is None:
            return values
        parts = np.split(values, len(self.rotations), axis=-1)
        return np.concatenate(
            [part @ rotation.T for part, rotation in zip(parts, self.rotations, strict=True)], axis=-1
        )
