"""Keys and ciphertexts as bytes: what they are labelled with, and how they are checked before they are read.

Concrete reads its serialised objects with Cap'n Proto and trusts their sender: a truncated key keeps it busy
for most of a minute, in which no other thread of Python runs, some flipped bits for longer, and keys of other
sizes than the circuit's abort the process. Nothing is therefore given to it unless its structure is known to
be right. That needs no parser: of one circuit, all keys have the same bytes but for the random numbers in
them, and so have all inputs and all results. A ``Layout`` remembers where the numbers are and the hash of the
rest. Any numbers are valid there: wrong ones decrypt to nonsense, no more.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, BinaryIO

import numpy as np

_MAGIC = b"CLMTFHE\x01"
_HEADER = struct.Struct("<8sI32s32s32sQ")
_WORD = 8

HEADER_BYTES = _HEADER.size
"""Bytes of the label before every message."""


class Kind(IntEnum):
    """What a message holds. Secret keys are only ever written to the client's own files."""

    SECRET_KEYS = 0
    EVALUATION_KEYS = 1
    INPUT = 2
    RESULT = 3


_NAMES = {
    Kind.SECRET_KEYS: "secret keys",
    Kind.EVALUATION_KEYS: "evaluation keys",
    Kind.INPUT: "an input",
    Kind.RESULT: "a result",
}


@dataclass(frozen=True)
class Header:
    """The label of a message: its kind, its circuit's fingerprint, its keys' one, its body's hash and bytes.

    Keys are named by the SHA-256 of the evaluation keys as Concrete serialises them.
    """

    kind: Kind
    circuit: bytes
    keys: bytes
    digest: bytes
    size: int

    def pack(self) -> bytes:
        """Return the label's bytes, ``HEADER_BYTES`` of them."""
        return _HEADER.pack(_MAGIC, self.kind, self.circuit, self.keys, self.digest, self.size)

    @classmethod
    def unpack(cls, data: bytes) -> Header:
        """Read a label from the first ``HEADER_BYTES`` of ``data``; ``ValueError`` if it is none."""
        if len(data) < HEADER_BYTES:
            raise ValueError(f"the message is cut off: {len(data)} bytes")
        magic, kind, *rest = _HEADER.unpack_from(data)
        if magic != _MAGIC:
            raise ValueError("the message is not one of CipherLM's for TFHE, or another version's")
        if kind not in list(Kind):
            raise ValueError(f"the message is of an unknown kind, {kind}")
        return cls(Kind(kind), *rest)

    def check(self, kind: Kind, circuit: str) -> None:
        """Raise ``ValueError`` unless the message is a ``kind`` of the circuit with this fingerprint."""
        if self.kind is not kind:
            raise ValueError(f"the message holds {_NAMES[self.kind]}, not {_NAMES[kind]}")
        if self.circuit.hex() != circuit:
            raise ValueError(f"the message holds {_NAMES[kind]} of another circuit")


def seal(kind: Kind, circuit: str, keys: bytes, body: bytes) -> bytes:
    """Return ``body`` with its label in front."""
    header = Header(kind, bytes.fromhex(circuit), keys, hashlib.sha256(body).digest(), len(body))
    return header.pack() + body


def read_message(file: BinaryIO, header: Header, layout: Layout | None) -> bytes:
    """Read and check the body behind a label that has been read. Raises ``ValueError``.

    Without a ``layout`` only the hash is checked, which anyone can compute: for the reader's own files.
    """
    if layout is not None and header.size != layout.size:
        raise ValueError(f"the message has a body of {header.size} bytes, not {layout.size}")
    body = file.read(header.size)
    if len(body) != header.size:
        raise ValueError(f"the message is cut off: {len(body)} of {header.size} bytes")
    if not hmac.compare_digest(hashlib.sha256(body).digest(), header.digest):
        raise ValueError("the message is damaged: its checksum does not match")
    if layout is not None:
        layout.check(body)
    return body


@dataclass(frozen=True)
class Layout:
    """Where the numbers lie in the bytes of every valid message of one kind, and what the rest hashes to."""

    size: int
    spans: tuple[tuple[int, int], ...]
    digest: str

    @classmethod
    def between(cls, one: bytes, other: bytes) -> Layout:
        """Find the layout from two valid messages with independent random numbers.

        Numbers are words of 64 bits, which agree by chance once in 2**64.
        """
        if len(one) != len(other) or len(one) % _WORD:
            raise ValueError("messages of one kind differ in length")
        words = (np.frombuffer(message, dtype="<u8") for message in (one, other))
        differ = np.concatenate([[False], np.not_equal(*words), [False]])
        edges = np.flatnonzero(differ[1:] != differ[:-1]).reshape(-1, 2) * _WORD
        spans = tuple((int(start), int(end)) for start, end in edges)
        return cls(len(one), spans, _digest(one, spans))

    def check(self, message: bytes) -> None:
        """Raise ``ValueError`` unless ``message`` has this layout."""
        if len(message) != self.size or _digest(message, self.spans) != self.digest:
            raise ValueError("the message does not have the structure that this circuit's have")

    def to_dict(self) -> dict[str, Any]:
        """Return the layout as JSON types."""
        return {"size": self.size, "spans": [list(span) for span in self.spans], "sha256": self.digest}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Layout:
        """Read what ``to_dict`` wrote; ``ValueError`` for anything else."""
        try:
            size, digest = int(values["size"]), str(values["sha256"])
            spans = tuple((int(start), int(end)) for start, end in values["spans"])
        except (KeyError, TypeError) as error:
            raise ValueError("a layout is not as it was written") from error
        edges = [0, *(edge for span in spans for edge in span), size]
        if edges != sorted(edges):
            raise ValueError("a layout's spans are out of order")
        return cls(size, spans, digest)


def _digest(message: bytes, spans: tuple[tuple[int, int], ...]) -> str:
    """Return the SHA-256 of what lies outside of ``spans``."""
    digest = hashlib.sha256()
    for part in _outside(memoryview(message), spans):
        digest.update(part)
    return digest.hexdigest()


def _outside(message: memoryview, spans: tuple[tuple[int, int], ...]) -> Iterator[memoryview]:
    position = 0
    for start, end in spans:
        yield message[position:start]
        position = end
    yield message[position:]
