"""Compiling a quantised attention to TFHE with Concrete, and running it on real ciphertexts.

Compiled circuits and keys are kept on disk, one folder a circuit, named by a hash of all that they depend on.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import platformdirs
from numpy.typing import NDArray

from cipherlm.exclusive import exclusive
from cipherlm.progress import silent
from cipherlm.schemes.tfhe.attention import QuantizedAttention
from cipherlm.schemes.tfhe.client import ClientCircuit
from cipherlm.schemes.tfhe.description import CircuitDescription, find_layouts
from cipherlm.schemes.tfhe.errors import (
    DamagedCacheError,
    NoParametersError,
    TfheError,
    TooManyTokensError,
)
from cipherlm.schemes.tfhe.files import sha256_of, write_private
from cipherlm.schemes.tfhe.library import concrete_version, import_concrete, load_server, machine
from cipherlm.schemes.tfhe.lookup import ACCUMULATOR_BITS, traced_lookup
from cipherlm.schemes.tfhe.quantization import largest_level
from cipherlm.schemes.tfhe.server import ServerCircuit

DEFAULT_P_ERROR = 0.01
"""Probability that the noise moves one lookup's input by more than half a cell, to the neighbouring cell.

Lookups round approximately anyway, and the tables are smooth: the neighbouring cell holds a close value. The
noise that this default allows has a standard deviation of a fifth of a cell, less than the rounding's own.
"""

_FORMAT = 1

Progress = Callable[[str], AbstractContextManager[None]]
Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class CircuitStatistics:
    """What a compiled circuit costs."""

    tokens: int
    pbs: int
    max_bit_width: int
    pbs_per_bit_width: dict[int, int]
    accumulator_bits: int
    parameter_sets: list[dict[str, int]]
    evaluation_key_bytes_in_memory: int
    ciphertext_bytes_in: int
    ciphertext_bytes_out: int
    p_error: float
    complexity: float
    compile_seconds: float
    concrete_version: str

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CircuitStatistics:
        """Read what ``to_dict`` wrote."""
        widths = {int(bits): int(count) for bits, count in values["pbs_per_bit_width"].items()}
        return cls(**{**values, "pbs_per_bit_width": widths})


@dataclass
class RunReport:
    """Seconds of the last encrypted run, and the bytes that would travel."""

    encrypt_seconds: float
    execute_seconds: float
    decrypt_seconds: float
    ciphertext_bytes_in: int
    ciphertext_bytes_out: int


@dataclass
class AttentionCircuit:
    """A compiled attention layer: ``keygen`` once, then ``execute`` on real ciphertexts."""

    attention: QuantizedAttention
    tokens: int
    statistics: CircuitStatistics
    folder: Path | None
    from_cache: bool
    progress: Progress = field(default=silent, repr=False)
    last_run: RunReport | None = None
    keygen_seconds: float | None = None
    evaluation_key_bytes: int | None = None
    _server: Any = field(default=None, repr=False)
    _client: Any = field(default=None, repr=False)
    _evaluation_keys: Any = field(default=None, repr=False)
    _rng: np.random.Generator = field(default_factory=np.random.default_rng, repr=False)

    @classmethod
    def compile(
        cls,
        attention: QuantizedAttention,
        tokens: int,
        *,
        p_error: float = DEFAULT_P_ERROR,
        cache_dir: Path | bool | None = True,
        progress: Progress = silent,
    ) -> AttentionCircuit:
        """Compile ``attention`` for up to ``tokens`` tokens, or read the compiled circuit from the cache.

        Of processes that want the same circuit at once, one compiles it and the others wait. ``cache_dir`` is
        a folder, ``True`` for the user's cache directory or ``None`` for no cache.

        Raises ``MissingSchemeError`` without Concrete, ``NoParametersError`` where no secure parameters
        exist for it, ``DamagedCacheError`` for a cached circuit that is not what was written.
        """
        fhe = import_concrete()
        if tokens < 1:
            raise ValueError(f"tokens must be at least 1, not {tokens}")
        if not 0.0 < p_error < 0.5:
            raise ValueError(f"p_error must lie between 0 and 0.5, not {p_error}")
        version = concrete_version()
        folder = _circuit_folder(cache_dir, attention, tokens, p_error, version)
        with _alone(folder, progress):
            if folder is not None and (folder / "circuit.json").exists():
                server, statistics = _load(folder)
                return cls(
                    attention, tokens, statistics, folder, True, progress,
                    _server=server, _client=fhe.Client(server.client_specs),
                )  # fmt: skip
            start = time.perf_counter()
            with progress("compiling"):
                circuit = _compile(fhe, attention, tokens, p_error)
            seconds = time.perf_counter() - start
            statistics = _statistics(circuit, attention, tokens, p_error, seconds, version)
            if folder is not None:
                _save(circuit.server, statistics, folder)
        return cls(
            attention, tokens, statistics, folder, False, progress,
            _server=circuit.server, _client=circuit.client,
        )  # fmt: skip

    @property
    def keys_ready(self) -> bool:
        """Whether ``execute`` has keys to run with."""
        return self._evaluation_keys is not None

    def keygen(self, *, force: bool = False) -> float:
        """Generate keys, or read them from the cache; return the seconds it took.

        Cached keys include the secret key: the file is readable by its owner only.
        """
        start = time.perf_counter()
        path = None if self.folder is None else self.folder / "keys"
        with _alone(self.folder, self.progress):
            if path is not None and path.exists() and not force:
                with self.progress("loading keys"):
                    self._client.keys.load_from_bytes(_read_checked(path))
            else:
                with self.progress("generating keys"):
                    self._client.keygen(force=True)
                if path is not None:
                    serialized = self._client.keys.serialize()
                    write_private(path, hashlib.sha256(serialized).digest() + serialized)
        self._evaluation_keys = self._client.evaluation_keys
        self.evaluation_key_bytes = len(self._evaluation_keys.serialize())
        self.keygen_seconds = time.perf_counter() - start
        return self.keygen_seconds

    def execute(self, x: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """Quantise, encrypt, run on ciphertexts, decrypt: (t, width) to (t, outputs), t at most ``tokens``.

        Shorter inputs are padded with zeros behind; causality keeps those out of the rows that are returned.
        """
        if not self.keys_ready:
            self.keygen()
        padded = self.attention.quantizer.padded(x, self.tokens)
        start = time.perf_counter()
        encrypted = self._client.encrypt(padded)
        encrypted_at = time.perf_counter()
        with self.progress("running on ciphertexts"):
            result = self._server.run(encrypted, evaluation_keys=self._evaluation_keys)
        executed_at = time.perf_counter()
        integers = np.asarray(self._client.decrypt(result), dtype=np.int64)
        self.last_run = RunReport(
            encrypted_at - start,
            executed_at - encrypted_at,
            time.perf_counter() - executed_at,
            len(encrypted.serialize()),
            len(result.serialize()),
        )
        return self.attention.dequantizer(integers)[: len(x)]

    def simulate(self, x: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """Compute in the clear what ``execute`` does, with simulated noise as wide as ``p_error`` allows."""
        if len(x) > self.tokens:
            raise TooManyTokensError(len(x), self.tokens)
        return self.attention.simulate(x, self.statistics.p_error, self._rng)

    @property
    def fingerprint(self) -> str:
        """A hash of the layer's parameters, the length and the cryptographic parameters.

        Circuits with the same one take each other's keys.
        """
        parts = [
            _FORMAT,
            self.attention.fingerprint(),
            self.tokens,
            self.statistics.p_error,
            json.loads(self._client.specs.serialize()),
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def split(self) -> tuple[ServerCircuit, ClientCircuit]:
        """Return the server's part, which has the weights, and the client's, which has none of them.

        Neither has keys: the client generates its own. Two pairs of keys are generated here and dropped, to
        learn which bytes of a valid message are always the same.
        """
        specs = json.loads(self._client.specs.serialize())
        with self.progress("preparing the client and the server"):
            keys, inputs, results = find_layouts(specs)
        dequantizer = self.attention.dequantizer
        description = CircuitDescription(
            fingerprint=self.fingerprint,
            tokens=self.tokens,
            width=self.attention.width,
            outputs=len(dequantizer.scale),
            concrete_version=self.statistics.concrete_version,
            machine=machine(),
            memory=self.statistics.evaluation_key_bytes_in_memory,
            keys=keys,
            inputs=inputs,
            results=results,
        )
        client = ClientCircuit(description, specs, self.attention.quantizer, dequantizer, self.progress)
        return ServerCircuit(description, self._server), client


def _compile(fhe: ModuleType, attention: QuantizedAttention, tokens: int, p_error: float) -> Any:
    output_bits = attention.precision.output + 1

    def attend(x: Any) -> Any:
        return fhe.hint(attention.circuit(x, traced_lookup), bit_width=output_bits)

    configuration = fhe.Configuration(
        p_error=p_error,
        compress_evaluation_keys=True,
        compress_input_ciphertexts=True,
        additional_pre_processors=[_signed_integers(attention)],
        dump_artifacts_on_unexpected_failures=False,
        # Tables are shifted so that values past their range saturate (see ``lookup``): nothing to clip.
        approximate_rounding_config=fhe.ApproximateRoundingConfig(
            logical_clipping=False, approximate_clipping_start_precision=False
        ),
    )
    compiler = fhe.Compiler(attend, {"x": "encrypted"})
    try:
        circuit = compiler.compile(_inputset(attention, tokens), configuration)
    except RuntimeError as error:
        if "parameters" not in str(error).lower():
            raise TfheError(f"Concrete cannot compile this circuit: {error}") from error
        precision = attention.precision
        raise NoParametersError(
            "Concrete finds no 128-bit secure parameters for lookups of "
            f"{precision.product} bits on products, {precision.softmax} bits in the softmax and "
            f"{precision.output} bits in the result at p_error={p_error:g}: "
            "lower n_bits, the number of heads, or raise p_error"
        ) from error
    return circuit


def _inputset(attention: QuantizedAttention, tokens: int) -> list[Int64]:
    """Return inputs that tell Concrete how wide the input is; ``_signed_integers`` says the rest."""
    top = largest_level(attention.n_bits)
    shape = (tokens, attention.width)
    return [np.full(shape, level, dtype=np.int64) for level in (top, -top - 1)]


def _signed_integers(attention: QuantizedAttention) -> Any:
    """Return a pass over Concrete's graph that gives every encrypted integer a sign and its declared width.

    Concrete takes both from what it sees on sample inputs. A value that happens to be positive on all of them
    would get tables for unsigned values, which are wrong for the first negative one; a sum that happens to
    be wide would cost its width everywhere. Here accumulators have a width by design and the rest follows.
    """
    from concrete.fhe.dtypes import Integer
    from concrete.fhe.representation import Graph, GraphProcessor, Operation

    output_bits = attention.precision.output + 1

    class SignedIntegers(GraphProcessor):  # type: ignore[misc]
        def apply(self, graph: Graph) -> None:
            for node in graph.query_nodes(ordered=True):
                dtype = node.output.dtype
                if not node.output.is_encrypted or not isinstance(dtype, Integer):
                    continue
                hint = node.properties.get("bit_width_hint")
                dtype.is_signed = True
                if node.operation is Operation.Input:
                    dtype.bit_width = attention.n_bits
                else:
                    dtype.bit_width = hint if hint is not None else min(dtype.bit_width, output_bits)
                for successor in graph.graph.successors(node):
                    for edge in graph.graph.get_edge_data(node, successor).values():
                        successor.inputs[edge["input_idx"]] = node.output

    return SignedIntegers()


def _statistics(
    circuit: Any, attention: QuantizedAttention, tokens: int, p_error: float, seconds: float, version: str
) -> CircuitStatistics:
    counts = {int(tag.split()[0]): int(n) for tag, n in circuit.programmable_bootstrap_count_per_tag.items()}
    sets = [
        {
            "polynomial_size": key.polynomial_size(),
            "glwe_dimension": key.glwe_dimension(),
            "lwe_dimension": key.input_lwe_dimension(),
            "levels": key.level(),
            "pbs": int(count),
        }
        for key, count in circuit.programmable_bootstrap_count_per_parameter.items()
    ]
    return CircuitStatistics(
        tokens=tokens,
        pbs=int(circuit.programmable_bootstrap_count),
        max_bit_width=max(counts),
        pbs_per_bit_width=dict(sorted(counts.items())),
        accumulator_bits=ACCUMULATOR_BITS,
        parameter_sets=sets,
        evaluation_key_bytes_in_memory=int(circuit.size_of_bootstrap_keys + circuit.size_of_keyswitch_keys),
        ciphertext_bytes_in=int(circuit.size_of_inputs),
        ciphertext_bytes_out=int(circuit.size_of_outputs),
        p_error=p_error,
        complexity=float(circuit.complexity),
        compile_seconds=seconds,
        concrete_version=version,
    )


def cache_root() -> Path:
    """Return the folder of compiled circuits and keys in the user's cache directory."""
    return Path(platformdirs.user_cache_dir("cipherlm")) / "tfhe"


def _circuit_folder(
    cache_dir: Path | bool | None, attention: QuantizedAttention, tokens: int, p_error: float, version: str
) -> Path | None:
    if cache_dir is None or cache_dir is False:
        return None
    root = cache_root() if cache_dir is True else Path(cache_dir)
    parts = [_FORMAT, attention.fingerprint(), tokens, p_error, version]
    return root / hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def _alone(folder: Path | None, progress: Progress) -> AbstractContextManager[None]:
    """Keep other processes from a folder of the cache."""
    if folder is None:
        return nullcontext()
    return exclusive(folder, lambda: progress("waiting for another process with this circuit"))


def _read_checked(path: Path) -> bytes:
    """Read a file that starts with the SHA-256 of the rest."""
    content = path.read_bytes()
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        raise DamagedCacheError(path, "its checksum does not match")
    return content[32:]


def _save(server: Any, statistics: CircuitStatistics, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    archive = folder / "server.zip"
    server.save(archive)
    # Written last: a folder without it is an unfinished one, and is compiled again.
    description = {"sha256": sha256_of(archive), "statistics": statistics.to_dict()}
    write_private(folder / "circuit.json", json.dumps(description, indent=1).encode())


def _load(folder: Path) -> tuple[Any, CircuitStatistics]:
    description_path, archive = folder / "circuit.json", folder / "server.zip"
    try:
        description = json.loads(description_path.read_text())
        statistics = CircuitStatistics.from_dict(description["statistics"])
        expected = description["sha256"]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedCacheError(description_path, "it is not the JSON that was written") from error
    if not archive.exists() or sha256_of(archive) != expected:
        raise DamagedCacheError(archive, "its checksum does not match")
    return load_server(archive), statistics
