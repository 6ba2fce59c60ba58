"""Measure GPT-2's blocks on ciphertexts (CKKS): a prompt through them, then further tokens one by one.

Client and server meet in one process; what they exchange is written to bytes and read back. The first run
also encodes the weights: ``prepare_seconds`` has its prompt and its first further token. The others are
timed, and the fastest is reported. The first further token is apart from those behind it, since it brings
the prompt's keys and values to where further tokens need them. Errors are against the same blocks in
floating point. The geometry ``gpt2`` has random weights, ``tiny`` those of the embedded model, behind its
public first token.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cipherlm import engine
from cipherlm.cli import UsageError
from cipherlm.cli.bench_ckks import MeasuredSession, errors, memory_figures
from cipherlm.cli.bench_primitives import Primitives
from cipherlm.cli.bench_tally import Figures, Tally
from cipherlm.cli.common import add_json_option, positive_integer
from cipherlm.progress import TerminalProgress
from cipherlm.schemes.ckks.session import Geometry, Module
from cipherlm.schemes.ckks.simulation import SimulatedTensor
from cipherlm.schemes.ckks.tensor import KeyValue, Linear

if TYPE_CHECKING:
    from cipherlm.models.gpt2 import GPT2

EXAMPLES = """\
examples:
  cipherlm bench model --geometry gpt2 --blocks 1 --prompt-tokens 8 --new-tokens 3 --json
  cipherlm bench model --geometry tiny --prompt-tokens 7 --new-tokens 8 --roofline --json
"""

Float64 = NDArray[np.float64]

WIDTH, HEADS, BLOCKS = 768, 12, 12
"""Of the geometry ``gpt2``."""

CALIBRATION_TEXTS = 5

GC_PERCENT = 25
"""How far the native heap may grow between collections: the matrices of twelve blocks are 5 GB."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmark's arguments."""
    parser.add_argument(
        "--blocks", type=positive_integer, metavar="K", help="the first K blocks (default: all)"
    )
    add_common_arguments(parser)


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what any number of blocks has."""
    parser.add_argument(
        "--geometry", choices=("gpt2", "tiny"), default="tiny", help="which model (default: tiny)"
    )
    parser.add_argument(
        "--prompt-tokens", type=positive_integer, default=7, metavar="N", help="encrypted tokens (default: 7)"
    )
    parser.add_argument(
        "--new-tokens", type=_count, default=0, metavar="M", help="further tokens, one by one (default: 0)"
    )
    parser.add_argument(
        "--side-by-side",
        type=positive_integer,
        default=8,
        metavar="T",
        help="tokens in a ciphertext, a power of two; a longer prompt goes on token by token (default: 8)",
    )
    parser.add_argument(
        "--context",
        type=positive_integer,
        default=64,
        metavar="C",
        help="the most tokens that keys and rows of scores are made for (default: 64)",
    )
    parser.add_argument(
        "--post-quantum", action="store_true", help="parameters that are secure against quantum computers too"
    )
    parser.add_argument(
        "--runs", type=positive_integer, default=2, metavar="R", help="timed runs (default: 2)"
    )
    parser.add_argument(
        "--roofline", action="store_true", help="compare with the primitive operations, measured one by one"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of random weights and inputs")
    add_json_option(parser)


def run(options: argparse.Namespace) -> Figures:
    """Measure, and return the figures."""
    prompt, new = options.prompt_tokens, options.new_tokens
    subject = (
        _random_model(options.blocks or BLOCKS, prompt + new, np.random.default_rng(options.seed))
        if options.geometry == "gpt2"
        else _embedded_model(options.blocks, prompt + new)
    )
    start = subject.prefix_tokens
    try:
        geometry = Geometry(
            *subject.shape, options.side_by_side, start, options.context, post_quantum=options.post_quantum
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    if start + prompt + new > options.context:
        raise UsageError(f"--context {options.context} has no room for {start + prompt + new} tokens")
    want = subject.clear()
    before = engine.set_gc_percent(GC_PERCENT)
    try:
        measured = _measure(subject.module(options.context), geometry, subject.hidden, want, options)
    finally:
        engine.set_gc_percent(before)
    return {
        "scheme": "ckks",
        "geometry": options.geometry,
        "blocks": len(subject.model.blocks),
        "prefix_tokens": start,
        "prompt_tokens": prompt,
        "new_tokens": new,
        **measured,
    }


def _measure(
    module: Module, geometry: Geometry, hidden: Float64, want: Float64, options: argparse.Namespace
) -> Figures:
    progress, start, prompt = TerminalProgress(), geometry.prefix, options.prompt_tokens
    with progress("generating keys"):
        session = MeasuredSession(geometry, module)
    with progress("encoding weights and executing"):
        prepare = [tally.seconds for _, tally in _text(session, hidden[: prompt + 1], start, prompt)]
    runs = []
    for index in range(options.runs):
        with progress(f"executing, run {index + 1}"):
            runs.append(list(_text(session, hidden, start, prompt)))
    best = min(runs, key=lambda run: sum(tally.seconds for _, tally in run))
    figures = {
        **session.figures(),
        "prepare_seconds": prepare,
        "execute_seconds": sum(tally.seconds for _, tally in best),
        **memory_figures(),
    }
    got = np.concatenate([rows for rows, _ in best])
    figures |= errors(got, want)
    primitives = Primitives(geometry.parameters) if options.roofline else None

    def part(first: int, last: int, tokens: int, *, each: bool = False) -> Figures | None:
        """Return the figures of some evaluations, the prompt's being number 0."""
        if first >= last:
            return None
        together = Tally()
        for _, tally in best[first:last]:
            together.add(tally)
        position = prompt + first - 1 if first else 0
        found = together.figures(tokens, each=each) | errors(
            got[position : position + tokens], want[position : position + tokens]
        )
        if primitives:
            found["roofline"] = together.roofline(primitives, tokens if each else 1)
        return found

    new = len(best) - 1
    with progress("measuring primitive operations" if options.roofline else "adding up"):
        figures["prompt"] = part(0, 1, prompt)
        figures["first_token"] = part(1, min(2, new + 1), 1)
        figures["next_tokens"] = part(2, new + 1, new - 1, each=True)
    figures["token_seconds"] = [tally.seconds for _, tally in best[1:]]
    figures["token_max_abs_errors"] = [
        float(np.abs(rows - want[prompt + index]).max()) for index, (rows, _) in enumerate(best[1:])
    ]
    return figures


def _text(session: MeasuredSession, hidden: Float64, start: int, prompt: int) -> list[tuple[Float64, Tally]]:
    """Return outputs and tallies of a prompt, and of each token behind it."""
    results = [session.evaluate(hidden[:prompt], start)]
    results += [session.evaluate(hidden[i : i + 1], start + i) for i in range(prompt, len(hidden))]
    return results


@dataclass(frozen=True, eq=False)
class _Subject:
    """A model in the clear, hidden states to calibrate with, and those to be measured (tokens, width)."""

    model: GPT2
    shape: tuple[int, int]
    hidden: Float64
    calibration: list[Float64]
    prefix: list[KeyValue] | None = None

    @property
    def prefix_tokens(self) -> int:
        return int(self.prefix[0][0].shape[1]) if self.prefix else 0

    def clear(self) -> Float64:
        """Return the outputs in floating point."""
        from cipherlm.models.gpt2 import caches

        return self.model(SimulatedTensor(self.hidden), caches(self.prefix)).values

    def module(self, context: int) -> Module:
        """Return what the server evaluates."""
        with TerminalProgress()("calibrating"):
            ranges = self.model.calibrated(self.calibration, self.prefix)
        fitted = self.model.fitted(ranges, context)
        nothing = np.zeros((self.shape[0], 0, self.shape[1]))
        none: list[KeyValue] = [(nothing, nothing)] * len(self.model.blocks)
        return Module(lambda x, caches, report: fitted(x, caches, report), self.prefix or none)


def _random_model(blocks: int, tokens: int, random: np.random.Generator) -> _Subject:
    """Return a model of GPT-2's size with random weights."""
    from cipherlm.models.gpt2 import GPT2, MLP, Attention, Block
    from cipherlm.schemes.ckks.calibration import ExactFunctions

    def linear(inputs: int, outputs: int) -> Linear:
        weight = random.standard_normal((inputs, outputs)) / inputs**0.5
        return Linear(weight, 0.1 * random.standard_normal(outputs))

    def block() -> Block:
        exact = ExactFunctions(1e-5)
        attn = Attention(HEADS, linear(WIDTH, 3 * WIDTH), linear(WIDTH, WIDTH).centred(), exact.softmax)
        mlp = MLP(linear(WIDTH, 4 * WIDTH), linear(4 * WIDTH, WIDTH).centred(), exact.activation)
        return Block(exact.ln_1, attn, exact.ln_2, mlp)

    def hidden() -> Float64:
        x = random.standard_normal((tokens, WIDTH))
        centred: Float64 = x - x.mean(axis=-1, keepdims=True)
        return centred

    model = GPT2(tuple(block() for _ in range(blocks)), 1e-5)
    return _Subject(model, (HEADS, WIDTH // HEADS), hidden(), [hidden() for _ in range(CALIBRATION_TEXTS)])


def _embedded_model(blocks: int | None, tokens: int) -> _Subject:
    """Return the embedded model on sentences it was not calibrated with."""
    from cipherlm.evaluation.texts import calibration_sentences, evaluation_sentences
    from cipherlm.models.gpt2 import GPT2, Ends
    from cipherlm.models.loading import EMBEDDED_MODEL, load_model, load_tokenizer

    clear, tokenizer = load_model(EMBEDDED_MODEL), load_tokenizer(EMBEDDED_MODEL)
    whole, ends = GPT2.from_transformers(clear), Ends.from_transformers(clear)
    model, config = GPT2(whole.blocks[:blocks], whole.epsilon), clear.config
    text = tokenizer(" ".join(evaluation_sentences()))["input_ids"]
    most = min(len(text), config.n_positions - 1)
    if tokens > most:
        raise UsageError(f"{tokens} tokens: the embedded model has text for {most}")
    calibration: list[Any] = [tokenizer(sentence)["input_ids"] for sentence in calibration_sentences()]
    return _Subject(
        model,
        (config.n_head, config.n_embd // config.n_head),
        ends.embed(text[:tokens], 1),
        [ends.embed(ids, 1) for ids in calibration],
        model.keys_values(ends.embed([int(config.bos_token_id or 0)])),
    )


def _count(text: str) -> int:
    return 0 if text.strip() == "0" else positive_integer(text)
