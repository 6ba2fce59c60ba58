"""What ``cipherlm inspect --placement`` tells: what a model costs, before it is exported or computed."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from cipherlm.cli import CommandError, UsageError, inspect_choices
from cipherlm.cli.common import (
    configured,
    human_bytes,
    human_seconds,
    is_saved,
    positive_integer,
    print_pairs,
    write_json,
)
from cipherlm.cli.estimate import (
    RANDOM,
    TYPICAL,
    Estimate,
    LinearShape,
    Pass,
    WholeShape,
    estimate_linear,
    estimate_whole,
    same_ranges,
)
from cipherlm.cli.line import Line, add_line_options, line_of
from cipherlm.cli.machine import Machine
from cipherlm.engine import threads
from cipherlm.progress import TerminalProgress, counted

GEOMETRIES = ("gpt2", "llama-1b")
"""Sizes that need no model, as the benchmarks have them."""
PROMPT_TOKENS = 8
SINGLE_BYTES = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of an estimate."""
    group = parser.add_argument_group(
        "estimates", "seconds, memory, keys and traffic, calculated from shapes and what this machine takes"
    )
    group.add_argument(
        "--placement",
        choices=("whole", "linear"),
        help="estimate what a whole model, or its linear layers, cost at a server",
    )
    group.add_argument(
        "--geometry", choices=GEOMETRIES, help="sizes that need no model, instead of one (random weights)"
    )
    group.add_argument(
        "--prompt-tokens",
        type=positive_integer,
        metavar="P",
        help=f"private tokens of a prompt (default: {PROMPT_TOKENS})",
    )
    group.add_argument(
        "--server-cores",
        type=positive_integer,
        metavar="N",
        help="cores like this machine's (default: as many as it has)",
    )
    add_line_options(group)
    group.add_argument("--remeasure", action="store_true", help="measure this machine anew")


def check(options: argparse.Namespace) -> None:
    """Raise ``UsageError`` for options of an estimate where none is asked for."""
    if options.placement is not None:
        return
    for name in ("geometry", "prompt_tokens", "server_cores", "rtt", "mbit", "remeasure"):
        if getattr(options, name) not in (None, False):
            raise UsageError(f"--{name.replace('_', '-')} is for estimates: add --placement whole or linear")


def show(options: argparse.Namespace) -> None:
    """Estimate and print. Raises ``CommandError`` for a model that cannot be placed so."""
    progress = TerminalProgress()
    cores, line = options.server_cores or threads(), line_of(options) or Line()
    tokens = options.prompt_tokens or PROMPT_TOKENS
    machine = Machine.here(progress, again=options.remeasure)
    ranges = "none"
    try:
        if options.placement == "whole":
            shape, ranges = _whole(options, progress)
            with progress("counting operations, measuring this machine"):
                found = estimate_whole(shape, tokens, machine, cores, line)
        else:
            products = _linear(options, progress)
            with counted(progress, "planning", "shape") as report:
                found = estimate_linear(products, tokens, machine, cores, line, report)
    except (ValueError, KeyError) as error:
        raise CommandError(f"no estimate: {error}") from error
    machine.save()
    about: dict[str, Any] = {
        "model": options.geometry or options.model,
        "placement": options.placement,
        "server_cores": cores,
        "rtt_seconds": line.rtt,
        "mbit": options.mbit,
        "ranges": ranges,
        "machine": {**machine.about, "measured": machine.measured, "overheads": machine.overheads},
    }
    if options.json:
        write_json({**about, **found.to_dict()})
        return
    print(f"{about['model']}, {options.placement}, {cores} cores, a line of {line}: calculated")
    print_pairs(_lines(found, ranges, machine), indent="  ")
    if found.functions:
        print()
        print(inspect_choices.table(found.functions))


def _lines(found: Estimate, ranges: str, machine: Machine) -> list[tuple[str, str]]:
    keys = found.keys
    upload = f", {human_seconds(keys.upload_seconds)} on their way" if keys.upload_seconds else ""
    lines = [
        (f"prompt, {found.prompt.tokens} tokens", _words(found.prompt)),
        ("first token behind it", _words(found.first_token)),
        ("each further token", _words(found.next_token)),
        (
            "keys, sent once",
            f"{human_bytes(keys.sent_bytes)} for {keys.count} rotations, made in "
            f"{human_seconds(keys.make_seconds)}{upload}",
        ),
        ("memory, server", human_bytes(found.server_memory_bytes)),
        ("memory, client", f"{human_bytes(found.client_memory_bytes)}, while keys are made"),
        ("this machine", f"measured {machine.measured}; --remeasure does it again"),
    ]
    if ranges != "none":
        lines.append(("ranges", ranges))
    if machine.overheads == "usual":
        lines.append(("note", "other work shares this machine: overheads are those of another, quiet one"))
    return lines


def _words(part: Pass) -> str:
    parts = (
        ("server", part.server_seconds),
        ("client", part.client_seconds),
        ("line", part.line_seconds),
    )
    seconds = ", ".join(f"{name} {human_seconds(value)}" for name, value in parts)
    up, down = human_bytes(part.up_bytes), human_bytes(part.down_bytes)
    return f"{human_seconds(part.seconds)}: {seconds}; {part.round_trips} round trips, {up} up, {down} down"


def _whole(options: argparse.Namespace, progress: TerminalProgress) -> tuple[WholeShape, str]:
    """Return the shape of a whole model, and where its ranges are from."""
    from cipherlm.models.architecture import architecture_of
    from cipherlm.models.geometry import geometry_of, public_prefix

    config = configured(options)
    if not config.is_whole:
        raise UsageError("--placement whole is for all blocks: leave --target-modules and --block out")
    if options.geometry is not None:
        return _whole_geometry(options)

    from cipherlm.models.config import EncryptionConfig
    from cipherlm.models.loading import load_config, load_tokenizer

    with progress("reading the model's configuration"):
        model = load_config(options.model)
    architecture = architecture_of(model.model_type)
    args = architecture.args.of(model.to_dict())
    if not is_saved(options):
        from cipherlm.cli.whole import CONTEXT, is_chat
        from cipherlm.models.chat import public_head

        with progress("reading the tokenizer"):
            tokenizer = load_tokenizer(options.model)
        if is_chat(tokenizer):
            head, context = public_head(tokenizer), getattr(options, "context", None) or CONTEXT
            config = EncryptionConfig(prefix=head, context=context, post_quantum=config.post_quantum)
    geometry = geometry_of(config, args, public_prefix(config, model))
    blocks = architecture.model(args)
    known = _known_ranges(options, blocks.range_names)
    ranges = known or same_ranges(blocks, TYPICAL)
    source = "of the model's calibration" if known else "typical of trained models: this one's are not known"
    shape = WholeShape(blocks, geometry, ranges, _own_bytes(model), architecture.blocks)
    return shape, source


def _whole_geometry(options: argparse.Namespace) -> tuple[WholeShape, str]:
    from cipherlm.cli.bench_model import BLOCKS, SIDE_BY_SIDE, SIZES
    from cipherlm.models.architecture import architecture_of
    from cipherlm.schemes.ckks.geometry import Geometry

    if options.geometry != "gpt2":
        raise UsageError(f"--geometry {options.geometry} is for --placement linear")
    architecture = architecture_of("gpt2")
    args = architecture.args(**SIZES, layers=BLOCKS)
    geometry = Geometry(
        args.heads,
        args.head_dim,
        SIDE_BY_SIDE,
        0,
        getattr(options, "context", None) or 64,
        post_quantum=getattr(options, "post_quantum", False),
        width=args.width,
        inner=args.inner,
    )
    blocks = architecture.model(args)
    shape = WholeShape(blocks, geometry, same_ranges(blocks, RANDOM), 0, architecture.blocks)
    return shape, "of random weights"


def _linear(options: argparse.Namespace, progress: TerminalProgress) -> LinearShape:
    if options.geometry is not None:
        from cipherlm.cli.bench_linear import GEOMETRIES as SHAPES

        blocks, shapes = SHAPES[options.geometry]
        return LinearShape({shape: blocks * number for shape, number in Counter(shapes.values()).items()}, 0)

    import torch
    from transformers import AutoModelForCausalLM

    from cipherlm.linear.groups import find_groups
    from cipherlm.models.config import LINEAR, EncryptionConfig
    from cipherlm.models.loading import load_config
    from cipherlm.models.targets import find_linear

    with progress("reading the model's configuration"):
        config = load_config(options.model)
    with progress("finding linear layers"), torch.device("meta"):
        model = cast("Any", AutoModelForCausalLM).from_config(config)
        groups = find_groups(model, find_linear(model, EncryptionConfig(LINEAR)))
    return LinearShape(Counter((group.rows, group.in_features) for group in groups), _own_bytes(config))


def _own_bytes(config: Any) -> int:
    """Return the memory of a client's own weights: embeddings, and the output layer where it is another."""
    tables = 1 if config.tie_word_embeddings else 2
    return int(config.vocab_size) * int(config.hidden_size) * tables * SINGLE_BYTES


def _known_ranges(options: argparse.Namespace, names: list[str]) -> dict[str, tuple[float, float]] | None:
    """Return the ranges that a model was saved with, or that come with the package."""
    from cipherlm.models.calibrations import shipped
    from cipherlm.models.storage import CALIBRATION_NAME

    directory = Path(options.model) if is_saved(options) else shipped(options.model)
    if directory is None or not (directory / CALIBRATION_NAME).is_file():
        return None
    try:
        values = json.loads((directory / CALIBRATION_NAME).read_text(encoding="utf-8"))
        (found,) = values["modules"].values()
        if not isinstance(found, Mapping) or set(found) != set(names):
            raise ValueError("of another model")
        return {name: (float(low), float(high)) for name, (low, high) in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CommandError(f"{directory / CALIBRATION_NAME} is damaged: {error}") from error
