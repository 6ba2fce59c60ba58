"""How a passphrase reaches a command: from a file or the terminal, never as an argument that `ps` shows."""

import argparse
import getpass
import sys
from pathlib import Path

from cipherlm.cli import CommandError


def add_passphrase_options(parser: argparse._ActionsContainer) -> None:
    """Add ``--passphrase-file`` and ``--ask-passphrase``."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--passphrase-file", metavar="FILE", help="file whose first line is the secret key's passphrase"
    )
    group.add_argument(
        "--ask-passphrase", action="store_true", help="ask for the secret key's passphrase on the terminal"
    )


def read_passphrase(options: argparse.Namespace, *, confirm: bool = False) -> str | None:
    """Return the passphrase, or None without either option; with ``confirm`` it is asked for twice."""
    if options.passphrase_file is not None:
        return _first_line(Path(options.passphrase_file))
    if not options.ask_passphrase:
        return None
    if not sys.stdin.isatty():
        raise CommandError("no terminal to ask for a passphrase on: use --passphrase-file")
    passphrase = getpass.getpass("Passphrase: ")
    if not passphrase:
        raise CommandError("the passphrase is empty")
    if confirm and getpass.getpass("The same again: ") != passphrase:
        raise CommandError("the two passphrases differ")
    return passphrase


def _first_line(path: Path) -> str:
    try:
        lines = path.read_text("utf-8").splitlines()
    except UnicodeDecodeError:
        raise CommandError(f"{path}: not a text in UTF-8") from None
    if not lines or not lines[0]:
        raise CommandError(f"{path}: its first line, the passphrase, is empty")
    return lines[0]
