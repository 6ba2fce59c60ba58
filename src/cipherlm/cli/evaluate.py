"""Measure what quantisation costs, against the clear model.

Agreement: at every position of 80 sentences, is the clear model's next token the first guess (top-1), or
among the first 5 or 10, of the quantised one? Value ranges come from other text, never from the sentences
that are measured.
"""

import argparse
import copy
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cipherlm.cli import UsageError
from cipherlm.cli.circuits import compile_circuits, compiled_length
from cipherlm.cli.common import (
    add_calibration_option,
    add_json_option,
    add_model_option,
    add_noise_option,
    calibration_ids,
    encryption_config,
    existing_file,
    heads_argument,
    heads_label,
    modules_argument,
    positive_integer,
    prompt_ids,
    quiet_libraries,
    write_json,
)
from cipherlm.progress import TerminalProgress

if TYPE_CHECKING:
    import torch

EXAMPLES = """\
examples:
  cipherlm evaluate
  cipherlm evaluate --heads 0 --heads all --n-bits 2..8 --plot agreement.png
  cipherlm evaluate --model gpt2 --heads all --n-bits 7 --perplexity book.txt --json
  cipherlm evaluate --illustration
"""

ILLUSTRATION_PROMPT = "Cryptography is a"
ILLUSTRATION_BITS = [8, 2]
ILLUSTRATION_TOKENS = 8
SIMULATED_TOKENS = 6
PERPLEXITY_TOKENS = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_model_option(parser)
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--block", type=int, metavar="I", help="quantise the attention of block I (default: 0)"
    )
    group.add_argument(
        "--target-modules",
        type=modules_argument,
        metavar="NAMES",
        help="attention modules, separated by commas",
    )
    parser.add_argument(
        "--heads",
        type=heads_argument,
        action="append",
        metavar="HEADS",
        help='"0", "0,2" or "all" with the output projection; may be repeated (default: 0, then all)',
    )
    parser.add_argument(
        "--n-bits", type=bits_argument, metavar="BITS", help='"4", "2,4,7" or "2..8" (default: 2..8)'
    )
    add_noise_option(parser)
    parser.add_argument(
        "--mode",
        choices=("disable", "simulate"),
        default="disable",
        help="disable: the quantised arithmetic (default); simulate: with ciphertext noise, compiles first",
    )
    parser.add_argument(
        "--sentences",
        metavar="FILE",
        help="sentences to measure on, one a line (default: the 80 in this package)",
    )
    parser.add_argument("--limit", type=positive_integer, metavar="N", help="only the first N sentences")
    parser.add_argument(
        "--tokens",
        type=positive_integer,
        metavar="N",
        help=f"cut sentences to N tokens (default: whole; with --mode simulate {SIMULATED_TOKENS})",
    )
    add_calibration_option(parser)
    parser.add_argument("--perplexity", metavar="FILE", help="measure perplexity on this text too")
    parser.add_argument(
        "--perplexity-tokens",
        type=positive_integer,
        metavar="N",
        help=f"tokens of that text to measure on (default: the first {PERPLEXITY_TOKENS})",
    )
    parser.add_argument(
        "--window",
        type=positive_integer,
        metavar="N",
        help="tokens of a window for perplexity (default: the longest calibration sentence)",
    )
    parser.add_argument(
        "--plot", metavar="FILE", help="draw agreement against bits, for example into agreement.png"
    )
    parser.add_argument(
        "--illustration",
        action="store_true",
        help="continue a prompt with the clear model, with enough bits and with too few",
    )
    parser.add_argument(
        "--prompt", metavar="TEXT", help=f'of --illustration (default: "{ILLUSTRATION_PROMPT}")'
    )
    parser.add_argument(
        "--max-new-tokens",
        type=positive_integer,
        metavar="N",
        help=f"of --illustration (default: {ILLUSTRATION_TOKENS})",
    )
    add_json_option(parser)


def bits_argument(text: str) -> list[int]:
    """Return bit-widths from ``4``, ``2,4,7`` or ``2..8`` (also ``2-8``)."""
    try:
        bits: list[int] = []
        for part in text.split(","):
            first, _, last = part.replace("..", "-").partition("-")
            bits.extend(range(int(first), int(last or first) + 1))
        if not bits:
            raise ValueError
        return list(dict.fromkeys(bits))
    except ValueError:
        raise argparse.ArgumentTypeError(f'{text!r}: use bit-widths such as "4", "2,4,7" or "2..8"') from None


def run(options: argparse.Namespace) -> None:
    """Print a table or JSON, and draw the plot."""
    for path in (options.sentences, options.calibration, options.perplexity):
        existing_file(path)
    with quiet_libraries():
        if options.illustration:
            _illustrate(options)
        else:
            _evaluate(options)


def _evaluate(options: argparse.Namespace) -> None:
    if options.prompt is not None or options.max_new_tokens is not None:
        raise UsageError("--prompt and --max-new-tokens belong to --illustration")
    for name in ("window", "perplexity_tokens"):
        if getattr(options, name) is not None and options.perplexity is None:
            raise UsageError(f"--{name.replace('_', '-')} belongs to --perplexity")
    if options.mode == "simulate" and options.perplexity:
        raise UsageError("--perplexity is measured with --mode disable")
    all_heads = options.heads or [[0], None]
    all_bits = options.n_bits or list(range(2, 9))
    # Every configuration before any work, so that a wrong one costs nothing.
    configs = [
        encryption_config(options, heads=heads, n_bits=bits) for heads in all_heads for bits in all_bits
    ]
    if options.plot:
        _check_plot(options.plot)

    from cipherlm.evaluation.agreement import next_tokens, top_k_agreement
    from cipherlm.evaluation.perplexity import perplexity
    from cipherlm.evaluation.texts import encode, evaluation_sentences, read_sentences
    from cipherlm.models.integration import get_encrypted_model
    from cipherlm.models.loading import load_model, load_tokenizer

    progress = TerminalProgress()
    clear, tokenizer = load_model(options.model), load_tokenizer(options.model)
    length = options.tokens or (SIMULATED_TOKENS if options.mode == "simulate" else clear.config.n_positions)
    texts = read_sentences(options.sentences) if options.sentences else evaluation_sentences()
    sentences = encode(tokenizer, texts[: options.limit], max_tokens=length)
    calibration = calibration_ids(options, tokenizer, length)
    longest = max(ids.shape[1] for ids in calibration)
    reference = next_tokens(clear, sentences)

    measure: Callable[[Any], Any] | None = None
    if options.perplexity:
        text = Path(options.perplexity).read_text(encoding="utf-8")
        ids = encode(tokenizer, [text], max_tokens=options.perplexity_tokens or PERPLEXITY_TOKENS)[0]
        window = min(options.window or longest, clear.config.n_positions)

        def measure(model: Any) -> Any:
            return perplexity(model, ids, window=window)

    header: dict[str, Any] = {
        "model": options.model,
        "modules": configs[0].target_modules,
        "mode": options.mode,
        "sentences": len(sentences),
        "positions": sum(ids.shape[1] for ids in sentences),
        "calibration_sentences": len(calibration),
    }
    if measure is not None:
        measured = measure(clear)
        header["perplexity_file"] = options.perplexity
        header["perplexity_tokens"] = measured.tokens
        header["perplexity_window"] = measured.window
        header["clear_perplexity"] = _finite(measured.value)

    results = []
    for config in configs:
        start = time.perf_counter()
        label = heads_label(config.heads)
        with progress(f"{label}, {config.n_bits} bits"):
            model: Any = get_encrypted_model(copy.deepcopy(clear), config, progress=progress)
            model.calibrate(calibration)
            if options.mode == "simulate":
                compile_circuits(model, max(ids.shape[1] for ids in sentences))
            model.set_fhe_mode(options.mode)
            agreement = top_k_agreement(model, sentences, reference)
            row: dict[str, Any] = {"heads": config.heads, "heads_label": label, "n_bits": config.n_bits}
            row.update({f"top{rank}": share for rank, share in agreement.top.items()})
            if measure is not None:
                row["perplexity"] = _finite(measure(model).value)
        row["seconds"] = time.perf_counter() - start
        results.append(row)

    if options.plot:
        from cipherlm.evaluation.report import plot_agreement

        plot_agreement(results, options.plot, title=f"{options.model}: {', '.join(header['modules'])}")
    if options.json:
        write_json({**header, "results": results})
    else:
        _print_results(header, results)
        if options.plot:
            print(f"\nplot written to {options.plot}")


def _print_results(header: dict[str, Any], results: Sequence[dict[str, Any]]) -> None:
    from cipherlm.evaluation.report import format_table

    print(
        f"{header['model']}, {', '.join(header['modules'])}: agreement with the clear model at "
        f"{header['positions']} positions of {header['sentences']} sentences\n"
    )
    columns = ["heads", "bits", "top-1", "top-5", "top-10"]
    measured = "clear_perplexity" in header
    rows = [
        [row["heads_label"], str(row["n_bits"]), *(f"{row[rank]:.1%}" for rank in ("top1", "top5", "top10"))]
        + ([_perplexity(row["perplexity"])] if measured else [])
        for row in results
    ]
    print(format_table([*columns, "perplexity"] if measured else columns, rows))
    if measured:
        print(
            f"\nperplexity of the clear model {_perplexity(header['clear_perplexity'])}; "
            f"{header['perplexity_tokens']} tokens of {header['perplexity_file']}, "
            f"in windows of {header['perplexity_window']}"
        )


def _perplexity(value: float | None) -> str:
    return "overflow" if value is None else f"{value:.2f}"


def _finite(value: float) -> float | None:
    """Return a number that JSON can hold."""
    return value if math.isfinite(value) else None


def _check_plot(path: str) -> None:
    """Find out before the long part whether a plot can be written."""
    from cipherlm.evaluation.report import plot_agreement

    plot_agreement([], path, title="")


def _illustrate(options: argparse.Namespace) -> None:
    for name in ("perplexity", "perplexity_tokens", "window", "plot", "sentences", "limit"):
        if getattr(options, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')} does not go with --illustration")
    heads = options.heads[0] if options.heads else None
    if options.heads and len(options.heads) > 1:
        raise UsageError("--illustration takes one set of heads")
    all_bits = options.n_bits or ILLUSTRATION_BITS
    configs = [encryption_config(options, heads=heads, n_bits=bits) for bits in all_bits]
    new_tokens = options.max_new_tokens or ILLUSTRATION_TOKENS

    from cipherlm.cli.streaming import TokenStream, generate
    from cipherlm.models.integration import get_encrypted_model
    from cipherlm.models.loading import load_model, load_tokenizer

    progress = TerminalProgress()
    clear, tokenizer = load_model(options.model), load_tokenizer(options.model)
    ids = prompt_ids(tokenizer, options.prompt or ILLUSTRATION_PROMPT)
    length = compiled_length(clear, ids.shape[1], new_tokens, options.tokens)

    def continued(model: Any) -> "torch.Tensor":
        return generate(model, ids, new_tokens, stream=TokenStream(tokenizer))

    expected = continued(clear)
    rows: list[dict[str, Any]] = [
        {"n_bits": None, "text": tokenizer.decode(expected[0], skip_special_tokens=True), "same": True}
    ]
    for config in configs:
        with progress(f"{config.n_bits} bits"):
            model = get_encrypted_model(copy.deepcopy(clear), config, progress=progress)
            model.calibrate(calibration_ids(options, tokenizer, length))
            if options.mode == "simulate":
                compile_circuits(model, length)
            model.set_fhe_mode(options.mode)
            generated = continued(model)
        rows.append(
            {
                "n_bits": config.n_bits,
                "text": tokenizer.decode(generated[0], skip_special_tokens=True),
                "same": generated.tolist() == expected.tolist(),
            }
        )
    if options.json:
        write_json(
            {"model": options.model, "modules": configs[0].target_modules, "heads": heads, "texts": rows}
        )
        return
    print(f"{options.model}, {heads_label(heads)} of {', '.join(configs[0].target_modules)}\n")
    for row in rows:
        name = "clear" if row["n_bits"] is None else f"{row['n_bits']} bits"
        verdict = "" if row["n_bits"] is None else ("  (the same)" if row["same"] else "  (another)")
        print(f"{name:>7}  {row['text']!r}{verdict}")
