"""Writing a model in two bundles: linear layers for a server, all else for its clients."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from cipherlm.linear.groups import find_groups, linear_layers, weights_of
from cipherlm.linear.model import save_client_model
from cipherlm.linear.plan import Plan, make_plan
from cipherlm.linear.prefix import PREFIX_NAME, public_prefix_cache
from cipherlm.linear.products import Float32, LinearGroup
from cipherlm.linear.server import MATRICES_NAME, PLAN_NAME, encode_to
from cipherlm.models.chat import public_head
from cipherlm.models.config import EncryptionConfig
from cipherlm.models.linear import EncryptedLinearModel
from cipherlm.models.targets import find_linear
from cipherlm.progress import Progress, counted, silent
from cipherlm.serving.bundle import LINEAR, new_bundles, seal
from cipherlm.serving.keystore import sha256
from cipherlm.serving.linear import describe


def export_linear(
    model: Any,
    config: EncryptionConfig,
    directory: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    prefix: str | None = None,
    system: str | None = None,
    training: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write the linear layers that ``config`` names as ``server``, the rest of a clear model as ``client``.

    ``prefix`` is a public text that comes before every prompt, ``system`` the public system prompt of chats:
    the keys and values of either are computed here, and cost clients nothing. Without them, a model for chats
    has what its template begins with. ``training`` writes the
    transposed matrices too, which gradients need. Returns the description that clients get from the server.

    Raises ``ValueError`` for a directory that is not empty, for layers that are not there or cannot be
    remote, and for a prefix that the model or its tokenizer cannot have.
    """
    if isinstance(model, EncryptedLinearModel):
        raise ValueError("export the clear model: its linear layers are found here")
    layers, names = linear_layers(model), find_linear(model, config)
    ids = public_ids(tokenizer, prefix, system)
    with progress("finding linear layers"):
        groups = find_groups(model, names)
        try:
            cache = public_prefix_cache(model, torch.tensor(ids)) if ids else None
        except ValueError:
            if prefix is not None or system is not None:
                raise
            cache = None  # nobody has asked for one
    if not groups:
        raise ValueError(f"the linear layers of a {type(model).__name__} cannot be remote")
    weights = _Weights(layers, groups)
    server, client = new_bundles(Path(directory))
    with progress("planning"):
        plan = make_plan(list(groups), weights, training=training)
    with counted(progress, "encoding weights", "matrix") as report:
        encode_to(server, plan, weights, report)
    with progress("writing the clients' bundle"):
        save_client_model(model, groups, client)
        (client / PLAN_NAME).write_bytes((server / PLAN_NAME).read_bytes())
        tokenizer.save_pretrained(client)
        config.save_pretrained(client)
        if cache is not None:
            cache.save(client / PREFIX_NAME)
    fingerprint = _fingerprint(plan, server)
    description = describe(plan, fingerprint, name)
    common = {"scheme": "ckks", "placement": LINEAR, "name": name, "fingerprint": fingerprint}
    mapped = {MATRICES_NAME: (server / MATRICES_NAME).stat().st_size}
    seal(server, {**common, "mapped": mapped, "party": "server"})
    given = {name: text for name, text in (("text", prefix), ("system", system)) if text is not None}
    seal(client, {**common, "party": "client", "description": description, "prefix": given})
    return description


def public_ids(
    tokenizer: PreTrainedTokenizerBase, prefix: str | None = None, system: str | None = None
) -> list[int]:
    """Return the token ids that texts begin with: a prefix, or the head of a chat; none if there is neither.

    Raises ``ValueError`` for a tokenizer without a chat template, and for one that leaves the system prompt
    out.
    """
    if prefix is not None and system is not None:
        raise ValueError("a prefix of texts and a system prompt of chats do not go together")
    if prefix is not None:
        return list(tokenizer(prefix)["input_ids"])
    if system is None:
        try:
            return public_head(tokenizer)
        except ValueError:  # not a model for chats
            return []
    head = public_head(tokenizer, system)
    if system not in tokenizer.decode(head):
        raise ValueError("the model's chat template does not begin with the system prompt")
    return head


class _Weights(Mapping[str, Float32]):
    """The stacked matrices of groups, each made when it is asked for."""

    def __init__(self, layers: Mapping[str, Any], groups: Sequence[LinearGroup]) -> None:
        self._layers, self._groups = layers, {group.name: group for group in groups}

    def __getitem__(self, name: str) -> Float32:
        return weights_of(self._layers, self._groups[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)


def _fingerprint(plan: Plan, server: Path) -> str:
    text = f"{plan.digest} {sha256(server / MATRICES_NAME)}"
    return hashlib.sha256(text.encode()).hexdigest()
