"""Measure one encrypted step for real: keys, encryption, execution and decryption, with nothing cached."""

import argparse
from collections.abc import Iterator, Mapping
from importlib import import_module

from cipherlm.cli.common import add_json_option, human_bytes, print_pairs, quiet_libraries, write_json

EXAMPLES = """\
examples:
  cipherlm bench attention --scheme tfhe --geometry gpt2 --tokens 6 --heads 1 --n-bits 4 --json
  cipherlm bench attention --tokens 8 --json
  cipherlm bench block --geometry gpt2 --prompt-tokens 8 --new-tokens 3 --json
  cipherlm bench model --geometry tiny --prompt-tokens 7 --new-tokens 8 --json
  cipherlm bench linear --geometry smollm2 --json
  cipherlm bench engine --degrees 14 --json
"""

_BENCHMARKS = {
    "attention": "one attention layer: errors against floating point, seconds, bytes, table lookups",
    "block": "one block of a GPT-2 on ciphertexts (CKKS)",
    "model": "blocks of a GPT-2 on ciphertexts (CKKS): seconds, bytes, round trips, operations",
    "linear": "the linear layers of a model on ciphertexts: GPT-2, SmolLM2, a Llama of a billion weights",
    "engine": "the operations of the CKKS engine",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what can be measured."""
    what = parser.add_subparsers(metavar="WHAT", dest="benchmark", required=True)
    for name, summary in _BENCHMARKS.items():
        try:
            module = import_module(f"cipherlm.cli.bench_{name}")
        except ImportError:  # an installation without what this benchmark measures
            continue
        benchmark = what.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            epilog=module.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(benchmark)
        if "--json" not in benchmark.format_usage():
            add_json_option(benchmark)
        # Here too, so that it may stand at the end of the line as with the other verbs.
        benchmark.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
        benchmark.set_defaults(measure=module.run)


def run(options: argparse.Namespace) -> None:
    """Measure and print."""
    with quiet_libraries():
        figures = options.measure(options)
    if options.json:
        write_json(figures)
    else:
        print_pairs(list(_lines(figures)))


def _lines(figures: Mapping[str, object], within: str = "") -> Iterator[tuple[str, str]]:
    """Yield a line for each figure, and for each of those that have others in them."""
    for name, value in figures.items():
        if isinstance(value, dict) and any(isinstance(part, dict) for part in value.values()):
            yield from _lines(value, f"{within}{name} ")
        else:
            yield f"{within}{name}", _written(name, value)


def _written(name: str, value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_written(key, part)}" for key, part in value.items())
    if isinstance(value, list):
        return ", ".join(_written(name, part) for part in value)
    if name.endswith("bytes") and isinstance(value, int):
        return human_bytes(value)
    if isinstance(value, float):
        return f"{value:.4g} s" if name.endswith("seconds") else f"{value:.4g}"
    return str(value)
