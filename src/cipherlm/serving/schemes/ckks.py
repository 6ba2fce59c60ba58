"""Bundles of modules and whole models with CKKS."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from cipherlm.engine import EngineError, SecretKey
from cipherlm.schemes.ckks.session import Client
from cipherlm.serving.bundle import CONSTANTS_NAME, Bundle, BundleError
from cipherlm.serving.ckks import (
    CkksBackend,
    CkksHostedModel,
    RemotePart,
    bounds_of,
    chunks_of,
    generate,
    geometry_of,
    modules_fingerprint,
    parameters_of,
    save_modules,
)
from cipherlm.serving.keystore import KeyMaterial, KeyStoreError

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from cipherlm.models.ckks import CkksModel
    from cipherlm.models.remote import Exact
    from cipherlm.progress import Progress
    from cipherlm.serving.client import Connection


class Ckks:
    """See :class:`~cipherlm.serving.schemes.BundleScheme`."""

    def export(self, model: CkksModel, server: Path, client: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """Write exact modules with their ranges, and the outputs at the public prefix for clients."""
        remote = model.remote_modules
        exact, parts = {}, {}
        for name, module in remote.items():
            if module.exact is None or module.exact.module is None or module.ranges is None:
                raise RuntimeError(f"the weights of {name} are not here")
            exact[name] = module.exact
            parts[name] = RemotePart(module.exact.module, module.exact.prefixes, module.ranges)
        save_modules(server, str(model.config.model_type), model.placement.args, parts)
        outputs = {name: np.ascontiguousarray(own.outputs, np.float32) for name, own in exact.items()}
        save_file(outputs, client / CONSTANTS_NAME)
        about = {
            "fingerprint": modules_fingerprint(server),
            "parameters": parameters_of(model.placement.geometry),
            "modules": list(remote),
        }
        constants = {
            "remote": {name: {"centred": own.centred, "extra": own.extra} for name, own in exact.items()}
        }
        return about, constants

    def client_state(self, model: CkksModel) -> dict[str, torch.Tensor]:
        """Return all weights but those of remote modules, embeddings in half precision."""
        from cipherlm.linear.model import with_half_embeddings

        state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        if model.config.tie_word_embeddings:
            state.pop("lm_head.weight", None)
        inside = tuple(f"{name}." for name in model.encrypted_modules)
        own = {name: tensor for name, tensor in state.items() if not name.startswith(inside)}
        return with_half_embeddings(own, model)

    def load(self, bundle: Bundle) -> CkksHostedModel:
        """Load a server's bundle."""
        about = bundle.about
        return CkksHostedModel.load(bundle.directory, geometry_of(about), about["fingerprint"], about["name"])

    def generate_keys(self, description: Mapping[str, Any], progress: Progress) -> KeyMaterial:
        """Make keys for the geometry of a described model."""
        secret_key, public = generate(geometry_of(description))
        return KeyMaterial(secret_key.to_bytes(), public)

    def client_parts(
        self, bundle: Bundle, blocks: int, connection: Connection, progress: Progress
    ) -> tuple[dict[str, Exact], Callable[[CkksModel, bytes], None]]:
        """Return the constants of remote modules, and what connects a model with a secret key."""
        geometry, description = geometry_of(bundle.about), bundle.about["description"]
        bounds = connection.bounds = bounds_of(description, blocks)
        chunks = chunks_of(description)

        def connect(model: CkksModel, secret: bytes) -> None:
            try:
                secret_key = SecretKey.from_bytes(secret, geometry.parameters)
            except EngineError as error:
                raise KeyStoreError("the secret key is for another model, or damaged") from error
            client = Client(secret_key, geometry, most_chunks=chunks)
            model.connect(CkksBackend(client, connection, bounds.message_bytes))

        return _constants(bundle), connect


def _constants(bundle: Bundle) -> dict[str, Exact]:
    from cipherlm.models.remote import Exact

    path = bundle.directory / CONSTANTS_NAME
    try:
        outputs = load_file(path)
        return {
            name: Exact(
                None, [], np.asarray(outputs[name], np.float64), bool(facts["centred"]), facts["extra"]
            )
            for name, facts in bundle.about["remote"].items()
        }
    except (SafetensorError, OSError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{path} is damaged: {error}") from error


SCHEME = Ckks()
