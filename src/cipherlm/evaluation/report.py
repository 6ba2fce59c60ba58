"""Figures as a table for a terminal, and as a plot."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an aligned table: the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        aligned = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
        return "  ".join((cells[0].ljust(widths[0]), *aligned)).rstrip()

    return "\n".join((line(header), "  ".join("-" * width for width in widths), *map(line, rows)))


def plot_agreement(results: Sequence[Mapping[str, Any]], path: str | Path, *, title: str) -> None:
    """Draw agreement against bit-width, a line for each set of heads and each k, into an image file.

    ``results`` are rows with ``heads_label``, ``n_bits`` and ``top1``, ``top5``, ``top10``. Raises
    ``ImportError`` without matplotlib.
    """
    figure, axes = _figure()
    from matplotlib.ticker import PercentFormatter

    labels = list(dict.fromkeys(row["heads_label"] for row in results))
    for color, label in enumerate(labels):
        rows = sorted((row for row in results if row["heads_label"] == label), key=lambda row: row["n_bits"])
        for style, rank in zip(("-o", "--s", ":^"), ("top1", "top5", "top10"), strict=True):
            axes.plot(
                [row["n_bits"] for row in rows],
                [row[rank] for row in rows],
                style,
                color=f"C{color}",
                label=f"{label}, top-{rank.removeprefix('top')}",
            )
    axes.set_xlabel("bits")
    axes.set_xticks(sorted({row["n_bits"] for row in results}))
    axes.set_ylabel("agreement with the clear model")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    _save(figure, path)


def plot_blocks(errors: Mapping[str, Mapping[str, float]], path: str | Path, *, title: str) -> None:
    """Draw the error of each block's parts, a line a part, into an image file.

    ``errors`` has blocks in the model's order, and in each the parts by name. Raises ``ImportError`` without
    matplotlib.
    """
    figure, axes = _figure()
    for part in dict.fromkeys(part for own in errors.values() for part in own):
        values = [own.get(part, float("nan")) for own in errors.values()]
        axes.plot(range(len(values)), values, "-o", label=part)
    axes.set_xlabel("block")
    axes.set_ylabel("root mean square error of a logit")
    if errors:
        axes.set_yscale("log")
        axes.legend(fontsize="small")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.3)
    _save(figure, path)


def _figure() -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('a plot needs matplotlib: pip install "cipherlm[plot]"') from error

    # Not pyplot, which would look for a display.
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    return figure, figure.add_subplot()


def _save(figure: Any, path: str | Path) -> None:
    try:
        figure.savefig(str(path), dpi=150)
    except ValueError as error:  # an unknown ending; the message lists those it knows
        raise ValueError(f"cannot write the plot {path}: {error}") from error
