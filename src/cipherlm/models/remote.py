"""Modules of a ``transformers`` model whose place a CKKS server takes, and what they share."""

from __future__ import annotations

import hashlib
import inspect
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from cipherlm.engine import SecretKey
from cipherlm.models.ckks import (
    Backend,
    BlockRanges,
    Part,
    Simulated,
    TextLost,
    function_names,
    part_of,
)
from cipherlm.models.config import EncryptionConfig
from cipherlm.models.geometry import geometry_of, public_prefix
from cipherlm.models.length import bounded
from cipherlm.models.modules import EncryptedModule, FheMode, Float64, cache_of, to_numpy
from cipherlm.progress import Progress, counted, silent
from cipherlm.schemes.ckks.session import InProcess, Module, Server
from cipherlm.schemes.ckks.tensor import KeyValue
from cipherlm.schemes.ckks.traffic import MeteredClient, Traffic

CalibratedRanges = Mapping[str, Sequence[BlockRanges]]
SAME = 1e-5
"""How far rows may differ, in units of their largest value, and still be those of the same text."""


class NotCalibratedError(RuntimeError):
    """A model is asked to compute before it has seen any text."""


class Placement:
    """What is remote in one model, with which polynomials, and who computes it in each mode."""

    def __init__(self, config: EncryptionConfig, model_config: Any, progress: Progress = silent) -> None:
        self.progress = progress
        self.prefix = public_prefix(config, model_config)
        self.geometry = geometry_of(config, model_config)
        self.modules: dict[str, Module] = {}
        self.hides_length = False
        self._connected: Backend | None = None
        self._client: MeteredClient | None = None
        self._backends: dict[FheMode, Backend] = {}

    def use(self, modules: Mapping[str, Module]) -> None:
        """Compute these from now on: what a server evaluates, by name."""
        self.modules = dict(modules)
        self._backends, self._client = {}, None

    def connect(self, backend: Backend | None) -> None:
        """Let ``backend`` compute in the mode ``"execute"``, or with None a server in this process."""
        self._connected = backend

    @property
    def is_connected(self) -> bool:
        """Whether a backend elsewhere computes."""
        return self._connected is not None

    @contextmanager
    def hiding_length(self, modules: Iterable[RemoteModule]) -> Iterator[None]:
        """Let what is asked for depend on the lengths of texts alone, for as long as the context lasts."""
        modules = list(modules)
        self.hides_length = True
        try:
            for module in modules:
                module.forget()
            yield
        finally:
            self.hides_length = False
            # Behind the text are tokens that do not belong to it.
            for module in modules:
                module.forget()

    def backend(self, mode: FheMode) -> Backend:
        """Return who computes in a mode. A server in this process, and its keys, are made here."""
        if mode == "execute" and self._connected is not None:
            return self._connected
        if not self.modules:
            raise RuntimeError("nothing is here to compute remote modules with: connect a backend")
        if mode not in self._backends:
            if mode == "execute":
                with self.progress("making keys"):
                    secret_key = SecretKey.generate(self.geometry.parameters)
                    self._client = MeteredClient(secret_key, self.geometry)
                    self._backends[mode] = InProcess(Server(self.modules, self.geometry), self._client)
            else:
                self._backends[mode] = Simulated(self.modules, self.geometry, noise=mode == "simulate")
        return self._backends[mode]

    def make_keys(self) -> float:
        """Make the keys for ``"execute"`` in this process, and return the seconds it took."""
        start = time.perf_counter()
        self.backend("execute")
        return time.perf_counter() - start

    @property
    def traffic(self) -> Traffic:
        """What has gone between client and server in this process."""
        return self._client.traffic if self._client is not None else Traffic()


@dataclass(frozen=True, eq=False)
class Exact:
    """A remote module before its polynomials: what can be told of it from the clear model alone."""

    part: Part
    prefix: list[KeyValue]
    outputs: Float64
    """The outputs (tokens, width) at the prefix."""
    extra: int | None
    """How many values the clear module returns beside hidden states; None if it returns no tuple."""


@dataclass(frozen=True, eq=False)
class _Text:
    """What a backend has seen of a text, from behind the prefix on."""

    backend: Backend
    rows: Float64
    outputs: Float64


class RemoteModule(EncryptedModule):
    """Takes the place of attention, an MLP or a block: the same weights and names, the same call.

    Hidden states go to whoever computes the module, row by row: those of a text that it has seen already stay
    here with their results. Rows of the public prefix do not go anywhere; their results are those of the
    clear module.

    A block, and all blocks as one, get hidden states without their mean, which layer normalisation ignores.
    What they return lacks its mean for the same reason. The mean of the input stands in for it, so that
    hidden states stay of the kind that a reader expects; nothing in the model depends on it.
    """

    def __init__(self, name: str, target: nn.Module, placement: Placement, config: Any) -> None:
        super().__init__(name, placement.progress)
        self.placement = placement
        self.exact: Exact | None = None
        self.ranges: list[BlockRanges] | None = None
        # The submodules themselves, so that parameters keep their names in the model's state dict. The
        # module around them stays out of it.
        for child, module in target.named_children():
            self.add_module(child, module)
        self._target, self._config = (target,), config
        first = next(iter(target)) if isinstance(target, nn.ModuleList) else target
        self._signature = inspect.signature(first.forward)
        self.train(target.training)
        self._recorded: list[tuple[Float64, Any]] | None = None
        self._text: _Text | None = None

    @property
    def target(self) -> nn.Module:
        """The clear module."""
        return self._target[0]

    @property
    def is_calibrated(self) -> bool:
        """Whether the polynomials are there."""
        return self.ranges is not None

    @property
    def functions(self) -> list[tuple[str, ...]]:
        """The names of the ranges that calibration finds, block by block."""
        return function_names(self.target)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the clear module does, for hidden states (batch, tokens, width)."""
        call = self._signature.bind(*args, **kwargs).arguments
        hidden_states: torch.Tensor = call["hidden_states"]
        if self._in_clear:
            output = self.clear(*args, **kwargs)
            if self._recorded is not None:
                self._recorded.append((to_numpy(hidden_states), output))
            return output
        self.check_call(
            hidden_states.shape[1],
            cache_of(call | call.get("kwargs", {})),
            call.get("attention_mask"),
            call.get("head_mask"),
        )
        assert self.exact is not None  # check_call
        results = np.stack([self._sequence(rows) for rows in self._separate(to_numpy(hidden_states))])
        hidden = torch.from_numpy(results).to(hidden_states)
        return hidden if self.exact.extra is None else (hidden, *[None] * self.exact.extra)

    def clear(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the clear module does."""
        return self.target(*args, **kwargs)

    def check_ready(self, tokens: int) -> None:
        """Raise unless a sequence of ``tokens`` can run.

        ``NotCalibratedError`` before calibration, ``ValueError`` for more tokens than the context.
        """
        if self._in_clear:
            return
        if not self.is_calibrated:
            raise NotCalibratedError(f"{self.name} is not calibrated: call compile(calibration_ids) first")
        context = self.placement.geometry.context
        if tokens > context:
            raise ValueError(
                f"{tokens} tokens are more than the context of {context}: encrypt with "
                f"EncryptionConfig(..., context={tokens})"
            )

    @contextmanager
    def recording(self) -> Iterator[list[tuple[Float64, Any]]]:
        """Collect inputs (batch, tokens, width) and outputs of the clear module."""
        recorded: list[tuple[Float64, Any]] = []
        self._recorded = recorded
        try:
            yield recorded
        finally:
            self._recorded = None

    def examine(self, inputs: Float64, output: Any) -> Exact:
        """Return the exact module, from its inputs (1, tokens, width) and output at the prefix."""
        part = part_of(self.target, self._config)
        outputs = output[0] if isinstance(output, tuple) else output
        return Exact(
            part,
            part.keys_values(self._centred(part, inputs[0])),
            to_numpy(outputs)[0],
            len(output) - 1 if isinstance(output, tuple) else None,
        )

    def calibrated(self, exact: Exact, texts: Sequence[Float64]) -> list[BlockRanges]:
        """Return the ranges met on inputs (tokens, width), that of the prefix among them."""
        prefix = self.placement.geometry.prefix
        behind = (self._centred(exact.part, text[prefix:]) for text in texts)
        return exact.part.calibrated(behind, exact.prefix)

    def freeze(self, exact: Exact, ranges: Sequence[BlockRanges]) -> Module:
        """Fit polynomials to ranges, and return what a server computes."""
        fitted = exact.part.fitted(ranges, self.placement.geometry.context)
        self.exact, self.ranges, self._text = exact, list(ranges), None
        return Module(fitted, exact.prefix)

    def detach(self, exact: Exact) -> None:
        """Drop the weights: a backend that the model is connected to has them. ``exact`` has none either."""
        for child in [name for name, _ in self.named_children()]:
            delattr(self, child)
        self.exact, self.ranges = exact, []

    def extra_repr(self) -> str:
        """Say in ``print(model)`` that this is encrypted."""
        return f"scheme=ckks, mode={self.mode}"

    def forget(self) -> None:
        """Start the next text anew, whatever it begins with."""
        self._text = None

    def _separate(self, batch: Float64) -> Iterator[Float64]:
        """Yield the texts (tokens, width) of a batch."""
        for rows in batch:
            if self.placement.hides_length:
                if len(batch) > 1:  # whether two texts begin in the same way depends on what is in them
                    self.forget()
                rows = bounded(rows)
            yield rows

    @staticmethod
    def _centred(part: Part, rows: Float64) -> Float64:
        return rows - rows.mean(axis=-1, keepdims=True) if part.centred else rows

    def _sequence(self, rows: Float64) -> Float64:
        """Return the outputs (tokens, width) of one text."""
        assert self.exact is not None
        prefix = self.placement.geometry.prefix
        behind = rows[prefix:]
        if not len(behind):
            return self.exact.outputs[: len(rows)]
        centred = self._centred(self.exact.part, behind)
        outputs = self._evaluated(centred) + (behind - centred)
        return np.concatenate([self.exact.outputs, outputs])

    def _evaluated(self, rows: Float64) -> Float64:
        """Return the outputs for rows behind the prefix, of which those that were not there yet are sent."""
        backend = self.placement.backend(self.mode)
        text, self._text = self._text, None  # what fails here starts anew
        if text is None or text.backend is not backend or not _go_together(text.rows, rows):
            text = _Text(backend, rows[:0], rows[:0])
        if len(rows) <= len(text.rows):
            self._text = text
            return text.outputs[: len(rows)]
        seen = len(text.rows)
        try:
            new = self._ask(backend, rows[seen:], seen)
        except TextLost:  # once: a new session may be lost as well
            seen, text = 0, _Text(backend, rows[:0], rows[:0])
            new = self._ask(backend, rows, 0)
        # Later rows are compared with what was sent.
        sent = np.concatenate([text.rows, rows[seen:]])
        self._text = _Text(backend, sent, np.concatenate([text.outputs, new]))
        return self._text.outputs

    def _ask(self, backend: Backend, rows: Float64, seen: int) -> Float64:
        progress = self.progress if self.mode == "execute" else silent
        with counted(progress, f"evaluating {self.name}", "block") as report:
            outputs = backend.evaluate(self.name, rows, self.placement.geometry.prefix + seen, report)
        if outputs.shape != rows.shape:
            raise ValueError(f"{self.name}: {outputs.shape} came back for hidden states of {rows.shape}")
        return outputs


class RemoteBlocks(RemoteModule):
    """All blocks of a model as one remote module: in the model's loop over its blocks it is the only one."""

    def clear(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what the blocks do, one after the other."""
        output: Any = hidden_states
        for block in self.target.children():
            output = block(hidden_states, *args, **kwargs)
            hidden_states = output[0] if isinstance(output, tuple) else output
        return output

    def __iter__(self) -> Iterator[RemoteBlocks]:
        return iter([self])

    def __len__(self) -> int:
        return len(list(self.children()))

    def __getitem__(self, index: int) -> nn.Module:
        return list(self.children())[index]


def fingerprint(modules: Mapping[str, RemoteModule], placement: Placement) -> str:
    """Return a hash of what remote modules compute before calibration: their weights and the prefix."""
    digest = hashlib.sha256()
    config = next(iter(modules.values()))._config
    names = ("n_head", "layer_norm_epsilon", "activation_function", "scale_attn_weights")
    about = {name: getattr(config, name) for name in (*names, "scale_attn_by_inverse_layer_idx")}
    digest.update(json.dumps([about, placement.prefix, list(modules)]).encode())
    for name, module in modules.items():
        for key, tensor in module.state_dict().items():
            digest.update(f"{name}.{key}{list(tensor.shape)}".encode())
            digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def _go_together(known: Float64, rows: Float64) -> bool:
    """Say whether one is the beginning of the other, to within what torch may compute differently."""
    shared = min(len(known), len(rows))
    scale = np.abs(rows[:shared]).max(initial=0.0)
    return np.allclose(known[:shared], rows[:shared], rtol=0, atol=SAME * scale)
