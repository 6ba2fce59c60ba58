"""The messages of a session and how they become bytes: what client and server share. See docs/protocol.md.

One message is one binary WebSocket message::

    4 bytes, little-endian   length h of the header, at most HEADER_BYTES
    h bytes                  the header: a JSON object with "type", the type's fields, and "blobs": [sizes]
    the blobs, one after another

``pack`` and ``unpack`` are inverse. Whatever bytes a stranger sends, ``unpack`` returns a message whose
fields have the right types and ranges, or raises :class:`ProtocolError`.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, ClassVar, TypeVar

VERSION = 1
DEFAULT_PORT = 8470
HEADER_BYTES = 64 * 1024
CHUNK_BYTES = 8 * 1024**2
"""Greatest chunk of a key upload."""
MAX_BLOBS = 4096
MAX_TEXT = 1024
"""Greatest length of a text in a header, in characters."""
MAX_ENTRIES = 32
MAX_INTEGER = 2**53 - 1
"""What JSON carries exactly everywhere."""

UNAUTHORIZED = "unauthorized"
PROTOCOL = "protocol"
BAD_REQUEST = "bad_request"
UNKNOWN_MODEL = "unknown_model"
UNKNOWN_KEYS = "unknown_keys"
BAD_KEYS = "bad_keys"
TOO_LARGE = "too_large"
CONFLICT = "conflict"
STORAGE = "storage"
BUSY = "busy"
RATE_LIMITED = "rate_limited"
TIMEOUT = "timeout"
CANCELLED = "cancelled"
INTERNAL = "internal"
SHUTTING_DOWN = "shutting_down"


class ProtocolError(ValueError):
    """Bytes that are no message, or a message that is out of place."""


@dataclass(frozen=True)
class Open:
    """Client: start a session with keys that were uploaded, given as ``{kind: SHA-256}``."""

    type: ClassVar[str] = "open"
    protocol: int
    model: str
    keys: dict[str, str]


@dataclass(frozen=True)
class Evaluate:
    """Client: evaluate a module on ciphertexts of ``count`` tokens from position ``start`` on."""

    type: ClassVar[str] = "evaluate"
    id: int
    module: str
    start: int
    count: int
    blobs: Sequence[bytes]


@dataclass(frozen=True)
class Refreshed:
    """Client: the answer to a refresh of the same ``id`` and ``round``."""

    type: ClassVar[str] = "refreshed"
    id: int
    round: int
    blob: bytes


@dataclass(frozen=True)
class Cancel:
    """Client: stop an evaluation. It is over when its result or its error comes."""

    type: ClassVar[str] = "cancel"
    id: int


@dataclass(frozen=True)
class Close:
    """Client: end the session."""

    type: ClassVar[str] = "close"


@dataclass(frozen=True)
class Opened:
    """Server: the session is open, within these limits (bytes, tokens, seconds)."""

    type: ClassVar[str] = "opened"
    session: str
    limits: dict[str, int]


@dataclass(frozen=True)
class Queued:
    """Server: ``position`` evaluations are before this one."""

    type: ClassVar[str] = "queued"
    id: int
    position: int


@dataclass(frozen=True)
class Progress:
    """Server: ``done`` of ``total`` blocks are evaluated."""

    type: ClassVar[str] = "progress"
    id: int
    done: int
    total: int


@dataclass(frozen=True)
class Refresh:
    """Server: answer this with :class:`Refreshed`; rounds count from 0."""

    type: ClassVar[str] = "refresh"
    id: int
    round: int
    blob: bytes


@dataclass(frozen=True)
class Result:
    """Server: what the module makes of the inputs."""

    type: ClassVar[str] = "result"
    id: int
    blobs: Sequence[bytes]


@dataclass(frozen=True)
class Error:
    """Server: an evaluation failed or, without ``id``, the session: then the connection is closed.

    ``retry_after`` is after how many seconds trying again makes sense, where the server knows.
    """

    type: ClassVar[str] = "error"
    code: str
    message: str
    retry: bool
    id: int | None = None
    retry_after: int | None = None


@dataclass(frozen=True)
class Connect:
    """Client: begin with products of a model's linear layers; the blob has evaluation keys for its plan."""

    type: ClassVar[str] = "connect"
    protocol: int
    model: str
    plan: str
    blob: bytes


@dataclass(frozen=True)
class Multiply:
    """Client: multiply ``rows`` vectors by a group's weights; the blobs are theirs, vector by vector."""

    type: ClassVar[str] = "multiply"
    id: int
    group: str
    transposed: bool
    rows: int
    blobs: Sequence[bytes]


@dataclass(frozen=True)
class Connected:
    """Server: products can be asked for, within these limits (rows, requests at a time, bytes, seconds)."""

    type: ClassVar[str] = "connected"
    session: str
    limits: dict[str, int]


ClientMessage = Open | Evaluate | Refreshed | Cancel | Close
ServerMessage = Opened | Queued | Progress | Refresh | Result | Error
ProductsClientMessage = Connect | Multiply | Close
ProductsServerMessage = Connected | Result | Error
Message = ClientMessage | ServerMessage | ProductsClientMessage | ProductsServerMessage
AnyMessage = TypeVar("AnyMessage", bound=Message)

CLIENT_MESSAGES: tuple[type[ClientMessage], ...] = (Open, Evaluate, Refreshed, Cancel, Close)
SERVER_MESSAGES: tuple[type[ServerMessage], ...] = (Opened, Queued, Progress, Refresh, Result, Error)
PRODUCTS_CLIENT_MESSAGES: tuple[type[ProductsClientMessage], ...] = (Connect, Multiply, Close)
PRODUCTS_SERVER_MESSAGES: tuple[type[ProductsServerMessage], ...] = (Connected, Result, Error)


def error(
    code: str, message: str, *, retry: bool = False, id: int | None = None, retry_after: int | None = None
) -> Error:
    """Return an error with a text of any length and form, as one line that a header can hold."""
    text = "".join(character if character.isprintable() else " " for character in message)
    return Error(code, " ".join(text.split())[:MAX_TEXT], retry, id, retry_after)


def message_limit(description: dict[str, Any]) -> int:
    """Return how many bytes a message for a described model may have."""
    return int(description["message_bytes"]) + HEADER_BYTES + 4


def pack(message: Message) -> bytes:
    """Return a message as bytes. Raises :class:`ProtocolError` for one that ``unpack`` would refuse."""
    header: dict[str, Any] = {"type": message.type}
    blobs: list[bytes] = []
    for field in fields(message):
        value = getattr(message, field.name)
        if field.name == "blob":
            blobs = [value]
        elif field.name == "blobs":
            blobs = list(value)
        elif not (value is None and field.default is None):
            _check(message.type, field, value)
            header[field.name] = value
    if len(blobs) > MAX_BLOBS:
        raise ProtocolError(f"{len(blobs)} blobs in a message, at most {MAX_BLOBS} may be")
    header["blobs"] = [len(blob) for blob in blobs]
    text = json.dumps(header, separators=(",", ":")).encode()
    if len(text) > HEADER_BYTES:
        raise ProtocolError(f"a header of {len(text)} bytes, at most {HEADER_BYTES} may be")
    return b"".join((len(text).to_bytes(4, "little"), text, *blobs))


def unpack(data: bytes, expected: Sequence[type[AnyMessage]]) -> AnyMessage:
    """Return the message in ``data``, one of the expected types. Raises :class:`ProtocolError`."""
    header, blobs = _split(data)
    name = header.pop("type", None)
    kind = next((kind for kind in expected if kind.type == name), None)
    if kind is None:
        raise ProtocolError(f"a message that is none of: {', '.join(kind.type for kind in expected)}")
    values: dict[str, Any] = {}
    for field in fields(kind):
        if field.name == "blobs":
            values["blobs"], blobs = blobs, []
        elif field.name == "blob":
            if len(blobs) != 1:
                raise ProtocolError(f'"{kind.type}" with {len(blobs)} blobs instead of one')
            values["blob"], blobs = blobs[0], []
        elif field.name in header:
            values[field.name] = header.pop(field.name)
            _check(kind.type, field, values[field.name])
        elif field.default is MISSING:
            raise ProtocolError(f'"{kind.type}" without "{field.name}"')
    if header or blobs:
        raise ProtocolError(f'"{kind.type}" with more than belongs to it')
    return kind(**values)


def _split(data: bytes) -> tuple[dict[str, Any], list[bytes]]:
    length = int.from_bytes(data[:4], "little")
    if len(data) < 4 or length > HEADER_BYTES or length > len(data) - 4:
        raise ProtocolError("a message whose header is cut off or too long")
    try:
        header = json.loads(data[4 : 4 + length].decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise ProtocolError("a message whose header is not JSON") from None
    if not isinstance(header, dict):
        raise ProtocolError("a message whose header is not a JSON object")
    sizes = header.pop("blobs", None)
    if not isinstance(sizes, list) or len(sizes) > MAX_BLOBS or not all(map(_is_integer, sizes)):
        raise ProtocolError('a message whose "blobs" are not sizes')
    if 4 + length + sum(sizes) != len(data):
        raise ProtocolError("a message that does not have the size that its header says")
    blobs = []
    offset = 4 + length
    for size in sizes:
        blobs.append(data[offset : offset + size])
        offset += size
    return header, blobs


def _refuse_constant(_name: str) -> None:
    raise ValueError("NaN and Infinity are not JSON")


def _is_integer(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_INTEGER


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_TEXT and value.isprintable()


def _is_map(of: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, dict)
        and len(value) <= MAX_ENTRIES
        and all(_is_text(name) and of(entry) for name, entry in value.items())
    )


_CHECKS: dict[Any, Callable[[Any], bool]] = {
    int: _is_integer,
    int | None: _is_integer,
    str: _is_text,
    bool: lambda value: isinstance(value, bool),
    dict[str, str]: _is_map(_is_text),
    dict[str, int]: _is_map(_is_integer),
}


def _check(kind: str, field: "Field[Any]", value: Any) -> None:
    if not _CHECKS[field.type](value):
        raise ProtocolError(f'"{kind}" whose "{field.name}" is not what it should be')
