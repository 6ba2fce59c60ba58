"""Count the tokens that a draft gives for each pass of a whole encrypted chat model, on unseen chats.

    python benchmarks/drafts.py DRAFT_DIR
    python benchmarks/drafts.py DRAFT_DIR --worthwhile 0 0.6 1 --mode simulate --json

DRAFT_DIR has a draft head (training/train_draft.py) or a small model of the same tokenizer. Chats are those
of the package that nothing was calibrated on. They are answered by `generate` with drafts of each length, in
the arithmetic of ciphertexts on clear numbers, and each answer must be the one without drafts. Seconds are
calculated from what a pass of one token and one of several take on a server: these cost the same for any
number up to eight.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from cipherlm import load_model, load_tokenizer
from cipherlm.cli.streaming import TokenStream, generate
from cipherlm.cli.whole import whole_chat_model
from cipherlm.evaluation.chats import evaluation_chats, read_chats
from cipherlm.evaluation.prompts import chat_prompts
from cipherlm.models.drafts import load_draft
from cipherlm.progress import TerminalProgress


def answers(
    model: Any, tokenizer: Any, prompts: Iterable[torch.Tensor], new_tokens: int, draft: Any = None
) -> list[tuple[list[int], list[int]]]:
    """Return each greedy answer, and how many tokens were evaluated in each pass behind the prompt's."""
    tokens: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: tokens.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    found = []
    for prompt in prompts:
        tokens.clear()
        ids = model.with_prefix(prompt)
        drafts = {} if draft is None else {"assistant_model": draft}
        generated = generate(model, ids, new_tokens, stream=TokenStream(tokenizer), drafts=drafts)
        # The pass of the prompt gives the first token, and is there with and without drafts.
        found.append((generated[0, ids.shape[1] :].tolist(), tokens[1:]))
    hook.remove()
    return found


def measured(
    plain: list[list[int]], drafted: list[tuple[list[int], list[int]]], options: argparse.Namespace
) -> dict[str, Any]:
    """Return tokens a pass behind the prompt's, and the seconds that follow."""
    tokens = sum(len(answer) - 1 for answer, _ in drafted)
    passes = [count for _, counts in drafted for count in counts]
    seconds = sum(options.one_seconds if count == 1 else options.several_seconds for count in passes)
    return {
        "equal_answers": sum(answer == same for (answer, _), same in zip(drafted, plain, strict=True)),
        "answers": len(plain),
        "tokens": tokens,
        "passes": len(passes),
        "tokens_per_pass": tokens / len(passes),
        "calculated_seconds_per_token": seconds / tokens,
    }


def main() -> int:
    """Print a row for each number of tokens that a head has to expect."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("draft", type=Path, metavar="DRAFT_DIR")
    parser.add_argument("--model", default="smollm2", help="the chat model (default: smollm2)")
    parser.add_argument("--chats", type=Path, help="JSONL file of chats (default: the package's)")
    parser.add_argument("--limit", type=int, help="only the first chats")
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument(
        "--worthwhile", type=float, nargs="+", help="tokens that a head has to expect, or it proposes none"
    )
    parser.add_argument("--mode", choices=("disable", "simulate"), default="disable")
    parser.add_argument("--one-seconds", type=float, default=17.6, help="what a pass of one token takes")
    parser.add_argument(
        "--several-seconds", type=float, default=28.2, help="what one of several tokens takes"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    tokenizer = load_tokenizer(options.model)
    model = whole_chat_model(load_model(options.model), tokenizer, TerminalProgress())
    draft = load_draft(options.draft, model.config)
    chats = read_chats(options.chats) if options.chats else evaluation_chats()
    prompts = chat_prompts(tokenizer, chats[: options.limit], model.prefix)
    model.set_fhe_mode(options.mode)
    plain = [answer for answer, _ in answers(model, tokenizer, prompts, options.max_new_tokens)]
    rows, equal = {}, True
    for least in options.worthwhile or [getattr(draft, "worthwhile", 0.0)]:
        draft.worthwhile = least
        drafted = answers(model, tokenizer, prompts, options.max_new_tokens, draft)
        row = rows[least] = measured(plain, drafted, options)
        equal = equal and row["equal_answers"] == row["answers"]
        if not options.json:
            print(
                f"expecting {least}: {row['tokens_per_pass']:.2f} tokens a pass ({row['tokens']} in "
                f"{row['passes']}), calculated {row['calculated_seconds_per_token']:.1f} s a token; "
                f"{row['equal_answers']} of {row['answers']} answers as without drafts",
                flush=True,
            )
    if options.json:
        json.dump(
            {"mode": options.mode, "model": options.model, "by_least_expected": rows}, sys.stdout, indent=1
        )
        print()
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
