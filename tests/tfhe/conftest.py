import numpy as np
import pytest

from cipherlm.schemes.tfhe.weights import AttentionWeights


def layer_norm(rows: np.ndarray) -> np.ndarray:
    return (rows - rows.mean(-1, keepdims=True)) / rows.std(-1, keepdims=True)


def random_layer(width: int, n_heads: int, seed: int = 0) -> AttentionWeights:
    rng = np.random.default_rng(seed)
    scale = 1.0 / np.sqrt(width)
    return AttentionWeights(
        rng.normal(0, scale, (width, 3 * width)),
        rng.normal(0, 0.1, 3 * width),
        rng.normal(0, scale, (width, width)),
        rng.normal(0, 0.1, width),
        n_heads,
    )


def random_rows(width: int, tokens: int, seed: int) -> np.ndarray:
    return layer_norm(np.random.default_rng(seed).normal(size=(tokens, width)))


def float_heads(weights: AttentionWeights, heads: list[int], x: np.ndarray) -> np.ndarray:
    """Causal softmax attention in floating point, the heads side by side."""
    outputs = []
    for head in heads:
        (wq, wk, wv), (bq, bk, bv) = weights.head(head)
        scores = (x @ wq + bq) @ (x @ wk + bk).T / np.sqrt(weights.head_dim)
        scores = np.where(np.tril(np.ones(scores.shape, dtype=bool)), scores, -np.inf)
        probabilities = np.exp(scores - scores.max(axis=1, keepdims=True))
        outputs.append(probabilities / probabilities.sum(axis=1, keepdims=True) @ (x @ wv + bv))
    return np.concatenate(outputs, axis=1)


@pytest.fixture(scope="session")
def small_layer() -> AttentionWeights:
    return random_layer(width=16, n_heads=4)


@pytest.fixture(scope="session")
def calibration() -> list[np.ndarray]:
    return [random_rows(16, 8, seed) for seed in range(100, 140)]
