"""What export, server and client do in their own way for each scheme: ``SCHEME`` in its file here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cipherlm.serving.computation import HostedModel, HostedProducts
from cipherlm.serving.keystore import KeyMaterial

if TYPE_CHECKING:
    import torch

    from cipherlm.models.encrypted import EncryptedModel
    from cipherlm.progress import Progress
    from cipherlm.serving.bundle import Bundle
    from cipherlm.serving.client import Connection

SCHEMES = ("ckks", "linear", "tfhe")
"""Modules and whole models with CKKS, linear layers with CKKS, and attention modules with TFHE."""


class BundleScheme(Protocol):
    """What is done in its own way for models of one scheme."""

    def export(
        self, model: EncryptedModel, server: Path, client: Path
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Write what a server computes with, and what its clients need beside the weights that stay there.

        Returns what both bundles say of it, and what the client's alone does. Raises ``RuntimeError`` for a
        model that is not ready.
        """

    def client_state(self, model: EncryptedModel) -> dict[str, torch.Tensor]:
        """Return the weights that a client gets."""

    def load(self, bundle: Bundle) -> HostedModel | HostedProducts:
        """Load a server's bundle. Raises ``ValueError`` or ``KeyError`` if it is damaged."""

    def generate_keys(self, description: Mapping[str, Any], progress: Progress) -> KeyMaterial:
        """Make keys for a described model. Raises ``ValueError`` where that cannot be."""

    def client_parts(
        self, bundle: Bundle, blocks: int, connection: Connection, progress: Progress
    ) -> tuple[Mapping[str, Any], Callable[[EncryptedModel, bytes], None]]:
        """Return what a client has of each encrypted module, and what gives a model its secret key.

        Bounds what the connection takes, for a model of so many blocks. Raises ``BundleError``, and the
        latter ``KeyStoreError``.
        """


def scheme_of(name: object) -> BundleScheme:
    """Return what is done for a scheme. Raises ``ValueError`` for one that is not known."""
    if name not in SCHEMES:
        raise ValueError(f"the scheme {name!r} is not known: is it of a newer CipherLM?")
    found: BundleScheme = import_module(f"cipherlm.serving.schemes.{name}").SCHEME
    return found
