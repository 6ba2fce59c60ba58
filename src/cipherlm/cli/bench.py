"""Measure one encrypted step for real: keys, encryption, execution and decryption, with nothing cached."""

import argparse
import importlib.util
from importlib import import_module

from cipherlm.cli.common import human_bytes, print_pairs, quiet_libraries, write_json

EXAMPLES = """\
example:
  cipherlm bench attention --scheme tfhe --geometry gpt2 --tokens 6 --heads 1 --n-bits 4 --json
"""

_BENCHMARKS = {
    "attention": "one attention layer: errors against floating point, seconds, bytes, table lookups",
    "engine": "the operations of the CKKS engine",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what can be measured."""
    what = parser.add_subparsers(metavar="WHAT", dest="benchmark", required=True)
    for name, summary in _BENCHMARKS.items():
        module_name = f"cipherlm.cli.bench_{name}"
        if importlib.util.find_spec(module_name) is None:
            continue
        module = import_module(module_name)
        benchmark = what.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            epilog=getattr(module, "EXAMPLES", EXAMPLES),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(benchmark)
        if "--json" not in benchmark.format_usage():
            benchmark.add_argument(
                "--json", action="store_true", help="write one JSON object instead of a table"
            )
        benchmark.set_defaults(measure=module.run)


def run(options: argparse.Namespace) -> None:
    """Measure and print."""
    with quiet_libraries():
        figures = options.measure(options)
    if options.json:
        write_json(figures)
    else:
        print_pairs([(name, _written(name, value)) for name, value in figures.items()])


def _written(name: str, value: object) -> str:
    if name.endswith("_bytes") and isinstance(value, int):
        return human_bytes(value)
    if isinstance(value, float):
        return f"{value:.4g} s" if name.endswith("_seconds") else f"{value:.4g}"
    return str(value)
