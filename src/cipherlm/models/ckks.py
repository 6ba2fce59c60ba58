"""Models whose modules a CKKS server computes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from cipherlm.models.architecture import MODULES
from cipherlm.models.backends import Backend
from cipherlm.models.config import EncryptionConfig
from cipherlm.models.encrypted import CalibrationIds, EncryptedModel
from cipherlm.models.modules import cache_of, is_causal
from cipherlm.models.remote import (
    Exact,
    NotCalibratedError,
    Placement,
    Ranges,
    RemoteBlocks,
    RemoteModule,
    fingerprint,
)
from cipherlm.models.storage import delete_frozen, load_ranges, save_ranges
from cipherlm.models.targets import find_remote
from cipherlm.progress import Progress

if TYPE_CHECKING:
    from typing_extensions import Self


class CkksModel(EncryptedModel):
    """A model of transformers whose attention, MLPs, blocks or all blocks CKKS servers compute.

    The key-value cache of transformers says which tokens are new, and only these are evaluated; the keys and
    values of the others are on the server. Every text starts with the ids in ``prefix``, which
    ``with_prefix`` adds.
    """

    architectures = tuple(MODULES)
    module_kind = "encrypted module"

    placement: Placement
    """What is remote, and who computes it."""

    @property
    def remote_modules(self) -> dict[str, RemoteModule]:
        """The modules that servers compute, by name."""
        return {name: m for name, m in self.named_modules() if isinstance(m, RemoteModule)}

    @property
    def prefix(self) -> list[int]:
        """The ids of the public tokens that every text starts with."""
        return list(self.placement.prefix)

    @property
    def room(self) -> int:
        """See :class:`EncryptedModel`."""
        return self.placement.geometry.context

    @property
    def most_drafts(self) -> int:
        """See :class:`EncryptedModel`: the token before them goes with them."""
        return max(1, self.placement.geometry.tokens - 1)

    def connect(self, backend: Backend | None) -> None:
        """Let ``backend`` compute the remote modules in the mode ``"execute"``, as with a server elsewhere.

        None stands for a server in this process, with keys of its own, which is also what there is at first.
        """
        self.placement.connect(backend)

    @property
    def is_elsewhere(self) -> bool:
        """See :class:`EncryptedModel`."""
        modes = {module.mode for module in self.remote_modules.values()}
        return "execute" in modes and self.placement.is_connected

    @contextmanager
    def _hiding_length(self) -> Iterator[None]:
        with self.placement.hiding_length():
            yield

    def make_keys(self) -> float:
        """Make the keys for the mode ``"execute"`` in this process, and return the seconds it took.

        Otherwise the first call in that mode does so.
        """
        if not self.is_calibrated:
            raise NotCalibratedError("nothing is calibrated yet: call compile(calibration_ids)")
        return self.placement.make_keys()

    @property
    def fingerprint(self) -> str:
        """A hash of the weights of the remote modules and of the prefix."""
        return fingerprint(self.remote_modules, self.placement)

    def compile(self, calibration_ids: CalibrationIds | None = None, tokens: int | None = None) -> None:
        """Make ready to run: fit the polynomials, and print how many functions they stand for.

        Calibrates on ``calibration_ids`` first, but only if that has not happened. ``tokens`` may not exceed
        the configuration's ``context``. This takes the place of ``torch.nn.Module.compile``.
        """
        context = self.placement.geometry.context
        if tokens is not None and self._checked_tokens(None, tokens) > context:
            raise ValueError(f"tokens={tokens} is more than the configuration's context={context}")
        if not self.is_calibrated:
            if calibration_ids is None:
                raise NotCalibratedError("nothing is calibrated yet: call compile(calibration_ids)")
            self.calibrate(calibration_ids)
        count = sum(module.functions for module in self.remote_modules.values())
        print(f"Fitted {count} functions for contexts of up to {context} tokens")

    def calibrate(self, calibration_ids: CalibrationIds) -> None:
        """Find the ranges of what remote modules meet on text, fit polynomials to them, and drop older keys.

        ``calibration_ids``: token ids (n, tokens), or a list of such and of (tokens,) for texts of different
        lengths. The prefix is put before texts that lack it, and short ones are also joined to the length of
        the context.
        """
        texts = [self._prefixed(ids) for ids in self._checked_ids(calibration_ids)]
        if all(ids.shape[1] == len(self.prefix) for ids in texts):
            raise ValueError("calibration_ids has nothing behind the prefix")
        texts += self._joined(texts)
        remote = self.remote_modules
        exact = self._examined()
        with ExitStack() as stack, torch.no_grad():
            recorded = {name: stack.enter_context(module.recording()) for name, module in remote.items()}
            stack.enter_context(self.in_clear())
            for ids in texts:
                self.base_model(ids.to(self.device))
        ranges = {
            name: module.calibrated(exact[name], [text for inputs, _ in recorded[name] for text in inputs])
            for name, module in remote.items()
        }
        self._freeze(exact, ranges)

    def freeze(self, ranges: Mapping[str, Ranges]) -> None:
        """Use the ranges that an earlier calibration found, by module."""
        self._freeze(self._examined(), ranges)

    def _freeze(self, exact: Mapping[str, Exact], ranges: Mapping[str, Ranges]) -> None:
        self.placement.use(
            {name: module.freeze(exact[name], ranges[name]) for name, module in self.remote_modules.items()}
        )

    def leave_to_server(self, parts: Mapping[str, Exact]) -> None:
        """See :class:`EncryptedModel`; ``parts`` lack their modules. ``connect`` is to follow."""
        shape = (len(self.prefix), int(self.config.hidden_size))
        for name, module in self.remote_modules.items():
            outputs = parts[name].outputs
            if outputs.shape != shape:
                raise ValueError(f"{name} has outputs of {outputs.shape} at a prefix of {shape}")
            module.detach(parts[name])

    def _save_frozen(self, directory: str | os.PathLike[str]) -> None:
        delete_frozen(directory)
        save_ranges(directory, self.remote_modules, self.placement)

    def _load_frozen(self, directory: str | os.PathLike[str]) -> None:
        ranges = load_ranges(directory, self.remote_modules, self.placement)
        if ranges:
            self.freeze(ranges)

    @classmethod
    def _encrypt(cls, model: Any, config: EncryptionConfig, progress: Progress) -> Self:
        placement = Placement(config, model.config, progress)
        blocks = placement.architecture.blocks
        encrypted = cls._replaced(
            model,
            config,
            {
                name: (RemoteBlocks if name == blocks else RemoteModule)(name, module, placement)
                for name, module in find_remote(model, config).items()
            },
        )
        encrypted.placement = placement
        # Not a forward of its own: transformers reads the arguments of the model's from its signature.
        encrypted.register_forward_pre_hook(_check_call, with_kwargs=True)
        return encrypted

    def _joined(self, texts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return texts as long as the context, of short ones: scores over many keys have a wider range."""
        prefix, room = len(self.prefix), self.room - len(self.prefix)
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

    def _examined(self) -> dict[str, Exact]:
        """Return the exact arithmetic of remote modules, with what the clear model makes of the prefix."""
        remote = self.remote_modules
        with ExitStack() as stack, torch.no_grad():
            recorded = {name: stack.enter_context(module.recording()) for name, module in remote.items()}
            stack.enter_context(self.in_clear())
            self.base_model(torch.tensor([self.prefix], device=self.device))
        return {name: module.examine(*recorded[name][0]) for name, module in remote.items()}

    def _check_text(self, call: dict[str, Any]) -> None:
        """Refuse what the rows of hidden states cannot tell: another prefix, other positions, padding."""
        ids, mask = call.get("input_ids"), call.get("attention_mask")
        cache = cache_of(call | call.get("kwargs", {}))
        if cache is not None and not isinstance(cache, DynamicCache):
            raise ValueError(f"an encrypted model takes a DynamicCache here, not a {type(cache).__name__}")
        self.placement.past = past = 0 if cache is None else int(cache.get_seq_length())
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


def _check_call(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not any(module._in_clear for module in model.encrypted_modules.values()):
        model._check_text(signature(model.forward).bind(*args, **kwargs).arguments)


MODEL = CkksModel
