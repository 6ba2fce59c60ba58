"""A public prefix (a system prompt, a chat template): keys and values computed once, in the clear."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from inspect import signature
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import DynamicCache, PreTrainedModel

PREFIX_NAME = "public_prefix.safetensors"


@dataclass(frozen=True)
class PublicPrefix:
    """Token ids (tokens,) that texts start with, and the keys and values of each layer.

    Keys and values are (1, heads, tokens, head_dim). They tell nothing but the prefix, which is public; a
    client that has them sends nothing for these tokens.
    """

    ids: torch.Tensor
    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    def cache(self, model: PreTrainedModel, sequences: int = 1) -> DynamicCache:
        """Return a key-value cache for ``sequences`` texts, of its own memory: each call needs a new one."""
        cache = DynamicCache(config=model.config)
        for index, (keys, values) in enumerate(self.layers):
            here = (x.to(model.device, model.dtype).repeat(sequences, 1, 1, 1) for x in (keys, values))
            cache.update(next(here), next(here), index)
        return cache

    def first(self, tokens: int) -> PublicPrefix:
        """Return the first ``tokens`` of it."""
        layers = tuple((keys[:, :, :tokens], values[:, :, :tokens]) for keys, values in self.layers)
        return PublicPrefix(self.ids[:tokens], layers)

    def split(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return ``input_ids`` (n, tokens) less the prefix. Raises ``ValueError`` if a text lacks it."""
        prefix = self.ids.to(input_ids.device)
        if input_ids.shape[1] <= len(prefix) or not bool((input_ids[:, : len(prefix)] == prefix).all()):
            raise ValueError(f"a text does not start with the {len(prefix)} tokens of the public prefix")
        return input_ids[:, len(prefix) :]

    def generate(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Return what ``model.generate`` does for texts behind the prefix, with the prefix before them.

        ``input_ids`` (n, tokens) are the private texts alone, padded on the left if need be, and
        ``attention_mask`` is theirs. ``options`` are those of ``generate``.
        """
        rows = len(input_ids)
        prefix = self.ids.to(input_ids.device).expand(rows, -1)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        # generate repeats the texts for beams, and leaves a cache as it is given.
        given = options.get("generation_config") or model.generation_config
        copies = [options.get(name) or getattr(given, name, None) or 1 for name in _COPIES]
        with reading_new_tokens(model):
            generated: torch.Tensor = model.generate(
                torch.cat([prefix, input_ids], dim=1),
                attention_mask=torch.cat([torch.ones_like(prefix), mask], dim=1),
                **{cache_name(model): self.cache(model, rows * max(copies))},
                **options,
            )
        return generated

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write the prefix to a safetensors file."""
        tensors = {"ids": self.ids.contiguous()}
        for index, (keys, values) in enumerate(self.layers):
            tensors |= {f"{index}.keys": keys.contiguous(), f"{index}.values": values.contiguous()}
        save_file(tensors, file)

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> PublicPrefix:
        """Read what ``save`` wrote. Raises ``ValueError``, naming the file, if it is damaged."""
        try:
            with safe_open(file, framework="pt") as stored:
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{os.fspath(file)} is damaged: {error}") from error
        ids, count = tensors.get("ids"), len(tensors) // 2
        names = {"ids", *(f"{i}.{kind}" for i in range(count) for kind in ("keys", "values"))}
        if ids is None or ids.dim() != 1 or ids.dtype != torch.int64 or set(tensors) != names:
            raise ValueError(f"{os.fspath(file)} is damaged: not the keys and values of a prefix")
        for name in names - {"ids"}:
            tensor = tensors[name]
            if tensor.dim() != 4 or tensor.shape[0] != 1 or tensor.shape[2] != len(ids):
                raise ValueError(f"{os.fspath(file)} is damaged: {name} has the shape {tuple(tensor.shape)}")
        return cls(ids, tuple((tensors[f"{i}.keys"], tensors[f"{i}.values"]) for i in range(count)))


_COPIES = ("num_beams", "num_return_sequences")


@contextmanager
def reading_new_tokens(model: Any) -> Iterator[None]:
    """Let ``generate`` read only what its cache lacks of whole texts, for as long as the context lasts.

    With drafts, some versions of transformers read all of a text at first, whatever is in the cache that they
    were given. Does nothing for what is no model of transformers.
    """
    name = "prepare_inputs_for_generation"
    prepare = getattr(model, name, None)
    if prepare is None:
        yield
        return

    @wraps(prepare)
    def prepared(input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("cache")
        # Where a cut is there already it is right, as it is in versions without this argument.
        if cache is not None and kwargs.get("next_sequence_length", 0) is None:
            kwargs["next_sequence_length"] = input_ids.shape[1] - cache.get_seq_length()
        return prepare(input_ids, *args, **kwargs)

    own = vars(model).get(name)
    setattr(model, name, prepared)
    try:
        yield
    finally:
        if own is None:
            delattr(model, name)
        else:
            setattr(model, name, own)


def cache_name(model: Any) -> str:
    """Return what the model calls its key-value cache: transformers 5.24 gave it a new name."""
    return "cache" if "cache" in signature(model.forward).parameters else "past_key_values"


def public_prefix_cache(model: PreTrainedModel, input_ids: torch.Tensor) -> PublicPrefix:
    """Return the keys and values of ``input_ids`` (tokens,), which ``model`` computes: a clear model.

    Raises ``ValueError`` unless the model is a decoder with plain keys and values in every layer.
    """
    ids = torch.as_tensor(input_ids, device=model.device).reshape(1, -1)
    if getattr(model.config, "is_encoder_decoder", False) or not model.can_generate():
        raise ValueError(f"a {type(model).__name__} has no prefix of a text: it is not a decoder alone")
    if not ids.numel() or ids.is_floating_point():
        raise ValueError("a public prefix is token ids, at least one")
    # Without the configuration, every layer keeps all tokens, those with a sliding window too.
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=ids, use_cache=True, **{cache_name(model): cache})
    layers = []
    for layer in cache.layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None or keys.shape[-2] != ids.shape[1]:
            raise ValueError(f"the layers of a {type(model).__name__} keep more than keys and values")
        layers.append((keys.cpu().clone(), values.cpu().clone()))
    return PublicPrefix(ids[0].cpu(), tuple(layers))
