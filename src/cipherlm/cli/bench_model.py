"""Measure GPT-2's blocks on ciphertexts (CKKS): a prompt through them, then further tokens one by one.

Client and server meet in one process; what they exchange is written to bytes and read back. The first run
also encodes the weights: ``prepare_seconds`` has its prompt and its first further token. The others are
timed, and the fastest is reported. The first further token is apart from those behind it, since it brings
the prompt's keys and values to where further tokens need them. Errors are against the same blocks in
floating point. The geometry ``gpt2`` has random weights and no public prefix, ``tiny`` is the embedded model
behind its public first token, and ``smollm2`` SmolLM2-135M-Instruct behind the head of its chat template.
With --rtt and --mbit, all that goes between the parties really takes as long as on such a line.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cipherlm.cli import UsageError
from cipherlm.cli.bench_ckks import MeasuredSession, errors, memory_figures
from cipherlm.cli.bench_primitives import Primitives
from cipherlm.cli.bench_tally import Figures, Tally
from cipherlm.cli.common import add_json_option, positive_integer
from cipherlm.cli.line import add_line_options, line_figures, line_of
from cipherlm.cli.whole import is_chat
from cipherlm.models.architecture import Args, architecture_of
from cipherlm.nn.blocks import Blocks, calibrated, evaluate, prefixes
from cipherlm.nn.clear import ClearTensor
from cipherlm.nn.tensor import Cache, Prefix
from cipherlm.progress import TerminalProgress
from cipherlm.schemes.ckks.geometry import Geometry
from cipherlm.schemes.ckks.session import MOST_CHUNKS, Hosted

EXAMPLES = """\
examples:
  cipherlm bench model --geometry gpt2 --blocks 1 --prompt-tokens 8 --new-tokens 3 --json
  cipherlm bench model --geometry tiny --prompt-tokens 7 --new-tokens 8 --roofline --json
"""

Float64 = NDArray[np.float64]

BLOCKS = 12
SIDE_BY_SIDE = 8
SIZES = {
    "width": 768,
    "heads": 12,
    "inner": 3072,
    "positions": 1024,
    "epsilon": 1e-5,
    "activation": "gelu_new",
}
"""Of the geometry ``gpt2``."""

CALIBRATION_TEXTS = 5
CALIBRATION_CHATS = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmark's arguments."""
    parser.add_argument(
        "--blocks", type=positive_integer, metavar="K", help="the first K blocks (default: all)"
    )
    add_common_arguments(parser)


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what any number of blocks has."""
    parser.add_argument(
        "--geometry", choices=("gpt2", "smollm2", "tiny"), default="tiny", help="which model (default: tiny)"
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
        default=SIDE_BY_SIDE,
        metavar="T",
        help="tokens in a ciphertext, a power of two; a longer prompt goes in several chunks (default: 8)",
    )
    parser.add_argument(
        "--chunks",
        type=positive_integer,
        default=MOST_CHUNKS,
        metavar="K",
        help=f"how many chunks go through the model side by side, {MOST_CHUNKS} at most and by default",
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
    add_line_options(parser)
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of random weights and inputs")
    add_json_option(parser)


def run(options: argparse.Namespace) -> Figures:
    """Measure, and return the figures."""
    if options.chunks > MOST_CHUNKS:
        raise UsageError(f"--chunks {options.chunks}: {MOST_CHUNKS} at most")
    prompt, new = options.prompt_tokens, options.new_tokens
    subject = (
        random_model(options.blocks or BLOCKS, prompt + new, np.random.default_rng(options.seed))
        if options.geometry == "gpt2"
        else _embedded_model(options.geometry, options.blocks, prompt + new)
    )
    start, args = len(subject.prefix), subject.args
    try:
        geometry = Geometry(
            args.heads,
            args.head_dim,
            options.side_by_side,
            start,
            options.context,
            post_quantum=options.post_quantum,
            width=args.width,
            inner=args.inner,
            rotary=args.rope is not None,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    if start + prompt + new > options.context:
        raise UsageError(f"--context {options.context} has no room for {start + prompt + new} tokens")
    want = subject.clear()
    measured = _measure(subject.hosted(options.context), geometry, subject.hidden, want, options)
    return {
        "scheme": "ckks",
        "geometry": options.geometry,
        "blocks": len(subject.model.blocks),
        "prefix_tokens": start,
        "prompt_tokens": prompt,
        "new_tokens": new,
        "line": line_figures(options),
        **measured,
    }


def _measure(
    module: Hosted, geometry: Geometry, hidden: Float64, want: Float64, options: argparse.Namespace
) -> Figures:
    progress, start, prompt = TerminalProgress(), geometry.prefix, options.prompt_tokens
    with progress("generating keys"):
        session = MeasuredSession(geometry, module, line=line_of(options), most_chunks=options.chunks)
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

    model: Blocks
    args: Args
    hidden: Float64
    calibration: list[Float64]
    prefix: Float64
    """The hidden states of the public prefix."""

    @cached_property
    def prefixes(self) -> list[Prefix] | list[None]:
        """The keys and values of the prefix, for each block, if there is one."""
        return prefixes(self.model, self.prefix) if len(self.prefix) else [None] * len(self.model.blocks)

    def clear(self) -> Float64:
        """Return the outputs in floating point."""
        x = ClearTensor(self.hidden, position=len(self.prefix))
        return evaluate(self.model.recording(), x, [Cache(prefix) for prefix in self.prefixes]).values

    def hosted(self, context: int) -> Hosted:
        """Return what the server evaluates."""
        with TerminalProgress()("calibrating"):
            ranges = calibrated(self.model, self.calibration, self.prefixes)
        return Hosted(self.model.fitted(ranges, context), self.prefixes)


def random_model(blocks: int, tokens: int, random: np.random.Generator) -> _Subject:
    """Return a model of GPT-2's size with random weights."""
    architecture = architecture_of("gpt2")
    args = architecture.args(**SIZES, layers=blocks)
    model: Blocks = architecture.model(args)
    model.load(
        {
            name: random.standard_normal(array.shape) * (0.1 if array.ndim == 1 else len(array) ** -0.5)
            for name, array in model.weights.items()
        }
    )

    def hidden(count: int) -> Float64:
        x = random.standard_normal((count, args.width))
        centred: Float64 = x - x.mean(axis=-1, keepdims=True)
        return centred

    texts = [hidden(tokens) for _ in range(CALIBRATION_TEXTS)]
    return _Subject(model, args, hidden(tokens), texts, hidden(0))


def _embedded_model(name: str, blocks: int | None, tokens: int) -> _Subject:
    """Return a model that is here on text that it was not calibrated with.

    A chat model has chats, behind the head of its template.
    """
    import torch

    from cipherlm.models.loading import load_model, load_tokenizer
    from cipherlm.models.modules import to_numpy

    clear, tokenizer = load_model(name), load_tokenizer(name)
    config: Any = clear.config
    architecture = architecture_of(config.model_type)
    args = architecture.args.of(config.to_dict())
    head, text, calibration = _texts(tokenizer, config)
    most = min(len(text), args.positions - len(head))
    if tokens > most:
        raise UsageError(f"{tokens} tokens: this model has text for {most}")
    block_list = clear.get_submodule(architecture.blocks)
    args = replace(args, layers=min(blocks or args.layers, args.layers))
    model: Blocks = architecture.model(args)
    state = {key: to_numpy(tensor) for key, tensor in block_list.state_dict().items()}
    model.load(model.sanitize(state))

    def hidden(ids: list[int]) -> Float64:
        """Return what the first block gets, behind the public prefix."""
        met: list[Float64] = []

        def see(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            met.append(to_numpy((args or tuple(kwargs.values()))[0])[0])

        hook = next(iter(block_list.children())).register_forward_pre_hook(see, with_kwargs=True)
        with torch.no_grad():
            clear(torch.tensor([[*head, *ids]]))
        hook.remove()
        rows = met[0]
        return rows - rows.mean(axis=-1, keepdims=True) if architecture.centred else rows

    measured, start = hidden(text[:tokens]), len(head)
    return _Subject(
        model, args, measured[start:], [hidden(ids)[start:] for ids in calibration], measured[:start]
    )


def _texts(tokenizer: Any, config: Any) -> tuple[list[int], list[int], list[list[int]]]:
    """Return token ids: the public prefix, a text to measure with, and texts to calibrate on."""
    from cipherlm.evaluation.chats import calibration_chats, evaluation_chats
    from cipherlm.evaluation.prompts import chat_prompts
    from cipherlm.evaluation.texts import calibration_sentences, evaluation_sentences
    from cipherlm.models.chat import public_head

    if not is_chat(tokenizer):
        text = tokenizer(" ".join(evaluation_sentences()))["input_ids"]
        calibration = [tokenizer(sentence)["input_ids"] for sentence in calibration_sentences()]
        return [int(config.bos_token_id or 0)], text, calibration
    head = public_head(tokenizer)
    measured, chats = (
        [prompt[0].tolist() for prompt in chat_prompts(tokenizer, given, head)]
        for given in (evaluation_chats()[:1], calibration_chats()[:CALIBRATION_CHATS])
    )
    return head, measured[0], chats


def _count(text: str) -> int:
    return 0 if text.strip() == "0" else positive_integer(text)
