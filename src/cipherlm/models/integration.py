"""Encryption for a ``transformers`` model in two lines, as PEFT adds adapters.

    config = EncryptionConfig(target_modules=["transformer.h.0.attn"], n_bits=4, heads=[0])
    model = get_encrypted_model(model, config)

The model keeps its class's behaviour, its weights and their names; the modules named in the configuration
are replaced in place.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import GPT2LMHeadModel

from cipherlm.models.attention import MODES, EncryptedAttention, FheMode
from cipherlm.models.config import EncryptionConfig
from cipherlm.models.loading import SUPPORTED_ARCHITECTURES, load_model
from cipherlm.models.storage import load_quantization, save_quantization
from cipherlm.models.targets import find_targets, match
from cipherlm.progress import Progress, silent
from cipherlm.schemes.tfhe.attention import QuantizedAttention
from cipherlm.schemes.tfhe.circuit import AttentionCircuit
from cipherlm.schemes.tfhe.errors import NotCompiledError

if TYPE_CHECKING:
    from typing_extensions import Self

CalibrationIds = torch.Tensor | Sequence[torch.Tensor]


class EncryptedGPT2LMHeadModel(GPT2LMHeadModel):  # type: ignore[no-untyped-call]
    """A ``GPT2LMHeadModel`` some of whose attention modules run on encrypted data.

    Made by ``get_encrypted_model``. Calls and ``generate`` are those of transformers. There is no key-value
    cache (a circuit computes all positions), so ``use_cache`` is off.
    """

    encryption_config: EncryptionConfig

    @property
    def encrypted_modules(self) -> dict[str, EncryptedAttention]:
        """The encrypted modules by name, in the model's order."""
        return {name: m for name, m in self.named_modules() if isinstance(m, EncryptedAttention)}

    @property
    def fhe_mode(self) -> str:
        """The mode of all encrypted modules, or ``"mixed"``."""
        modes: set[str] = {module.mode for module in self.encrypted_modules.values()}
        return modes.pop() if len(modes) == 1 else "mixed"

    def set_fhe_mode(self, fhe: FheMode, modules: str | Sequence[str] | None = None) -> None:
        """Choose how encrypted modules run: ``"disable"``, ``"simulate"`` or ``"execute"``.

        ``modules`` names some of them as ``target_modules`` does; None means all. Raises ``ValueError`` on
        an unknown mode or name.
        """
        if fhe not in MODES:
            raise ValueError(f"no mode {fhe!r}: choose one of {', '.join(map(repr, MODES))}")
        encrypted = self.encrypted_modules
        for name in encrypted if modules is None else match(modules, list(encrypted)):
            encrypted[name].mode = fhe

    @property
    def is_calibrated(self) -> bool:
        """Whether the quantisation parameters are there, so that the mode ``"disable"`` works."""
        return all(module.quantized is not None for module in self.encrypted_modules.values())

    def calibrate(self, calibration_ids: CalibrationIds) -> None:
        """Choose the quantisation parameters on text and freeze them, in place of any there are.

        ``calibration_ids``: token ids (n, tokens), or a list of such and of (tokens,) for texts of different
        lengths. What encrypted modules see in the clear model sets their parameters. Circuits compiled from
        earlier parameters are dropped.
        """
        batches = self._checked_ids(calibration_ids)
        encrypted = self.encrypted_modules
        with ExitStack() as stack, torch.no_grad():
            recorded = {name: stack.enter_context(m.recording()) for name, m in encrypted.items()}
            stack.enter_context(self.in_clear())
            for ids in batches:
                self.transformer(ids.to(self.device))
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
        """Compile one circuit an encrypted module, for sequences of up to ``tokens`` tokens.

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
        encrypted = self.encrypted_modules
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

    @contextmanager
    def in_clear(self) -> Iterator[None]:
        """Compute as the clear model does for as long as the context lasts, to compare with it."""
        with ExitStack() as stack:
            for module in self.encrypted_modules.values():
                stack.enter_context(module.in_clear())
            yield

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike[str], **kwargs: Any
    ) -> None:
        """Save the clear model as transformers does, and with it the configuration and frozen parameters.

        ``encryption_config.json`` and ``quantisation.safetensors`` lie beside the model's files, so that the
        directory also loads as a clear model. Circuits and keys are not saved.
        """
        cls = type(self)
        # transformers writes down the name of the class, and a clear GPT-2 is what the files hold.
        self.__class__ = GPT2LMHeadModel  # type: ignore[assignment]
        try:
            self.save_pretrained(save_directory, **kwargs)
        finally:
            self.__class__ = cls
        self.encryption_config.save_pretrained(save_directory)
        save_quantization(save_directory, self.encrypted_modules)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, directory: str | os.PathLike[str], *, progress: Progress = silent
    ) -> Self:
        """Load what ``save_pretrained`` wrote: weights, configuration and frozen parameters.

        Raises ``FileNotFoundError`` if there is no encrypted model in ``directory``, and ``ValueError``,
        naming the file, if one is damaged.
        """
        config = EncryptionConfig.from_pretrained(directory)
        model = cls._encrypt(load_model(directory), config, progress)
        model._freeze(load_quantization(directory, model.encrypted_modules))
        return model

    @classmethod
    def _encrypt(cls, model: GPT2LMHeadModel, config: EncryptionConfig, progress: Progress) -> Self:
        """Make ``model`` itself an encrypted one. All that can fail comes before the first change."""
        targets = find_targets(model, config)
        replacements = {
            name: EncryptedAttention(name, module, config, progress) for name, module in targets.items()
        }
        for name, replacement in replacements.items():
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, replacement)
        model.config.use_cache = False
        if model.generation_config is not None:
            model.generation_config.use_cache = False
        # The same object under a class of the same layout, so that it stays what transformers made.
        model.__class__ = cls
        assert isinstance(model, cls)
        model.encryption_config = config
        return model

    def _freeze(self, quantized: dict[str, QuantizedAttention]) -> None:
        encrypted = self.encrypted_modules
        for name, parameters in quantized.items():
            encrypted[name].quantized = parameters
            encrypted[name].circuit = None

    def _validate_generated_length(self, generation_config: Any, *args: Any, **kwargs: Any) -> None:
        """Refuse to generate past the compiled length before the first, costly, step.

        transformers calls this with the final ``max_length``, however it was given.
        """
        super()._validate_generated_length(generation_config, *args, **kwargs)  # type: ignore[misc]
        for module in self.encrypted_modules.values():
            # The last token is generated, but never read.
            module.check_ready(generation_config.max_length - 1)

    def _checked_ids(self, calibration_ids: CalibrationIds) -> list[torch.Tensor]:
        """Return the calibration texts as a list of (n, tokens) batches."""
        given = [calibration_ids] if isinstance(calibration_ids, torch.Tensor) else list(calibration_ids)
        if not given or not all(isinstance(ids, torch.Tensor) and 1 <= ids.dim() <= 2 for ids in given):
            raise ValueError("calibration_ids must be token ids (n, tokens) or a list of them, as tensors")
        batches = [ids if ids.dim() == 2 else ids.unsqueeze(0) for ids in given]
        longest, vocabulary = self.config.n_positions, self.config.vocab_size
        for ids in batches:
            if ids.is_floating_point() or ids.dtype == torch.bool:
                raise ValueError(f"calibration_ids must be integers, not {ids.dtype}")
            if ids.numel() == 0:
                raise ValueError("calibration_ids has a text without tokens")
            if ids.shape[1] > longest:
                raise ValueError(f"calibration_ids has {ids.shape[1]} tokens, the model at most {longest}")
            if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
                raise ValueError(f"calibration_ids must lie between 0 and {vocabulary - 1}")
        return batches

    def _checked_tokens(self, calibration_ids: CalibrationIds | None, tokens: int | None) -> int:
        if tokens is None:
            if calibration_ids is None:
                raise ValueError("for which length? call compile(tokens=...)")
            return max(ids.shape[1] for ids in self._checked_ids(calibration_ids))
        longest = self.config.n_positions
        if isinstance(tokens, bool) or not isinstance(tokens, int) or not 1 <= tokens <= longest:
            raise ValueError(f"tokens must be an integer from 1 to {longest}, not {tokens!r}")
        return tokens


def get_encrypted_model(
    model: nn.Module, config: EncryptionConfig, *, progress: Progress = silent
) -> EncryptedGPT2LMHeadModel:
    """Encrypt the modules of ``model`` that ``config`` names, and return it.

    The model is changed in place: it stays the same ``GPT2LMHeadModel``, with a few methods more. Next is
    ``model.compile(calibration_ids)``, or ``model.calibrate(calibration_ids)`` for quantisation alone.
    ``progress`` hears of each long step.

    Raises ``ValueError``, and changes nothing, if the model's architecture is not supported or if it lacks
    a module or head that ``config`` names.
    """
    if isinstance(model, EncryptedGPT2LMHeadModel):
        raise ValueError("this model is encrypted already: load the clear one again")
    architecture = getattr(getattr(model, "config", None), "model_type", None)
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise ValueError(
            f"cannot encrypt the architecture {architecture or type(model).__name__!r}; "
            f"supported: {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    # A subclass would lose what it adds.
    if type(model) is not GPT2LMHeadModel:
        raise ValueError(f"cannot encrypt a {type(model).__name__}, only a GPT2LMHeadModel")
    return EncryptedGPT2LMHeadModel._encrypt(model, config, progress)
