"""Encryption for a ``transformers`` model in two lines, as PEFT adds adapters.

    config = EncryptionConfig()  # the whole model on CKKS
    model = get_encrypted_model(model, config)

The model keeps its class's behaviour, its weights and their names; the modules named in the configuration
are replaced in place.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from inspect import signature
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from torch import nn
from transformers import DynamicCache, GPT2LMHeadModel, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from cipherlm.models.architecture import MODULES, architecture_of
from cipherlm.models.attention import EncryptedAttention
from cipherlm.models.backends import Backend
from cipherlm.models.config import EncryptionConfig, Scheme
from cipherlm.models.length import at_full_length, evaluated_tokens
from cipherlm.models.linear import EncryptedLinearModel, encrypt_linear
from cipherlm.models.loading import load_model
from cipherlm.models.modules import MODES, EncryptedModule, FheMode, cache_of, is_causal
from cipherlm.models.remote import (
    Exact,
    NotCalibratedError,
    Placement,
    Ranges,
    RemoteBlocks,
    RemoteModule,
    fingerprint,
)
from cipherlm.models.storage import load_quantization, load_ranges, save_quantization, save_ranges
from cipherlm.models.targets import find_remote, find_targets, match, means_linear
from cipherlm.progress import Progress, silent
from cipherlm.schemes.tfhe.attention import QuantizedAttention
from cipherlm.schemes.tfhe.circuit import AttentionCircuit
from cipherlm.schemes.tfhe.errors import NotCompiledError

if TYPE_CHECKING:
    from typing_extensions import Self

ARCHITECTURES: dict[Scheme, tuple[str, ...]] = {"ckks": tuple(MODULES), "tfhe": ("gpt2",)}
"""What each scheme can encrypt, by the ``model_type`` of transformers."""

CalibrationIds = torch.Tensor | Sequence[torch.Tensor]


class EncryptedModel(nn.Module):
    """A causal language model of transformers some of whose modules run on encrypted data.

    Made by ``get_encrypted_model``: the class of the model is then a subclass of this one and of its own.
    Calls and ``generate`` are those of transformers. A TFHE circuit computes all positions anew, and
    ``use_cache`` is off. With CKKS the key-value cache of transformers says which tokens are new, and only
    these are evaluated; the keys and values of the others are on the server.

    With CKKS, every text starts with the ids in ``prefix``, which ``with_prefix`` adds.
    """

    config: Any
    device: torch.device
    base_model: Any
    generation_config: Any

    encryption_config: EncryptionConfig
    placement: Placement | None
    """What is remote, and who computes it: with CKKS only."""
    _clear_class: type[Any]
    _longest: int
    """How many tokens the text that is being generated may have, the prompt's with them."""

    @property
    def encrypted_modules(self) -> dict[str, EncryptedModule]:
        """The encrypted modules by name, in the model's order."""
        return {name: m for name, m in self.named_modules() if isinstance(m, EncryptedModule)}

    @property
    def _circuits(self) -> dict[str, EncryptedAttention]:
        return {name: m for name, m in self.named_modules() if isinstance(m, EncryptedAttention)}

    @property
    def remote_modules(self) -> dict[str, RemoteModule]:
        """The modules that CKKS servers compute, by name."""
        return {name: m for name, m in self.named_modules() if isinstance(m, RemoteModule)}

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
        kind = "attention module" if self.placement is None else "encrypted module"
        for name in encrypted if modules is None else match(modules, list(encrypted), kind=kind):
            encrypted[name].mode = fhe

    @property
    def is_calibrated(self) -> bool:
        """Whether the frozen parameters are there, so that the mode ``"disable"`` works."""
        return all(module.is_calibrated for module in self.encrypted_modules.values())

    @property
    def prefix(self) -> list[int]:
        """The ids of the public tokens that every text starts with; none with TFHE."""
        return [] if self.placement is None else list(self.placement.prefix)

    def with_prefix(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return token ids (n, tokens) with the public prefix before each text."""
        return torch.cat([self._prefix_rows(input_ids), input_ids], dim=1)

    def connect(self, backend: Backend | None) -> None:
        """Let ``backend`` compute the remote modules in the mode ``"execute"``, as with a server elsewhere.

        None stands for a server in this process, with keys of its own, which is also what there is at first.
        Raises ``ValueError`` with TFHE.
        """
        self._ckks().connect(backend)

    @property
    def is_elsewhere(self) -> bool:
        """Whether a server elsewhere computes, and so sees how often it is asked."""
        if self.placement is not None:
            modes = {module.mode for module in self.remote_modules.values()}
            return "execute" in modes and self.placement.is_connected
        return any(module.is_elsewhere for module in self._circuits.values())

    def generate(self, *args: Any, reveal_length: bool = False, **kwargs: Any) -> Any:
        """Continue token ids (n, tokens) as transformers' ``generate`` does.

        Where a server elsewhere computes, it is asked as often as the token budget allows (``max_new_tokens``
        or ``max_length``, rounded up by three tokens at most), whatever ends the text: it learns neither how
        long the text is nor when it ends. This returns when all has been evaluated, so that a text that ends
        early takes as long as one that does not. Every call then evaluates its whole prompt, also where the
        text before began as this one does. With ``reveal_length`` a generation ends with its text; see
        docs/security.md for what a server that cheats reads from that.
        """
        own: Any = super()
        generate = own.generate
        if reveal_length or not self.is_elsewhere:
            return generate(*args, **kwargs)
        self._longest = 0
        with ExitStack() as stack:
            if self.placement is not None:
                stack.enter_context(self.placement.hiding_length())
            return at_full_length(self, lambda: generate(*args, **kwargs), self._evaluated_tokens)

    def _evaluated_tokens(self) -> int:
        if self.placement is not None:
            room = self.placement.geometry.context
        else:
            room = min(module.circuit_tokens for module in self._circuits.values())
        return evaluated_tokens(self._longest, len(self.prefix), room)

    def make_keys(self) -> float:
        """Make the keys for the mode ``"execute"`` in this process, and return the seconds it took.

        Otherwise the first call in that mode does so. Raises ``ValueError`` with TFHE, whose circuits have
        their own keys.
        """
        self._check_calibrated()
        return self._ckks().make_keys()

    @property
    def fingerprint(self) -> str:
        """A hash of the weights of the remote modules and of the prefix, with CKKS."""
        return fingerprint(self.remote_modules, self._ckks())

    def calibrate(self, calibration_ids: CalibrationIds) -> None:
        """Choose the parameters on text and freeze them, in place of any there are.

        ``calibration_ids``: token ids (n, tokens), or a list of such and of (tokens,) for texts of different
        lengths. What encrypted modules see in the clear model sets their parameters: of the quantisation, or
        the ranges that polynomials are fitted to. Circuits compiled from earlier parameters are dropped, and
        so are keys for CKKS. With CKKS, the prefix is put before texts that lack it, and short ones are also
        joined to the length of the context.
        """
        batches = self._checked_ids(calibration_ids)
        if self.placement is not None:
            self._calibrate_remote(self.placement, batches)
            return
        encrypted = self._circuits
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
    ) -> AttentionCircuit | dict[str, AttentionCircuit] | None:
        """Make ready to run: compile one circuit an encrypted module, for up to ``tokens`` tokens.

        With CKKS there are no circuits: what calibration finds is all that a run needs. ``tokens`` may not
        exceed the configuration's ``context``. Prints how many functions have become polynomials, and
        returns None.

        Calibrates on ``calibration_ids`` first, but only if that has not happened: parameters once frozen,
        or loaded with ``from_pretrained``, stay as they are until ``calibrate`` is called. ``tokens``
        defaults to the longest of ``calibration_ids``.

        Prints each circuit's bit-width. Returns the circuit, or circuits by module name if there are several.
        This takes the place of ``torch.nn.Module.compile``, which has no meaning for a circuit.
        """
        if calibration_ids is None and not self.is_calibrated:
            error = NotCompiledError if self.placement is None else NotCalibratedError
            raise error("nothing is calibrated yet: call compile(calibration_ids)")
        if self.placement is not None:
            self._fit(self.placement, calibration_ids, tokens)
            return None
        tokens = self._checked_tokens(calibration_ids, tokens)
        if not self.is_calibrated:
            assert calibration_ids is not None
            self.calibrate(calibration_ids)
        config = self.encryption_config
        encrypted = self._circuits
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

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save the clear model as transformers does, and with it the configuration and frozen parameters.

        ``encryption_config.json`` lies beside the model's files, so that the directory also loads as a clear
        model, and ``quantisation.safetensors`` (TFHE) or ``calibration.json`` (CKKS). Circuits and keys are
        not saved.
        """
        cls, clear = type(self), self._clear_class
        # transformers writes down the name of the class, and a clear model is what the files hold.
        self.__class__ = clear
        try:
            clear.save_pretrained(self, save_directory, **kwargs)
        finally:
            self.__class__ = cls
        self.encryption_config.save_pretrained(save_directory)
        # Of both kinds, so that none of an earlier model stays behind.
        save_quantization(save_directory, self._circuits)
        if self.placement is not None:
            save_ranges(save_directory, self.remote_modules, self.placement)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str], *, progress: Progress = silent) -> Self:
        """Load what ``save_pretrained`` wrote: weights, configuration and frozen parameters.

        Raises ``FileNotFoundError`` if there is no encrypted model in ``directory``, and ``ValueError``,
        naming the file, if one is damaged.
        """
        config = EncryptionConfig.from_pretrained(directory)
        model = cls.encrypt(load_model(directory), config, progress=progress)
        if model.placement is None:
            model._freeze(load_quantization(directory, model._circuits))
        else:
            ranges = load_ranges(directory, model.remote_modules, model.placement)
            if ranges:
                model.freeze(ranges)
        return model

    @classmethod
    def encrypt(cls, model: nn.Module, config: EncryptionConfig, *, progress: Progress = silent) -> Self:
        """Make ``model`` itself an encrypted one, as ``get_encrypted_model`` says."""
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        architecture_of(model_type or type(model).__name__)
        clear = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[str(model_type)]
        if model_type not in ARCHITECTURES[config.scheme]:
            raise ValueError(
                f"cannot encrypt the architecture {model_type!r} with scheme={config.scheme!r}; "
                f"supported: {', '.join(ARCHITECTURES[config.scheme])}. Its linear layers can be encrypted: "
                'target_modules="linear"'
            )
        # A subclass would lose what it adds.
        if type(model) is not getattr(transformers, clear):
            raise ValueError(f"cannot encrypt a {type(model).__name__}, only a {clear}")
        chosen: Any = cls if issubclass(cls, PreTrainedModel) else _encrypted_class(cast(Any, type(model)))
        if not issubclass(chosen, type(model)):
            raise ValueError(f"cannot encrypt a {type(model).__name__} as a {cls.__name__}")
        encrypted: Self = chosen._encrypt(model, config, progress)
        return encrypted

    @classmethod
    def _encrypt(cls, model: Any, config: EncryptionConfig, progress: Progress) -> Self:
        """Make ``model`` itself an encrypted one. All that can fail comes before the first change."""
        placement: Placement | None = None
        replacements: dict[str, EncryptedModule]
        if config.scheme == "tfhe":
            replacements = {
                name: EncryptedAttention(name, module, config, progress)
                for name, module in find_targets(model, config).items()
            }
        else:
            placement = Placement(config, model.config, progress)
            blocks = placement.architecture.blocks
            replacements = {
                name: (RemoteBlocks if name == blocks else RemoteModule)(name, module, placement)
                for name, module in find_remote(model, config).items()
            }
        for name, replacement in replacements.items():
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, replacement)
        if placement is None:
            model.config.use_cache = False
            if model.generation_config is not None:
                model.generation_config.use_cache = False
        # The same object under a class of the same layout, so that it stays what transformers made.
        model._clear_class = type(model)
        model.__class__ = cls
        assert isinstance(model, cls)
        model.encryption_config, model.placement = config, placement
        if placement is not None:
            # Not a forward of its own: transformers reads the arguments of GPT-2's from its signature.
            model.register_forward_pre_hook(_check_call, with_kwargs=True)
        return model

    def _check_text(self, call: dict[str, Any]) -> None:
        """Refuse what the rows of hidden states cannot tell: another prefix, other positions, padding."""
        ids, mask = call.get("input_ids"), call.get("attention_mask")
        options = call | call.get("kwargs", {})
        cache = cache_of(options)
        if cache is not None and (self.placement is None or not isinstance(cache, DynamicCache)):
            known = "no key-value cache" if self.placement is None else "a DynamicCache"
            raise ValueError(f"an encrypted model takes {known} here, not a {type(cache).__name__}")
        past = 0 if cache is None else int(cache.get_seq_length())
        if self.placement is not None:
            self.placement.past = past
        for name in ("inputs_embeds", "token_type_ids", "encoder_hidden_states"):
            if call.get(name) is not None:
                raise ValueError(f"an encrypted model takes input_ids, and no {name}")
        if not isinstance(ids, torch.Tensor):
            raise ValueError("an encrypted model takes input_ids, as a tensor (batch, tokens)")
        length = past + ids.shape[-1]
        for module in self.encrypted_modules.values():
            module.check_ready(length)
        if mask is not None and not is_causal(mask, ids.shape[-1], past):
            raise ValueError(
                "an encrypted model attends to every earlier token: a mask that hides some (padding, packed "
                "sequences) cannot be used; run sequences of different lengths one by one"
            )
        prefix = self._prefix_rows(ids)[:, past:length]
        if not torch.equal(ids[:, : prefix.shape[1]], prefix):
            raise ValueError(
                f"a text does not start with the public prefix {self.prefix}: "
                "call with model.with_prefix(input_ids)"
            )
        positions = call.get("position_ids")
        if positions is not None and (positions != torch.arange(past, length, device=ids.device)).any():
            raise ValueError("an encrypted model counts positions from 0: leave position_ids out")

    def _prefix_rows(self, input_ids: torch.Tensor) -> torch.Tensor:
        return input_ids.new_tensor(self.prefix).expand(len(input_ids), -1)

    def _ckks(self) -> Placement:
        if self.placement is None:
            raise ValueError(f"this is for scheme='ckks', not {self.encryption_config.scheme!r}")
        return self.placement

    def _check_calibrated(self) -> None:
        if not self.is_calibrated:
            raise NotCalibratedError("nothing is calibrated yet: call compile(calibration_ids)")

    def _calibrate_remote(self, placement: Placement, batches: Sequence[torch.Tensor]) -> None:
        """Find and freeze the ranges of what remote modules meet."""
        texts = [self._prefixed(ids) for ids in batches]
        if all(ids.shape[1] == len(placement.prefix) for ids in texts):
            raise ValueError("calibration_ids has nothing behind the prefix")
        texts += self._joined(placement, texts)
        remote = self.remote_modules
        exact = self._examined(placement)
        with ExitStack() as stack, torch.no_grad():
            recorded = {name: stack.enter_context(module.recording()) for name, module in remote.items()}
            stack.enter_context(self.in_clear())
            for ids in texts:
                self.base_model(ids.to(self.device))
        ranges = {
            name: module.calibrated(exact[name], [text for inputs, _ in recorded[name] for text in inputs])
            for name, module in remote.items()
        }
        self._freeze_remote(placement, exact, ranges)

    def _joined(self, placement: Placement, texts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return texts as long as the context, of short ones: scores over many keys have a wider range."""
        prefix, room = len(placement.prefix), placement.geometry.context - len(placement.prefix)
        flat = torch.cat([ids[:, prefix:].flatten() for ids in texts])
        whole = [flat[i : i + room] for i in range(0, len(flat) - room + 1, room)] or [flat]
        return [self._prefixed(ids[None]) for ids in whole]

    def _prefixed(self, ids: torch.Tensor) -> torch.Tensor:
        """Return calibration texts with the prefix, if they lack it."""
        prefix = self._prefix_rows(ids)
        if torch.equal(ids[:, : prefix.shape[1]], prefix):
            return ids
        ids = torch.cat([prefix, ids], dim=1)
        if ids.shape[1] > self._positions:
            raise ValueError(
                f"calibration_ids has {ids.shape[1]} tokens with the prefix, "
                f"the model at most {self._positions}"
            )
        return ids

    @property
    def _positions(self) -> int:
        """How many tokens a text may have."""
        return int(self.config.max_position_embeddings)

    def _examined(self, placement: Placement) -> dict[str, Exact]:
        """Return the exact arithmetic of remote modules, with what the clear model makes of the prefix."""
        with ExitStack() as stack, torch.no_grad():
            recorded = {
                n: stack.enter_context(module.recording()) for n, module in self.remote_modules.items()
            }
            stack.enter_context(self.in_clear())
            self.base_model(torch.tensor([placement.prefix], device=self.device))
        return {name: module.examine(*recorded[name][0]) for name, module in self.remote_modules.items()}

    def freeze(self, ranges: Mapping[str, Ranges]) -> None:
        """Use the ranges that an earlier calibration found. Raises ``ValueError`` with TFHE."""
        placement = self._ckks()
        self._freeze_remote(placement, self._examined(placement), ranges)

    def _freeze_remote(
        self, placement: Placement, exact: dict[str, Exact], ranges: Mapping[str, Ranges]
    ) -> None:
        placement.use({n: module.freeze(exact[n], ranges[n]) for n, module in self.remote_modules.items()})

    def _fit(self, placement: Placement, calibration_ids: CalibrationIds | None, tokens: int | None) -> None:
        context = placement.geometry.context
        if tokens is not None and self._checked_tokens(None, tokens) > context:
            raise ValueError(f"tokens={tokens} is more than the configuration's context={context}")
        if not self.is_calibrated:
            assert calibration_ids is not None
            self.calibrate(calibration_ids)
        count = sum(module.functions for module in self.remote_modules.values())
        print(f"Fitted {count} functions for contexts of up to {context} tokens")

    def _freeze(self, quantized: dict[str, QuantizedAttention]) -> None:
        encrypted = self._circuits
        for name, parameters in quantized.items():
            encrypted[name].quantized = parameters
            encrypted[name].circuit = None

    def _validate_generated_length(self, generation_config: Any, *args: Any, **kwargs: Any) -> None:
        """Refuse to generate past the compiled length before the first, costly, step.

        transformers calls this with the final ``max_length``, however it was given.
        """
        own: Any = super()
        own._validate_generated_length(generation_config, *args, **kwargs)
        self._longest = generation_config.max_length
        for module in self.encrypted_modules.values():
            # The last token is generated, but never read.
            module.check_ready(generation_config.max_length - 1)

    def _checked_ids(self, calibration_ids: CalibrationIds) -> list[torch.Tensor]:
        """Return the calibration texts as a list of (n, tokens) batches."""
        given = [calibration_ids] if isinstance(calibration_ids, torch.Tensor) else list(calibration_ids)
        if not given or not all(isinstance(ids, torch.Tensor) and 1 <= ids.dim() <= 2 for ids in given):
            raise ValueError("calibration_ids must be token ids (n, tokens) or a list of them, as tensors")
        batches = [ids if ids.dim() == 2 else ids.unsqueeze(0) for ids in given]
        longest, vocabulary = self._positions, self.config.vocab_size
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
        longest = self._positions
        if isinstance(tokens, bool) or not isinstance(tokens, int) or not 1 <= tokens <= longest:
            raise ValueError(f"tokens must be an integer from 1 to {longest}, not {tokens!r}")
        return tokens


class EncryptedGPT2LMHeadModel(EncryptedModel, GPT2LMHeadModel):  # type: ignore[no-untyped-call, misc]
    """A GPT-2 some of whose modules run on encrypted data."""


@cache
def _encrypted_class(clear: type[Any]) -> type[EncryptedModel]:
    """Return the class that a model of a clear class gets."""
    if clear is GPT2LMHeadModel:
        return EncryptedGPT2LMHeadModel
    return type(f"Encrypted{clear.__name__}", (EncryptedModel, clear), {"__module__": __name__})


def _check_call(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not any(module._in_clear for module in model.encrypted_modules.values()):
        model._check_text(signature(model.forward).bind(*args, **kwargs).arguments)


def get_encrypted_model(
    model: nn.Module,
    config: EncryptionConfig,
    *,
    example: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> EncryptedModel | EncryptedLinearModel:
    """Encrypt the modules of ``model`` that ``config`` names, and return it.

    The model is changed in place: it stays the same object, with a few methods more. With linear layers, of
    any architecture, it is an ``EncryptedLinearModel`` and ready to run; ``example`` is for models that take
    unusual arguments (see ``find_groups``). Otherwise next is ``model.compile(calibration_ids)``, or
    ``model.calibrate(calibration_ids)`` for its parameters alone. ``progress`` hears of each long step.

    Raises ``ValueError``, and changes nothing, if the model's architecture is not supported or if it lacks
    a module or head that ``config`` names.
    """
    if isinstance(model, (EncryptedModel, EncryptedLinearModel)):
        raise ValueError("this model is encrypted already: load the clear one again")
    if means_linear(model, config):
        return encrypt_linear(model, config, example, progress)
    return EncryptedModel.encrypt(model, config, progress=progress)
