"""A CKKS engine: Lattigo under Python.

Vectors of numbers are encrypted, computed on and decrypted. This package knows
ciphertexts and keys, not models. ``docs/engine.md`` introduces it.
"""

from __future__ import annotations

from .bootstrapping import Bootstrapper, BootstrappingKeys, bootstrappable
from .ciphertext import Ciphertext, Plaintext
from .errors import (
    CorruptDataError,
    EngineError,
    InsecureParametersError,
    InternalError,
    InvalidArgumentError,
    KeyMaterialError,
    LevelError,
    ParametersError,
    ScaleError,
)
from .evaluator import Evaluator, inner_sum_rotations
from .linear import LinearTransformation, folded, matrix_diagonals, paired, split_rotations
from .parameters import PRESETS, Parameters
from .polynomial import Chebyshev
from .public import EvaluationKeys, PublicKey
from .refresh import Held, RefreshMask, RefreshReply, RefreshRequest, Subring, wrap_probability
from .runtime import Memory, collect, memory, set_gc_percent, set_threads, threads
from .secret import SecretKey

__all__ = [
    "PRESETS",
    "Bootstrapper",
    "BootstrappingKeys",
    "Chebyshev",
    "Ciphertext",
    "CorruptDataError",
    "EngineError",
    "EvaluationKeys",
    "Evaluator",
    "Held",
    "InsecureParametersError",
    "InternalError",
    "InvalidArgumentError",
    "KeyMaterialError",
    "LevelError",
    "LinearTransformation",
    "Memory",
    "Parameters",
    "ParametersError",
    "Plaintext",
    "PublicKey",
    "RefreshMask",
    "RefreshReply",
    "RefreshRequest",
    "ScaleError",
    "SecretKey",
    "Subring",
    "bootstrappable",
    "collect",
    "folded",
    "inner_sum_rotations",
    "matrix_diagonals",
    "memory",
    "paired",
    "set_gc_percent",
    "set_threads",
    "split_rotations",
    "threads",
    "wrap_probability",
]
