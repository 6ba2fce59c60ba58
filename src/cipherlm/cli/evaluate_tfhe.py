"""What quantisation to few bits costs, with TFHE: agreement at each bit-width, and the illustration."""

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from cipherlm.cli import UsageError
from cipherlm.cli.circuits import compile_circuits, compiled_length
from cipherlm.cli.common import (
    calibration_ids,
    encryption_config,
    heads_label,
    prompt_ids,
    write_json,
)
from cipherlm.cli.evaluate_perplexity import check_options, finite, in_words, text_ids
from cipherlm.progress import TerminalProgress

if TYPE_CHECKING:
    import torch

ILLUSTRATION_PROMPT = "Cryptography is a"
ILLUSTRATION_BITS = [8, 2]
ILLUSTRATION_TOKENS = 8
SIMULATED_TOKENS = 6


def evaluate(options: argparse.Namespace) -> None:
    """Print a table of agreement by heads and bits or JSON, and draw the plot."""
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
    from cipherlm.models.encrypted import EncryptedModel
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
        ids = text_ids(options, tokenizer)
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
        header["clear_perplexity"] = finite(measured.value)

    results = []
    for config in configs:
        start = time.perf_counter()
        label = heads_label(config.heads)
        with progress(f"{label}, {config.n_bits} bits"):
            model: Any = EncryptedModel.encrypt(copy.deepcopy(clear), config, progress=progress)
            model.calibrate(calibration)
            if options.mode == "simulate":
                compile_circuits(model, max(ids.shape[1] for ids in sentences))
            model.set_fhe_mode(options.mode)
            agreement = top_k_agreement(model, sentences, reference)
            row: dict[str, Any] = {"heads": config.heads, "heads_label": label, "n_bits": config.n_bits}
            row.update({f"top{rank}": share for rank, share in agreement.top.items()})
            if measure is not None:
                row["perplexity"] = finite(measure(model).value)
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
        + ([in_words(row["perplexity"])] if measured else [])
        for row in results
    ]
    print(format_table([*columns, "perplexity"] if measured else columns, rows))
    if measured:
        print(
            f"\nperplexity of the clear model {in_words(header['clear_perplexity'])}; "
            f"{header['perplexity_tokens']} tokens of {header['perplexity_file']}, "
            f"in windows of {header['perplexity_window']}"
        )


def _check_options(options: argparse.Namespace) -> None:
    if options.prompt is not None or options.max_new_tokens is not None:
        raise UsageError("--prompt and --max-new-tokens belong to --illustration")
    for name in ("chats", "by_block"):
        if getattr(options, name):
            raise UsageError(f"--{name.replace('_', '-')} belongs to --scheme ckks")
    if options.mode == "execute":
        raise UsageError("--mode execute belongs to --scheme ckks")
    check_options(options)


def _check_plot(path: str) -> None:
    """Find out before the long part whether a plot can be written."""
    from cipherlm.evaluation.report import plot_agreement

    plot_agreement([], path, title="")


def illustrate(options: argparse.Namespace) -> None:
    """Continue a prompt with the clear model, with enough bits and with too few."""
    for name in (
        "perplexity",
        "perplexity_tokens",
        "window",
        "plot",
        "sentences",
        "chats",
        "limit",
        "by_block",
    ):
        if getattr(options, name):
            raise UsageError(f"--{name.replace('_', '-')} does not go with --illustration")
    heads, *more = getattr(options, "heads", [None])
    if more:
        raise UsageError("--illustration takes one set of heads")
    all_bits = getattr(options, "n_bits", ILLUSTRATION_BITS)
    options.mode = options.mode or "disable"
    configs = [encryption_config(options, heads=heads, n_bits=bits) for bits in all_bits]
    new_tokens = options.max_new_tokens or ILLUSTRATION_TOKENS

    from cipherlm.cli.streaming import TokenStream, generate
    from cipherlm.models.encrypted import EncryptedModel
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
            model = EncryptedModel.encrypt(copy.deepcopy(clear), config, progress=progress)
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
