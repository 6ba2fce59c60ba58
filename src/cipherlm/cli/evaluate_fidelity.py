"""How close a model with CKKS is to the clear one, position by position and in what both generate."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from cipherlm.cli import UsageError
from cipherlm.cli.common import print_pairs, write_json
from cipherlm.cli.evaluate_perplexity import check_options, finite, in_words, text_ids
from cipherlm.cli.evaluate_setup import calibrated, header, prepare, title
from cipherlm.progress import TerminalProgress

if TYPE_CHECKING:
    from cipherlm.evaluation.fidelity import Comparison, Fidelity


def evaluate(options: argparse.Namespace) -> None:
    """Print the comparison as a table or JSON."""
    if options.illustration:
        raise UsageError("--illustration is about bits of quantisation, which CKKS has not")
    if options.prompt is not None:
        raise UsageError("--prompt belongs to --illustration")
    check_options(options)
    options.mode = options.mode or "simulate"
    if getattr(options, "heads", None) == [None]:  # all heads are what there is
        del options.heads
    if options.by_block:
        from cipherlm.cli.evaluate_blocks import evaluate_blocks

        evaluate_blocks(options)
        return
    if options.plot:
        raise UsageError("--plot goes with --by-block, or with --scheme tfhe")

    from cipherlm.evaluation.behind import behind
    from cipherlm.evaluation.fidelity import summarised
    from cipherlm.evaluation.perplexity import perplexity
    from cipherlm.evaluation.prompts import compared
    from cipherlm.models.loading import load_tokenizer

    progress = TerminalProgress()
    setup = prepare(options, progress)
    model = calibrated(options, setup, setup.config, setup.clear, progress)
    model.set_fhe_mode(options.mode)
    called = behind(model, setup.prefix)
    start = time.perf_counter()
    comparisons: list[Comparison] = []
    with progress("comparing"):
        comparisons.extend(compared(model, called, setup.texts))
    seconds = time.perf_counter() - start
    prompts = [c[: text.prompt_tokens - 1] for c, text in zip(comparisons, setup.texts, strict=True)]
    answers = [c[text.prompt_tokens - 1 :] for c, text in zip(comparisons, setup.texts, strict=True)]
    parts = {
        "prompts": summarised(prompts) if any(len(c.ranks) for c in prompts) else None,
        "answers": summarised(answers),
        "all": summarised(comparisons),
    }
    result: dict[str, Any] = {
        **header(options, model, setup),
        "positions": parts["all"].positions if parts["all"] else 0,
        **{f"top{k}": share for k, share in summarised(comparisons).top.items()},
        "parts": {name: _figures(part) for name, part in parts.items() if part is not None},
        "greedy": _greedy(answers),
        "seconds": seconds,
    }
    if options.perplexity:
        ids = text_ids(options, load_tokenizer(options.model))
        window = min(options.window or setup.room, setup.room)
        with model.in_clear():
            clear = perplexity(called, ids, window=window, batch_size=1)
        result["perplexity"] = finite(perplexity(called, ids, window=window, batch_size=1).value)
        result["clear_perplexity"] = finite(clear.value)
        result["perplexity_tokens"], result["perplexity_window"] = clear.tokens, window
    if options.json:
        write_json(result)
    else:
        _print(result)


def _figures(part: Fidelity) -> dict[str, Any]:
    return {
        "positions": part.positions,
        **{f"top{k}": share for k, share in part.top.items()},
        "kl": finite(part.mean_divergence),
        "worst_kl": finite(part.worst_divergence),
        "perplexity": finite(part.perplexity),
        "clear_perplexity": finite(part.clear_perplexity),
    }


def _greedy(answers: list[Comparison]) -> dict[str, Any]:
    """Return for how long greedy answers are those of the clear model."""
    equal, tokens = [c.equal_tokens for c in answers], [len(c.ranks) for c in answers]
    return {
        "answers": len(answers),
        "equal_answers": sum(a == b for a, b in zip(equal, tokens, strict=True)),
        "mean_equal_tokens": sum(equal) / len(equal),
        "mean_tokens": sum(tokens) / len(tokens),
    }


def _print(result: dict[str, Any]) -> None:
    from cipherlm.evaluation.report import format_table

    kind = "chats" if "chats" in result else "sentences"
    print(f"{title(result)}: agreement with the clear model")
    print(f"{kind}: {result[kind]}, each with the clear model's greedy answer\n")
    names = ["", "positions", "top-1", "top-5", "top-10", "KL", "worst KL", "perplexity", "clear"]
    rows = [
        [
            name,
            str(part["positions"]),
            *(f"{part[rank]:.1%}" for rank in ("top1", "top5", "top10")),
            *("overflow" if part[kl] is None else f"{part[kl]:.2g}" for kl in ("kl", "worst_kl")),
            *(in_words(part[perplexity]) for perplexity in ("perplexity", "clear_perplexity")),
        ]
        for name, part in result["parts"].items()
    ]
    print(format_table(names, rows))
    greedy = result["greedy"]
    print(
        f"\ngreedy answers: {greedy['equal_answers']} of {greedy['answers']} are the same to the end; on "
        f"average {greedy['mean_equal_tokens']:.1f} of {greedy['mean_tokens']:.1f} tokens before a difference"
    )
    if result["left_out"]:
        print(f"{kind} left out, which are longer than the context: {result['left_out']}")
    if "perplexity_tokens" in result:
        print(f"\n{result['perplexity_tokens']} tokens in windows of {result['perplexity_window']}")
        print_pairs(
            [(name, in_words(result[name.replace(" ", "_")])) for name in ("perplexity", "clear perplexity")]
        )
