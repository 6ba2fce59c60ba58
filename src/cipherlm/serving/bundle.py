"""A model in two bundles: what the server computes with, and what clients get.

::

    OUT/server/bundle.json       scheme, parameters, modules, fingerprint, SHA-256 of every other file
              weights.safetensors, modules.json    CKKS: weights and ranges of the remote modules
              circuits/                            TFHE: compiled circuits
              linear_plan.json, matrices.json, matrices.int16   linear layers: encoded weights
    OUT/client/bundle.json       the same, and the server's description
              config.json, model.safetensors       the model without the remote modules' weights
              encryption_config.json, tokenizer files
              remote.safetensors                   CKKS: what remote modules make of the public prefix
              draft/                               a draft model or head, if the owner has put one there
              circuits/                            TFHE: scales and parameters
              linear_plan.json, remote_layers.json, public_prefix.safetensors   linear layers

There is no pickle in them. A client's bundle is for everybody who may use the model; a server's is what has
to be kept from them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cipherlm.serving.computation import HostedModel, HostedProducts
from cipherlm.serving.keystore import KeyMaterial, sha256
from cipherlm.serving.schemes import scheme_of

if TYPE_CHECKING:
    import torch

    from cipherlm.models.encrypted import EncryptedModel
    from cipherlm.progress import Progress

BUNDLE_NAME = "bundle.json"
FORMAT = "cipherlm-bundle"
VERSION = 1
LINEAR = "linear"
"""The placement of bundles that :mod:`cipherlm.serving.linear_bundle` writes."""
STATE_NAME = "model.safetensors"
CONSTANTS_NAME = "remote.safetensors"
DRAFT_NAME = "draft"
_MOST_BYTES = 4 << 20


class BundleError(ValueError):
    """A bundle that is missing, damaged, of another version or for the other party."""


@dataclass(frozen=True)
class Bundle:
    """A directory that :func:`export` wrote, its files checked."""

    directory: Path
    about: Mapping[str, Any]

    @classmethod
    def load(cls, directory: str | os.PathLike[str], party: str) -> Bundle:
        """Read a bundle for ``"server"`` or ``"client"``. Raises :class:`BundleError`, naming the file."""
        bundle = cls.read(directory, party)
        bundle._check_files()
        return bundle

    @classmethod
    def read(cls, directory: str | os.PathLike[str], party: str) -> Bundle:
        """Read what a bundle is about, without a look at its files. Raises :class:`BundleError`."""
        root = Path(directory)
        path = root / BUNDLE_NAME
        if not path.is_file():
            hint = f": try {root / party}" if (root / party / BUNDLE_NAME).is_file() else ""
            raise BundleError(f"{root} is no bundle{hint or ': `cipherlm export` makes one'}")
        try:
            if path.stat().st_size > _MOST_BYTES:
                raise ValueError("too long")
            about = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(about, dict) or about.get("format") != FORMAT:
                raise ValueError("not a bundle")
            files = about["files"]
            if not isinstance(files, dict) or not all(_is_inside(name) for name in files):
                raise ValueError("its list of files")
        except (ValueError, KeyError) as error:
            raise BundleError(f"{path} is damaged: {error}") from error
        if about.get("version") != VERSION:
            raise BundleError(
                f"{path} has the version {about.get('version')!r}, and {VERSION} is known: "
                "export the model again with this version of CipherLM"
            )
        if about.get("party") != party:
            raise BundleError(f"{root} is for the {about.get('party')}, not for the {party}")
        return cls(root, about)

    def _check_files(self) -> None:
        mapped = self.about.get("mapped", {})
        for name, expected in self.about["files"].items():
            file = self.directory / name
            # What is mapped into memory is read when it is needed, and not for its sum at every start.
            whole = file.is_file() and (
                file.stat().st_size == mapped[name] if name in mapped else sha256(file) == expected
            )
            if not whole:
                raise BundleError(f"{file} is missing or damaged: export the model or copy the bundle again")

    @property
    def has_draft(self) -> bool:
        """Whether a client's bundle has a draft."""
        return any(name.startswith(f"{DRAFT_NAME}/") for name in self.about["files"])

    @property
    def scheme(self) -> str:
        """The scheme of the encryption."""
        return str(self.about["scheme"])

    @property
    def is_linear(self) -> bool:
        """Whether linear layers are at the server, one by one, and not modules that hold some."""
        return self.kind == LINEAR

    @property
    def kind(self) -> str:
        """The placement that has bundles of its own, or the scheme."""
        return str(self.about.get("placement") or self.scheme)


def export(
    model: EncryptedModel,
    directory: str | os.PathLike[str],
    tokenizer: Any,
    *,
    name: str,
    draft: Any = None,
) -> dict[str, Any]:
    """Write a calibrated model (with TFHE, a compiled one) as ``server`` and ``client`` in a directory.

    ``draft`` is what :func:`~cipherlm.models.drafts.load_draft` returns, for clients to propose tokens with.
    Returns the description that clients get from the server. Raises ``RuntimeError`` for a model that is not
    ready, and ``ValueError`` for a directory that is not empty.
    """
    if not model.is_calibrated:
        raise RuntimeError("the model is not calibrated: call compile(calibration_ids) before exporting")
    root = Path(directory)
    server, client = new_bundles(root)
    scheme = scheme_of(model.encryption_config.scheme)
    about, constants = scheme.export(model, server, client)
    model.config.save_pretrained(client)
    model.encryption_config.save_pretrained(client)
    tokenizer.save_pretrained(client)
    _save_state(scheme.client_state(model), client / STATE_NAME)
    if draft is not None:
        draft.save_pretrained(client / DRAFT_NAME)
    common = {"scheme": model.encryption_config.scheme, "name": name, **about}
    seal(server, {**common, "party": "server"})
    description = load_hosted_model(server).description
    seal(client, {**common, "party": "client", "description": description, **constants})
    return description


def new_bundles(root: Path) -> tuple[Path, Path]:
    """Make the directories of the server's and the client's bundle.

    Raises ``ValueError`` for a directory that is not empty.
    """
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ValueError(f"{root} is there already and not empty: export to a new directory")
    server, client = root / "server", root / "client"
    server.mkdir(parents=True)
    client.mkdir()
    return server, client


def load_hosted_model(directory: str | os.PathLike[str]) -> HostedModel | HostedProducts:
    """Load a server's bundle. Raises :class:`BundleError`, naming the file, if that cannot be."""
    bundle = Bundle.load(directory, "server")
    try:
        return scheme_of(bundle.kind).load(bundle)
    except (ValueError, KeyError) as error:
        raise BundleError(f"{bundle.directory} cannot be served: {error}") from error


def client_description(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what a server of this model says of it, from the client's bundle, and where the bundle lies."""
    bundle = Bundle.load(directory, "client")
    return {**bundle.about["description"], "bundle": str(bundle.directory.resolve())}


def generate_keys(description: Mapping[str, Any], progress: Progress) -> KeyMaterial:
    """Make keys for a described model.

    Raises ``ValueError`` for a description that makes no sense, and for TFHE's without its bundle: its
    parameters are there.
    """
    return scheme_of(description.get("placement") or description.get("scheme")).generate_keys(
        description, progress
    )


def _save_state(state: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(state, path, metadata={"format": "pt"})


def seal(directory: Path, about: dict[str, Any]) -> None:
    """Write a bundle's :data:`BUNDLE_NAME`: what it is about, and the sums of all its files.

    ``about["mapped"]`` has the sizes in bytes of files that are too large to be summed at every start.
    """
    files = {path.relative_to(directory).as_posix(): sha256(path) for path in _files(directory)}
    whole = {"format": FORMAT, "version": VERSION, **about, "files": files}
    text = json.dumps(whole, indent=1, allow_nan=False)
    (directory / BUNDLE_NAME).write_text(text + "\n", encoding="utf-8")


def _files(directory: Path) -> Iterable[Path]:
    return (path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != BUNDLE_NAME)


def _is_inside(name: Any) -> bool:
    return isinstance(name, str) and not Path(name).is_absolute() and ".." not in Path(name).parts
