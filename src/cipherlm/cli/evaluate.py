"""Measure what encryption costs in quality, against the clear model.

At every position of texts that no value range was taken from: is the clear model's next token the first
guess of the encrypted one (top-1), or among its first 5 or 10? How far are the two distributions apart
(Kullback-Leibler divergence), how well does each predict the text (perplexity), and for how long is the text
that each generates greedily the same? Models with a chat template are measured on conversations, others on
sentences, each with what the clear model goes on with.
"""

import argparse

from cipherlm.cli.common import (
    add_calibration_option,
    add_json_option,
    add_model_option,
    add_module_options,
    add_noise_option,
    add_scheme_option,
    existing_file,
    heads_argument,
    of_scheme,
    positive_integer,
    quiet_libraries,
    settle_scheme,
)
from cipherlm.cli.evaluate_perplexity import PERPLEXITY_TOKENS
from cipherlm.cli.evaluate_setup import BLOCK_TEXTS, CHAT_TOKENS, SENTENCE_TOKENS
from cipherlm.cli.evaluate_tfhe import ILLUSTRATION_PROMPT, ILLUSTRATION_TOKENS, SIMULATED_TOKENS

EXAMPLES = """\
examples:
  cipherlm evaluate
  cipherlm evaluate --model smollm2 --target-modules linear
  cipherlm evaluate --by-block --plot blocks.png
  cipherlm evaluate --model gpt2 --perplexity book.txt --json
  cipherlm evaluate --scheme tfhe --heads 0 --heads all --n-bits 2..8 --plot agreement.png
  cipherlm evaluate --illustration
"""

MODES = ("disable", "simulate", "execute")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_model_option(parser)
    add_scheme_option(parser)
    add_module_options(parser, "encrypt")
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
        choices=MODES,
        help="disable: the arithmetic of ciphertexts, in the clear (default with TFHE); simulate: with their "
        "noise, which compiles first with TFHE (default with CKKS); execute: on ciphertexts, with CKKS",
    )
    texts = parser.add_mutually_exclusive_group()
    texts.add_argument(
        "--sentences",
        metavar="FILE",
        help="sentences to measure on, one a line (default: the 80 in this package)",
    )
    texts.add_argument(
        "--chats",
        metavar="FILE",
        help='with CKKS, conversations to measure on, one {"messages": [...]} a line (default where the '
        "model has a chat template: those in this package)",
    )
    parser.add_argument("--limit", type=positive_integer, metavar="N", help="only the first N texts")
    parser.add_argument(
        "--tokens",
        type=positive_integer,
        metavar="N",
        help=f"cut sentences to N tokens (default: whole; with TFHE and --mode simulate {SIMULATED_TOKENS})",
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
        "--by-block",
        action="store_true",
        help="with CKKS, show how much each block changes the logits if it alone is encrypted (on the first "
        f"{BLOCK_TEXTS} texts, unless --limit says otherwise)",
    )
    parser.add_argument(
        "--plot",
        metavar="FILE",
        help="draw agreement against bits (TFHE) or the errors of --by-block, as into errors.png",
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
        help="tokens that the clear model goes on with, which are measured too (default: "
        f"{CHAT_TOKENS} after a conversation, {SENTENCE_TOKENS} after a sentence); of --illustration "
        f"(default: {ILLUSTRATION_TOKENS})",
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
    from cipherlm.cli import evaluate_fidelity, evaluate_tfhe

    for path in (options.sentences, options.chats, options.calibration, options.perplexity):
        existing_file(path)
    settle_scheme(options, "illustration", *([] if options.by_block else ["plot"]))
    with quiet_libraries():
        illustrated = evaluate_tfhe.illustrate if options.illustration else evaluate_tfhe.evaluate
        of_scheme(options, {"ckks": evaluate_fidelity.evaluate, "tfhe": illustrated})(options)
