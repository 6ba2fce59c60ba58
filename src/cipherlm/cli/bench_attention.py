"""Measure one encrypted attention layer: compile, generate keys, encrypt, execute, decrypt.

Nothing comes from the cache. Value ranges are taken from other inputs than the one that is measured. Errors
are against the same heads in floating point, differences against the quantised result in the clear.
"""

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cipherlm.cli import CommandError, UsageError, bench_ckks
from cipherlm.cli.common import (
    SCHEME_OPTIONS,
    add_json_option,
    add_noise_option,
    existing_file,
    heads_argument,
    positive_integer,
)
from cipherlm.models.config import DEFAULT_BITS
from cipherlm.progress import TerminalProgress

if TYPE_CHECKING:
    from cipherlm.schemes.tfhe.attention import AttentionWeights

EXAMPLES = """\
examples:
  cipherlm bench attention --scheme tfhe --geometry gpt2 --tokens 6 --heads 1 --n-bits 4 --json
  cipherlm bench attention --geometry gpt2 --tokens 8 --json
  cipherlm bench attention --scheme tfhe --geometry tiny --tokens 8 --heads all --n-bits 7
  cipherlm bench attention --weights model.safetensors --block 3
"""

Float64 = NDArray[np.float64]

WEIGHT_STD = 0.045
"""Standard deviation of GPT-2's query and key weights, with the gain of the LayerNorm before them: with it,
scores spread as they do in the trained model."""

EMBEDDING_STD = 0.13
"""Of GPT-2's token embeddings."""

LAYER_NORM_EPSILON = 1e-5
CALIBRATION_SEQUENCES = 32

PBS_BITS = 8
PBS_BATCH = 16
PBS_P_ERROR = 1e-5
"""Of the yardstick: fixed, so that it depends on the machine alone."""


TFHE_ONLY: dict[str, Any] = {
    "n_bits": None,
    "p_error": None,
    "pbs": 0,
    "pbs_per_bit_width": {},
    "max_bit_width": None,
    "max_abs_difference": None,
    "mean_abs_difference": None,
    "quantized_mean_abs_error": None,
    "pbs_8bit_seconds": None,
}
"""What CKKS has none of: figures of table lookups and of quantisation."""


@dataclass(frozen=True)
class Geometry:
    """The shape of an attention layer."""

    width: int
    n_heads: int


GEOMETRIES = {"gpt2": Geometry(768, 12), "tiny": Geometry(128, 4)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmark's arguments."""
    parser.add_argument(
        "--scheme",
        choices=("tfhe", "ckks"),
        default=argparse.SUPPRESS,
        help="ckks: the whole layer (default); tfhe: heads, quantised (default where an option of its own or "
        "fewer than all heads are given)",
    )
    parser.add_argument("--geometry", choices=tuple(GEOMETRIES), default="gpt2", help="shape (default: gpt2)")
    parser.add_argument(
        "--tokens", type=positive_integer, default=6, metavar="N", help="positions (default: 6)"
    )
    parser.add_argument(
        "--heads",
        type=_count_of_heads,
        default=argparse.SUPPRESS,
        metavar="K",
        help='how many heads; "all", or as many as there are, is the whole layer with its output projection '
        "(default: all; 1 with --scheme tfhe)",
    )
    parser.add_argument(
        "--n-bits",
        type=int,
        default=argparse.SUPPRESS,
        metavar="B",
        help=f"with TFHE, bits, 2 to 8 (default: {DEFAULT_BITS})",
    )
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="safetensors of one attention layer and its ln_1, or of a whole GPT-2 (default: random weights)",
    )
    parser.add_argument(
        "--block",
        type=int,
        metavar="I",
        help="the block of --weights, where that file has several (default: 0)",
    )
    parser.add_argument(
        "--wpe", metavar="FILE", help="safetensors with position embeddings, for inputs like those of block 0"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="of random weights and inputs (default: 0)"
    )
    add_noise_option(parser)
    add_json_option(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, and return the figures."""
    if options.weights is None and (options.block is not None or options.wpe is not None):
        raise UsageError("--block and --wpe belong to --weights")
    geometry = GEOMETRIES[options.geometry]
    options.scheme = _scheme(options, geometry)
    heads = _heads(options, geometry)
    rng = np.random.default_rng(options.seed)
    layer = (
        _random_layer(geometry, rng)
        if options.weights is None
        else _read_layer(options.weights, options.block or 0, options.wpe, geometry, options.tokens)
    )
    calibration = [layer.inputs(rng, options.tokens) for _ in range(CALIBRATION_SEQUENCES)]
    measured = _MEASURES[options.scheme](
        options, layer.weights, calibration, layer.inputs(rng, options.tokens), heads
    )
    return {
        "scheme": options.scheme,
        "geometry": options.geometry,
        "tokens": options.tokens,
        "heads": geometry.n_heads if heads is None else len(heads),
        "projection": heads is None,
        "weights": "random" if options.weights is None else Path(options.weights).name,
        **measured,
    }


def _measure_ckks(
    options: argparse.Namespace,
    weights: "AttentionWeights",
    calibration: list[Float64],
    x: Float64,
    heads: list[int] | None,
) -> dict[str, Any]:
    return {**TFHE_ONLY, **bench_ckks.attention(weights, calibration, x)}


def _measure_tfhe(
    options: argparse.Namespace,
    weights: "AttentionWeights",
    calibration: list[Float64],
    x: Float64,
    heads: list[int] | None,
) -> dict[str, Any]:
    from cipherlm.schemes.tfhe.attention import QuantizedAttention
    from cipherlm.schemes.tfhe.circuit import DEFAULT_P_ERROR, AttentionCircuit

    progress = TerminalProgress()
    n_bits = getattr(options, "n_bits", DEFAULT_BITS)
    attention = QuantizedAttention.calibrate(weights, calibration, heads=heads, n_bits=n_bits)
    p_error = getattr(options, "p_error", DEFAULT_P_ERROR)

    start = time.perf_counter()
    circuit = AttentionCircuit.compile(
        attention,
        options.tokens,
        p_error=p_error,
        cache_dir=None,
        progress=progress,
    )
    compile_seconds = time.perf_counter() - start
    keygen_seconds = circuit.keygen(force=True)
    decrypted = circuit.execute(x)
    report = circuit.last_run
    assert report is not None  # execute() has just written it
    peak_memory = peak_memory_bytes()  # before the yardstick, whose keys are large too
    with progress("measuring one 8-bit table lookup"):
        pbs_seconds = measure_pbs()

    quantized = attention(x)
    exact = float_attention(weights, x, heads)
    error, difference = np.abs(decrypted - exact), np.abs(decrypted - quantized)
    figures = circuit.statistics
    return {
        "n_bits": n_bits,
        "p_error": p_error,
        "compile_seconds": compile_seconds,
        "keygen_seconds": keygen_seconds,
        "encrypt_seconds": report.encrypt_seconds,
        "execute_seconds": report.execute_seconds,
        "decrypt_seconds": report.decrypt_seconds,
        "pbs": figures.pbs,
        "pbs_per_bit_width": {str(bits): count for bits, count in figures.pbs_per_bit_width.items()},
        "max_bit_width": figures.max_bit_width,
        "evaluation_key_bytes": circuit.evaluation_key_bytes,
        "evaluation_key_bytes_in_memory": figures.evaluation_key_bytes_in_memory,
        "ciphertext_bytes": report.ciphertext_bytes_in + report.ciphertext_bytes_out,
        "ciphertext_bytes_in": report.ciphertext_bytes_in,
        "ciphertext_bytes_out": report.ciphertext_bytes_out,
        "peak_memory_bytes": peak_memory,
        "max_abs_error": float(error.max()),
        "mean_abs_error": float(error.mean()),
        "max_abs_output": float(np.abs(exact).max()),
        "max_abs_difference": float(difference.max()),
        "mean_abs_difference": float(difference.mean()),
        "quantized_mean_abs_error": float(np.abs(quantized - exact).mean()),
        "pbs_8bit_seconds": pbs_seconds,
    }


_MEASURES = {"ckks": _measure_ckks, "tfhe": _measure_tfhe}


def float_attention(weights: "AttentionWeights", x: Float64, heads: Sequence[int] | None) -> Float64:
    """Return what a GPT-2 layer gives for ``x`` (tokens, width): some heads, or all and the projection."""
    width, head_dim = weights.width, weights.head_dim
    qkv = (x @ weights.qkv_weight + weights.qkv_bias).reshape(len(x), 3, width // head_dim, head_dim)
    query, key, value = qkv.transpose(1, 2, 0, 3)
    scores = query @ key.transpose(0, 2, 1) / np.sqrt(head_dim)
    scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
    mixed = np.exp(scores - scores.max(axis=-1, keepdims=True))
    mixed = mixed / mixed.sum(axis=-1, keepdims=True) @ value
    chosen = mixed if heads is None else mixed[list(heads)]
    together: Float64 = chosen.transpose(1, 0, 2).reshape(len(x), -1)
    return together @ weights.projection_weight + weights.projection_bias if heads is None else together


def measure_pbs() -> float:
    """Return the seconds of one 8-bit table lookup on encrypted values, a batch on all cores.

    A yardstick of the machine: what circuits take on another one follows from it.
    """
    from concrete import fhe

    # A table and not a lambda, which Concrete would recognise as the identity and leave out.
    table = fhe.LookupTable(list(range(2**PBS_BITS)))
    configuration = fhe.Configuration(p_error=PBS_P_ERROR)
    values = np.arange(PBS_BATCH, dtype=np.int64) * (2**PBS_BITS // PBS_BATCH)
    inputs = [values, np.full(PBS_BATCH, 2**PBS_BITS - 1)]
    circuit = fhe.Compiler(lambda x: table[x], {"x": "encrypted"}).compile(inputs, configuration)
    circuit.keygen()
    encrypted = circuit.encrypt(values)
    seconds = []
    for _ in range(4):  # the first also loads the keys
        start = time.perf_counter()
        result = circuit.run(encrypted)
        seconds.append(time.perf_counter() - start)
    if not np.array_equal(circuit.decrypt(result), values):
        raise CommandError("the yardstick's table lookups came out wrong: is this machine's Concrete sound?")
    return statistics.median(seconds[1:]) / PBS_BATCH


def peak_memory_bytes() -> int:
    """Return the most memory that this process has held."""
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass(frozen=True)
class _Layer:
    """Weights, and the LayerNorm and position embeddings that their inputs went through."""

    weights: "AttentionWeights"
    gain: Float64
    bias: Float64
    positions: Float64 | None = None

    def inputs(self, rng: np.random.Generator, tokens: int) -> Float64:
        """Return the layer's input (tokens, width) for random hidden states."""
        hidden = rng.standard_normal((tokens, self.weights.width))
        if self.positions is not None:
            hidden = EMBEDDING_STD * hidden + self.positions[:tokens]
        centred = hidden - hidden.mean(axis=-1, keepdims=True)
        normal = centred / np.sqrt(np.mean(centred**2, axis=-1, keepdims=True) + LAYER_NORM_EPSILON)
        scaled: Float64 = normal * self.gain + self.bias
        return scaled


def _random_layer(geometry: Geometry, rng: np.random.Generator) -> _Layer:
    from cipherlm.schemes.tfhe.attention import AttentionWeights

    width = geometry.width
    # In a narrower model weights are larger, so that queries and keys come out alike.
    std = WEIGHT_STD * np.sqrt(GEOMETRIES["gpt2"].width / width)
    weights = AttentionWeights(
        qkv_weight=std * rng.standard_normal((width, 3 * width)),
        qkv_bias=std * rng.standard_normal(3 * width),
        projection_weight=std * rng.standard_normal((width, width)),
        projection_bias=std * rng.standard_normal(width),
        n_heads=geometry.n_heads,
    )
    return _Layer(weights, np.ones(width), np.zeros(width))


def _read_layer(path: str, block: int, wpe: str | None, geometry: Geometry, tokens: int) -> _Layer:
    from cipherlm.schemes.tfhe.attention import AttentionWeights

    width = geometry.width
    prefixes = (f"h.{block}.", f"transformer.h.{block}.", "")
    shapes = {
        "attn.c_attn.weight": (width, 3 * width),
        "attn.c_attn.bias": (3 * width,),
        "attn.c_proj.weight": (width, width),
        "attn.c_proj.bias": (width,),
        "ln_1.weight": (width,),
        "ln_1.bias": (width,),
    }
    tensors = _read_tensors(path, shapes, prefixes)
    positions = None
    if wpe is not None:
        positions = _read_tensors(wpe, {"wpe.weight": None}, ("", "transformer."))["wpe.weight"]
        if positions.ndim != 2 or positions.shape[0] < tokens or positions.shape[1] != width:
            raise CommandError(
                f"{wpe}: position embeddings of shape {positions.shape}, not ({tokens} or more, {width})"
            )
    weights = AttentionWeights(
        qkv_weight=tensors["attn.c_attn.weight"],
        qkv_bias=tensors["attn.c_attn.bias"],
        projection_weight=tensors["attn.c_proj.weight"],
        projection_bias=tensors["attn.c_proj.bias"],
        n_heads=geometry.n_heads,
    )
    return _Layer(weights, tensors["ln_1.weight"], tensors["ln_1.bias"], positions)


def _read_tensors(
    path: str, shapes: Mapping[str, tuple[int, ...] | None], prefixes: Sequence[str]
) -> dict[str, Float64]:
    """Read tensors by name, behind the first prefix that the file uses."""
    from safetensors import SafetensorError, safe_open

    existing_file(path)
    try:
        with safe_open(path, framework="numpy") as file:
            names = set(file.keys())
            prefix = next((p for p in prefixes if all(p + name in names for name in shapes)), None)
            if prefix is None:
                raise CommandError(f"{path} lacks one of {', '.join(shapes)}")
            tensors = {name: file.get_tensor(prefix + name).astype(np.float64) for name in shapes}
    except SafetensorError as error:
        raise CommandError(f"{path} is not a safetensors file, or damaged: {error}") from error
    for name, shape in shapes.items():
        if shape is not None and tensors[name].shape != shape:
            raise CommandError(f"{path}: {name} has the shape {tensors[name].shape}, not {shape}")
    return tensors


def _scheme(options: argparse.Namespace, geometry: Geometry) -> str:
    """Return the scheme: that of the options, or TFHE for what only it can do, and CKKS otherwise."""
    own = [name for name in ("n_bits", "p_error") if hasattr(options, name)]
    some = getattr(options, "heads", None) not in (None, geometry.n_heads)
    scheme: str = getattr(options, "scheme", None) or ("tfhe" if own or some else "ckks")
    if own and own[0] not in SCHEME_OPTIONS[scheme].names:
        raise UsageError(f"--{own[0].replace('_', '-')} belongs to --scheme tfhe")
    return scheme


def _heads(options: argparse.Namespace, geometry: Geometry) -> list[int] | None:
    """Return the heads to encrypt, or None for the whole layer."""
    some = "heads" in SCHEME_OPTIONS[options.scheme].names
    count = getattr(options, "heads", 1 if some else None)
    if count is None or count == geometry.n_heads:
        return None
    if count > geometry.n_heads:
        raise CommandError(f"{options.geometry} has {geometry.n_heads} heads, not {count}")
    if not some:
        raise UsageError(f"--scheme {options.scheme} encrypts the whole layer: --heads all")
    return list(range(count))


def _count_of_heads(text: str) -> int | None:
    if heads_argument(text) is None:
        return None
    return positive_integer(text)
