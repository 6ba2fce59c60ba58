"""Objects to bytes and back, piece by piece.

A frame is a header of 64 bytes, a payload and a checksum; ``engine/core/frame.go``
defines it. Ciphertexts go to and from the native side as one piece. Keys are not copied whole:
a piece at a time goes between the file and the native side, so that they may be larger than
memory allows twice.
"""

from __future__ import annotations

import ctypes
import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from . import _native
from .errors import CorruptDataError

if TYPE_CHECKING:
    from .parameters import Parameters

HEADER_SIZE = 64
PIECE = 1 << 20
WHOLE = 1 << 24
"""The most bytes of a ciphertext, or of several, that go to the native side as one piece."""

_PASSED_ON = (6, 7, 8)  # ciphertexts, refresh requests, replies

T = TypeVar("T", bound="Serializable")


class BinaryReader(Protocol):
    """A file that can be read."""

    def read(self, size: int, /) -> bytes: ...  # noqa: D102


class BinaryWriter(Protocol):
    """A file that can be written."""

    def write(self, data: memoryview, /) -> Any: ...  # noqa: D102


class Serializable(_native.Handle):
    """An object that can be written to a file and read back."""

    __slots__ = ()
    _frame_type: ClassVar[int]

    def write_to(self, file: BinaryWriter) -> int:
        """Write the object to a file; return the number of bytes."""
        total = 0
        for piece in self._pieces():
            file.write(piece)
            total += len(piece)
        return total

    def to_bytes(self) -> bytes:
        """Return the object as bytes. Prefer :meth:`write_to` for keys."""
        file = io.BytesIO()
        self.write_to(file)
        return file.getvalue()

    def _pieces(self) -> Iterator[memoryview]:
        """Yield the bytes, in the same memory each time."""
        out, size, written = ctypes.c_size_t(), ctypes.c_int64(), ctypes.c_int64()
        _native.call("cl_writer_new", self.handle, ctypes.byref(out), ctypes.byref(size))
        writer = _native.Handle(out.value)
        piece = ctypes.create_string_buffer(size.value or PIECE)
        while True:
            _native.call("cl_writer_read", writer.handle, piece, len(piece), ctypes.byref(written))
            if not written.value:
                return
            yield memoryview(piece).cast("B")[: written.value]

    @classmethod
    def read_from(cls: type[T], file: BinaryReader, parameters: Parameters) -> T:
        """Read an object from a file, no byte further than its end.

        Raises :class:`CorruptDataError` for bytes that are not such an object, and
        :class:`ParametersError` for an object of other parameters.
        """
        return cls._adopt(read_frame(file, cls._frame_type, parameters), parameters)

    @classmethod
    def from_bytes(cls: type[T], data: bytes | bytearray | memoryview, parameters: Parameters) -> T:
        """Read an object from all of the bytes."""
        file = io.BytesIO(data)
        result = cls.read_from(file, parameters)
        if file.read(1):
            raise CorruptDataError("bytes after the end of an object")
        return result

    @classmethod
    def _adopt(cls: type[T], handle: int, parameters: Parameters) -> T:
        raise NotImplementedError


def read_frame(file: BinaryReader, frame_type: int, parameters: Parameters | None) -> int:
    """Read one frame and return the handle of its object."""
    header = _read_exactly(file, HEADER_SIZE)
    out, length = ctypes.c_size_t(), ctypes.c_uint64()
    owner = parameters.handle if parameters is not None else 0
    _native.call(
        "cl_reader_new", owner, frame_type, header, len(header), ctypes.byref(out), ctypes.byref(length)
    )
    reader = _native.Handle(out.value)
    left = length.value
    while left:
        piece = _read_exactly(file, min(left, WHOLE if frame_type in _PASSED_ON else PIECE))
        _native.call("cl_reader_write", reader.handle, piece, len(piece))
        left -= len(piece)
    return _native.create("cl_reader_finish", reader.handle)


def _read_exactly(file: BinaryReader, size: int) -> bytes:
    data = file.read(size)
    while len(data) < size:
        more = file.read(size - len(data))
        if not more:
            raise CorruptDataError(f"truncated: {size - len(data)} bytes are missing")
        data += more
    return data
