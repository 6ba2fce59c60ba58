"""Bundles of linear layers with CKKS, which :mod:`cipherlm.serving.linear_bundle` writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cipherlm.serving.bundle import Bundle
from cipherlm.serving.keystore import KeyMaterial
from cipherlm.serving.linear import LinearHostedModel

if TYPE_CHECKING:
    from cipherlm.progress import Progress


class Linear:
    """See :class:`~cipherlm.serving.schemes.BundleScheme`: the server's side alone.

    Models and clients of linear layers are of classes of their own.
    """

    def load(self, bundle: Bundle) -> LinearHostedModel:
        """Load a server's bundle."""
        return LinearHostedModel.load(bundle.directory, bundle.about["fingerprint"], bundle.about["name"])

    def generate_keys(self, description: Mapping[str, Any], progress: Progress) -> KeyMaterial:
        """Say that there is nothing to do."""
        raise ValueError(
            "keys for linear layers are made for each run and not stored: there is nothing to do"
        )


SCHEME = Linear()
