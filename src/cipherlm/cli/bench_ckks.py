"""Measure CKKS: a session whose client is at the other end of a wire, and one attention layer in it."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cipherlm.cli import UsageError
from cipherlm.cli.bench_tally import Figures, MeasuredEvaluator, TalliedEncodings, Tally
from cipherlm.cli.line import Line
from cipherlm.engine import (
    Ciphertext,
    EvaluationKeys,
    Parameters,
    PublicKey,
    RefreshReply,
    RefreshRequest,
    SecretKey,
    memory,
    threads,
)
from cipherlm.models.gpt2 import Args, Attention
from cipherlm.nn.clear import ClearTensor
from cipherlm.progress import TerminalProgress
from cipherlm.schemes.ckks.arithmetic import Arithmetic, Encodings
from cipherlm.schemes.ckks.geometry import Geometry
from cipherlm.schemes.ckks.refresh import MaskedRefresh
from cipherlm.schemes.ckks.session import MOST_CHUNKS, Client, Hosted, Server

if TYPE_CHECKING:
    from cipherlm.schemes.tfhe.weights import AttentionWeights

Float64 = NDArray[np.float64]


class MeasuredSession:
    """A session of one module, with everything counted; all that goes between the parties does so as bytes.

    ``prompts_only`` leaves out the keys that only decoding needs. All bytes take as long as on a ``line``. Up
    to ``most_chunks`` go side by side.
    """

    def __init__(
        self,
        geometry: Geometry,
        module: Hosted,
        *,
        prompts_only: bool = False,
        line: Line | None = None,
        most_chunks: int = MOST_CHUNKS,
    ) -> None:
        self.geometry, self._line = geometry, line
        began = time.perf_counter()
        secret_key = SecretKey.generate(geometry.parameters)
        self._client = Client(secret_key, geometry, most_chunks=most_chunks)
        if prompts_only:
            rotations = geometry.layout.rotations(geometry.parameters.max_level, decoding=False)
            keys = secret_key.evaluation_keys(rotations, conjugation=True)
        else:
            keys = self._client.evaluation_keys()
        self.keygen_seconds = time.perf_counter() - began
        self.rotation_keys = len(keys.galois_levels) - 1  # less the conjugation
        self._keys, self.evaluation_key_bytes = _sent(keys, EvaluationKeys, geometry.parameters)
        public_key, _ = _sent(self._client.public_key(), PublicKey, geometry.parameters)
        self._evaluator = MeasuredEvaluator(geometry.parameters, self._keys)
        refresh = MaskedRefresh(self._evaluator, public_key, self._refresh)
        # What Server.open makes, but for what counts.
        self._session = Server({"all": module}, geometry).open(self._keys, public_key, self._refresh)
        storage = self._session.arithmetic.encodings.storage
        encodings = TalliedEncodings(self._evaluator, geometry.layout, storage=storage)
        self._session.arithmetic = Arithmetic(self._evaluator, encodings, refresh)

    @property
    def encodings(self) -> Encodings:
        """What of the server's clear weights is encoded."""
        return self._session.arithmetic.encodings

    @property
    def _tally(self) -> Tally:
        return self._evaluator.tally

    def evaluate(self, hidden: Float64, start: int) -> tuple[Float64, Tally]:
        """Return the module's outputs for hidden states (tokens, width), and what that took.

        The first is the token at position ``start``; what does not go together follows in other passes.
        """
        self._evaluator.tally, arithmetic = Tally(), self._session.arithmetic
        arithmetic.refreshes = arithmetic.round_trips = 0
        began, processor = time.perf_counter(), time.process_time()
        rows = [
            self._pass(hidden[position - start : position - start + count], position)
            for position, count in self._client.passes(start, len(hidden))
        ]
        self._tally.seconds = time.perf_counter() - began
        self._tally.cpu_seconds = time.process_time() - processor
        self._tally.refreshes, self._tally.round_trips = arithmetic.refreshes, arithmetic.round_trips
        return np.concatenate(rows), self._tally

    def _pass(self, hidden: Float64, start: int) -> Float64:
        parameters = self.geometry.parameters
        began, processor = time.perf_counter(), time.process_time()
        with self._clock("encrypt_seconds"):
            up = [part.to_bytes() for part in self._client.encrypt(hidden, start)]
        self._carry(up)
        inputs = [Ciphertext.from_bytes(part, parameters) for part in up]
        outputs = self._session.evaluate("all", start, inputs, len(hidden))
        down = [part.to_bytes() for part in outputs]
        self._carry(down)
        with self._clock("decrypt_seconds"):
            results = [Ciphertext.from_bytes(part, parameters) for part in down]
            got = self._client.decrypt(results, len(hidden), start)
        self._tally.input_bytes += sum(map(len, up))
        self._tally.output_bytes += sum(map(len, down))
        self._tally.chunks.append(
            {
                "tokens": len(hidden),
                "seconds": time.perf_counter() - began,
                "cpu_seconds": time.process_time() - processor,
            }
        )
        return got

    def _refresh(self, request: RefreshRequest) -> RefreshReply:
        """Answer a request over the wire."""
        parameters = self.geometry.parameters
        down = request.to_bytes()
        self._carry([down])
        with self._clock("refresh_seconds"):
            up = self._client.refresh(RefreshRequest.from_bytes(down, parameters)).to_bytes()
        self._carry([up])
        self._tally.refresh_up_bytes += len(up)
        self._tally.refresh_down_bytes += len(down)
        return RefreshReply.from_bytes(up, parameters)

    def _carry(self, sent: Sequence[bytes]) -> None:
        if self._line is not None:
            self._tally.line_seconds += self._line.carry(sum(map(len, sent)))

    @contextmanager
    def _clock(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        setattr(self._tally, name, getattr(self._tally, name) + time.perf_counter() - began)

    def figures(self) -> Figures:
        """Return what is the same for all evaluations."""
        return {
            "threads": threads(),
            "levels": self.geometry.parameters.max_level,
            "tokens_side_by_side": self.geometry.tokens,
            "context": self.geometry.context,
            "keygen_seconds": self.keygen_seconds,
            "rotation_keys": self.rotation_keys,
            "evaluation_key_bytes": self.evaluation_key_bytes,
            "evaluation_key_bytes_in_memory": self._keys.nbytes,
        }


def _sent(item: Any, kind: Any, parameters: Parameters) -> tuple[Any, int]:
    """Return what arrives of an object that is sent, and how many bytes that takes."""
    file = io.BytesIO()
    size = item.write_to(file)
    file.seek(0)
    return kind.read_from(file, parameters), size


def errors(got: Float64, want: Float64) -> Figures:
    """Return how far results are from those in the clear."""
    difference = np.abs(got - want)
    return {
        "max_abs_error": float(difference.max()),
        "mean_abs_error": float(difference.mean()),
        "max_abs_output": float(np.abs(want).max()),
    }


def memory_figures() -> Figures:
    """Return the most memory that this process has held, and what its native side holds now."""
    from cipherlm.cli.bench_attention import peak_memory_bytes

    return {"peak_memory_bytes": peak_memory_bytes(), "native_memory_bytes": memory().held}


def attention(weights: AttentionWeights, calibration: Sequence[Float64], x: Float64) -> Figures:
    """Measure one attention layer with all heads and both projections on an input (tokens, width).

    The first run also encodes the weights, and is reported as ``compile_seconds``. Of three others the
    fastest is reported.
    """
    tokens, width = len(x), weights.n_heads * weights.head_dim
    side_by_side = 1 << (tokens - 1).bit_length()
    try:
        geometry = Geometry(weights.n_heads, weights.head_dim, side_by_side, 0, side_by_side)
    except ValueError as error:
        raise UsageError(f"--tokens {tokens}: {error}") from error
    clear = Attention(Args(width, weights.n_heads, 4 * width, 1, side_by_side, 1e-5, "gelu_new"), 0).load(
        {
            "c_attn.weight": weights.qkv_weight,
            "c_attn.bias": weights.qkv_bias,
            "c_proj.weight": weights.projection_weight,
            "c_proj.bias": weights.projection_bias,
        }
    )
    for hidden in calibration:
        clear(ClearTensor(hidden))
    fitted = clear.fitted(clear.ranges, side_by_side)

    progress = TerminalProgress()
    with progress("generating keys"):
        session = MeasuredSession(geometry, Hosted(fitted, [None]), prompts_only=True)
    with progress("encoding weights and executing"):
        _, first = session.evaluate(x, 0)
    with progress("executing"):
        runs = [session.evaluate(x, 0) for _ in range(3)]
    got, best = min(runs, key=lambda run: run[1].seconds)
    figures = best.figures(tokens)
    return {
        **session.figures(),
        "compile_seconds": first.seconds,
        "encrypt_seconds": best.encrypt_seconds,
        "execute_seconds": best.seconds - best.encrypt_seconds - best.decrypt_seconds,
        "decrypt_seconds": best.decrypt_seconds,
        "ciphertext_bytes": best.input_bytes + best.output_bytes,
        "ciphertext_bytes_in": best.input_bytes,
        "ciphertext_bytes_out": best.output_bytes,
        **{name: value for name, value in figures.items() if name not in ("tokens", "seconds")},
        **memory_figures(),
        **errors(got, clear(ClearTensor(x)).values),
    }
