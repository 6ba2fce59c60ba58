"""Write docs/cli.md from what ``cipherlm VERB --help`` says: ``python docs/reference.py``."""

import argparse
import textwrap
from collections.abc import Iterator
from pathlib import Path

from cipherlm.cli import VERBS, verb_parser

PAGE = Path(__file__).parent / "cli.md"

INTRODUCTION = """\
# The command line

`cipherlm VERB --help` says what is here, for the version that you have.

VERBS

**Results** go to stdout, everything else to stderr. `--json` writes one JSON object instead of text.

**Exit codes**: 0 done, 1 failed, 2 used wrongly, 130 interrupted. An error is one line; `--debug` after the
verb, or `CIPHERLM_DEBUG=1`, adds the traceback.

| environment variable | |
|---|---|
| `CIPHERLM_TOKEN` | the server's token, for `serve` and for all that talk to a server |
| `CIPHERLM_HOME` | where keys are: a client's in `keys`, a server's in `server` (default: a data directory) |
| `CIPHERLM_PROXY_API_KEY` | the API key of `cipherlm proxy` |
| `CIPHERLM_DEBUG` | show tracebacks |
| `HF_HUB_OFFLINE` | of `transformers`: ask no network |

<!-- Written by docs/reference.py. -->
"""


def page() -> str:
    """Return the page."""
    verbs = "\n".join(
        ["| | |", "|---|---|", *(f"| [`{v}`](#cipherlm-{v}) | {s} |" for v, s in VERBS.items())]
    )
    return "\n".join([INTRODUCTION.replace("VERBS", verbs), *(section(verb_parser(verb)) for verb in VERBS)])


def section(parser: argparse.ArgumentParser, level: int = 2) -> str:
    """Return what a verb, or one of its subcommands, does and takes."""
    positional = " ".join(_written(action) for action in parser._get_positional_actions())
    parts = [f"{'#' * level} {parser.prog}", _paragraphs(parser.description)]
    if not list(_subcommands(parser)):
        parts.append(f"`{parser.prog} {positional} [OPTIONS]`".replace("  ", " "))
    parts += [_table(parser, group) for group in parser._action_groups]
    if parser.epilog:
        parts.append(f"```\n{parser.epilog.strip()}\n```")
    parts += [section(each, level + 1) for each in _subcommands(parser)]
    return "\n\n".join(part for part in parts if part) + ("\n" if level == 2 else "")


def _paragraphs(text: str | None) -> str:
    paragraphs = textwrap.dedent(text or "").strip().split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs).replace("``", "`")


def _subcommands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.values()


def _table(parser: argparse.ArgumentParser, group: argparse._ArgumentGroup) -> str:
    formatter = parser._get_formatter()
    rows = [
        f"| `{_written(action)}` | {_cell(formatter._expand_help(action))} |"
        for action in group._group_actions
        if action.help and action.help is not argparse.SUPPRESS and action.dest not in ("help", "debug")
    ]
    usual = group.title in ("positional arguments", "options")
    return "\n".join([f"| {'' if usual else group.title} | |", "|---|---|", *rows]) if rows else ""


def _written(action: argparse.Action) -> str:
    value = action.metavar if isinstance(action.metavar, str) else None
    if action.choices is not None and value is None:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    if not action.option_strings:
        name = value or action.dest
        return f"[{name}]" if action.nargs == "?" else name
    if action.nargs == 0:
        return action.option_strings[-1]
    value = value or action.dest.upper()
    if action.nargs in ("+", "*"):
        value += " ..."
    return f"{action.option_strings[-1]} {f'[{value}]' if action.nargs == '?' else value}"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
