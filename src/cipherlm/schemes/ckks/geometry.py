"""The plan of an evaluation: layout, levels, rotations and sizes follow from a few numbers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

from cipherlm.engine import Parameters
from cipherlm.schemes.ckks.layout import Layout

VERSION = 7
"""Of what follows from a geometry: the packings, and in which order ciphertexts are computed."""


@dataclass(frozen=True)
class Geometry:
    """How hidden states lie in ciphertexts: what client and server have to agree on.

    Hidden states have ``width`` features, in heads and in an MLP there are ``heads`` times ``head_dim`` and
    ``inner`` (0 stands for the width that heads have together, and for four times the width). ``tokens`` go
    side by side into a ciphertext. The first ``prefix`` tokens of a text are public and never encrypted; if
    they are fewer than ``tokens``, they take their places among these. ``context`` is the highest number of
    tokens, with the prefix. ``rotary`` says that queries and keys are rotated, and ``post_quantum`` keeps 128
    bits of security against quantum computers too. Raises ``ValueError`` for anything that does not fit.
    """

    heads: int
    head_dim: int
    tokens: int = 8
    prefix: int = 1
    context: int = 64
    log_degree: int = 14
    post_quantum: bool = False
    width: int = 0
    inner: int = 0
    rotary: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name in ("post_quantum", "rotary"):
                if not isinstance(getattr(self, field.name), bool):
                    raise ValueError(f"{field.name} must be True or False, not {getattr(self, field.name)!r}")
                continue
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 16:
                raise ValueError(f"{field.name} must be a small integer, not {value!r}")
        if self.log_degree != 14:
            raise ValueError(f"ring degree 2^{self.log_degree}: only 2^14 has the levels that are needed")
        if not 1 <= self.heads <= 1 << 10 or not 1 <= self.head_dim <= 1 << 10:
            raise ValueError(f"{self.heads} heads of {self.head_dim} features")
        object.__setattr__(self, "width", self.width or self.heads * self.head_dim)
        object.__setattr__(self, "inner", self.inner or 4 * self.width)
        if not self.prefix < self.context:
            raise ValueError(
                f"a prefix of {self.prefix} tokens leaves no room in a context of {self.context}: "
                f"encrypt with EncryptionConfig(..., context={max(2 * self.prefix, 64)})"
            )
        if self.context > self.layout.most_tokens:
            raise ValueError(f"a context of {self.context} tokens: at most {self.layout.most_tokens}")

    @cached_property
    def parameters(self) -> Parameters:
        """The parameters of the encryption."""
        return Parameters.preset(self.log_degree, post_quantum=self.post_quantum)

    @cached_property
    def layout(self) -> Layout:
        """The packing."""
        return Layout(
            1 << (self.log_degree - 1),
            self.tokens,
            self.heads,
            self.head_dim,
            self.width,
            self.inner,
            self.prefix - self.start,
            self.rotary,
        )

    @property
    def start(self) -> int:
        """The place of a text's first private token in a ciphertext: behind a short prefix."""
        return self.place(self.prefix)

    def place(self, start: int) -> int:
        """Return the place in a ciphertext of the first token of a chunk."""
        return self.prefix if start == self.prefix < self.tokens else 0

    def is_alone(self, start: int, count: int) -> bool:
        """Whether a chunk is one token behind others: it has a packing of its own."""
        return count == 1 and start > self.prefix

    def places(self, start: int, count: int) -> int:
        """Return how many places for keys a row of scores has, for a chunk at a position of the text."""
        layout = self.layout
        if start == self.prefix:
            return layout.places
        before = start - layout.prefix
        if self.is_alone(start, count):
            return layout.decoding.places(before + 1)
        return layout.chunk.places(before)

    def passes(self, start: int, count: int, most: int = 1) -> Iterator[tuple[int, int]]:
        """Yield start and count of what goes through a model in one evaluation: up to ``most`` chunks.

        Behind a text, the first of several chunks has to begin with a group of keys in the KV cache: a
        shorter one brings it there.
        """
        end, before = start + count, self._before_group(start)
        if before and count > self.tokens:
            yield start, before
            start, before = start + before, 0
        first, together = start, 0
        for position, size in self.chunks(start, end - start):
            if together and (before or together == most or self.is_alone(position, size)):
                yield first, position - first
                first, together = position, 0
            together += 1
        if together:
            yield first, end - first

    def goes_together(self, start: int, count: int) -> bool:
        """Whether so many tokens, of several chunks, can go through a model in one evaluation."""
        return not self._before_group(start) and not self.is_alone(*list(self.chunks(start, count))[-1])

    def _before_group(self, start: int) -> int:
        """Return how many tokens there are up to the next group in the KV cache, from a position on."""
        return 0 if start == self.prefix else -(start - self.layout.prefix) % self.tokens

    def chunks(self, start: int, count: int) -> Iterator[tuple[int, int]]:
        """Yield start and count of what is side by side in a ciphertext."""
        end = start + count
        while start < end:
            size = min(end - start, self.tokens - self.place(start))
            yield start, size
            start += size

    @cached_property
    def rotations(self) -> dict[int, int]:
        """The rotations that a server needs Galois keys for, and the highest level of each."""
        return self.layout.rotations(self.parameters.max_level)

    @property
    def evaluation_key_bytes(self) -> int:
        """How many bytes the evaluation keys have as they are sent, at most.

        A key has a polynomial for each digit of two primes, modulo all primes up to its level and two more.
        """
        top = self.parameters.max_level
        levels = [*self.rotations.values(), top, top]  # and conjugation and relinearisation
        polynomials = sum((level + 2) // 2 * (level + 3) for level in levels)
        return polynomials * self.parameters.degree * 8

    @cached_property
    def digest(self) -> str:
        """A SHA-256 of all that keys and ciphertexts of a client depend on."""
        about = {
            "version": VERSION,
            "geometry": self.to_dict(),
            "parameters": self.parameters.fingerprint,
            "rotations": sorted(self.rotations.items()),
        }
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, int]:
        """Return the fields, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> Geometry:
        """Read what ``to_dict`` gave. Raises ``ValueError`` for anything else."""
        names = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or not {"heads", "head_dim"} <= set(values):
            raise ValueError("not the geometry of an encrypted model")
        unknown = sorted(set(values) - names)
        if unknown:
            raise ValueError(f"{unknown[0]!r} in the geometry is not known: is it of a newer CipherLM?")
        return cls(**values)
