"""What a client keeps of a model whose encrypted parts run at a server's."""

import torch
from transformers import GPT2LMHeadModel

from cipherlm.models.config import EncryptionConfig
from cipherlm.models.targets import match


def client_state_dict(model: GPT2LMHeadModel, config: EncryptionConfig) -> dict[str, torch.Tensor]:
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
