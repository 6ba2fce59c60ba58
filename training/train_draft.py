"""Train a draft head for a chat model on the model's own conversations.

The head is a block between the model's features and its output layer, after EAGLE (Li et al., ICML 2024).
It learns the model's distribution of the next token (cross-entropy) and the next features (smooth L1), from
the true features of a text and, for further steps of a draft, from its own, as in HASS (Zhang et al.,
"Learning harmonized representations for speculative sampling", ICLR 2025). Only frequent tokens are counted
in the loss, for speed; the draft chooses among all.

Example: python training/train_draft.py chats smollm2-draft --epochs 8
"""

import argparse
import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from options import add_run_options, begin
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy, smooth_l1_loss
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from cipherlm import load_model
from cipherlm.models.eagle import DraftHead


@dataclass(frozen=True)
class Text:
    """Token ids (tokens,) and the features at all but the last; the answer starts at token ``prompt``."""

    ids: torch.Tensor
    features: torch.Tensor
    prompt: int


def read(directory: Path) -> list[Text]:
    """Return the conversations that draft_data.py has written."""
    found = []
    for file in sorted(directory.glob("*.safetensors")):
        batch = load_file(file)
        found += [
            Text(ids[:length].long(), features[: length - 1].clone(), int(prompt))
            for ids, features, prompt, length in zip(
                batch["ids"], batch["features"], batch["prompt"], batch["length"].tolist(), strict=True
            )
        ]
    if not found:
        raise FileNotFoundError(f"no conversations (*.safetensors) in {directory}")
    return found


def new_head(model: Any, texts: list[Text]) -> DraftHead:
    """Return a head that starts as the model's last block, on the input that fits best (least squares)."""
    config = LlamaConfig.from_dict({**model.config.to_dict(), "num_hidden_layers": 1})
    head = DraftHead(config)
    head.body.layers[0].load_state_dict(model.model.layers[-1].state_dict())
    head.body.norm.load_state_dict(model.model.norm.state_dict())
    entered: list[torch.Tensor] = []
    hook = model.model.layers[-1].register_forward_pre_hook(
        lambda _, args: entered.append(args[0][0]), with_kwargs=False
    )
    inputs, outputs = [], []
    with torch.inference_mode():
        for text in texts[:: max(1, len(texts) // 100)]:
            model.model(text.ids[None], use_cache=False)
            following = model.get_input_embeddings()(text.ids[1:])
            inputs.append(torch.cat([text.features.float(), following], dim=1)[text.prompt :])
            outputs.append(entered.pop()[text.prompt + 1 :])
    hook.remove()
    x, y = torch.cat(inputs).double(), torch.cat(outputs).double()
    ridge = x.T @ x + 1e-2 * x.pow(2).sum() / x.shape[1] * torch.eye(x.shape[1], dtype=x.dtype)
    solution = torch.linalg.solve(ridge, x.T @ y)
    left = (y - x @ solution).pow(2).sum() / (y - y.mean(0)).pow(2).sum()
    print(f"the joined input explains {1 - left:.0%} of what enters the last block", flush=True)
    with torch.no_grad():
        head.joined.weight.copy_(solution.T)
    return head


def rolled_out(
    head: DraftHead, features: torch.Tensor, embeddings: torch.Tensor, steps: int
) -> Iterator[torch.Tensor]:
    """Yield what the head predicts in its first, second, ... step (n, tokens, width), for every position.

    In step s the last s - 1 features that a position sees are the head's own, and those before are true. All
    positions are computed at once: scores of a step are on the keys of the true features up to s - 1 tokens
    before, and on one key of each step since.
    """
    layer, count = head.body.layers[0], features.shape[1]
    attention = layer.self_attn
    shape = (*features.shape[:2], -1, attention.head_dim)
    positions = torch.arange(count)
    cos, sin = head.body.rotary_emb(features, positions[None])
    keys: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    seen = features
    for step in range(steps):
        x = head.joined(torch.cat([seen, embeddings], dim=-1))
        normed = layer.input_layernorm(x)
        query = attention.q_proj(normed).view(shape).transpose(1, 2)
        key = attention.k_proj(normed).view(shape).transpose(1, 2)
        value = attention.v_proj(normed).view(shape).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        groups = query.shape[1] // key.shape[1]
        keys.append(key.repeat_interleave(groups, dim=1))
        values.append(value.repeat_interleave(groups, dim=1))
        scores = query @ keys[0].transpose(2, 3)
        scores = scores.masked_fill(positions[None] > positions[:, None] - step, float("-inf"))
        # The key of an earlier step belongs to the token so many before.
        own = [(_back(keys[s], step - s), _back(values[s], step - s)) for s in range(1, step + 1)]
        scores = torch.cat([scores, *((query * k).sum(-1, keepdim=True) for k, _ in own)], dim=-1)
        weights = (scores.float() * attention.scaling).softmax(-1).to(query.dtype)
        # Positions that have no true features before them have none to attend to in their first step.
        mixed = weights[..., :count].nan_to_num() @ values[0]
        for number, (_, v) in enumerate(own):
            mixed = mixed + weights[..., count + number, None].nan_to_num() * v
        x = x + attention.o_proj(mixed.transpose(1, 2).reshape(*features.shape[:2], -1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
        following = head.body.norm(x)
        yield following
        # Row i is what is predicted of token i + 1, which the next step reads in the place of its features.
        seen = _back(following.detach(), 1)


def _back(x: torch.Tensor, by: int) -> torch.Tensor:
    """Return rows (..., tokens, width) moved so many tokens on, with zeros before them."""
    return x if by == 0 else torch.nn.functional.pad(x, (0, 0, by, 0))[..., : x.shape[-2], :]


def batches(texts: list[Text], size: int, generator: torch.Generator) -> Iterator[list[Text]]:
    """Yield an epoch of batches of texts of about one length."""
    shuffled = [texts[i] for i in torch.randperm(len(texts), generator=generator)]
    pools = [shuffled[i : i + 16 * size] for i in range(0, len(shuffled), 16 * size)]
    groups = []
    for pool in pools:
        pool.sort(key=lambda text: len(text.ids))
        groups += [pool[i : i + size] for i in range(0, len(pool), size)]
    yield from (groups[i] for i in torch.randperm(len(groups), generator=generator))


def loss_of(head: DraftHead, batch: list[Text], frozen: "Frozen", args: argparse.Namespace) -> torch.Tensor:
    """Return the loss of a batch, all steps of a draft together."""
    longest = max(len(text.features) for text in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.int64)
    features = torch.zeros(len(batch), longest, batch[0].features.shape[1])
    weights = torch.zeros(len(batch), longest - 1)
    for row, text in enumerate(batch):
        count = len(text.features)
        ids[row, :count], features[row, :count] = text.ids[:-1], text.features.float()
        # Row i predicts the features of token i + 1, from which token i + 2 is chosen.
        weights[row, args.prefix : count - 1] = args.question_weight
        weights[row, text.prompt - 2 : count - 1] = 1.0
    share, rows = weights[weights > 0] / weights.sum(), weights > 0
    given = features[:, :-1]
    given = given + args.noise * given.pow(2).mean(-1, keepdim=True).sqrt() * torch.randn_like(given)
    total = torch.zeros(())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        true = features[:, 1:][rows]
        wanted = (true @ frozen.output.T).float().softmax(-1)
        for step, following in enumerate(rolled_out(head, given, frozen.embedding[ids[:, 1:]], args.steps)):
            likely = cross_entropy((following[rows] @ frozen.output.T).float(), wanted, reduction="none")
            near = smooth_l1_loss(following[rows].float(), true, reduction="none").mean(-1)
            total = total + args.decay**step * (share * (likely + args.feature_weight * near)).sum()
    return total


@dataclass(frozen=True)
class Frozen:
    """The model's embedding, and the rows of its output layer for frequent tokens."""

    embedding: torch.Tensor
    output: torch.Tensor


def frozen_of(model: Any, texts: list[Text], vocabulary: int) -> Frozen:
    """Return what is not trained."""
    counts = Counter(token for text in texts for token in text.ids.tolist())
    frequent = torch.tensor(sorted(token for token, _ in counts.most_common(vocabulary)))
    output = model.get_output_embeddings().weight.detach()
    return Frozen(model.get_input_embeddings().weight.detach(), output[frequent].clone())


@torch.inference_mode()
def kept_tokens(head: DraftHead, model: Any, texts: list[Text], steps: int) -> list[float]:
    """Return the share of drafts whose first, first two, ... tokens are those of the model's answer."""
    right, drafts = [0] * steps, 0
    output = model.get_output_embeddings().weight
    for text in texts:
        embeddings = model.get_input_embeddings()(text.ids[1:])[None]
        # A draft from row i, of token i + 2 and on: what its steps predict stands one row further each.
        rows = torch.arange(text.prompt - 1, len(text.ids) - 1 - steps)
        kept = torch.ones(len(rows), dtype=torch.bool)
        drafts += len(rows)
        for step, x in enumerate(rolled_out(head, text.features[None].float(), embeddings, steps)):
            chosen = (x[0, rows + step] @ output.T).argmax(-1)
            kept &= chosen == text.ids[rows + step + 2]
            right[step] += int(kept.sum())
    return [count / drafts for count in right]


def told(shares: list[float]) -> str:
    """Say how much of drafts is right, and what they give for each pass."""
    right = ", ".join(f"{share:.0%}" for share in shares)
    return f"first tokens right {right}; {1 + sum(shares):.2f} tokens a pass"


def train(head: DraftHead, model: Any, texts: list[Text], held: list[Text], args: argparse.Namespace) -> None:
    """Run the optimisation, and save after each epoch."""
    frozen = frozen_of(model, texts, args.vocabulary)
    optimizer = torch.optim.AdamW(head.parameters(), betas=(0.9, 0.95), weight_decay=args.weight_decay)
    steps = math.ceil(args.epochs * math.ceil(len(texts) / args.batch_size))
    generator = torch.Generator().manual_seed(args.seed)
    done, epoch, started = 0, 0, time.perf_counter()
    while done < steps:
        smoothed = 0.0
        head.train(True)
        for batch in batches(texts, args.batch_size, generator):
            warm = min(1.0, (done + 1) / args.warm_up)
            for group in optimizer.param_groups:
                group["lr"] = args.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * min(1, done / steps)))
            loss = loss_of(head, batch, frozen, args)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(head.parameters(), args.clip)
            optimizer.step()
            smoothed = loss.item() if not smoothed else 0.98 * smoothed + 0.02 * loss.item()
            done += 1
            if done % 100 == 0:
                print(
                    f"step {done}/{steps}: loss {smoothed:.3f}, {time.perf_counter() - started:.0f} s",
                    flush=True,
                )
        epoch += 1
        head.train(False)
        head.save_pretrained(args.out_dir)
        shares = kept_tokens(head, model, held, args.most)
        print(f"epoch {epoch}: {told(shares)}", flush=True)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("chats", type=Path, help="directory that draft_data.py has written")
    parser.add_argument("out_dir", type=Path, help="where the head is written")
    parser.add_argument("--model", default="smollm2", help="the chat model (default: smollm2)")
    parser.add_argument("--start", type=Path, help="go on from this head")
    parser.add_argument("--epochs", type=float, default=8.0)
    parser.add_argument("--batch-size", type=int, default=8, help="conversations a step")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="peak of the cosine schedule")
    parser.add_argument("--warm-up", type=int, default=50, help="steps")
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--clip", type=float, default=0.5, help="largest norm of the gradient")
    parser.add_argument("--steps", type=int, default=3, help="steps of a draft in the loss")
    parser.add_argument("--decay", type=float, default=0.7, help="weight of a step relative to that before")
    parser.add_argument("--vocabulary", type=int, default=8192, help="tokens counted in the loss")
    parser.add_argument("--feature-weight", type=float, default=0.1, help="weight of the smooth L1")
    parser.add_argument("--question-weight", type=float, default=0.2, help="weight of what users say")
    parser.add_argument("--noise", type=float, default=0.02, help="on features, relative")
    parser.add_argument("--prefix", type=int, default=24, help="tokens that all chats start with")
    parser.add_argument("--held-out", type=int, default=100, help="conversations to measure on")
    parser.add_argument("--most", type=int, default=7, help="tokens of a draft that is measured")
    add_run_options(parser)
    return parser.parse_args()


def main() -> None:
    """Train the head."""
    args = parse()
    begin(args)
    model = load_model(args.model)
    texts = read(args.chats)
    tokens = sum(len(text.ids) - text.prompt for text in texts)
    print(f"{len(texts)} conversations, {tokens:,} tokens of answers", flush=True)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    held = [texts[i] for i in order[: args.held_out]]
    rest = [texts[i] for i in order[args.held_out :]]
    head = DraftHead.from_pretrained(args.start) if args.start else new_head(model, rest)
    print(f"before: {told(kept_tokens(head, model, held, args.most))}")
    train(head, model, rest, held, args)


if __name__ == "__main__":
    main()
