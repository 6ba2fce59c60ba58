"""Settings and state of the native side."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

from . import _native


class Memory(NamedTuple):
    """Bytes of objects on the native heap, and of all memory held from the system."""

    heap: int
    held: int


def set_threads(count: int) -> None:
    """Set how many threads one call may use. The default is the number of cores."""
    _native.call("cl_set_threads", count)


def threads() -> int:
    """Return how many threads one call may use."""
    return int(_native.library().cl_threads())


def set_gc_percent(percent: int) -> int:
    """Set how far the native heap may grow between collections; return the former value.

    In percent of what is alive: 100 at first. A server that holds gigabytes of keys
    and matrices saves memory with less, at the price of more frequent collections.
    """
    return int(_native.library().cl_set_gc_percent(percent))


def collect() -> None:
    """Collect the native heap and return free memory to the system."""
    _native.call("cl_collect")


def memory() -> Memory:
    """Return what memory the native side uses."""
    heap, held = ctypes.c_int64(), ctypes.c_int64()
    _native.call("cl_memory", ctypes.byref(heap), ctypes.byref(held))
    return Memory(heap.value, held.value)
