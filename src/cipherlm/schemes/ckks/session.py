"""The two parties of an evaluation: what each holds, and what goes from one to the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from cipherlm.engine import (
    Ciphertext,
    EvaluationKeys,
    Evaluator,
    PublicKey,
    RefreshReply,
    RefreshRequest,
    SecretKey,
    collect,
    set_gc_percent,
)
from cipherlm.engine.linear import Storage
from cipherlm.errors import Refused
from cipherlm.nn.blocks import Report, evaluate
from cipherlm.nn.module import Module
from cipherlm.nn.tensor import Cache, Prefix
from cipherlm.schemes.ckks.arithmetic import Arithmetic, Encodings
from cipherlm.schemes.ckks.chunk import EncryptedChunk
from cipherlm.schemes.ckks.decoding import EncryptedToken
from cipherlm.schemes.ckks.encrypted import encrypted
from cipherlm.schemes.ckks.geometry import Geometry
from cipherlm.schemes.ckks.layout import ATTENTION_LEVEL
from cipherlm.schemes.ckks.refresh import MaskedRefresh
from cipherlm.schemes.ckks.side_by_side import Chunk, evaluate_together

Float64 = NDArray[np.float64]
Exchange = Callable[[RefreshRequest], RefreshReply]

GC_PERCENT = 25
"""How far the native heap of a server may grow between collections: a model's matrices are gigabytes."""

MOST_CHUNKS = 8
"""How many chunks go through a model side by side at most: more take more memory, and save little."""

FLOOD = 16
"""Bits of the noise that is added to results: see :meth:`~cipherlm.engine.Evaluator.rerandomize`."""


class Client:
    """The party with the text: it alone holds the secret key.

    ``most_chunks`` says how many chunks of a prompt go to the server in one evaluation.
    """

    def __init__(self, secret_key: SecretKey, geometry: Geometry, *, most_chunks: int = MOST_CHUNKS) -> None:
        self.geometry, self.secret_key = geometry, secret_key
        self._layout, self._most_chunks = geometry.layout, most_chunks

    @classmethod
    def generate(cls, geometry: Geometry) -> Client:
        """Make a new secret key."""
        return cls(SecretKey.generate(geometry.parameters), geometry)

    def evaluation_keys(self) -> EvaluationKeys:
        """Make the keys that a server needs to compute."""
        return self.secret_key.evaluation_keys(self.geometry.rotations, conjugation=True)

    def public_key(self) -> PublicKey:
        """Make the key that a server needs to refresh and rerandomise."""
        return self.secret_key.public_key()

    def passes(self, start: int, count: int) -> Iterator[tuple[int, int]]:
        """See :meth:`Geometry.passes`."""
        return self.geometry.passes(start, count, self._most_chunks)

    def encrypt(self, hidden: Float64, start: int) -> list[Ciphertext]:
        """Encrypt hidden states (tokens, width) of one pass, the first at position ``start``.

        There is one ciphertext for each chunk. The last token is repeated up to the end of the ciphertext: no
        token sees these copies, their values are in the ranges of others, and the ciphertext does not tell
        how many tokens there are.
        """
        return [
            self.secret_key.encrypt(
                self._packed(hidden[position - start : position - start + count], position), ATTENTION_LEVEL
            )
            for position, count in self.geometry.chunks(start, len(hidden))
        ]

    def _packed(self, hidden: Float64, start: int) -> Float64:
        """Return the slots of one chunk."""
        if self.geometry.is_alone(start, len(hidden)):
            return self._layout.decoding.pack(hidden[0])
        place = self.geometry.place(start)
        missing = max(0, self._layout.tokens - place - len(hidden))
        padded = np.concatenate([hidden, np.repeat(hidden[-1:], missing, axis=0)])
        (slots,) = self._layout.pack(padded, place)
        return slots

    def decrypt(self, ciphertexts: Sequence[Ciphertext], count: int, start: int) -> Float64:
        """Decrypt hidden states (tokens, width) of one pass."""
        chunks = zip(ciphertexts, self.geometry.chunks(start, count), strict=True)
        return np.concatenate([self._decrypt(ciphertext, *chunk) for ciphertext, chunk in chunks])

    def _decrypt(self, ciphertext: Ciphertext, start: int, count: int) -> Float64:
        slots = self.secret_key.decrypt(ciphertext).real
        if self.geometry.is_alone(start, count):
            return self._layout.decoding.unpack(slots, self._layout.width)[None]
        return self._layout.unpack([slots], self._layout.width, count, self.geometry.place(start))

    def refresh(self, request: RefreshRequest) -> RefreshReply:
        """Answer a server that is out of levels: it shows uniformly random numbers only."""
        return self.secret_key.refresh(request)


@dataclass(frozen=True, eq=False)
class Hosted:
    """What a server evaluates: a module with polynomials, and what each attention layer has of the prefix.

    Without a prefix there are none.
    """

    module: Module
    prefixes: Sequence[Prefix | None]

    def caches(self) -> list[Cache]:
        """Return the caches of a new text."""
        return [Cache(prefix) for prefix in self.prefixes]


class Server:
    """The party with the weights. It encodes them once for all its clients.

    Diagonals of matrices, which take most of the memory, are kept in 16 bits, with a relative error of 4e-5,
    unless ``storage`` says otherwise. From the first server on, the native heap of this process is collected
    each time it has grown by :data:`GC_PERCENT`.
    """

    def __init__(
        self, modules: Mapping[str, Hosted], geometry: Geometry, *, storage: Storage = "int16"
    ) -> None:
        set_gc_percent(GC_PERCENT)
        self.modules, self.geometry = dict(modules), geometry
        self.storage = storage
        self.encodings = Encodings(geometry.parameters, geometry.layout, storage=storage)

    def open(self, keys: EvaluationKeys, public_key: PublicKey, exchange: Exchange) -> Session:
        """Start to compute for a client. ``exchange`` brings it a refresh request and returns its reply."""
        evaluator, refresher = self._tools(keys, public_key, exchange)
        return Session(self, Arithmetic(evaluator, self.encodings, refresher), public_key, exchange)

    def _tools(
        self, keys: EvaluationKeys, public_key: PublicKey, exchange: Exchange
    ) -> tuple[Evaluator, MaskedRefresh]:
        evaluator = Evaluator(self.geometry.parameters, keys)
        return evaluator, MaskedRefresh(evaluator, public_key, exchange)


class Session:
    """One client's evaluations on a server, which remembers the keys and values of its tokens."""

    def __init__(
        self, server: Server, arithmetic: Arithmetic, public_key: PublicKey, exchange: Exchange
    ) -> None:
        self.arithmetic, self._server = arithmetic, server
        self._public_key: PublicKey | None = public_key
        self._exchange = exchange
        self._seen: dict[str, tuple[list[Cache], int]] = {}

    @property
    def has_keys(self) -> bool:
        """Whether there are evaluation keys here."""
        return self.arithmetic.has_keys

    def release_keys(self) -> None:
        """Drop the keys. The KV cache stays, and :meth:`load_keys` is to follow."""
        self.arithmetic.release_keys()
        self._public_key = None
        collect()

    def load_keys(self, keys: EvaluationKeys, public_key: PublicKey) -> None:
        """Take the keys that the session was opened with again."""
        self._public_key = public_key
        self.arithmetic.use(*self._server._tools(keys, public_key, self._exchange))

    def evaluate(
        self,
        name: str,
        start: int,
        ciphertexts: Sequence[Ciphertext],
        count: int,
        report: Report = lambda done, total: None,
    ) -> list[Ciphertext]:
        """Evaluate a module on the chunks of one pass, whose first token is at position ``start``.

        Tokens right behind the prefix start a new text; any others go on where the text ends, or at one of
        its tokens, which is then dropped with all behind it. What failed has to start anew. Raises
        ``Refused`` for an unknown module, for tokens that do not fit, and for a client's reply that does
        not answer a refresh.
        """
        geometry = self._server.geometry
        if name not in self._server.modules:
            raise Refused(f"there is no module {name!r} here")
        module = self._server.modules[name]
        if not 1 <= count <= geometry.context - start:
            raise Refused(f"{count} tokens from position {start} on do not fit")
        chunks = list(geometry.chunks(start, count))
        if len(chunks) > MOST_CHUNKS or (len(chunks) > 1 and not geometry.goes_together(start, count)):
            raise Refused(f"{count} tokens from position {start} on do not go together")
        if len(ciphertexts) != len(chunks):
            raise Refused(f"{count} tokens come in {len(chunks)} ciphertexts, not in {len(ciphertexts)}")
        caches, seen = self._seen.pop(name, ([], geometry.prefix))
        if start == geometry.prefix:
            caches = module.caches()
        elif not geometry.prefix < start <= seen:
            raise Refused(f"tokens from position {start} on, where {seen} was expected")
        tensors = [
            self._chunk(ciphertext, *chunk) for ciphertext, chunk in zip(ciphertexts, chunks, strict=True)
        ]
        if len(tensors) == 1:
            results = [evaluate(module.module, tensors[0](self.arithmetic), caches, report)]
        else:
            results, caches = evaluate_together(self.arithmetic, module.module, tensors, caches, report)
        self._seen[name] = caches, start + count
        public_key = cast(PublicKey, self._public_key)  # it is there when evaluation keys are
        return [
            self.arithmetic.evaluator.rerandomize(part, public_key, flood=FLOOD)
            for result in results
            for part in result.parts
        ]

    def _chunk(self, ciphertext: Ciphertext, start: int, count: int) -> Chunk:
        """Return what makes a tensor of a chunk."""
        geometry = self._server.geometry
        layout = geometry.layout
        if start == geometry.prefix:
            return lambda arithmetic: encrypted(arithmetic, [ciphertext], count, geometry.start)
        if geometry.is_alone(start, count):
            copies = layout.copies(layout.period)
            return lambda arithmetic: EncryptedToken(arithmetic, (ciphertext,), start, copies=copies)
        copies = layout.whole_copies
        return lambda arithmetic: EncryptedChunk(
            arithmetic, (ciphertext,), count, position=start, copies=copies
        )

    def caches(self, name: str) -> list[Cache]:
        """Return the keys and values of the text that a module has read."""
        return self._seen[name][0]

    def close(self) -> None:
        """Let go of everything of this client."""
        self._seen.clear()
        self.arithmetic.close()


class InProcess:
    """Both parties in one process: a placement's arithmetic with real ciphertexts, without a network."""

    def __init__(self, server: Server, client: Client) -> None:
        self.client = client
        self.session = server.open(client.evaluation_keys(), client.public_key(), client.refresh)

    def evaluate(self, name: str, hidden: Float64, start: int, report: Report | None = None) -> Float64:
        """Return a module's outputs (tokens, width) for hidden states (tokens, width) from ``start`` on."""
        rows = []
        for position, count in self.client.passes(start, len(hidden)):
            inputs = self.client.encrypt(hidden[position - start : position - start + count], position)
            outputs = self.session.evaluate(
                name, position, inputs, count, report or (lambda done, total: None)
            )
            rows.append(self.client.decrypt(outputs, count, position))
        return np.concatenate(rows)
