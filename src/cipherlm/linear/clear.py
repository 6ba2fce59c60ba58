"""Products with NumPy: the arithmetic of the clear model."""

from collections.abc import Mapping

import numpy as np

from cipherlm.linear.products import Float32, Float64


class ClearProducts:
    """Multiplies by the weights of groups in single precision, with no encryption."""

    def __init__(self, weights: Mapping[str, Float32]) -> None:
        self._weights = weights

    def product(self, group: str, x: Float64, *, transposed: bool = False) -> Float64:
        """Return x @ W.T, or x @ W, as ``Products`` says."""
        matrix = self._weights[group]
        result: Float64 = (x.astype(np.float32) @ (matrix if transposed else matrix.T)).astype(np.float64)
        return result
