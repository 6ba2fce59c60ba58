"""The shared library: its functions, its errors and the life of its objects.

The library is loaded by the first call, not by the import: a Go runtime does not
survive a fork, so a process that only forks workers must be able to import this
package and never start it.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from .errors import BY_KIND, EngineError, InternalError

LIBRARY = Path(__file__).with_name("_lattigo.so")

HandleArray = ctypes.Array[ctypes.c_size_t]

_CODES = {
    "h": ctypes.c_size_t,  # a handle
    "i": ctypes.c_int64,
    "d": ctypes.c_double,
    "p": ctypes.c_void_p,  # an array or a place for a result
}

# Every function of the ABI with its arguments. All return an error or NULL.
SIGNATURES = {
    "cl_nothing": "",
    "cl_free": "h",
    "cl_set_threads": "i",
    "cl_collect": "",
    "cl_memory": "pp",
    "cl_parameters_new": "pip",
    "cl_parameters_describe": "hp",
    "cl_rotation_elements": "hpip",
    "cl_conjugation_element": "hp",
    "cl_secret_key_new": "hp",
    "cl_public_key_new": "hp",
    "cl_evaluation_keys_new": "hppiip",
    "cl_evaluation_keys_describe": "hp",
    "cl_evaluation_keys_expand": "h",
    "cl_key_id": "hp",
    "cl_encode": "hpiidp",
    "cl_decode": "hdpi",
    "cl_plaintext_info": "hpp",
    "cl_plaintext_greatest": "hp",
    "cl_encrypt_secret": "hhp",
    "cl_encrypt_public": "hhp",
    "cl_decrypt": "hhp",
    "cl_evaluator_new": "hhp",
    "cl_ciphertext_info": "hpp",
    "cl_round": "hii",
    "cl_copy": "hp",
    "cl_set_scale": "hdhp",
    "cl_drop_level": "hihp",
    "cl_add": "hhhhp",
    "cl_subtract": "hhhhp",
    "cl_add_plain": "hhhhp",
    "cl_subtract_plain": "hhhhp",
    "cl_multiply_plain": "hhhhp",
    "cl_multiply": "hhhihp",
    "cl_add_constant": "hhddhp",
    "cl_multiply_constant": "hhddhp",
    "cl_relinearize": "hhhp",
    "cl_rescale": "hhhp",
    "cl_adjust_scale": "hhdhp",
    "cl_rotate": "hhihp",
    "cl_conjugate": "hhhp",
    "cl_inner_sum": "hhiihp",
    "cl_inner_sum_rotations": "iipp",
    "cl_rotate_hoisted": "hhpip",
    "cl_dot": "hppip",
    "cl_dot_plain": "hppip",
    "cl_lintrans_new": "hiiiiidp",
    "cl_lintrans_stored": "hppp",
    "cl_lintrans_restore": "hppip",
    "cl_lintrans_add": "hpipii",
    "cl_lintrans_info": "hp",
    "cl_lintrans_apply": "hpipip",
    "cl_polynomial": "hhpidddp",
    "cl_polynomial_levels": "hpiddddp",
    "cl_refresh_mask": "hppihiiipp",
    "cl_refresh_client": "hhp",
    "cl_refresh_unmask": "hhhpi",
    "cl_refresh_info": "hp",
    "cl_refresh_reply_count": "hp",
    "cl_rerandomize": "hhhip",
    "cl_bootstrapping_keys_new": "hp",
    "cl_bootstrapping_keys_bytes": "hp",
    "cl_bootstrapper_new": "hp",
    "cl_bootstrap": "hhp",
    "cl_writer_new": "hpp",
    "cl_writer_read": "hpip",
    "cl_reader_new": "hipipp",
    "cl_reader_write": "hpi",
    "cl_reader_finish": "hp",
}

_lock = threading.Lock()
_library: ctypes.CDLL | None = None
_forked = False


def _after_fork() -> None:
    global _forked
    _forked = _library is not None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def library() -> ctypes.CDLL:
    """Return the library, loaded on the first call."""
    global _library
    if _forked:
        raise EngineError("the engine was started before a fork and cannot run in the child: use spawn")
    if _library is None:
        with _lock:
            if _library is None:
                _library = _load()
    return _library


def _load() -> ctypes.CDLL:
    if not LIBRARY.exists():
        raise EngineError(f"{LIBRARY} is missing: build it with `pip install -e .`")
    loaded = ctypes.CDLL(str(LIBRARY))
    for name, codes in SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes = [_CODES[code] for code in codes]
        function.restype = ctypes.c_void_p
    loaded.cl_free_string.argtypes = [ctypes.c_void_p]
    loaded.cl_free_string.restype = None
    loaded.cl_threads.restype = ctypes.c_int64
    loaded.cl_set_gc_percent.argtypes = [ctypes.c_int64]
    loaded.cl_set_gc_percent.restype = ctypes.c_int64
    return loaded


def call(name: str, *arguments: Any) -> None:
    """Call a function of the library; raise the error that it returns."""
    message = getattr(library(), name)(*arguments)
    if message:
        text = take_string(message)
        raise BY_KIND.get(text[:1], InternalError)(text[1:])


def take_string(pointer: int) -> str:
    """Return a string of the library's and free it."""
    try:
        return ctypes.string_at(pointer).decode("utf-8", "replace")
    finally:
        library().cl_free_string(pointer)


def create(name: str, *arguments: Any) -> int:
    """Call a function whose last argument takes a new handle, and return that."""
    out = ctypes.c_size_t()
    call(name, *arguments, ctypes.byref(out))
    return out.value


def describe(name: str, handle: int) -> str:
    """Call a function that gives a string."""
    out = ctypes.c_void_p()
    call(name, handle, ctypes.byref(out))
    return take_string(out.value or 0)


def integers(name: str, handle: int, count: int) -> list[int]:
    """Call a function that fills an array of integers."""
    out = (ctypes.c_int64 * count)()
    call(name, handle, out)
    return list(out)


def handles(objects: Sequence[Handle]) -> HandleArray:
    """Return an array of the objects' handles."""
    return (ctypes.c_size_t * len(objects))(*(item.handle for item in objects))


def int64s(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    """Return an array of integers."""
    return (ctypes.c_int64 * len(values))(*values)


def _free(handle: int) -> None:
    if not _forked and _library is not None:
        _library.cl_free(handle)


class Handle:
    """An object of the library, freed when the Python object goes."""

    __slots__ = ("__weakref__", "handle")

    def __init__(self, handle: int) -> None:
        self.handle = handle
        weakref.finalize(self, _free, handle).atexit = False

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__} cannot be pickled: use to_bytes or write_to where it has them"
        )

    def __copy__(self) -> NoReturn:
        raise TypeError(f"{type(self).__name__} cannot be copied this way")

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise TypeError(f"{type(self).__name__} cannot be copied this way")


def key_fingerprint(handle: int) -> str:
    """Return the public name of the key that an object belongs to."""
    out = ctypes.create_string_buffer(16)
    call("cl_key_id", handle, out)
    return out.raw.hex()
