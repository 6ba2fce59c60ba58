"""Choosing a head's integer weights and table ranges on real hidden states, once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cipherlm.schemes.tfhe.head import Precision, QuantizedHead, QuantizedProjection
from cipherlm.schemes.tfhe.lookup import FULL_SCALE, lookup
from cipherlm.schemes.tfhe.quantization import InputQuantizer, quantize_weight
from cipherlm.schemes.tfhe.weights import AttentionWeights

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

RANGE_QUANTILE = 0.9995
"""Share of calibration values inside a table's range. The rest saturates; a wider range costs resolution."""

MARGIN = 1.25
"""Headroom over the largest value seen, where leaving the range costs more than resolution: scores, whose
largest carry the softmax and whose least must not leave the exponential's flat end, and the first token's
values, which calibration sees only once a sequence."""


def calibrate_head(
    weights: AttentionWeights, head: int, quantizer: InputQuantizer, sequences: Sequence[Int64]
) -> QuantizedHead:
    """Quantise one head on ``sequences``: quantised hidden states (tokens, width), two tokens or more."""
    n_bits = quantizer.n_bits
    weight, bias = weights.head(head)
    weight = weight * quantizer.channel_scale[:, None]  # acts on the quantiser's integers
    head_dim = weights.head_dim
    rows = np.concatenate(sequences).astype(np.float64)
    gram = rows.T @ rows / len(rows)

    def quantized(matrix: Float64) -> Float64:
        integers, scale = quantize_weight(matrix, gram, n_bits)
        return integers * scale

    later = np.concatenate([tokens[1:] for tokens in sequences])
    relative = np.concatenate([tokens[1:] - tokens[0] for tokens in sequences])

    query = later @ weight[0] + bias[0]
    key = relative @ weight[1] / np.sqrt(head_dim)
    query_basis, key_basis = _balancing_bases(np.cov(query.T), np.cov(key.T), seed=2 * head)
    query_weight = quantized(weight[0] @ query_basis)
    query_bias = bias[0] @ query_basis
    key_weight = quantized(weight[1] / np.sqrt(head_dim) @ key_basis)
    query_mean = (later @ query_weight).mean(axis=0) + query_bias
    key_mean = (relative @ key_weight).mean(axis=0)

    sums, scores = [], []
    for tokens in sequences:
        queries = tokens[1:] @ query_weight + query_bias
        keys = (tokens[1:] - tokens[0]) @ key_weight
        causal = np.tril_indices(len(tokens) - 1)
        sums.append((queries - query_mean)[causal[0]] + (keys - key_mean)[causal[1]])
        scores.append(queries @ keys.T)
    product_range = np.quantile(np.abs(np.concatenate(sums)), RANGE_QUANTILE, axis=0)
    score_range, probabilities = _score_range(scores)
    # A single square has to fit the accumulator too: with few dimensions it needs more room than scores.
    score_range = max(score_range, float(product_range.max()) ** 2 / 2)

    rotation = _random_rotation(head_dim, seed=2 * head + 1)
    value_weight = quantized(weight[2] @ rotation)
    value_bias = bias[2] @ rotation
    value_range = 2.0 * float(np.quantile(np.abs(relative @ value_weight), RANGE_QUANTILE))
    first_values = np.stack([tokens[0] for tokens in sequences]) @ value_weight + value_bias
    first_range = MARGIN * float(np.abs(first_values).max())
    outputs = [
        first + probability @ ((tokens[1:] - tokens[0]) @ value_weight)
        for tokens, first, probability in zip(sequences, first_values, probabilities, strict=True)
    ]
    largest = max(first_range, float(np.abs(np.concatenate(outputs)).max()))

    def integers(values: Float64, full: Float64 | float) -> Int64:
        scaled: Int64 = np.rint(values / full * FULL_SCALE).astype(np.int64)
        return scaled

    return QuantizedHead(
        query_weight=integers(query_weight, product_range),
        query_bias=integers(query_bias - query_mean, product_range),
        key_weight=integers(key_weight, product_range),
        key_bias=integers(-key_mean, product_range),
        score_query_weight=integers(query_weight @ key_mean, score_range),
        score_key_weight=integers(key_weight @ query_mean, score_range),
        score_bias=integers(np.asarray((query_bias - query_mean) @ key_mean), score_range),
        value_weight=integers(value_weight, value_range),
        first_weight=integers(value_weight, first_range),
        first_bias=integers(value_bias, first_range),
        product_range=product_range,
        score_range=np.array(score_range),
        value_range=np.array(value_range),
        first_range=np.array(first_range),
        output_unit=np.array(largest / (1 << (Precision(n_bits).output - 1))),
        rotation=rotation,
    )


def calibrate_projection(
    weights: AttentionWeights,
    heads: Sequence[int],
    quantized: Sequence[QuantizedHead],
    n_bits: int,
    sequences: Sequence[Int64],
) -> QuantizedProjection:
    """Quantise the output projection behind ``heads``, with their rotations and units folded into it."""
    precision = Precision(n_bits)
    rows = np.concatenate(
        [
            np.concatenate([head(tokens, precision, lookup) for head in quantized], axis=1)
            for tokens in sequences
        ]
    ).astype(np.float64)
    by_head = weights.projection_weight.reshape(weights.n_heads, weights.head_dim, weights.width)
    folded = np.concatenate(
        [
            float(head.output_unit) * head.rotation.T @ by_head[index]
            for index, head in zip(heads, quantized, strict=True)
        ]
    )
    integers, scale = quantize_weight(folded, rows.T @ rows / len(rows), n_bits)
    weight = integers * scale
    largest = np.abs(rows @ weight + weights.projection_bias).max(axis=0)
    channel_range = MARGIN * np.maximum(largest, 1e-6 * float(largest.max()))
    return QuantizedProjection(
        weight=np.rint(weight / channel_range * FULL_SCALE).astype(np.int64),
        bias=np.rint(weights.projection_bias / channel_range * FULL_SCALE).astype(np.int64),
        channel_range=channel_range,
    )


def _score_range(scores: Sequence[Float64]) -> tuple[float, list[Float64]]:
    """Return the reach that scores, log-sums and differences need, and each sequence's probabilities."""
    reach = 1.0
    probabilities = []
    for score in scores:
        causal = np.tril(np.ones(score.shape, dtype=bool))
        masked = np.where(causal, score, -np.inf)
        running = np.logaddexp.accumulate(np.hstack([np.zeros((len(score), 1)), masked]), axis=1)
        steps = np.where(causal, score - running[:, :-1], 0.0)
        below = np.where(causal, running[:, -1:] - score, 0.0)
        reach = max(reach, np.abs(score[causal]).max(), np.abs(steps).max(), running.max(), below.max() / 2)
        probabilities.append(np.exp(masked - running[:, -1:]))
    return MARGIN * float(reach), probabilities


def _balancing_bases(query: Float64, key: Float64, seed: int) -> tuple[Float64, Float64]:
    """Return bases ``A``, ``B`` with ``A @ B.T = I`` in which query and key have one, even, covariance.

    ``X = Q^(-1/2) (Q^(1/2) K Q^(1/2))^(1/2) Q^(-1/2)`` solves ``X Q X = K``, so ``X^(1/2)`` and its inverse
    transpose make the covariances equal; a random rotation then spreads them evenly over the coordinates.
    """
    size = len(query)
    query = query + np.eye(size) * 1e-4 * np.trace(query) / size
    key = key + np.eye(size) * 1e-4 * np.trace(key) / size
    root, inverse_root = _power(query, 0.5), _power(query, -0.5)
    solution = inverse_root @ _power(root @ key @ root, 0.5) @ inverse_root
    rotation = _random_rotation(size, seed)
    return _power(solution, 0.5) @ rotation, _power(solution, -0.5) @ rotation


def _power(matrix: Float64, exponent: float) -> Float64:
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    powered: Float64 = (vectors * np.maximum(values, 1e-12 * values.max()) ** exponent) @ vectors.T
    return powered


def _random_rotation(size: int, seed: int) -> Float64:
    matrix = np.random.default_rng(seed).standard_normal((size, size))
    orthogonal, triangle = np.linalg.qr(matrix)
    rotation: Float64 = orthogonal * np.sign(np.diag(triangle))
    return rotation
