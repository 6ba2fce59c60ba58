"""One attention layer, quantised: the parameters that calibration freezes and a circuit is compiled from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cipherlm.schemes.tfhe.calibration import calibrate_head, calibrate_projection
from cipherlm.schemes.tfhe.head import Precision, QuantizedHead, QuantizedProjection
from cipherlm.schemes.tfhe.lookup import Integers, Lookup, lookup, noisy_lookup
from cipherlm.schemes.tfhe.quantization import InputQuantizer, OutputDequantizer, check_bits
from cipherlm.schemes.tfhe.weights import AttentionWeights

__all__ = ["AttentionWeights", "QuantizedAttention", "check_heads"]

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]


def check_heads(heads: Sequence[int], n_heads: int) -> None:
    """Raise ``ValueError`` unless ``heads`` are distinct heads of a layer that has ``n_heads``."""
    if not heads:
        raise ValueError("heads is empty: name at least one head, or None for all of them")
    unknown = sorted({head for head in heads if not 0 <= head < n_heads})
    if unknown:
        raise ValueError(f"no head {unknown[0]}: the layer's heads are 0 to {n_heads - 1}")
    if len(set(heads)) != len(heads):
        raise ValueError(f"heads repeat: {list(heads)}")


@dataclass(frozen=True)
class QuantizedAttention:
    """A layer's chosen heads, quantised and frozen: what a circuit is compiled from.

    Calling it computes the quantised result in the clear, which the encrypted run reproduces up to the noise
    of its roundings.
    """

    heads: tuple[int, ...]
    quantizer: InputQuantizer
    quantized_heads: tuple[QuantizedHead, ...]
    projection: QuantizedProjection | None

    @property
    def n_bits(self) -> int:
        """Bits of inputs and weights."""
        return self.quantizer.n_bits

    @property
    def precision(self) -> Precision:
        """Bits of the lookups."""
        return Precision(self.n_bits)

    @property
    def project(self) -> bool:
        """Whether the output projection is part of the circuit."""
        return self.projection is not None

    @property
    def width(self) -> int:
        """The model's width."""
        return len(self.quantizer.channel_scale)

    @property
    def head_dim(self) -> int:
        """The width of one head."""
        return len(self.quantized_heads[0].rotation)

    @classmethod
    def calibrate(
        cls,
        weights: AttentionWeights,
        inputs: Sequence[NDArray[np.floating[Any]]],
        *,
        heads: Sequence[int] | None,
        n_bits: int,
    ) -> QuantizedAttention:
        """Choose every scale and range on ``inputs``, hidden states (tokens, width) of real sequences.

        ``heads`` are the heads to encrypt; ``None`` is all of them and the output projection too.

        Raises ``ValueError`` for bits or heads out of range and for calibration text without a sequence of
        at least two tokens.
        """
        check_bits(n_bits)
        chosen = tuple(range(weights.n_heads)) if heads is None else tuple(heads)
        check_heads(chosen, weights.n_heads)
        sequences = [np.asarray(rows, dtype=np.float64) for rows in inputs if len(rows) > 1]
        if not sequences:
            raise ValueError("calibration needs at least one sequence of two tokens or more")
        quantizer = InputQuantizer.calibrate(np.concatenate(sequences), n_bits)
        integers = [quantizer(rows) for rows in sequences]
        quantized = tuple(calibrate_head(weights, head, quantizer, integers) for head in chosen)
        projection = None
        if heads is None:
            projection = calibrate_projection(weights, chosen, quantized, n_bits, integers)
        return cls(chosen, quantizer, quantized, projection)

    def circuit(self, x: Integers, lookup: Lookup) -> Integers:
        """What is compiled: quantised inputs (tokens, width) to integers (tokens, outputs)."""
        results = [head(x, self.precision, lookup) for head in self.quantized_heads]
        joined = results[0] if len(results) == 1 else np.concatenate(tuple(results), axis=1)
        return joined if self.projection is None else self.projection(joined, self.precision, lookup)

    @property
    def dequantizer(self) -> OutputDequantizer:
        """What turns the circuit's integers (tokens, outputs) into the layer's real values."""
        if self.projection is not None:
            levels = float(1 << (self.precision.output - 1))
            return OutputDequantizer(self.projection.channel_range / levels, None)
        units = [float(head.output_unit) for head in self.quantized_heads]
        rotations = np.stack([head.rotation for head in self.quantized_heads])
        return OutputDequantizer(np.repeat(units, self.head_dim), rotations)

    def __call__(self, x: NDArray[np.floating[Any]]) -> Float64:
        """Quantise ``x`` (tokens, width) or (batch, tokens, width), attend in the clear, dequantise.

        Returns the chosen heads side by side, (..., tokens, heads * head_dim), or with the projection
        (..., tokens, width).
        """
        if x.ndim == 3:
            return np.stack([self(sequence) for sequence in x])
        return self.dequantizer(self.circuit(self.quantizer(x), lookup))

    def simulate(self, x: NDArray[np.floating[Any]], p_error: float, rng: np.random.Generator) -> Float64:
        """Like calling it, with the noise that ciphertexts may have at ``p_error`` in every lookup."""
        if x.ndim == 3:
            return np.stack([self.simulate(sequence, p_error, rng) for sequence in x])
        return self.dequantizer(self.circuit(self.quantizer(x), noisy_lookup(p_error, rng)))

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Return everything as named arrays, for safetensors."""
        arrays: dict[str, NDArray[Any]] = {
            "heads": np.array(self.heads, dtype=np.int64),
            "n_bits": np.array(self.n_bits, dtype=np.int64),
            "channel_scale": self.quantizer.channel_scale,
            "largest_norm": np.array(self.quantizer.largest_norm),
        }
        for index, head in zip(self.heads, self.quantized_heads, strict=True):
            arrays |= {f"head.{index}.{field.name}": getattr(head, field.name) for field in fields(head)}
        if self.projection is not None:
            for field in fields(self.projection):
                arrays[f"projection.{field.name}"] = getattr(self.projection, field.name)
        return {
            name: np.array(a, dtype=np.int32 if a.dtype.kind == "i" else np.float64, order="C")
            for name, a in arrays.items()
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> QuantizedAttention:
        """Rebuild what ``to_arrays`` returned; ``ValueError`` where an array is missing or misshapen."""

        def read(name: str) -> NDArray[Any]:
            if name not in arrays:
                raise ValueError(f"damaged quantisation parameters: {name!r} is missing")
            array = np.asarray(arrays[name])
            if not np.all(np.isfinite(array)):
                raise ValueError(f"damaged quantisation parameters: {name!r} is not finite")
            return array.astype(np.int64 if array.dtype.kind == "i" else np.float64)

        n_bits = int(read("n_bits"))
        check_bits(n_bits)
        heads = tuple(int(head) for head in np.atleast_1d(read("heads")))
        quantizer = InputQuantizer(n_bits, read("channel_scale"), float(read("largest_norm")))
        quantized = tuple(
            QuantizedHead(**{f.name: read(f"head.{head}.{f.name}") for f in fields(QuantizedHead)})
            for head in heads
        )
        projection = None
        if "projection.weight" in arrays:
            projection = QuantizedProjection(
                **{f.name: read(f"projection.{f.name}") for f in fields(QuantizedProjection)}
            )
        attention = cls(heads, quantizer, quantized, projection)
        attention._check_shapes()
        return attention

    def _check_shapes(self) -> None:
        """Raise ``ValueError`` unless every array has the shape that the width and the heads give it."""
        if not self.heads or self.quantized_heads[0].rotation.ndim != 2:
            raise ValueError("damaged quantisation parameters: no heads")
        width, head_dim = self.width, self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"rotation": (head_dim, head_dim)}
        shapes |= dict.fromkeys(("query_weight", "key_weight", "value_weight"), (width, head_dim))
        shapes |= {
            "first_weight": (width, head_dim),
            "score_query_weight": (width,),
            "score_key_weight": (width,),
        }
        shapes |= dict.fromkeys(("query_bias", "key_bias", "first_bias", "product_range"), (head_dim,))
        shapes |= dict.fromkeys(
            ("score_bias", "score_range", "value_range", "first_range", "output_unit"), ()
        )
        for index, head in zip(self.heads, self.quantized_heads, strict=True):
            for name, shape in shapes.items():
                if getattr(head, name).shape != shape:
                    raise ValueError(f"damaged quantisation parameters: head.{index}.{name} is not {shape}")
        if self.projection is not None and (
            self.projection.weight.shape != (len(self.heads) * head_dim, width)
            or self.projection.bias.shape != (width,)
            or self.projection.channel_range.shape != (width,)
        ):
            raise ValueError("damaged quantisation parameters: the projection has another shape")

    def fingerprint(self) -> str:
        """Return a hash of every parameter: equal circuits, equal fingerprints."""
        digest = hashlib.sha256()
        for name, array in sorted(self.to_arrays().items()):
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(array.tobytes())
        return digest.hexdigest()
