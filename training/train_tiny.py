"""Train the embedded model: a byte-level BPE tokeniser and a small GPT-2 on a folder of plain-text books.

Example: python training/train_tiny.py CORPUS_DIR OUT_DIR --epochs 8
"""

import argparse
import json
import math
import time
from itertools import chain, count, islice
from pathlib import Path

import numpy as np
import torch
from corpus import Windows, read_books, split_book
from options import add_run_options, begin
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy, linear
from tqdm import tqdm
from transformers import AutoTokenizer, GenerationConfig, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(texts: list[str], size: int, context: int, out: Path) -> PreTrainedTokenizerBase:
    """Train GPT-2's kind of tokeniser (byte-level BPE), save it to `out` and load it as a user would."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = (line for text in texts for line in text.splitlines(keepends=True))
    tokenizer.train_from_iterator(lines, trainer)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": context,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        **{f"{name}_token": END_OF_TEXT for name in ("bos", "eos", "unk")},
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return AutoTokenizer.from_pretrained(out)


def encode_books(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Return all texts as one token sequence, each one preceded by the end-of-text token."""
    parts = [[tokenizer.eos_token_id, *tokenizer(text, verbose=False)["input_ids"]] for text in texts]
    return np.fromiter(chain.from_iterable(parts), dtype=np.int64)


def new_model(vocabulary_size: int, prefix_id: int, args: argparse.Namespace) -> GPT2LMHeadModel:
    """Return an untrained model in GPT-2's shape."""
    config = GPT2Config(
        vocab_size=vocabulary_size,
        n_positions=args.context,
        n_embd=args.width,
        n_layer=args.blocks,
        n_head=args.heads,
        # The same function as gelu_new, as one fused kernel; saved as gelu_new.
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=args.dropout,
        embd_pdrop=args.dropout,
        attn_pdrop=0.0,
        bos_token_id=prefix_id,
        eos_token_id=prefix_id,
        use_cache=False,
    )
    return GPT2LMHeadModel(config)


def learning_rate(step: int, steps: int, peak: float, warm_up: int) -> float:
    """Rise linearly to the peak, then fall along a cosine to a hundredth of it."""
    if step < warm_up:
        return peak * (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def save(model: GPT2LMHeadModel, out: Path) -> None:
    """Write the model as `transformers` reads it: float16, the tied output embedding stored once."""
    tensors = {
        name: tensor.to(torch.float16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(tensors, str(out / "model.safetensors"), metadata={"format": "pt"})
    config = GPT2Config.from_dict(model.config.to_dict())
    config.activation_function, config.use_cache = "gelu_new", True
    config.dtype, config.architectures = "float16", ["GPT2LMHeadModel"]
    config.save_pretrained(out)
    GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.eos_token_id
    ).save_pretrained(out)


def train(model: GPT2LMHeadModel, windows: Windows, args: argparse.Namespace) -> None:
    """Run the optimisation; the schedule counts steps, so that a pause of the process changes nothing."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        fused=True,
    )
    steps = args.steps or math.ceil(args.epochs * len(windows) / args.batch_size)
    first = 0
    checkpoint = args.checkpoint or args.out_dir.with_name(args.out_dir.name + ".checkpoint.pt")
    if args.resume:
        state = torch.load(checkpoint, weights_only=True)
        first = state["step"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    # A resumed run skips what the interrupted one has seen.
    batches = islice(chain.from_iterable(windows.epoch(args.batch_size) for _ in count()), first, None)
    model.train()
    # The outputs of the fused query, key and value projections of this step.
    projected: list[torch.Tensor] = []
    for block in model.transformer.h:
        block.attn.c_attn.register_forward_hook(lambda module, inputs, output: projected.append(output))
    smoothed, started = None, time.perf_counter()
    progress = tqdm(initial=first, total=steps, unit="step", mininterval=5, disable=args.quiet)
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, args.learning_rate, args.warm_up)
        inputs, targets = next(batches)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.bf16):
            hidden = model.transformer(inputs).last_hidden_state
            logits = linear(hidden.flatten(0, 1), model.lm_head.weight)
        loss = cross_entropy(logits.float(), targets.flatten())
        value = loss.item()
        if step >= args.qk_penalty_from:
            # Some heads learn scores a hundred wide where twenty give the same attention. The encrypted
            # softmax pays for width, so queries and keys are kept short once the attention has formed.
            squares = sum(x[..., : 2 * model.config.n_embd].float().pow(2).sum(-1).mean() for x in projected)
            loss = loss + args.qk_penalty * squares
        projected.clear()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        smoothed = value if smoothed is None else 0.98 * smoothed + 0.02 * value
        progress.update()
        progress.set_postfix(loss=f"{smoothed:.3f}", refresh=False)
        if (step + 1) % args.save_every == 0 or step + 1 == steps:
            state = {"step": step + 1, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, checkpoint)
            save(model, args.out_dir)
            rate = (step + 1 - first) * args.batch_size * args.context / (time.perf_counter() - started)
            progress.write(f"step {step + 1}: loss {smoothed:.4f}, {rate:,.0f} tokens/s, saved")
    progress.close()
    model.eval()


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Train the embedded tokeniser and model on a folder of plain-text books.",
        epilog="example: python training/train_tiny.py CORPUS_DIR OUT_DIR --epochs 8",
    )
    parser.add_argument("corpus_dir", type=Path, help="folder with one book a *.txt (wikitext2* is left out)")
    parser.add_argument("out_dir", type=Path, help="where the model and the tokeniser are written")
    parser.add_argument("--epochs", type=float, default=8.0, help="passes over the books (default: 8)")
    parser.add_argument("--steps", type=int, help="optimiser steps, instead of --epochs")
    add_run_options(parser)
    parser.add_argument("--held-out", type=float, default=0.05, help="share of each book not trained on")
    parser.add_argument("--vocabulary", type=int, default=4096, help="tokens, <|endoftext|> included")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--batch-size", type=int, default=16, help="windows a step")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="peak of the cosine schedule")
    parser.add_argument("--warm-up", type=int, default=200, help="steps")
    parser.add_argument("--weight-decay", type=float, default=0.1, help="on matrices and embeddings only")
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    parser.add_argument("--prefix-share", type=float, default=0.75, help="windows with <|endoftext|> first")
    parser.add_argument("--qk-penalty", type=float, default=2e-5, help="weight of squared q and k")
    parser.add_argument("--qk-penalty-from", type=int, default=2400, help="first step with that penalty")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="mixed precision")
    parser.add_argument("--save-every", type=int, default=200, help="steps between checkpoints")
    parser.add_argument("--checkpoint", type=Path, help="checkpoint file (default: beside OUT_DIR)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args()


def main() -> None:
    """Train the tokeniser, then the model, and save both."""
    args = parse()
    begin(args)
    books = read_books(args.corpus_dir)
    texts = [split_book(text, args.held_out)[0] for text in books.values()]
    tokenizer = train_tokenizer(texts, args.vocabulary, args.context, args.out_dir)
    ids = encode_books(texts, tokenizer)
    model = new_model(len(tokenizer), tokenizer.eos_token_id, args)
    parameters = model.num_parameters()
    print(f"{len(books)} books, {len(ids):,} training tokens, {parameters:,} parameters", flush=True)
    train(model, Windows(ids, tokenizer, args.context, args.prefix_share, args.seed), args)


if __name__ == "__main__":
    main()
