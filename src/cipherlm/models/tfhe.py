"""Models whose attention modules are TFHE circuits."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch

from cipherlm.models.attention import EncryptedAttention, RemoteCircuit
from cipherlm.models.config import EncryptionConfig
from cipherlm.models.encrypted import CalibrationIds, EncryptedModel
from cipherlm.models.storage import delete_frozen, load_quantization, save_quantization
from cipherlm.models.targets import find_targets
from cipherlm.progress import Progress
from cipherlm.schemes.tfhe.attention import QuantizedAttention
from cipherlm.schemes.tfhe.circuit import AttentionCircuit
from cipherlm.schemes.tfhe.errors import NotCompiledError

if TYPE_CHECKING:
    from typing_extensions import Self


class TfheModel(EncryptedModel):
    """A GPT-2 whose attention modules, or some of their heads, are TFHE circuits.

    A circuit computes all positions anew, and ``use_cache`` is off.
    """

    architectures = ("gpt2",)
    module_kind = "attention module"

    @property
    def circuits(self) -> dict[str, EncryptedAttention]:
        """The attention modules that are encrypted, by name."""
        return {name: m for name, m in self.named_modules() if isinstance(m, EncryptedAttention)}

    @property
    def room(self) -> int:
        """See :class:`EncryptedModel`."""
        return min(module.circuit_tokens for module in self.circuits.values())

    @property
    def is_elsewhere(self) -> bool:
        """See :class:`EncryptedModel`."""
        return any(module.is_elsewhere for module in self.circuits.values())

    def calibrate(self, calibration_ids: CalibrationIds) -> None:
        """Choose the parameters of the quantisation on text and freeze them, in place of any there are.

        ``calibration_ids``: token ids (n, tokens), or a list of such and of (tokens,) for texts of different
        lengths. Circuits compiled from earlier parameters are dropped.
        """
        batches = self._checked_ids(calibration_ids)
        encrypted = self.circuits
        with ExitStack() as stack, torch.no_grad():
            recorded = {name: stack.enter_context(m.recording()) for name, m in encrypted.items()}
            stack.enter_context(self.in_clear())
            for ids in batches:
                self.base_model(ids.to(self.device))
        quantized = {
            name: QuantizedAttention.calibrate(
                module.weights(),
                recorded[name],
                heads=self.encryption_config.heads,
                n_bits=self.encryption_config.n_bits,
            )
            for name, module in encrypted.items()
        }
        self._freeze(quantized)

    def compile(  # type: ignore[override]
        self, calibration_ids: CalibrationIds | None = None, tokens: int | None = None
    ) -> AttentionCircuit | dict[str, AttentionCircuit]:
        """Make ready to run: compile one circuit an encrypted module, for up to ``tokens`` tokens.

        Calibrates on ``calibration_ids`` first, but only if that has not happened: parameters once frozen,
        or loaded with ``from_pretrained``, stay as they are until ``calibrate`` is called. ``tokens``
        defaults to the longest of ``calibration_ids``.

        Prints each circuit's bit-width. Returns the circuit, or circuits by module name if there are several.
        This takes the place of ``torch.nn.Module.compile``, which has no meaning for a circuit.
        """
        if calibration_ids is None and not self.is_calibrated:
            raise NotCompiledError("nothing is calibrated yet: call compile(calibration_ids)")
        tokens = self._checked_tokens(calibration_ids, tokens)
        if not self.is_calibrated:
            assert calibration_ids is not None
            self.calibrate(calibration_ids)
        config = self.encryption_config
        encrypted = self.circuits
        circuits: dict[str, AttentionCircuit] = {}
        for name, module in encrypted.items():
            assert module.quantized is not None
            circuits[name] = AttentionCircuit.compile(
                module.quantized, tokens, p_error=config.p_error, progress=module.progress
            )
            where = "" if len(encrypted) == 1 else f" ({name})"
            print(f"Circuit compiled with {circuits[name].statistics.max_bit_width} bit-width{where}")
        for name, module in encrypted.items():
            module.circuit = circuits[name]
        return circuits if len(circuits) > 1 else next(iter(circuits.values()))

    def _freeze(self, quantized: Mapping[str, QuantizedAttention]) -> None:
        encrypted = self.circuits
        for name, parameters in quantized.items():
            encrypted[name].quantized = parameters
            encrypted[name].circuit = None

    def leave_to_server(self, parts: Mapping[str, RemoteCircuit]) -> None:
        """See :class:`EncryptedModel`. The weights of heads are not dropped: clients have zeros there."""
        for name, module in self.circuits.items():
            module.use(parts[name])

    def _save_frozen(self, directory: str | os.PathLike[str]) -> None:
        delete_frozen(directory)
        save_quantization(directory, self.circuits)

    def _load_frozen(self, directory: str | os.PathLike[str]) -> None:
        self._freeze(load_quantization(directory, self.circuits))

    @classmethod
    def _encrypt(cls, model: Any, config: EncryptionConfig, progress: Progress) -> Self:
        encrypted = cls._replaced(
            model,
            config,
            {
                name: EncryptedAttention(name, module, config, progress)
                for name, module in find_targets(model, config).items()
            },
        )
        encrypted.config.use_cache = False
        if encrypted.generation_config is not None:
            encrypted.generation_config.use_cache = False
        return encrypted


MODEL = TfheModel
