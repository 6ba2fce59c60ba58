"""The activations of GPT-2's MLPs, by the names that transformers has for them."""

from __future__ import annotations

from typing import Any

from cipherlm.schemes.ckks.approximation import Function, gelu_new
from cipherlm.schemes.ckks.calibration import Float64

DEFAULT_ACTIVATION = "gelu_new"
"""That of GPT-2 itself."""

_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate")
"""Four names of one function."""

_OTHERS = (
    *("gelu", "gelu_10", "gelu_fast", "gelu_python", "hardswish", "laplace", "leaky_relu", "linear", "mish"),
    *("quick_gelu", "relu", "relu2", "relu6", "sigmoid", "silu", "sqrtsoftplus", "swish", "tanh"),
)
"""All else that transformers has, as far as it is one fixed function of each value."""

ACTIVATIONS = tuple(sorted((*_TANH_GELU, *_OTHERS)))
"""What can be computed on ciphertexts."""


def activation(name: Any) -> Function:
    """Return an activation on clear numbers, in double precision, for a polynomial to be fitted to.

    Raises ``ValueError``, with the list of those that there are, for any other.
    """
    if name not in ACTIVATIONS:
        raise ValueError(
            f"the activation {name!r} cannot be computed on ciphertexts; these can: {', '.join(ACTIVATIONS)}"
        )
    if name in _TANH_GELU:
        return gelu_new

    import torch
    from transformers.activations import ACT2FN

    function = ACT2FN[name]

    def evaluate(x: Float64) -> Float64:
        with torch.inference_mode():
            values: Float64 = function(torch.from_numpy(x)).numpy()
        return values

    return evaluate
