"""What ``cipherlm inspect`` tells of a model's polynomials: which were chosen, and how exact they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from cipherlm.nn.fitted import Choice, Fitted, Stage
from cipherlm.nn.module import Module

Functions = Mapping[str, Sequence[Choice]]

HEADER = ("function", "blocks", "polynomials", "levels", "error", "of tolerance")


def functions_of(name: str, module: Module) -> dict[str, list[Choice]]:
    """Return how each function of a module is computed, by transformers' name of it.

    ``name`` is the module's, or that of the list for all blocks.
    """
    return {
        f"{name}.{inner.removeprefix('blocks.')}": function.choices()
        for inner, function in module.named(Fitted)
    }


def functions_dict(functions: Functions) -> dict[str, Any]:
    """Return all of it, for JSON."""
    return {name: [choice.to_dict() for choice in choices] for name, choices in functions.items()}


def table(functions: Functions) -> str:
    """Return a table with blocks that compute a function in the same way on one line.

    Of a function that depends on the number of keys, it has the one for the most of them. The error is that
    behind the last polynomial; its share of the tolerance is the largest of all polynomials.
    """
    from cipherlm.evaluation.report import format_table

    groups: dict[tuple[str, str], list[tuple[int, Choice]]] = {}
    for name, choices in functions.items():
        block, kind = _placed(name)
        choice = choices[-1]
        label = kind if choice.keys is None else f"{kind}, {choice.keys} keys"
        groups.setdefault((label, _polynomials(choice.stages)), []).append((block, choice))
    order = list(dict.fromkeys(label for label, _ in groups))
    rows = []
    for (label, polynomials), members in sorted(groups.items(), key=lambda item: order.index(item[0][0])):
        choices = [choice for _, choice in members]
        error = max(choice.stages[-1].error for choice in choices)
        share = max(stage.error / stage.tolerance for choice in choices for stage in choice.stages)
        blocks = _spans([block for block, _ in members])
        rows.append([label, blocks, polynomials, str(choices[0].levels), f"{error:.1e}", f"{share:.0%}"])
    return format_table(HEADER, rows)


def _placed(name: str) -> tuple[int, str]:
    """Return the block that a function is in, and its name there."""
    parts = name.split(".")
    at = next(index for index, part in enumerate(parts) if part.isdecimal())
    return int(parts[at]), ".".join(parts[at + 1 :])


def _polynomials(stages: Iterable[Stage]) -> str:
    """Return degrees by name, as in "exponential 15, inverse 15 7, reciprocal 31 + 1 Newton step"."""
    words = []
    for name, same in groupby(stages, key=lambda stage: stage.name):
        stages = list(same)
        steps = stages[-1].steps
        newton = f" + {steps} Newton step{'s' * (steps > 1)}" if steps else ""
        words.append(f"{name} {' '.join(str(stage.degree) for stage in stages)}{newton}")
    return ", ".join(words)


def _spans(numbers: Sequence[int]) -> str:
    """Return ascending numbers in few words, as in "0, 3-8"."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][-1] + 1:
            spans[-1].append(number)
        else:
            spans.append([number])
    return ", ".join(str(span[0]) if len(span) == 1 else f"{span[0]}-{span[-1]}" for span in spans)
