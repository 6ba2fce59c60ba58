"""Measure one block of a GPT-2 on ciphertexts (CKKS): ``cipherlm bench model --blocks 1``.

A prompt goes through it, then further tokens one by one; see ``cipherlm bench model --help``.
"""

import argparse

from cipherlm.cli import bench_model
from cipherlm.cli.bench_tally import Figures

EXAMPLES = """\
examples:
  cipherlm bench block --geometry gpt2 --prompt-tokens 8 --new-tokens 3 --json
"""

add_arguments = bench_model.add_common_arguments


def run(options: argparse.Namespace) -> Figures:
    """Measure, and return the figures."""
    options.blocks = 1
    return bench_model.run(options)
