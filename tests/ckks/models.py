"""Models of transformers beside the modules that compute their blocks, and modules of random weights."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch

from cipherlm.models.architecture import architecture_of
from cipherlm.nn.blocks import evaluate, prefixes
from cipherlm.nn.clear import ClearTensor
from cipherlm.nn.module import Linear
from cipherlm.nn.tensor import Cache


class Clear:
    """A model of transformers: what comes before its blocks and behind them, and the blocks as a module."""

    def __init__(self, model) -> None:
        self.model = model.eval().double()
        self.architecture = architecture_of(model.config.model_type)
        self.args = self.architecture.args.of(model.config.to_dict())

    @cached_property
    def exact(self):
        """All blocks, with exact functions."""
        return self.module(self.architecture.blocks)

    def module(self, name):
        """Return the exact module of what is at a name in the model."""
        made = self.architecture.make(name, self.args)
        state = self.model.get_submodule(name).state_dict()
        return made.load(made.sanitize({key: tensor.numpy() for key, tensor in state.items()}))

    def hidden_states(self, ids) -> tuple[np.ndarray, np.ndarray]:
        """Return hidden states (tokens, width) before the first block and behind the last."""
        blocks, found = self.model.get_submodule(self.architecture.blocks), []

        def note(values):
            found.append((values[0] if isinstance(values, tuple) else values)[0].numpy())

        hooks = [
            blocks[0].register_forward_pre_hook(lambda _, args: note(args)),
            blocks[-1].register_forward_hook(lambda _, __, output: note(output)),
        ]
        with torch.no_grad():
            self.model(torch.tensor([list(ids)]))
        for hook in hooks:
            hook.remove()
        before, behind = found
        return before, behind

    def embed(self, ids) -> np.ndarray:
        """Return hidden states (tokens, width) as the first block takes them."""
        return self.ready(self.hidden_states(ids)[0])

    def ready(self, hidden) -> np.ndarray:
        """Return hidden states without their mean, if that is how modules take and return them."""
        return hidden - hidden.mean(-1, keepdims=True) if self.architecture.centred else hidden

    def logits(self, hidden) -> np.ndarray:
        """Return logits (tokens, vocabulary) of what the last block returns."""
        body = self.model.base_model
        norm = body.ln_f if hasattr(body, "ln_f") else body.norm
        with torch.no_grad():
            return self.model.lm_head(norm(torch.from_numpy(hidden))).numpy()

    def clear_logits(self, ids) -> np.ndarray:
        with torch.no_grad():
            return self.model(torch.tensor([list(ids)])).logits[0].numpy()

    def prefixes(self, ids):
        """Return the keys and values of each block for the first tokens of texts."""
        return prefixes(self.exact, self.embed(ids))


def behind(module, hidden, before, position, noise=None) -> np.ndarray:
    """Return a module's outputs on clear numbers, behind the keys and values of a prefix."""
    caches = [Cache(prefix) for prefix in before]
    return evaluate(module, ClearTensor(hidden, noise, position), caches).values


def linear(random, inputs, outputs) -> Linear:
    return Linear(random.normal(size=(inputs, outputs)) / inputs**0.5, random.normal(size=outputs) / 10)


def filled(module, random):
    """Give a module random weights, and return it."""
    return module.load(
        {
            name: random.normal(size=weight.shape) / (weight.shape[0] ** 0.5 if weight.ndim == 2 else 10)
            for name, weight in module.weights.items()
        }
    )
