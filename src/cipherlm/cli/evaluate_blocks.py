"""How much each block, and each part of it, changes the logits if it alone is encrypted."""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import replace
from typing import Any

from cipherlm.cli import UsageError
from cipherlm.cli.common import is_saved, write_json
from cipherlm.cli.evaluate_perplexity import finite
from cipherlm.cli.evaluate_setup import BLOCK_TEXTS, calibrated, header, prepare, title
from cipherlm.progress import TerminalProgress

WHOLE = "block"
_WHAT = {"modules": "one block alone", "linear": "the linear layers of one block alone"}


def evaluate_blocks(options: argparse.Namespace) -> None:
    """Print a table or JSON, and draw the plot."""
    from cipherlm.models.config import ALL, LINEAR

    if options.block is not None or options.perplexity:
        name = "perplexity" if options.perplexity else "block"
        raise UsageError(f"--{name} does not go with --by-block, which measures every block")
    if options.target_modules not in (None, [ALL], [LINEAR]):
        raise UsageError('--by-block measures the whole model: --target-modules "all" or "linear"')
    if is_saved(options):
        raise UsageError("--by-block chooses what to encrypt itself: give it the clear model")
    if options.plot:
        from cipherlm.evaluation.report import plot_blocks

        plot_blocks({}, options.plot, title="")  # finds out before the long part whether it can be written

    from cipherlm.evaluation.behind import behind
    from cipherlm.evaluation.blocks import block_parts, encrypted_within, logit_errors
    from cipherlm.models.targets import means_linear

    options.limit = options.limit or BLOCK_TEXTS
    progress, start = TerminalProgress(), time.perf_counter()
    setup = prepare(options, progress)
    blocks = block_parts(setup.clear)
    inner = [part for parts in blocks.values() for part in parts]
    if means_linear(setup.clear, setup.config):
        runs = [("blocks", setup.config, [*blocks, *inner])]
    else:
        # A block as one remote module has its norms with it, which its attention and its MLP alone have not.
        runs = [
            (label, replace(setup.config, target_modules=names), names)
            for label, names in (("blocks", list(blocks)), ("parts of blocks", inner))
        ]
    errors: dict[str, dict[str, Any]] = {block: {} for block in blocks}
    about: dict[str, Any] = {}
    for label, config, names in runs:
        model = calibrated(options, setup, config, copy.deepcopy(setup.clear), progress)
        model.set_fhe_mode(options.mode)
        about = about or header(options, model, setup)
        called, wanted = behind(model, setup.prefix), {name: encrypted_within(model, name) for name in names}
        with progress(f"comparing {label}"):
            for name, error in logit_errors(model, called, setup.texts, wanted):
                block = next(block for block in blocks if f"{name}.".startswith(f"{block}."))
                errors[block][name.removeprefix(block).lstrip(".") or WHOLE] = {
                    "rms": finite(error.rms),
                    "kl": finite(error.divergence),
                }
    result = {**about, "blocks": errors, "seconds": time.perf_counter() - start}
    if options.plot:
        shown = {b: {part: e["rms"] or float("nan") for part, e in own.items()} for b, own in errors.items()}
        plot_blocks(shown, options.plot, title=title(about, _WHAT[about["placement"]]))
    if options.json:
        write_json(result)
    else:
        _print(result)
        if options.plot:
            print(f"\nplot written to {options.plot}")


def _print(result: dict[str, Any]) -> None:
    from cipherlm.evaluation.report import format_table

    blocks: dict[str, dict[str, dict[str, float | None]]] = result["blocks"]
    parts = list(dict.fromkeys(part for own in blocks.values() for part in own if part != WHOLE))
    total = sum((own[WHOLE]["rms"] or 0.0) ** 2 for own in blocks.values())
    print(f"{title(result, _WHAT[result['placement']])}: root mean square error of a logit\n")
    rows = []
    for block, own in blocks.items():
        whole = own[WHOLE]["rms"]
        share = "-" if whole is None or not total else f"{whole**2 / total:.1%}"
        rows.append([block, *(_number(own.get(part, {}).get("rms")) for part in (*parts, WHOLE)), share])
    print(format_table(["", *parts, WHOLE, "share of variance"], rows))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"
