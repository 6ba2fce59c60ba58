"""Modules of a ``transformers`` model whose place a CKKS server takes, and what they share."""

from __future__ import annotations

import hashlib
import inspect
import json
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache

from cipherlm.engine import SecretKey
from cipherlm.models.architecture import architecture_of
from cipherlm.models.backends import Backend, Simulated, TextLost
from cipherlm.models.config import EncryptionConfig
from cipherlm.models.geometry import geometry_of, public_prefix
from cipherlm.models.length import bounded
from cipherlm.models.modules import EncryptedModule, FheMode, Float64, cache_of, to_numpy
from cipherlm.nn.blocks import attention_layers, calibrated, prefixes
from cipherlm.nn.module import Module, Nonlinearity
from cipherlm.nn.ranges import Interval
from cipherlm.nn.tensor import Prefix
from cipherlm.progress import Progress, counted, silent
from cipherlm.schemes.ckks.session import Hosted, InProcess, Server
from cipherlm.schemes.ckks.traffic import MeteredClient, Traffic

Ranges = Mapping[str, Interval]


class NotCalibratedError(RuntimeError):
    """A model is asked to compute before it has seen any text."""


class Placement:
    """What is remote in one model, with which polynomials, and who computes it in each mode."""

    def __init__(self, config: EncryptionConfig, model_config: Any, progress: Progress = silent) -> None:
        self.progress = progress
        self.architecture = architecture_of(model_config.model_type)
        self.args = self.architecture.args.of(model_config.to_dict())
        self.prefix = public_prefix(config, model_config)
        self.geometry = geometry_of(config, self.args, self.prefix)
        self.modules: dict[str, Hosted] = {}
        self.hides_length = False
        self.past = 0
        """How many tokens of a text came before those that the model is called with."""
        self._connected: Backend | None = None
        self._client: MeteredClient | None = None
        self._backends: dict[FheMode, Backend] = {}

    def use(self, modules: Mapping[str, Hosted]) -> None:
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
    def hiding_length(self) -> Iterator[None]:
        """Let what is asked for depend on the lengths of texts alone, for as long as the context lasts."""
        self.hides_length = True
        try:
            yield
        finally:
            self.hides_length = False

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

    module: Module | None
    """None where its weights are with a server."""
    prefixes: list[Prefix]
    outputs: Float64
    """The outputs (tokens, width) at the prefix."""
    centred: bool
    """Whether inputs have to have a mean of zero, and outputs lack theirs."""
    extra: int | None
    """How many values the clear module returns beside hidden states; None if it returns no tuple."""


@dataclass(frozen=True, eq=False)
class _Text:
    """The text whose keys and values a backend has: whose it is, and what was sent, from the prefix on."""

    backend: Backend
    cache: weakref.ref[DynamicCache]
    row: int
    sent: Float64


class RemoteModule(EncryptedModule):
    """Takes the place of attention, an MLP or a block: the same weights and names, the same call.

    Hidden states go to whoever computes the module. transformers' key-value cache has, in place of keys and
    values, the hidden states that went in and came out: with a cache only new tokens are sent, and where the
    other side has lost a text, all of it is there to be sent again. Without a cache each call is a new text.
    Rows of the public prefix do not go anywhere; their results are those of the clear module.

    Where layer normalisation ignores the mean of hidden states, they are sent without it. What comes back
    lacks its mean for the same reason. The mean of the input stands in for it, so that hidden states stay of
    the kind that a reader expects; nothing in the model depends on it.
    """

    def __init__(self, name: str, target: nn.Module, placement: Placement) -> None:
        super().__init__(name, placement.progress)
        self.placement = placement
        self.exact: Exact | None = None
        self.ranges: dict[str, Interval] | None = None
        # The submodules themselves, so that parameters keep their names in the model's state dict. The
        # module around them stays out of it.
        for child, module in target.named_children():
            self.add_module(child, module)
        self._target = (target,)
        first = next(iter(target)) if isinstance(target, nn.ModuleList) else target
        self._signature = inspect.signature(first.forward)
        self.train(target.training)
        self._recorded: list[tuple[Float64, Any]] | None = None
        self._text: _Text | None = None
        # Without weights, to tell what there is in it.
        outline = placement.architecture.make(name, placement.args)
        self.range_names = outline.range_names
        self.functions = sum(1 for _ in outline.named(Nonlinearity))
        block = name.removeprefix(f"{placement.architecture.blocks}.").partition(".")[0]
        self.layer_index = int(block) if block.isdecimal() else 0
        self.is_stateless = not attention_layers(outline)

    @property
    def target(self) -> nn.Module:
        """The clear module."""
        return self._target[0]

    @property
    def is_calibrated(self) -> bool:
        """Whether the polynomials are there."""
        return self.ranges is not None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the clear module does, for hidden states (batch, tokens, width)."""
        call = self._signature.bind(*args, **kwargs).arguments
        hidden_states: torch.Tensor = next(iter(call.values()))
        if self._in_clear:
            output = self.clear(*args, **kwargs)
            if self._recorded is not None:
                self._recorded.append((to_numpy(hidden_states), output))
            return output
        options = call | call.get("kwargs", {})
        cache = None if self.is_stateless else cache_of(options)
        past = self._past(cache)
        self.check_call(
            hidden_states.shape[1],
            options.get("attention_mask"),
            options.get("head_mask"),
            0 if past is None else past.shape[1],
        )
        assert self.exact is not None  # check_call
        rows = to_numpy(hidden_states)
        results = np.stack([self._sequence(new, past, cache, row) for row, new in enumerate(rows)])
        hidden = torch.from_numpy(results).to(hidden_states)
        if cache is not None:
            cache.update(torch.from_numpy(rows)[:, None], hidden[:, None], self.layer_index)
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
        architecture, args = self.placement.architecture, self.placement.args
        module = architecture.make(self.name, args)
        state = {key: to_numpy(tensor) for key, tensor in self.target.state_dict().items()}
        module.load(module.sanitize(state))
        outputs = output[0] if isinstance(output, tuple) else output
        centred = architecture.is_centred(self.name)
        return Exact(
            module,
            prefixes(module, _centred(inputs[0]) if centred else inputs[0]),
            to_numpy(outputs)[0],
            centred,
            len(output) - 1 if isinstance(output, tuple) else None,
        )

    def calibrated(self, exact: Exact, texts: Iterable[Float64]) -> dict[str, Interval]:
        """Return the ranges met on inputs (tokens, width), that of the prefix among them."""
        assert exact.module is not None
        behind = (text[self.placement.geometry.prefix :] for text in texts)
        return calibrated(
            exact.module, (_centred(x) if exact.centred else x for x in behind if len(x)), exact.prefixes
        )

    def freeze(self, exact: Exact, ranges: Ranges) -> Hosted:
        """Fit polynomials to ranges, and return what a server computes."""
        assert exact.module is not None
        fitted = exact.module.fitted(ranges, self.placement.geometry.context)
        self.exact, self.ranges, self._text = exact, dict(ranges), None
        return Hosted(fitted, exact.prefixes)

    def detach(self, exact: Exact) -> None:
        """Drop the weights: a backend that the model is connected to has them. ``exact`` has none either."""
        for child in [name for name, _ in self.named_children()]:
            delattr(self, child)
        self.exact, self.ranges = exact, {}

    def extra_repr(self) -> str:
        """Say in ``print(model)`` that this is encrypted."""
        return f"scheme=ckks, mode={self.mode}"

    def _past(self, cache: Any) -> Float64 | None:
        """Return the hidden states (batch, tokens, width) that a cache has of earlier calls."""
        if cache is None:
            return None
        if not isinstance(cache, DynamicCache):
            raise ValueError(f"an encrypted model takes a DynamicCache, not a {type(cache).__name__}")
        if len(cache.layers) <= self.layer_index or not cache.get_seq_length(self.layer_index):
            return None
        layer: Any = cache.layers[self.layer_index]
        return to_numpy(layer.keys)[:, 0]

    def _sequence(self, new: Float64, past: Float64 | None, cache: Any, row: int) -> Float64:
        """Return the outputs (tokens, width) of the new rows of one text."""
        assert self.exact is not None
        prefix = self.placement.geometry.prefix
        before = new[:0] if past is None else past[row]
        start = self.placement.past if self.is_stateless else len(before)
        known = self.exact.outputs[start : start + len(new)]
        rows = new[len(known) :] if self.is_stateless else np.concatenate([before, new])[prefix:]
        if not len(rows):
            return known
        if self.placement.hides_length:
            rows = bounded(rows)
        count = len(new) - len(known)
        centred = _centred(rows) if self.exact.centred else rows
        outputs = self._evaluated(centred, count, cache, row) + (rows - centred)[len(rows) - count :]
        return np.concatenate([known, outputs])

    def _evaluated(self, rows: Float64, count: int, cache: Any, row: int) -> Float64:
        """Return the outputs for the last rows of a text; those before them may have been sent already."""
        backend = self.placement.backend(self.mode)
        if self.is_stateless:
            return self._pieces(backend, rows)
        seen = len(rows) - count
        # A server that sees to where it is taken back sees where the text before ended.
        text, self._text = self._text, None  # what fails here starts anew
        goes_on = (
            seen > 0
            and text is not None
            and (text.backend, text.cache(), text.row) == (backend, cache, row)
            and (seen == len(text.sent) or (seen < len(text.sent) and not self.placement.hides_length))
            and np.array_equal(text.sent[:seen], rows[:seen])
        )
        outputs = self._asked(backend, rows, seen if goes_on else 0)
        if cache is not None:
            self._text = _Text(backend, weakref.ref(cache), row, rows)
        return outputs[len(outputs) - count :]

    def _pieces(self, backend: Backend, rows: Float64) -> Float64:
        """Return the outputs of rows that do not depend on each other: each piece is a text of its own."""
        room = self.placement.geometry.tokens - self.placement.geometry.start
        return np.concatenate(
            [self._asked(backend, rows[first : first + room]) for first in range(0, len(rows), room)]
        )

    def _asked(self, backend: Backend, rows: Float64, seen: int = 0) -> Float64:
        """Return the outputs for rows that were not ``seen``, or for all of them if their text was lost."""
        try:
            return self._ask(backend, rows[seen:], seen)
        except TextLost:  # once: a new session may be lost as well
            return self._ask(backend, rows, 0)

    def _ask(self, backend: Backend, rows: Float64, seen: int) -> Float64:
        progress = self.progress if self.mode == "execute" else silent
        start = self.placement.geometry.prefix + seen
        with counted(progress, f"evaluating {self.name}", "block") as report:
            pieces = [
                backend.evaluate(self.name, rows[first:end], start + first, report)
                for first, end in self._asked_together(start, len(rows))
            ]
        outputs = np.concatenate(pieces)
        if outputs.shape != rows.shape:
            raise ValueError(f"{self.name}: {outputs.shape} came back for hidden states of {rows.shape}")
        return outputs

    def _asked_together(self, start: int, count: int) -> Iterator[tuple[int, int]]:
        """Yield first and last of the rows that a backend is asked for at once.

        All of them, unless lengths are hidden: then chunks behind others are full or have one token, so that
        the end of a prompt looks like the tokens behind it.
        """
        if not self.placement.hides_length:
            yield 0, count
            return
        geometry, full = self.placement.geometry, list[tuple[int, int]]()
        for position, size in geometry.chunks(start, count):
            if position > geometry.prefix and size < geometry.tokens:
                break
            full.append((position - start, position - start + size))
        done = full[-1][1] if full else 0
        if full and geometry.goes_together(start, done):
            full = [(0, done)]
        yield from full
        yield from ((row, row + 1) for row in range(done, count))


class RemoteBlocks(RemoteModule):
    """All blocks of a model as one remote module: in the model's loop over its blocks it is the only one."""

    def clear(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the blocks do, one after the other."""
        name = next(iter(self._signature.parameters))
        args, kwargs = (args, kwargs) if args else ((kwargs.pop(name),), kwargs)
        hidden_states, *others = args
        output: Any = hidden_states
        for block in self.target.children():
            output = block(hidden_states, *others, **kwargs)
            hidden_states = output[0] if isinstance(output, tuple) else output
        return output

    def __iter__(self) -> Iterator[RemoteBlocks]:
        return iter([self])

    def __len__(self) -> int:
        return len(list(self.children()))

    def __getitem__(self, index: int | slice) -> list[RemoteBlocks]:
        """Return this module in a list for a slice of all blocks. Raises ``ValueError`` for any other index.

        Single blocks are not handed out: they would compute in the clear.
        """
        if isinstance(index, slice) and index.indices(len(self.target)) == (0, len(self.target), 1):  # type: ignore[arg-type]
            return [self]
        raise ValueError(f"{self.name} is encrypted as a whole: its blocks cannot be used one by one")


def fingerprint(modules: Mapping[str, RemoteModule], placement: Placement) -> str:
    """Return a hash of what remote modules compute before calibration: their weights and the prefix."""
    digest = hashlib.sha256()
    about = [asdict(placement.args), placement.prefix, list(modules)]
    digest.update(json.dumps(about, sort_keys=True).encode())
    for name, module in modules.items():
        for key, tensor in module.state_dict().items():
            digest.update(f"{name}.{key}{list(tensor.shape)}".encode())
            digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def _centred(rows: Float64) -> Float64:
    centred: Float64 = rows - rows.mean(axis=-1, keepdims=True)
    return centred
