"""A draft that reads a model's last hidden states: one block that says what the next of them will be.

Li, Wei, Zhang and Zhang, "EAGLE: speculative sampling requires rethinking feature uncertainty" (ICML 2024,
arXiv 2401.15077). A client of a whole encrypted model has the last hidden states of all tokens that were
evaluated, and the model's own final normalisation and output layer: the head adds one block of Llama's kind.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaModel
from transformers.generation.candidate_generator import CandidateGenerator

from cipherlm.models.architecture import architecture_of

if TYPE_CHECKING:
    from typing_extensions import Self

CONFIG_NAME = "draft_head.json"
WEIGHTS_NAME = "draft_head.safetensors"
DRAFT_TOKENS = 7
"""How many tokens a draft has, unless its ``generation_config`` says otherwise.

An encrypted model evaluates up to eight tokens together, and fewer of them cost as much.
"""
WORTHWHILE = 0.6
"""How many tokens of its draft a head has to expect to be right, or it proposes none.

Several tokens cost a pass of SmolLM2 four fifths more than one.
"""

_ONE_BLOCK = {
    "num_hidden_layers": 1,
    "vocab_size": 1,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


class DraftHead(nn.Module):
    """Predicts a model's next features from those of the tokens so far, and from the token behind each.

    Features are hidden states behind the final normalisation, which the output layer reads. ``config`` is
    that of the block, and has the model's ``hidden_size`` and ``vocab_size``. Given to ``generate`` of an
    encrypted model as its ``assistant_model``, what it proposes is verified there.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.generation_config = GenerationConfig(  # type: ignore[no-untyped-call, unused-ignore]
            num_assistant_tokens=DRAFT_TOKENS, num_assistant_tokens_schedule="constant"
        )
        self.worthwhile = WORTHWHILE
        self.joined = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        # The model's embedding and output layer are used in the place of its own.
        self.body = LlamaModel(LlamaConfig(**{**config.to_dict(), **_ONE_BLOCK}))
        del self.body.embed_tokens
        self.train(False)

    def forward(self, features: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """Return the features that follow (n, tokens, width).

        Row i of ``features`` (n, tokens, width) is the model's at token i, row i of ``embeddings`` that of
        token i + 1, and row i of the result the model's features at token i + 1, as predicted.
        """
        x = self.joined(torch.cat([features, embeddings], dim=-1))
        following: torch.Tensor = self.body(inputs_embeds=x, use_cache=False).last_hidden_state
        return following

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write the head to a directory, in half precision."""
        root = Path(directory)
        root.mkdir(parents=True, exist_ok=True)
        self.config.to_json_file(root / CONFIG_NAME)
        state = {name: tensor.half().contiguous() for name, tensor in self.state_dict().items()}
        save_file(state, root / WEIGHTS_NAME, metadata={"format": "pt"})

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str]) -> Self:
        """Load what :meth:`save_pretrained` wrote. Raises ``ValueError``, naming the file, if damaged."""
        root = Path(directory)
        try:
            config = LlamaConfig.from_json_file(root / CONFIG_NAME)
            head = cls(config)
        # LlamaConfig raises whatever the numbers in a damaged file lead to.
        except Exception as error:
            raise ValueError(f"{root / CONFIG_NAME} is damaged: {_first_line(error)}") from error
        try:
            state = load_file(root / WEIGHTS_NAME)
            head.load_state_dict({name: tensor.float() for name, tensor in state.items()})
            if not all(bool(tensor.isfinite().all()) for tensor in head.state_dict().values()):
                raise ValueError("a weight is not a number")
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            raise ValueError(f"{root / WEIGHTS_NAME} is damaged: {_first_line(error)}") from error
        return head


class HeadCandidates(CandidateGenerator):  # type: ignore[misc, no-untyped-call, unused-ignore]
    """Proposes what a :class:`DraftHead` goes on with: a candidate generator of transformers.

    ``cache`` is that of an encrypted model, which has last hidden states in the place of values. A head that
    expects too little of a draft, by its own probabilities, proposes nothing.
    """

    def __init__(self, model: Any, head: DraftHead, cache: Any, max_length: int) -> None:
        self._model, self._head, self._cache, self._max_length = model, head, cache, max_length
        architecture = architecture_of(model.config.model_type)
        self._embedding = model.get_submodule(architecture.embedding)
        self._norm = model.get_submodule(architecture.norm)
        self._output = model.get_output_embeddings()

    @torch.no_grad()
    def get_candidates(self, input_ids: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:  # type: ignore[override, unused-ignore]
        """Return token ids (1, tokens) with the draft behind them.

        There is none before the first evaluation, as the tokens of the prompt have no hidden states yet. No
        probabilities are returned: transformers then draws tokens from the model's own distribution, and
        keeps those of the draft that were drawn.
        """
        tokens = input_ids.shape[1]
        # The last token comes from the model itself: the evaluation that follows reads it and the draft.
        most = min(int(self._head.generation_config.num_assistant_tokens), self._max_length - tokens - 1)
        hidden = last_hidden_states(self._cache)
        # In the clear, the cache has keys and values.
        if hidden is None or hidden.shape != (1, tokens - 1, self._model.config.hidden_size) or most < 1:
            return input_ids, None
        features, ids = self._norm(hidden.to(self._model.dtype)), input_ids
        right, expected = 1.0, 0.0
        for _step in range(most):
            following = self._head(features, self._embedding(ids[:, 1:]))[:, -1:]
            features = torch.cat([features, following], dim=1)
            probability, token = self._output(following)[:, 0].float().softmax(-1).max(-1, keepdim=True)
            ids = torch.cat([ids, token], dim=1)
            right *= float(probability)
            expected += right
        return ids if expected >= self._head.worthwhile else input_ids, None

    def update_candidate_strategy(self, *_: Any) -> None:
        """Propose as many tokens the next time, whatever became of these."""


def last_hidden_states(cache: Any) -> torch.Tensor | None:
    """Return those that an encrypted model's cache has (n, tokens, width), or None if nothing is there."""
    values = cache.layers[0].values if cache.layers else None
    return None if values is None else values[:, 0]


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
