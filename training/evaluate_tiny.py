"""Measure a trained model on the ends of the books that it was not trained on, and the ranges inside it.

Example: python training/evaluate_tiny.py CORPUS_DIR tiny
"""

import argparse
import json
import math
from pathlib import Path

import torch
from corpus import read_books, split_book
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import GPT2LMHeadModel

from cipherlm.models.loading import load_model, load_tokenizer

# Short ones, as a user types them, with and without a sentence that goes before.
PROMPTS = ("Cryptography is a", "The old man looked at", "It was a dark night, and")


def strided_windows(ids: list[int], context: int, prefix: list[int]) -> list[tuple[list[int], int]]:
    """Cut one text into windows of `context` tokens; with each, the number of its last tokens to be scored.

    Every token is scored once, with at least half a window before it wherever the text has that much.
    """
    room = context - len(prefix)
    stride = room // 2
    windows = []
    # Without a prefix the very first token has nothing to be predicted from.
    scored = 0 if prefix else 1
    while scored < len(ids):
        end = min(len(ids), room if not windows else scored + stride)
        windows.append((prefix + ids[max(0, end - room) : end], end - scored))
        scored = end
    return windows


@torch.no_grad()
def held_out_loss(
    model: GPT2LMHeadModel, texts: list[list[int]], prefix: list[int], quiet: bool
) -> tuple[float, int]:
    """Return the summed negative log-likelihood (nats) of the texts and the number of tokens scored."""
    windows = [w for ids in texts for w in strided_windows(ids, model.config.n_positions, prefix)]
    # Windows of one length share a batch, so that nothing is padded.
    windows.sort(key=lambda window: len(window[0]))
    total, tokens, first = 0.0, 0, 0
    progress = tqdm(total=len(windows), unit="window", disable=quiet)
    while first < len(windows):
        length = len(windows[first][0])
        batch = [w for w in windows[first : first + 32] if len(w[0]) == length]
        ids = torch.tensor([w[0] for w in batch])
        losses = cross_entropy(model(ids).logits[:, :-1].mT, ids[:, 1:], reduction="none")
        for row, (_, scored) in zip(losses, batch, strict=True):
            total += row[-scored:].double().sum().item()
            tokens += scored
        first += len(batch)
        progress.update(len(batch))
    progress.close()
    return total, tokens


@torch.no_grad()
def ranges(model: GPT2LMHeadModel, texts: list[list[int]], prefix: list[int]) -> dict[str, object]:
    """Return the largest magnitudes inside the model, block by block, over the first window of every text.

    What is encrypted is the part after the public prefix, so the prefix itself is not counted in.
    """
    first = len(prefix)
    context, width = model.config.n_positions, model.config.n_embd
    heads, head_width = model.config.n_head, model.config.n_embd // model.config.n_head
    ids = torch.tensor([(prefix + text)[:context] for text in texts if len(prefix + text) >= context])
    seen: dict[str, list[torch.Tensor]] = {}
    hooks = []

    def largest(x: torch.Tensor) -> float:
        return round(x.abs().max().item(), 2)

    def record(name: str):
        return lambda module, inputs, output: seen.setdefault(name, []).append(output.detach())

    for block in model.transformer.h:
        for name, module in (
            ("after ln_1", block.ln_1),
            ("after ln_2", block.ln_2),
            ("query, key, value", block.attn.c_attn),
            ("before the activation", block.mlp.c_fc),
        ):
            hooks.append(module.register_forward_hook(record(name)))
    hidden = model.transformer(ids, output_hidden_states=True).hidden_states
    for hook in hooks:
        hook.remove()
    # The last one of transformers' list is after the final LayerNorm.
    seen["residual stream"] = list(hidden[:-1])
    visible = torch.ones(context, context, dtype=torch.bool).tril()[first:]
    scores, widths, widths_of_prompts = [], [], []
    for qkv in seen["query, key, value"]:
        q, k = (x.unflatten(-1, (heads, head_width)).transpose(1, 2) for x in qkv.split(width, -1)[:2])
        score = (q @ k.mT / math.sqrt(head_width))[..., first:, :]
        highest = score.masked_fill(~visible, -math.inf).amax(-1)
        lowest = score.masked_fill(~visible, math.inf).amin(-1)
        scores.append([round(lowest.min().item(), 2), round(highest.max().item(), 2)])
        widths.append(largest(highest - lowest))
        widths_of_prompts.append(largest((highest - lowest)[..., :16]))
    return {
        **{name: [largest(x[:, first:]) for x in tensors] for name, tensors in seen.items()},
        "residual stream at position 0": [largest(x[:, 0]) for x in hidden[:-1]],
        "attention scores": scores,
        "attention scores, width of a row": widths,
        "attention scores, width of a row, first 16 tokens": widths_of_prompts,
    }


@torch.no_grad()
def samples(model: GPT2LMHeadModel, tokenizer, new_tokens: int) -> dict[str, list[str]]:
    """Return greedy and sampled continuations of the prompts."""
    texts: dict[str, list[str]] = {"greedy": [], "sampled": []}
    for prompt in PROMPTS:
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(prompt)["input_ids"]]])
        for kind, options in (
            ("greedy", {"do_sample": False}),
            ("sampled", {"do_sample": True, "temperature": 0.8, "top_k": 40}),
        ):
            torch.manual_seed(0)
            mask = torch.ones_like(ids)
            out = model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, **options)
            texts[kind].append(tokenizer.decode(out[0, 1:]))
    return texts


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Measure the held-out perplexity of a trained model, and the ranges inside it.",
        epilog="example: python training/evaluate_tiny.py CORPUS_DIR tiny",
    )
    parser.add_argument("corpus_dir", type=Path, help="the folder of books that the model was trained on")
    parser.add_argument("model", help="'tiny' or a directory with a saved model and its tokeniser")
    parser.add_argument("--held-out", type=float, default=0.05, help="as in training (default: 0.05)")
    parser.add_argument("--new-tokens", type=int, default=40, help="length of the sample texts (default: 40)")
    parser.add_argument("--json", action="store_true", help="one JSON object and nothing else")
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    args = parse()
    model, tokenizer = load_model(args.model), load_tokenizer(args.model)
    books = [split_book(text, args.held_out)[1] for text in read_books(args.corpus_dir).values()]
    texts = [tokenizer(book, verbose=False)["input_ids"] for book in books]
    size = sum(len(book.encode()) for book in books)
    result: dict[str, object] = {"books": len(books), "bytes": size, "tokens": sum(map(len, texts))}
    for name, prefix in (("with prefix", [tokenizer.eos_token_id]), ("without prefix", [])):
        loss, tokens = held_out_loss(model, texts, prefix, args.json)
        result[name] = {
            "perplexity": round(math.exp(loss / tokens), 3),
            "bits_per_byte": round(loss / math.log(2) / size, 4),
            "largest": ranges(model, texts, prefix),
        }
    result["samples"] = samples(model, tokenizer, args.new_tokens)
    print(json.dumps(result, indent=None if args.json else 2))


if __name__ == "__main__":
    main()
