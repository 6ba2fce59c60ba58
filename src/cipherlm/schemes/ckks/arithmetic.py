"""What encrypted tensors compute with: encoded weights and masks, keys, refresh."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from cipherlm.engine import (
    Chebyshev,
    Ciphertext,
    Held,
    LinearTransformation,
    Parameters,
    Plaintext,
    Subring,
    threads,
)
from cipherlm.engine.linear import Storage
from cipherlm.nn.module import Linear
from cipherlm.nn.rotary import Rotary
from cipherlm.nn.tensor import Prefix
from cipherlm.schemes.ckks.evaluator import Evaluator
from cipherlm.schemes.ckks.layout import ATTENTION_LEVEL, Layout
from cipherlm.schemes.ckks.refresh import MASK_LEVEL, Refresher

Float64 = NDArray[np.float64]
A = TypeVar("A")
B = TypeVar("B")


class Scaled(NamedTuple):
    """A real ciphertext, the scale that a refresh is to bring it near, and how often its slots repeat."""

    ciphertext: Ciphertext
    scale: float
    copies: int = 1


PLAIN_SHIFT, MAPPING_SHIFT = 8, 16
"""The bits by which a refresh divides: one number where scales stay near the default one, another before
polynomials, whose intervals scales may map. They are fixed, so that a request tells nothing of ranges.

A ciphertext is given its scale by a product with an integer, 2^shift times the ratio of the scales.
"""

RECENT = 32
"""How many encodings are kept that depend on positions: those of a few texts that are computed at a time."""

MOST_TOGETHER = 32
"""How many ciphertexts are refreshed in one round trip at most: a message has to hold them."""

LEAST_FACTOR = 2
"""The least of them. Below 8 it may miss a scale by so much that a polynomial takes one more level."""


class Encodings:
    """Clear weights and masks made ready for ciphertexts, once for all clients.

    They are encoded where they are first used, and kept: matrices for as long as their weights.
    """

    def __init__(self, parameters: Parameters, layout: Layout, *, storage: Storage = "int32") -> None:
        self.parameters, self.layout, self.storage = parameters, layout, storage
        self._layers: WeakKeyDictionary[Linear | Prefix, _Layer] = WeakKeyDictionary()
        self._kept: dict[Any, Any] = {}
        self._recent: OrderedDict[Any, Any] = OrderedDict()
        self._lock = threading.RLock()

    def layer(self, owner: Linear | Prefix) -> _Layer:
        """Return what is kept with clear weights, or with the keys and values of a prefix."""
        with self._lock:
            return self._layers.setdefault(owner, _Layer(self))

    def recent(self, key: Any, make: Callable[[], A]) -> A:
        """Return what belongs to a key, made anew where more than :data:`RECENT` others came in between."""
        with self._lock:
            value: A = self._recent.pop(key) if key in self._recent else make()
            self._recent[key] = value
            if len(self._recent) > RECENT:
                self._recent.popitem(last=False)
            return value

    def keep(self, key: Any, make: Callable[[], A]) -> A:
        """Return what belongs to a key, made on the first call."""
        with self._lock:
            if key not in self._kept:
                self._kept[key] = make()
            kept: A = self._kept[key]
            return kept

    def kept(self) -> list[Any]:
        """Return all masks and other encodings that :meth:`keep` has made."""
        with self._lock:
            return list(self._kept.values())

    def encode(self, slots: Float64 | NDArray[np.complex128], level: int, scale: float) -> Plaintext:
        """Encode what is to be added to ciphertexts of a level and a scale."""
        return Plaintext.encode(self.parameters, slots, level, scale)

    def mask(self, slots: Float64, level: int) -> Plaintext:
        """Encode what ciphertexts of a level are to be multiplied with: their scale stays."""
        return self.encode(slots, level, float(self.parameters.q[level]))

    def transformation(
        self,
        diagonals: Iterable[tuple[int, NDArray[Any]]],
        *,
        level: int,
        giant_step: int,
        scale: float | None = None,
        storage: Storage | None = None,
        stages: tuple[int, int] | None = None,
    ) -> LinearTransformation:
        """Encode a matrix by its diagonals; see :class:`~cipherlm.engine.LinearTransformation`.

        They are kept as this object's ``storage`` says, unless another is given.
        """
        return LinearTransformation(
            self.parameters,
            diagonals,
            level=level,
            giant_step=giant_step,
            storage=storage or self.storage,
            scale=scale,
            stages=stages,
        )

    def key_masks(self, rotary: Rotary | None, position: int) -> list[list[Plaintext]]:
        """Return the encoded masks of keys; see :meth:`Layout.key_masks`."""
        return self.keep(
            ("keys", rotary, position), lambda: self._masks(self.layout.key_masks(rotary, position))
        )

    def value_masks(self, start: int) -> list[list[Plaintext]]:
        """Return the encoded masks of values; see :meth:`Layout.value_masks`."""
        return self.keep(("values", start), lambda: self._masks(self.layout.value_masks(start)))

    def _masks(self, masks: Iterable[list[Float64]]) -> list[list[Plaintext]]:
        return [[self.mask(mask, ATTENTION_LEVEL - 1) for mask in row] for row in masks]


class Arithmetic:
    """What encrypted tensors of one client share: keys, refresh, and the server's encoded weights.

    ``refreshes`` counts the ciphertexts that were refreshed, ``round_trips`` how often.
    """

    alone = True
    """Whether no chunks are computed beside this one."""

    def __init__(self, evaluator: Evaluator, encodings: Encodings, refresher: Refresher) -> None:
        self.encodings = encodings
        self.parameters: Parameters = evaluator.parameters
        self.refreshes = self.round_trips = 0
        self._evaluator: Evaluator | None = evaluator
        self._refresher: Refresher | None = refresher
        self._pool = ThreadPoolExecutor(threads())

    @property
    def evaluator(self) -> Evaluator:
        """What computes, with a client's keys. Raises ``RuntimeError`` while they are released."""
        if self._evaluator is None:
            raise RuntimeError("the evaluation keys were released: load them first")
        return self._evaluator

    @property
    def has_keys(self) -> bool:
        """Whether there is something to compute with."""
        return self._evaluator is not None

    def release_keys(self) -> None:
        """Drop the keys. Tensors that refer to this can be computed with again after :meth:`use`."""
        self._evaluator = self._refresher = None

    def use(self, evaluator: Evaluator, refresher: Refresher) -> None:
        """Compute with these from now on: keys of the same client."""
        self._evaluator, self._refresher = evaluator, refresher

    @property
    def layout(self) -> Layout:
        """The packing."""
        return self.encodings.layout

    def each(self, function: Callable[[A], B], items: Iterable[A]) -> list[B]:
        """Apply a function, to the first item in this thread and to others in threads of their own."""
        first, *others = [*items]
        futures = [self._pool.submit(function, item) for item in others]
        try:
            return [function(first), *(future.result() for future in futures)]
        finally:
            for future in futures:
                future.cancel()

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=False)

    def transformed(
        self, ciphertext: Ciphertext, matrices: Sequence[LinearTransformation]
    ) -> list[Ciphertext]:
        """Return what matrices of clear weights make of a ciphertext."""
        return [row[0] for row in self.evaluator.transform_many([ciphertext], matrices)]

    def wait(self, until: Callable[[], bool]) -> None:
        """Wait for what tensors beside these compute: there are none here."""
        assert until()

    def changed(self) -> None:
        """Tell those beside that something is there that they may wait for."""

    def scale_before(self, polynomial: Chebyshev) -> float:
        """Return the scale at which a polynomial's interval costs no level."""
        low, high = polynomial.interval
        return self.parameters.scale * 2 / (high - low)

    def refresh(self, real: Sequence[Scaled], level: int, shift: int = PLAIN_SHIFT) -> list[Ciphertext]:
        """Return real ciphertexts at a level and near the given scales.

        Two travel as real and imaginary part of one. Raises ``ValueError`` for a scale that is too far below
        that of its ciphertext.
        """
        return self.refresh_together(real, [], level, shift)[0]

    def refresh_complex(self, ciphertexts: Sequence[Ciphertext], level: int) -> list[Ciphertext]:
        """Return ciphertexts of complex numbers at a level, each with its scale."""
        return self.refresh_together([], ciphertexts, level, PLAIN_SHIFT)[1]

    def refresh_together(
        self, real: Sequence[Scaled], others: Sequence[Ciphertext], level: int, shift: int
    ) -> tuple[list[Ciphertext], list[Ciphertext]]:
        """Return real ciphertexts near their scales, and complex ones with theirs, all at a level.

        Raises ``ValueError`` as :meth:`refresh` does.
        """
        evaluator = self.evaluator
        # Those that repeat as often are best together: what travels repeats as seldom as either.
        order = sorted(range(len(real)), key=lambda index: real[index].copies)
        pairs = [_Pair([(index, real[index]) for index in order[i : i + 2]]) for i in range(0, len(order), 2)]
        sent = [pair.joined(evaluator, shift) for pair in pairs]
        for ciphertext in others:
            dropped = evaluator.drop_level(ciphertext, MASK_LEVEL)
            sent.append(evaluator.multiply(dropped, 2**shift, out=dropped))
        held = [*(pair.held for pair in pairs), *[[Subring()]] * len(others)]
        fresh = iter(self._exchange(sent, held, level, shift))
        parts: dict[int, Ciphertext] = {}
        for pair in pairs:
            parts.update(pair.apart(evaluator, [next(fresh) for _ in pair.held], shift))
        wholes = [
            evaluator.set_scale(part, before.scale, out=part)
            for part, before in zip(fresh, others, strict=True)
        ]
        return [parts[index] for index in range(len(real))], wholes

    def refreshed_scales(self, ciphertext: Ciphertext, scale: float, shift: int) -> list[float]:
        """Return the scales near a given one that :meth:`refresh` brings to, alone and in a pair."""
        before: float = ciphertext.scale
        return [before * _factor(before, scale / copy, shift) / 2**shift * copy for copy in (1, 2)]

    def _exchange(self, sent: list[Ciphertext], held: list[Held], level: int, shift: int) -> list[Ciphertext]:
        assert self._refresher is not None  # or there were no ciphertexts to refresh
        self.refreshes += len(sent)
        fresh: list[Ciphertext] = []
        for first in range(0, len(sent), MOST_TOGETHER):
            self.round_trips += 1
            some = slice(first, first + MOST_TOGETHER)
            fresh += self._refresher(sent[some], held[some], level, shift)
        return fresh


class _Pair:
    """One or two real ciphertexts, with their numbers, that go to the client as one.

    Two whose slots repeat as often come back as one, of complex numbers, and are split here into twice the
    real and twice the imaginary part: that takes the fewest key switches. Others come back apart, since one
    of them takes fewer bytes.
    """

    def __init__(self, items: Sequence[tuple[int, Scaled]]) -> None:
        self._items = items
        copies = [item.copies for _, item in items]
        self._split = len(copies) == 2 and copies[0] == copies[1]
        self.held: Held = [Subring(copies[0])] if self._split else [Subring(c, real=True) for c in copies]

    def _factors(self, shift: int) -> list[int]:
        """Return what the ciphertexts are multiplied by. Raises ``ValueError`` where that is too little."""
        double = 2 if self._split else 1
        factors = [_factor(item.ciphertext.scale, item.scale / double, shift) for _, item in self._items]
        if min(factors) < LEAST_FACTOR:
            raise ValueError("the range of a function is too wide: a refresh cannot give its scale")
        return factors

    def joined(self, evaluator: Evaluator, shift: int) -> Ciphertext:
        """Return what is sent."""
        scaled = []
        for (_, item), factor, unit in zip(self._items, self._factors(shift), (1, 1j), strict=False):
            dropped = evaluator.drop_level(item.ciphertext, MASK_LEVEL)
            evaluator.multiply(dropped, factor * unit, out=dropped)
            # Declared scales do not matter on the way, but they must be equal to be added.
            scale = evaluator.parameters.scale * 2**shift
            scaled.append(evaluator.set_scale(dropped, scale, out=dropped))
        return scaled[0] if len(scaled) == 1 else evaluator.add(*scaled, out=scaled[0])

    def apart(
        self, evaluator: Evaluator, fresh: Sequence[Ciphertext], shift: int
    ) -> Iterator[tuple[int, Ciphertext]]:
        """Yield each number and what was refreshed of its ciphertext."""
        parts = evaluator.split(fresh[0]) if self._split else fresh
        double = 2 if self._split else 1
        for (index, item), factor, part in zip(self._items, self._factors(shift), parts, strict=True):
            scale = item.ciphertext.scale * factor / 2**shift * double
            yield index, evaluator.set_scale(part, scale, out=part)


def _factor(before: float, after: float, shift: int) -> int:
    """Return what a ciphertext is multiplied by to have another scale when it is divided by ``2^shift``."""
    return round(2.0**shift * after / before)


class _Layer:
    """What is kept with clear weights: matrices and encoded biases."""

    def __init__(self, encodings: Encodings) -> None:
        self._encodings = encodings
        self._kept: dict[Any, Any] = {}
        self._lock = threading.Lock()

    def matrix(self, key: tuple[Any, ...], make: Callable[[Encodings], A]) -> A:
        """Return a matrix, made on the first call."""
        with self._lock:
            if key not in self._kept:
                self._kept[key] = make(self._encodings)
            matrix: A = self._kept[key]
            return matrix

    def kept(self) -> list[Any]:
        """Return the matrices and biases that were made."""
        with self._lock:
            return list(self._kept.values())

    def bias(self, key: tuple[Any, ...], like: Ciphertext, slots: Callable[[], NDArray[Any]]) -> Plaintext:
        """Return an encoded bias to be added to a ciphertext, made on the first call."""
        level, scale = like.level, like.scale
        return self.matrix((key, level, scale), lambda encodings: encodings.encode(slots(), level, scale))
