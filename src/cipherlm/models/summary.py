"""What is told of an encrypted model before it computes: what is remote, and how it is encrypted."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

from cipherlm.models.architecture import MODULES, architecture_of
from cipherlm.models.config import ALL, EncryptionConfig
from cipherlm.models.geometry import geometry_of, public_prefix
from cipherlm.nn.activations import activation
from cipherlm.schemes.ckks.geometry import Geometry


@dataclass(frozen=True)
class Summary:
    """Remote modules by name, the public prefix as ids and as text, and the packing of hidden states."""

    modules: list[str]
    prefix: list[int]
    prefix_text: str
    geometry: Geometry


def read_summary(name: str | os.PathLike[str], config: EncryptionConfig) -> Summary | None:
    """Return the summary of a model on this machine with whole modules on CKKS, from its small files alone.

    Loads neither weights nor torch. Returns None where these files do not tell, and only the loaded model
    does: on the hub, in other forms than ``config.json`` and ``tokenizer.json``, for modules that are named
    in another way than in full, and for whatever is wrong with them. Raises ``ValueError`` as
    ``get_encrypted_model`` does.
    """
    embedded = str(files("cipherlm.models").joinpath("tiny"))
    directory = Path(embedded if os.fspath(name) == "tiny" else name)
    model = _plain(directory / "config.json")
    if model is None:
        return None
    modules = _modules(config, model)
    if modules is None:
        return None
    prefix = public_prefix(config, model)
    geometry = geometry_of(config, model.args, prefix)
    text = _decoded(directory / "tokenizer.json", prefix)
    return None if text is None else Summary(modules, prefix, text, geometry)


def _plain(path: Path) -> SimpleNamespace | None:
    """Return the configuration of a model whose modules can all be remote, or None for any other."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(values, dict) or values.get("model_type") not in MODULES:
        return None
    architecture = architecture_of(values["model_type"])
    try:
        args = architecture.args.of(values)
        activation(args.activation)
        prefix, vocabulary = values.get("bos_token_id"), int(values["vocab_size"])
    except (KeyError, TypeError, ValueError):
        return None
    return SimpleNamespace(architecture=architecture, args=args, bos_token_id=prefix, vocab_size=vocabulary)


def _modules(config: EncryptionConfig, model: SimpleNamespace) -> list[str] | None:
    """Return what is remote in the model's order, or None unless every name is one in full."""
    wanted = config.target_modules
    known = list(model.architecture.names(model.args.layers))
    if wanted in (ALL, [ALL]):
        return known[:1]
    if isinstance(wanted, str) or not set(wanted) <= set(known[1:]):
        return None
    inside = any(name.startswith(f"{other}.") for name in wanted for other in wanted)
    return None if inside else [name for name in known if name in wanted]


def _decoded(path: Path, ids: list[int]) -> str | None:
    from tokenizers import Tokenizer

    try:
        return str(Tokenizer.from_file(str(path)).decode(ids, skip_special_tokens=False))
    except Exception:  # the library raises bare ones
        return None
