"""Bundles of attention modules with TFHE."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cipherlm.serving.bounds import Bounds
from cipherlm.serving.bundle import Bundle
from cipherlm.serving.keystore import KeyMaterial
from cipherlm.serving.tfhe import TfheBackend, TfheHostedModel, export_tfhe

if TYPE_CHECKING:
    import torch

    from cipherlm.models.tfhe import TfheModel
    from cipherlm.progress import Progress
    from cipherlm.serving.client import Connection

Float64 = NDArray[np.float64]


class Tfhe:
    """See :class:`~cipherlm.serving.schemes.BundleScheme`."""

    def export(self, model: TfheModel, server: Path, client: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """Write both parts of the circuits."""
        said = export_tfhe(model, server.parent)
        return {"fingerprint": said["fingerprint"], "modules": said["modules"]}, {}

    def client_state(self, model: TfheModel) -> dict[str, torch.Tensor]:
        """Return all weights but those in circuits."""
        from cipherlm.models.client import client_state_dict

        return client_state_dict(model, model.encryption_config)

    def load(self, bundle: Bundle) -> TfheHostedModel:
        """Load a server's bundle."""
        return TfheHostedModel.load(bundle.directory, bundle.about["name"])

    def generate_keys(self, description: Mapping[str, Any], progress: Progress) -> KeyMaterial:
        """Make keys for the circuits in a client's bundle."""
        if "bundle" not in description:
            raise ValueError("keys for TFHE are made from the client's bundle: give it with --bundle")
        backend = TfheBackend.load(Path(description["bundle"]), progress=progress)
        backend.keygen()
        return backend.key_material()

    def client_parts(
        self, bundle: Bundle, blocks: int, connection: Connection, progress: Progress
    ) -> tuple[dict[str, _Circuit], Callable[[TfheModel, bytes], None]]:
        """Return the circuits at the server, and what takes their secret keys."""
        connection.bounds = Bounds(int(bundle.about["description"]["message_bytes"]), rounds=0)
        backend = TfheBackend.load(bundle.directory, connection, progress)
        circuits = {
            name: _Circuit(backend, name, circuit.description.tokens)
            for name, circuit in backend.circuits.items()
        }
        return circuits, lambda _model, secret: backend.load_secret(secret)


@dataclass(frozen=True)
class _Circuit:
    """A circuit at the server, as an encrypted module of a model sees it."""

    backend: TfheBackend
    name: str
    tokens: int

    def execute(self, x: Float64) -> Float64:
        """Return the outputs (t, outputs) for hidden states (t, width)."""
        return self.backend.evaluate(self.name, x)


SCHEME = Tfhe()
