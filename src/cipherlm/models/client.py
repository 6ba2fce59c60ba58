"""What a client keeps of a model whose encrypted parts run at a server's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from cipherlm.linear.model import empty_model, in_single_precision, model_class
from cipherlm.models.config import EncryptionConfig
from cipherlm.models.encrypted import EncryptedModel
from cipherlm.models.targets import match
from cipherlm.progress import Progress, silent


def client_model(
    config: PretrainedConfig,
    encryption: EncryptionConfig,
    state: Mapping[str, torch.Tensor],
    parts: Mapping[str, Any],
    *,
    progress: Progress = silent,
) -> EncryptedModel:
    """Return a model from a client's weights, in the mode ``"execute"``, which others compute.

    ``parts`` are what a client has of each encrypted module: with CKKS an
    :class:`~cipherlm.models.remote.Exact`, and the model still needs ``connect``; with TFHE circuits at a
    server. Raises ``ValueError`` if weights or parts are of another model.
    """
    clear = empty_model(model_class(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(config.model_type))), config)
    missing, unexpected = clear.load_state_dict(in_single_precision(state), strict=False, assign=True)
    clear.tie_weights()
    clear.train(False)
    model = EncryptedModel.encrypt(clear, encryption, progress=progress)
    inside = tuple(f"{name}." for name in model.encrypted_modules)
    lacking = [name for name in missing if not name.startswith((*inside, "lm_head."))]
    if lacking or unexpected:
        raise ValueError(f"the weights are of another model: {', '.join([*lacking, *unexpected][:3])}")
    model.set_fhe_mode("execute")
    if set(parts) != set(model.encrypted_modules):
        raise ValueError(f"{', '.join(model.encrypted_modules)} are remote, not {', '.join(parts)}")
    model.leave_to_server(parts)
    return model


def client_state_dict(model: Any, config: EncryptionConfig) -> dict[str, torch.Tensor]:
    """Return a copy of the weights of ``model``, clear or encrypted by ``config``, without the server's.

    Where ``config`` names heads, the columns of ``c_attn`` that make their queries, keys and values are zero;
    the output projection stays, as the client computes it. Otherwise all of the module's weights are left
    out. A tied output layer, which is the token embedding once more, is left out too.

    Raises ``ValueError`` if ``config`` names a module or head that there is not.
    """
    attentions = [name for name, _ in model.named_modules() if name.endswith(".attn")]
    heads, width = model.config.n_head, model.config.n_embd
    missing = [head for head in config.heads or [] if head >= heads]
    if missing:
        raise ValueError(f"the model has heads 0 to {heads - 1}, no head {missing[0]}")
    state = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    for name in match(config.target_modules, attentions):
        if config.heads is None:
            state = {key: tensor for key, tensor in state.items() if not key.startswith(f"{name}.")}
            continue
        for kind in ("weight", "bias"):
            columns = state[f"{name}.c_attn.{kind}"].view(-1, 3, heads, width // heads)
            columns[:, :, config.heads] = 0.0
    return state
