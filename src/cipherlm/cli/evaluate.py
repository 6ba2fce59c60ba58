"""Measure what quantisation, or polynomials in place of functions, cost against the clear model.

Agreement: at every position of 80 sentences, is the clear model's next token the first guess (top-1), or
among the first 5 or 10, of the encrypted one? Value ranges come from other text, never from the sentences
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
    add_module_options,
    add_noise_option,
    add_scheme_option,
    calibration_ids,
    encryption_config,
    existing_file,
    heads_argument,
    heads_label,
    load_encrypted,
    positive_integer,
    print_pairs,
    prompt_ids,
    quiet_libraries,
    settle_scheme,
    write_json,
)
from cipherlm.progress import TerminalProgress

if TYPE_CHECKING:
    import torch

EXAMPLES = """\
examples:
  cipherlm evaluate
  cipherlm evaluate --scheme tfhe --heads 0 --heads all --n-bits 2..8 --plot agreement.png
  cipherlm evaluate --model gpt2 --perplexity book.txt --json
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
    add_scheme_option(parser)
    add_module_options(parser, "quantise")
    parser.add_argument(
        "--heads",
        type=heads_argument,
        action="append",
        default=argparse.SUPPRESS,
        metavar="HEADS",
        help='with TFHE, "0", "0,2" or "all" with the output projection; may be repeated (default: 0, all)',
    )
    parser.add_argument(
        "--n-bits",
        type=bits_argument,
        default=argparse.SUPPRESS,
        metavar="BITS",
        help='with TFHE, "4", "2,4,7" or "2..8" (default: 2..8)',
    )
    add_noise_option(parser)
    parser.add_argument(
        "--mode",
        choices=("disable", "simulate"),
        help="disable: the arithmetic of ciphertexts, in the clear (default with TFHE); simulate: with their "
        "noise, which compiles first with TFHE (default with CKKS)",
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
        "--plot", metavar="FILE", help="with TFHE, draw agreement against bits, as into agreement.png"
    )
    parser.add_argument(
        "--illustration",
        action="store_true",
        help="with TFHE, continue a prompt with the clear model, with enough bits and with too few",
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
    from cipherlm.cli.ckks import is_ckks

    for path in (options.sentences, options.calibration, options.perplexity):
        existing_file(path)
    settle_scheme(options, "illustration", "plot")
    with quiet_libraries():
        if is_ckks(options):
            _evaluate_remote(options)
        elif options.illustration:
            _illustrate(options)
        else:
            _evaluate(options)


def _check_options(options: argparse.Namespace) -> None:
    if options.prompt is not None or options.max_new_tokens is not None:
        raise UsageError("--prompt and --max-new-tokens belong to --illustration")
    for name in ("window", "perplexity_tokens"):
        if getattr(options, name) is not None and options.perplexity is None:
            raise UsageError(f"--{name.replace('_', '-')} belongs to --perplexity")


def _evaluate_remote(options: argparse.Namespace) -> None:
    """Compare a model with CKKS to the clear one, both behind the public prefix."""
    if options.illustration or options.plot:
        raise UsageError("--illustration and --plot are about bits of quantisation, which CKKS has not")
    _check_options(options)
    options.mode = options.mode or "simulate"

    from cipherlm.cli.ckks import BehindPrefix, calibrate
    from cipherlm.evaluation.agreement import next_tokens, top_k_agreement
    from cipherlm.evaluation.perplexity import perplexity
    from cipherlm.evaluation.texts import encode, evaluation_sentences, read_sentences
    from cipherlm.models.loading import load_tokenizer

    if getattr(options, "heads", None) == [None]:  # all heads are what there is
        del options.heads
    progress = TerminalProgress()
    tokenizer = load_tokenizer(options.model)
    model = load_encrypted(options, progress)
    room = model.encryption_config.context - len(model.prefix)
    texts = read_sentences(options.sentences) if options.sentences else evaluation_sentences()
    length = min(options.tokens or room, room)
    sentences = encode(tokenizer, texts[: options.limit], max_tokens=length)
    calibrate(model, options, tokenizer)
    model.set_fhe_mode(options.mode)
    behind = BehindPrefix(model, model.prefix)
    start = time.perf_counter()
    with model.in_clear():
        reference = next_tokens(behind, sentences)
    with progress("comparing"):
        # One by one: no padding, which would be evaluated too.
        agreement = top_k_agreement(behind, sentences, reference, batch_size=1)
    result: dict[str, Any] = {
        "model": options.model,
        "scheme": "ckks",
        "modules": list(model.encrypted_modules),
        "mode": options.mode,
        "sentences": len(sentences),
        "positions": agreement.positions,
        **{f"top{rank}": share for rank, share in agreement.top.items()},
        "seconds": time.perf_counter() - start,
    }
    if options.perplexity:
        text = Path(options.perplexity).read_text(encoding="utf-8")
        ids = encode(tokenizer, [text], max_tokens=options.perplexity_tokens or PERPLEXITY_TOKENS)[0]
        window = min(options.window or room, room)
        with model.in_clear():
            clear = perplexity(behind, ids, window=window, batch_size=1)
        result["perplexity"] = _finite(perplexity(behind, ids, window=window, batch_size=1).value)
        result["clear_perplexity"] = _finite(clear.value)
        result["perplexity_tokens"], result["perplexity_window"] = clear.tokens, window
    if options.json:
        write_json(result)
        return
    noise = "with the noise of ciphertexts" if options.mode == "simulate" else "without noise"
    print(
        f"{options.model}, {', '.join(result['modules'])}, CKKS {noise}: agreement with the clear model at "
        f"{result['positions']} positions of {result['sentences']} sentences\n"
    )
    pairs = [(f"top-{rank}", f"{share:.1%}") for rank, share in agreement.top.items()]
    if options.perplexity:
        pairs.append(("perplexity", _perplexity(result["perplexity"])))
        pairs.append(("clear", _perplexity(result["clear_perplexity"])))
    print_pairs(pairs)


def _evaluate(options: argparse.Namespace) -> None:
    _check_options(options)
    options.mode = options.mode or "disable"
    if options.mode == "simulate" and options.perplexity:
        raise UsageError("--perplexity is measured with --mode disable")
    all_heads = getattr(options, "heads", None) or [[0], None]
    all_bits = getattr(options, "n_bits", None) or list(range(2, 9))
    # Every configuration before any work, so that a wrong one costs nothing.
    configs = [
        encryption_config(options, heads=heads, n_bits=bits) for heads in all_heads for bits in all_bits
    ]
    if options.plot:
        _check_plot(options.plot)

    from cipherlm.evaluation.agreement import next_tokens, top_k_agreement
    from cipherlm.evaluation.perplexity import perplexity
    from cipherlm.evaluation.texts import encode, evaluation_sentences, read_sentences
    from cipherlm.models.integration import EncryptedGPT2LMHeadModel
    from cipherlm.models.loading import load_model, load_tokenizer

    progress = TerminalProgress()
    tokenizer, clear = load_tokenizer(options.model), load_model(options.model)
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
            model: Any = EncryptedGPT2LMHeadModel.encrypt(copy.deepcopy(clear), config, progress=progress)
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
    heads, *more = getattr(options, "heads", [None])
    if more:
        raise UsageError("--illustration takes one set of heads")
    all_bits = getattr(options, "n_bits", ILLUSTRATION_BITS)
    options.mode = options.mode or "disable"
    configs = [encryption_config(options, heads=heads, n_bits=bits) for bits in all_bits]
    new_tokens = options.max_new_tokens or ILLUSTRATION_TOKENS

    from cipherlm.cli.streaming import TokenStream, generate
    from cipherlm.models.integration import EncryptedGPT2LMHeadModel
    from cipherlm.models.loading import load_model, load_tokenizer

    progress = TerminalProgress()
    tokenizer, clear = load_tokenizer(options.model), load_model(options.model)
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
            model = EncryptedGPT2LMHeadModel.encrypt(copy.deepcopy(clear), config, progress=progress)
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
