"""The command line, one module a verb.

Only the module of the verb that runs is imported, and it imports torch when it needs it, so that ``--help``
answers at once.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from cipherlm import __version__

VERBS = {
    "demo": "generate text with the embedded model, all its blocks on real ciphertexts",
    "chat": "talk to a chat model that computes on encrypted text",
    "generate": "continue a prompt on encrypted text",
    "evaluate": "measure what encryption costs: agreement with the clear model, perplexity",
    "inspect": "show parameters, sizes of keys and ciphertexts, and who learns what",
    "serve": "evaluate a model on ciphertexts, for clients that keep their secret keys",
    "proxy": "let OpenAI programs on this machine use an encrypted model on a server",
    "page": "write a web page where people use an encrypted model on a server, keys in the browser",
    "export": "write a model as a bundle for a server and one for its clients",
    "keygen": "make the keys that a model on a server needs, and keep them on this machine",
    "bench": "measure encrypted steps: seconds, bytes, errors",
}

INTERRUPTED = 130
BROKEN_PIPE = 141


class CommandError(Exception):
    """What went wrong, in one line for the person at the command line."""


class UsageError(CommandError):
    """Arguments that do not go together."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 failed, 2 used wrongly, 130 interrupted."""
    try:
        code = _run(sys.argv[1:] if arguments is None else list(arguments))
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has gone, as `| head` does. Python would complain again when it closes stdout.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return BROKEN_PIPE
    return code


def verb_parser(name: str) -> argparse.ArgumentParser:
    """Return the parser of a verb's own arguments."""
    verb = import_module(f"cipherlm.cli.{name}")
    parser = argparse.ArgumentParser(
        prog=f"cipherlm {name}",
        description=verb.__doc__,
        epilog=verb.EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _run(arguments: list[str]) -> int:
    parser = _parser()
    try:
        chosen = parser.parse_args(arguments)
        verb = import_module(f"cipherlm.cli.{chosen.verb}")
        options = verb_parser(chosen.verb).parse_args(chosen.arguments)
    except SystemExit as stop:  # argparse has said why
        return stop.code if isinstance(stop.code, int) else 2

    try:
        verb.run(options)
    except BrokenPipeError:
        raise
    except KeyboardInterrupt:
        print("cipherlm: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if options.debug or os.environ.get("CIPHERLM_DEBUG"):
            raise
        print(f"cipherlm: {_one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb.ljust(width)}  {summary}" for verb, summary in VERBS.items())
    parser = argparse.ArgumentParser(
        prog="cipherlm",
        description="Run language models on encrypted text.",
        epilog=f"verbs:\n{verbs}\n\nexample:\n  cipherlm demo\n\n"
        "`cipherlm VERB --help` explains a verb. An error is one line; --debug after the verb, or\n"
        "CIPHERLM_DEBUG=1, shows its traceback.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"cipherlm {__version__}")
    parser.add_argument("verb", metavar="VERB", choices=VERBS, help="what to do, one of those below")
    parser.add_argument("arguments", metavar="...", nargs=argparse.REMAINDER, help="the verb's own arguments")
    return parser


def _one_line(error: Exception) -> str:
    """Return what went wrong. Errors meant for people explain themselves, others need their name."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, (CommandError, ImportError, OSError, RuntimeError, ValueError)) and text:
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)"
