"""Show what the encrypted modules of a model cost: parameters, keys, ciphertexts, and circuits.

With CKKS: what is remote, the parameters of the encryption, and what each party learns. With TFHE: the
circuits, which are compiled or read from the cache. With --cache, lists the cache instead. With --placement:
seconds, memory, keys and traffic of a model at a server, calculated. With --ranges, and with --placement
whole: the polynomials that functions are computed with, chosen by cost for a stated error.
"""

import argparse
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from cipherlm.cli import UsageError, inspect_choices, inspect_costs
from cipherlm.cli.circuits import KEYS, circuit_figures, compile_circuits, keys_cached, table_ranges
from cipherlm.cli.common import (
    add_calibration_option,
    add_encryption_options,
    add_json_option,
    add_model_option,
    calibration_ids,
    configured,
    existing_file,
    heads_label,
    human_bytes,
    human_seconds,
    load_encrypted,
    of_scheme,
    positive_integer,
    print_pairs,
    quiet_libraries,
    settle_scheme,
    write_json,
)
from cipherlm.progress import TerminalProgress

if TYPE_CHECKING:
    from cipherlm.cli.inspect_choices import Functions
    from cipherlm.models.ckks import CkksModel
    from cipherlm.models.summary import Summary
    from cipherlm.nn.fitted import Choice

EXAMPLES = """\
examples:
  cipherlm inspect
  cipherlm inspect --ranges
  cipherlm inspect --model gpt2 --keys --json
  cipherlm inspect --scheme tfhe --block 0 --heads 0 --n-bits 4 --tokens 8
  cipherlm inspect smollm2 --placement linear --server-cores 8 --rtt 50ms --mbit 100
  cipherlm inspect --geometry gpt2 --placement whole --json
  cipherlm inspect --cache
  cipherlm inspect --clear-cache
"""

DEFAULT_TOKENS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "model", nargs="?", default=argparse.SUPPRESS, metavar="MODEL", help="the model, as --model names it"
    )
    add_model_option(parser)
    add_encryption_options(parser)
    parser.add_argument(
        "--tokens",
        type=positive_integer,
        metavar="N",
        help=f"length to compile for, with TFHE (default: {DEFAULT_TOKENS})",
    )
    parser.add_argument(
        "--keys",
        action="store_true",
        help="make keys too, if there are none, to tell the bytes that are sent",
    )
    parser.add_argument(
        "--ranges",
        action="store_true",
        help="with CKKS, calibrate, and show the polynomials; --json has the ranges, too",
    )
    add_calibration_option(parser)
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--cache", action="store_true", help="list the cached circuits and keys")
    group.add_argument("--clear-cache", action="store_true", help="delete them")
    inspect_costs.add_arguments(parser)
    add_json_option(parser)


def run(options: argparse.Namespace) -> None:
    """Print the figures of a model's circuits or of its encryption, or of the cache."""
    if options.keys and (options.cache or options.clear_cache):
        raise UsageError("--keys does not go with --cache or --clear-cache")
    inspect_costs.check(options)
    existing_file(options.calibration)
    settle_scheme(options, "tokens")
    with quiet_libraries():
        if options.placement is not None:
            of_scheme(options, {"ckks": inspect_costs.show, "tfhe": _no_estimate})(options)
            return
        if options.cache or options.clear_cache:
            _show_cache(options)
        else:
            of_scheme(options, {"ckks": _show_remote, "tfhe": _show_circuits})(options)


def _no_estimate(options: argparse.Namespace) -> None:
    raise UsageError("--placement is for --scheme ckks")


def _show_remote(options: argparse.Namespace) -> None:
    if options.tokens is not None:
        raise UsageError("--tokens is the length of a circuit: with --scheme ckks, give --context")

    from cipherlm.cli.ckks import described, key_figures, remote_figures, who_learns_what

    told, calibrated = _summary(options)
    keys = key_figures(told) if options.keys else {"keygen_seconds": None, "evaluation_key_bytes": None}
    result: dict[str, Any] = {"model": options.model, **remote_figures(told), **calibrated.to_dict(), **keys}
    if options.json:
        write_json(result)
        return
    sent = result["evaluation_key_bytes"]
    words = "known once they are made: add --keys" if sent is None else f"{human_bytes(sent)}, sent once"
    print(f"{options.model}, CKKS")
    print_pairs(
        [*described(result), ("keys, as sent", words), *who_learns_what(result["modules"])], indent="  "
    )
    if calibrated.functions:
        print()
        print(inspect_choices.table(calibrated.functions))


@dataclass(frozen=True)
class _Calibrated:
    """What a calibration tells: the ranges, and the polynomials for them. None where there was none."""

    ranges: dict[str, Any] | None = None
    functions: "Functions | None" = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "ranges": self.ranges,
            "polynomials": self.functions and inspect_choices.functions_dict(self.functions),
        }


def _summary(options: argparse.Namespace) -> "tuple[Summary, _Calibrated]":
    """Return what is told of the model, and what a calibration tells if that is asked for.

    The model is loaded where its small files do not tell, and calibrated for ranges only.
    """
    from cipherlm.cli.ckks import calibrate, range_figures, summary
    from cipherlm.models.summary import read_summary

    with_ranges = options.ranges or options.calibration is not None
    if not with_ranges:
        told = read_summary(options.model, configured(options))
        if told is not None:
            return told, _Calibrated()

    from cipherlm.models.loading import load_tokenizer

    tokenizer = load_tokenizer(options.model)
    model = cast("CkksModel", load_encrypted(options, TerminalProgress()))
    if with_ranges:
        calibrate(model, options, tokenizer)
    told = summary(model, tokenizer)
    if not with_ranges:
        return told, _Calibrated()
    functions: dict[str, list[Choice]] = {}
    for name, hosted in model.placement.modules.items():
        functions |= inspect_choices.functions_of(name, hosted.module)
    return told, _Calibrated(range_figures(model), functions)


def _show_circuits(options: argparse.Namespace) -> None:
    from cipherlm.models.loading import load_tokenizer

    options.tokens = options.tokens or DEFAULT_TOKENS
    tokenizer = load_tokenizer(options.model)
    model = load_encrypted(options, TerminalProgress())
    if not model.is_calibrated:
        model.calibrate(calibration_ids(options, tokenizer, options.tokens))
    circuits = compile_circuits(model, options.tokens)
    config = model.encryption_config
    modules = {}
    for name, circuit in circuits.items():
        if options.keys or keys_cached(circuit):
            circuit.keygen()
        modules[name] = {**circuit_figures(circuit), "table_ranges": table_ranges(circuit.attention)}
    result = {"model": options.model, "config": config.to_dict(), "modules": modules}
    if options.json:
        write_json(result)
        return
    for name, figures in modules.items():
        print(f"{options.model} {name}, {heads_label(config.heads)}, {config.n_bits} bits")
        print_pairs(_described(figures), indent="  ")


def _described(figures: dict[str, Any]) -> list[tuple[str, str]]:
    widths = ", ".join(f"{count} of {bits} bits" for bits, count in figures["pbs_per_bit_width"].items())
    sent = figures["evaluation_key_bytes"]
    bytes_in, bytes_out = (human_bytes(figures[f"ciphertext_bytes_{way}"]) for way in ("in", "out"))
    cached = ", now from the cache" if figures["from_cache"] else ""
    lines = [
        ("tokens", f"up to {figures['tokens']}"),
        ("table lookups (PBS)", f"{figures['pbs']}: {widths}"),
        ("bit-width", f"{figures['max_bit_width']} in lookups, {figures['accumulator_bits']} in sums"),
        ("p_error", f"{figures['p_error']:g} a lookup"),
        ("keys, as sent", "known once they are made: add --keys" if sent is None else human_bytes(sent)),
        ("keys, in memory", human_bytes(figures["evaluation_key_bytes_in_memory"])),
        ("ciphertexts", f"{bytes_in} in (less once compressed), {bytes_out} out"),
        ("compiled in", human_seconds(figures["compile_seconds"]) + cached),
    ]
    for number, chosen in enumerate(figures["parameter_sets"], 1):
        polynomials = f"{chosen['glwe_dimension']} x {chosen['polynomial_size']}"
        lines.append(
            (
                f"parameter set {number}",
                f"polynomials {polynomials}, LWE dimension {chosen['lwe_dimension']}, "
                f"{chosen['levels']} levels: {chosen['pbs']} PBS",
            )
        )
    for kind, (low, high) in figures["table_ranges"].items():
        reach = f"{high:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
        lines.append((f"{kind} table", f"reaches {reach}"))
    return lines


def _show_cache(options: argparse.Namespace) -> None:
    from cipherlm.schemes.tfhe.circuit import cache_root

    root = cache_root()
    entries = (
        [_entry(folder) for folder in sorted(root.iterdir()) if folder.is_dir()] if root.is_dir() else []
    )
    total = sum(entry["circuit_bytes"] + entry["key_bytes"] for entry in entries)
    if options.clear_cache:
        for entry in entries:
            shutil.rmtree(root / entry["name"])
    if options.json:
        write_json(
            {"folder": str(root), "bytes": total, "cleared": options.clear_cache, "circuits": entries},
        )
    elif options.clear_cache:
        print(f"deleted {len(entries)} circuits with their keys, {human_bytes(total)}, from {root}")
    elif not entries:
        print(f"{root} is empty")
    else:
        from cipherlm.evaluation.report import format_table

        rows = [
            [
                entry["name"],
                *(str(entry[name]) if entry[name] is not None else "?" for name in ("tokens", "pbs")),
                human_bytes(entry["circuit_bytes"]),
                human_bytes(entry["key_bytes"]) if entry["key_bytes"] else "none",
            ]
            for entry in entries
        ]
        print(f"{root}: {human_bytes(total)}\n")
        print(format_table(["circuit", "tokens", "PBS", "compiled", "keys (secret)"], rows))


def _entry(folder: Path) -> dict[str, Any]:
    """Describe one cached circuit; a damaged or unfinished one has sizes only."""
    sizes = {file.name: file.stat().st_size for file in folder.iterdir() if file.is_file()}
    try:
        statistics = json.loads((folder / "circuit.json").read_text(encoding="utf-8"))["statistics"]
        tokens, pbs = statistics["tokens"], statistics["pbs"]
    except (OSError, ValueError, KeyError, TypeError):
        tokens = pbs = None
    key_bytes = sizes.pop(KEYS, 0)
    return {
        "name": folder.name,
        "tokens": tokens,
        "pbs": pbs,
        "circuit_bytes": sum(sizes.values()),
        "key_bytes": key_bytes,
    }
