"""A model of transformers some of whose modules run on encrypted data, whatever the scheme."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from cipherlm.linear.prefix import reading_new_tokens
from cipherlm.models.architecture import architecture_of
from cipherlm.models.config import EncryptionConfig
from cipherlm.models.drafts import bounded_drafts, drafts_asked, refuse_drafts
from cipherlm.models.eagle import DraftHead, HeadCandidates
from cipherlm.models.length import at_full_length, evaluated_tokens
from cipherlm.models.loading import load_model
from cipherlm.models.modules import MODES, EncryptedModule, FheMode, cache_of
from cipherlm.models.schemes import model_class_of
from cipherlm.models.targets import match
from cipherlm.progress import Progress, silent

if TYPE_CHECKING:
    from typing_extensions import Self

CalibrationIds = torch.Tensor | Sequence[torch.Tensor]


class EncryptedModel(nn.Module):
    """A causal language model of transformers some of whose modules run on encrypted data.

    Made by ``get_encrypted_model``: the class of the model is then a subclass of that of its scheme, which is
    one of this class, and of its own. Calls and ``generate`` are those of transformers.
    """

    config: Any
    device: torch.device
    base_model: Any
    generation_config: Any

    encryption_config: EncryptionConfig
    architectures: tuple[str, ...]
    """What the scheme can encrypt, by the ``model_type`` of transformers."""
    module_kind: str
    """What messages call a module that can be encrypted."""
    _clear_class: type[Any]
    _longest: int
    """How many tokens the text that is being generated may have, the prompt's with them."""

    @property
    def encrypted_modules(self) -> dict[str, EncryptedModule]:
        """The encrypted modules by name, in the model's order."""
        return {name: m for name, m in self.named_modules() if isinstance(m, EncryptedModule)}

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
        named = encrypted if modules is None else match(modules, list(encrypted), kind=self.module_kind)
        for name in named:
            encrypted[name].mode = fhe

    @property
    def is_calibrated(self) -> bool:
        """Whether the frozen parameters are there, so that the mode ``"disable"`` works."""
        return all(module.is_calibrated for module in self.encrypted_modules.values())

    @property
    def prefix(self) -> list[int]:
        """The ids of the public tokens that every text starts with, if the scheme knows such."""
        return []

    def with_prefix(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return token ids (n, tokens) with the public prefix before each text."""
        return torch.cat([self._prefix_rows(input_ids), input_ids], dim=1)

    @property
    @abstractmethod
    def room(self) -> int:
        """How many tokens a text and what follows may have together, the public prefix with them."""

    @property
    def most_drafts(self) -> int:
        """How many tokens of a draft one evaluation verifies at most."""
        return self.room

    @property
    @abstractmethod
    def is_elsewhere(self) -> bool:
        """Whether a server elsewhere computes, and so sees how often it is asked."""

    def generate(self, *args: Any, reveal_length: bool = False, **kwargs: Any) -> Any:
        """Continue token ids (n, tokens) as transformers' ``generate`` does.

        Where a server elsewhere computes, it is asked as often as the token budget allows (``max_new_tokens``
        or ``max_length``, rounded up by three tokens at most), whatever ends the text: it learns neither how
        long the text is nor when it ends. This returns when all has been evaluated, so that a text that ends
        early takes as long as one that does not. Every call then evaluates its whole prompt, also where the
        text before began as this one does. With ``reveal_length`` a generation ends with its text; see
        docs/security.md for what a server that cheats reads from that.

        Drafts (``prompt_lookup_num_tokens``, ``assistant_model``, which may be a ``DraftHead`` where all
        blocks are encrypted) have at most :attr:`most_drafts` tokens. Raises ``ValueError`` for drafts where
        lengths are not to be revealed.
        """
        own: Any = super()
        generate = own.generate
        if reveal_length or not self.is_elsewhere:
            if not drafts_asked(kwargs, self.generation_config):
                return generate(*args, **kwargs)
            bounded = bounded_drafts(kwargs, self.generation_config, self.most_drafts)
            with bounded as options, reading_new_tokens(self):
                return generate(*args, **options)
        refuse_drafts(kwargs, self.generation_config)
        self._longest = 0
        with self._hiding_length():
            return at_full_length(self, lambda: generate(*args, **kwargs), self._evaluated_tokens)

    @contextmanager
    def _hiding_length(self) -> Iterator[None]:
        yield

    def _evaluated_tokens(self) -> int:
        return evaluated_tokens(self._longest, len(self.prefix), self.room)

    @abstractmethod
    def calibrate(self, calibration_ids: CalibrationIds) -> None:
        """Choose the parameters on text and freeze them, in place of any there are.

        ``calibration_ids``: token ids (n, tokens), or a list of such and of (tokens,) for texts of different
        lengths. What encrypted modules see in the clear model sets their parameters.
        """

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
        self._save_frozen(save_directory)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str], *, progress: Progress = silent) -> Self:
        """Load what ``save_pretrained`` wrote: weights, configuration and frozen parameters.

        Raises ``FileNotFoundError`` if there is no encrypted model in ``directory``, and ``ValueError``,
        naming the file, if one is damaged.
        """
        config = EncryptionConfig.from_pretrained(directory)
        model = cls.encrypt(load_model(directory), config, progress=progress)
        model._load_frozen(directory)
        return model

    @abstractmethod
    def leave_to_server(self, parts: Mapping[str, Any]) -> None:
        """Drop the weights of encrypted modules, which a server has; ``parts`` are what a client has of each.

        Raises ``ValueError`` for those of another model.
        """

    @abstractmethod
    def _save_frozen(self, directory: str | os.PathLike[str]) -> None:
        """Write the frozen parameters, and let none of an earlier model stay behind."""

    @abstractmethod
    def _load_frozen(self, directory: str | os.PathLike[str]) -> None:
        """Read what :meth:`_save_frozen` wrote, if it was calibrated."""

    @classmethod
    def encrypt(cls, model: nn.Module, config: EncryptionConfig, *, progress: Progress = silent) -> Self:
        """Make ``model`` itself an encrypted one, as ``get_encrypted_model`` says."""
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        architecture_of(model_type or type(model).__name__)
        clear = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[str(model_type)]
        scheme = model_class_of(config.scheme)
        if model_type not in scheme.architectures:
            raise ValueError(
                f"cannot encrypt the architecture {model_type!r} with scheme={config.scheme!r}; "
                f"supported: {', '.join(scheme.architectures)}. Its linear layers can be encrypted: "
                'target_modules="linear"'
            )
        # A subclass would lose what it adds.
        if type(model) is not getattr(transformers, clear):
            raise ValueError(f"cannot encrypt a {type(model).__name__}, only a {clear}")
        # A class of one model, such as those of the published system, stays what it is.
        chosen: Any = (
            cls
            if issubclass(cls, PreTrainedModel)
            else _encrypted_class(cast(Any, scheme), cast(Any, type(model)))
        )
        if not (issubclass(chosen, scheme) and issubclass(chosen, type(model))):
            raise ValueError(f"cannot encrypt a {type(model).__name__} as a {cls.__name__}")
        encrypted: Self = chosen._encrypt(model, config, progress)
        return encrypted

    @classmethod
    @abstractmethod
    def _encrypt(cls, model: Any, config: EncryptionConfig, progress: Progress) -> Self:
        """Make ``model`` itself an encrypted one. All that can fail comes before the first change."""

    @classmethod
    def _replaced(
        cls, model: Any, config: EncryptionConfig, replacements: Mapping[str, EncryptedModule]
    ) -> Self:
        """Put encrypted modules in their places, by name, and return the model as one of this class."""
        for name, replacement in replacements.items():
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, replacement)
        # The same object under a class of the same layout, so that it stays what transformers made.
        model._clear_class = type(model)
        model.__class__ = cls
        assert isinstance(model, cls)
        model.encryption_config = config
        return model

    def _prefix_rows(self, input_ids: torch.Tensor) -> torch.Tensor:
        return input_ids.new_tensor(self.prefix).expand(len(input_ids), -1)

    @property
    def _positions(self) -> int:
        """How many tokens a text may have."""
        return int(self.config.max_position_embeddings)

    def _validate_generated_length(self, generation_config: Any, *args: Any, **kwargs: Any) -> None:
        """Refuse to generate past the room that there is before the first, costly, step.

        transformers calls this with the final ``max_length``, however it was given.
        """
        own: Any = super()
        own._validate_generated_length(generation_config, *args, **kwargs)
        self._longest = generation_config.max_length
        for module in self.encrypted_modules.values():
            # The last token is generated, but never read.
            module.check_ready(generation_config.max_length - 1)

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        """Return what proposes drafts: transformers asks for it, and knows no heads."""
        head, own = kwargs.get("assistant_model"), super()
        if not isinstance(head, DraftHead):
            return cast(Any, own)._get_candidate_generator(*args, **kwargs)
        if not self.encryption_config.is_whole:
            raise ValueError(
                "a DraftHead reads last hidden states: it is for models with all blocks encrypted"
            )
        return HeadCandidates(
            self, head, cache_of(kwargs["model_kwargs"]), kwargs["generation_config"].max_length
        )

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


@cache
def _encrypted_class(scheme: Any, clear: Any) -> Any:
    """Return the class that a model of a clear class gets with a scheme."""
    return type(f"Encrypted{clear.__name__}", (scheme, clear), {"__module__": __name__})
