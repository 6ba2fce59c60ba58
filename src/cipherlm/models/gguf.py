"""Models in GGUF, llama.cpp's format: transformers reads it where two more packages are installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SUFFIX = ".gguf"
_PACKAGES = ("gguf", "accelerate")
_WEIGHTS = ("*.safetensors", "*.bin")
"""What else weights of a model with a ``config.json`` lie in."""


def gguf_file(path: Path) -> Path | None:
    """Return the GGUF file that a path means: itself, or the only one of a directory with no other model.

    Raises ``FileNotFoundError`` for a file that is not there, ``ValueError`` for a directory with several,
    and ``ImportError`` where what reads them is not installed.
    """
    found = path if path.suffix == SUFFIX and not path.is_dir() else _in_directory(path)
    if found is None:
        return None
    if not found.is_file():
        raise FileNotFoundError(f"no model {str(path)!r}: there is no such file")
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise ImportError(
            f'{found} is a GGUF file, which needs {" and ".join(missing)}: pip install "cipherlm[gguf]"'
        )
    return found


def completed(config: dict[str, Any]) -> dict[str, Any]:
    """Return GPT-2's configuration in a GGUF file with what transformers leaves under other names."""
    config = dict(config)
    for theirs, ours in (("n_ctx", "n_positions"), ("feed_forward_length", "n_inner")):
        if theirs in config:
            config[ours] = config.pop(theirs)
    return config


@contextmanager
def bar_on_terminals_only() -> Iterator[None]:
    """Keep the bar that transformers draws while it reads a GGUF file out of pipes and logs.

    transformers draws it with tqdm itself, so that its own switch for bars does not reach it.
    """
    reader: Any = import_module("transformers.modeling_gguf_pytorch_utils")
    original = getattr(reader, "tqdm", None)
    if original is None:
        yield
        return
    reader.tqdm = partial(original, disable=None)  # None: disabled where stderr is no terminal
    try:
        yield
    finally:
        reader.tqdm = original


def _in_directory(path: Path) -> Path | None:
    files = sorted(path.glob(f"*{SUFFIX}"))
    whole = (path / "config.json").is_file() and any(any(path.glob(weights)) for weights in _WEIGHTS)
    if not files or whole:
        return None
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"the directory {str(path)!r} has several models: give one as a file ({names})")
    return files[0]
