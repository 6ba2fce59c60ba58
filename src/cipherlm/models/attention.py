"""GPT-2's attention module with chosen heads, or all of it, on encrypted data."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from transformers.pytorch_utils import Conv1D

from cipherlm.models.config import EncryptionConfig
from cipherlm.models.length import bounded
from cipherlm.models.modules import EncryptedModule, Float64, cache_of, to_numpy
from cipherlm.progress import Progress, silent
from cipherlm.schemes.tfhe.attention import AttentionWeights, QuantizedAttention
from cipherlm.schemes.tfhe.circuit import AttentionCircuit
from cipherlm.schemes.tfhe.errors import NotCompiledError, TooManyTokensError


class RemoteCircuit(Protocol):
    """A circuit at a server."""

    @property
    def tokens(self) -> int:
        """For how many tokens it is."""

    def execute(self, x: Float64) -> Float64:
        """Return the outputs (t, outputs) for hidden states (t, width), t at most ``tokens``."""


class EncryptedAttention(EncryptedModule):
    """Takes the place of a ``GPT2Attention``: the same weights under the same names, the same call.

    Hidden states leave the clear model here, one sequence after the other, for the quantised attention, and
    its result comes back. ``mode`` says how that runs: ``"disable"`` the quantised arithmetic in the clear,
    ``"simulate"`` the same with simulated ciphertext noise, ``"execute"`` the circuit on ciphertexts.

    Where the configuration names heads, only they do so; the other heads and the output projection are
    computed here as before. Otherwise the whole module, with its projection, is in the circuit.
    """

    def __init__(
        self, name: str, attention: GPT2Attention, config: EncryptionConfig, progress: Progress = silent
    ) -> None:
        super().__init__(name, progress)
        self.config = config
        self.quantized: QuantizedAttention | None = None
        self.circuit: AttentionCircuit | None = None
        self._elsewhere: RemoteCircuit | None = None
        # The submodules themselves, so that parameters keep their names in the model's state dict.
        self.c_attn: Conv1D = attention.c_attn
        self.c_proj: Conv1D = attention.c_proj
        self.n_heads: int = attention.num_heads
        self.width: int = attention.embed_dim
        self.head_dim: int = attention.head_dim
        self.score_scale = _score_scale(attention)
        self.train(attention.training)
        self._recorded: list[Float64] | None = None

    @property
    def is_calibrated(self) -> bool:
        """Whether the quantisation parameters are there."""
        return self.quantized is not None or self._elsewhere is not None

    @property
    def is_elsewhere(self) -> bool:
        """Whether the circuit is at a server."""
        return self._elsewhere is not None

    @property
    def circuit_tokens(self) -> int:
        """For how many tokens the circuit is, here or at a server; 0 without one."""
        circuit = self._elsewhere or self.circuit
        return circuit.tokens if circuit is not None else 0

    def use(self, circuit: RemoteCircuit) -> None:
        """Let a server compute, in the mode ``"execute"``; there is no other then."""
        self._elsewhere = circuit

    @property
    def heads(self) -> list[int]:
        """The heads that are encrypted, in the order of the circuit's output."""
        return list(range(self.n_heads)) if self.config.heads is None else self.config.heads

    def forward(
        self,
        hidden_states: torch.Tensor,
        cache: Any = None,
        attention_mask: torch.Tensor | None = None,
        head_mask: torch.Tensor | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attend to ``hidden_states`` (batch, tokens, width); there are no attention weights to return.

        Positions and cache positions, which both lines of transformers pass too, say nothing more once there
        is neither a cache nor padding.
        """
        if cache_of({"cache": cache, **options}) is not None:
            raise ValueError(
                f"{self.name} is encrypted and has no key-value cache: call with use_cache=False"
            )
        self.check_call(hidden_states.shape[1], attention_mask, head_mask)
        if self._recorded is not None:
            self._recorded.extend(to_numpy(hidden_states))
        if self._in_clear:
            return self._project(self._clear_heads(hidden_states, range(self.n_heads))), None
        encrypted = self._encrypted(hidden_states)
        if self.config.heads is None:
            return encrypted, None
        others = [head for head in range(self.n_heads) if head not in self.heads]
        batch, tokens, _ = hidden_states.shape
        together = hidden_states.new_empty(batch, tokens, self.n_heads, self.head_dim)
        together[:, :, self.heads] = encrypted.view(batch, tokens, -1, self.head_dim)
        together[:, :, others] = self._clear_heads(hidden_states, others)
        return self._project(together), None

    def weights(self) -> AttentionWeights:
        """Return the layer's weights as the schemes take them, which divide scores by ``sqrt(head_dim)``."""
        qkv_weight, qkv_bias, projection_weight, projection_bias = (
            to_numpy(parameter)
            for parameter in (self.c_attn.weight, self.c_attn.bias, self.c_proj.weight, self.c_proj.bias)
        )
        # Another scale of the scores (GPT2Config can ask for one) goes into the queries.
        factor = self.score_scale * math.sqrt(self.head_dim)
        qkv_weight[:, : self.width] *= factor
        qkv_bias[: self.width] *= factor
        return AttentionWeights(qkv_weight, qkv_bias, projection_weight, projection_bias, self.n_heads)

    @contextmanager
    def recording(self) -> Iterator[list[Float64]]:
        """Collect what comes in, one (tokens, width) array a sequence."""
        recorded: list[Float64] = []
        self._recorded = recorded
        try:
            yield recorded
        finally:
            self._recorded = None

    def check_ready(self, tokens: int) -> None:
        """Raise unless a sequence of ``tokens`` can run in the present mode.

        ``NotCompiledError`` if calibration or the circuit is missing, ``TooManyTokensError`` if the circuit
        is too short.
        """
        if self._in_clear:
            return
        if self._elsewhere is not None:
            if self.mode != "execute":
                raise NotCompiledError(f'the circuit of {self.name} is at a server: set_fhe_mode("execute")')
            if tokens > self._elsewhere.tokens:
                raise TooManyTokensError(tokens, self._elsewhere.tokens)
            return
        if self.quantized is None:
            raise NotCompiledError(
                f"{self.name} is not calibrated: call compile(calibration_ids) first, "
                'or calibrate(calibration_ids) for the mode "disable" alone'
            )
        if self.mode == "disable":
            return
        if self.circuit is None:
            raise NotCompiledError(
                f'{self.name} has no circuit for the mode "{self.mode}": call compile() first, '
                'or set_fhe_mode("disable")'
            )
        if tokens > self.circuit.tokens:
            raise TooManyTokensError(tokens, self.circuit.tokens)

    def extra_repr(self) -> str:
        """Say in ``print(model)`` what is encrypted."""
        heads = "all, with the projection" if self.config.heads is None else self.config.heads
        return f"heads={heads}, n_bits={self.config.n_bits}, mode={self.mode}"

    def _encrypted(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the circuit's output (batch, tokens, outputs)."""
        run = self._runner()
        inputs = to_numpy(hidden_states)
        rows = [run(sequence) for sequence in (bounded(inputs) if self.is_elsewhere else inputs)]
        return torch.from_numpy(np.stack(rows)).to(hidden_states)

    def _runner(self) -> Callable[[Float64], Float64]:
        if self._elsewhere is not None:
            return self._elsewhere.execute
        assert self.quantized is not None  # check_ready
        if self.mode == "disable":
            return self.quantized
        circuit = self.circuit
        assert circuit is not None
        return circuit.simulate if self.mode == "simulate" else circuit.execute

    def _clear_heads(self, hidden_states: torch.Tensor, heads: Any) -> torch.Tensor:
        """Return the output (batch, tokens, heads, head_dim) of some heads, computed in the clear."""
        batch, tokens, _ = hidden_states.shape
        qkv = self.c_attn(hidden_states).view(batch, tokens, 3, self.n_heads, self.head_dim)
        query, key, value = qkv[:, :, :, list(heads)].permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.score_scale
        )
        return mixed.transpose(1, 2)

    def _project(self, heads: torch.Tensor) -> torch.Tensor:
        projected: torch.Tensor = self.c_proj(heads.flatten(2))
        return projected


def _score_scale(attention: GPT2Attention) -> float:
    """Return what the scores are multiplied by, as GPT-2's configuration has it."""
    scale = attention.head_dim**-0.5 if attention.scale_attn_weights else 1.0
    if attention.scale_attn_by_inverse_layer_idx:
        scale /= attention.layer_idx + 1
    return float(scale)
