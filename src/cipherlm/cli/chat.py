"""Talk to a chat model that computes on encrypted text.

The linear layers are products on ciphertexts, at a server or, without one, in this process. Everything else,
the conversation and its key-value cache among it, stays with the client. Text is hidden from the server;
weights are not hidden from the client. With TEXT, one question is answered; without, a conversation goes on
until the end of the input (Ctrl-D) or "/exit".
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from cipherlm.cli import CommandError, UsageError
from cipherlm.cli.common import add_json_option, positive_integer, quiet_libraries, write_json
from cipherlm.cli.server_options import (
    add_reveal_length_option,
    add_server_options,
    connect,
    server_options_given,
)
from cipherlm.progress import TerminalProgress

if TYPE_CHECKING:
    from cipherlm.models.chat import Chat, Turn

EXAMPLES = """\
examples:
  cipherlm chat "What is the capital of France?"
  cipherlm chat --model smollm2 --system "Answer in one sentence."
  cipherlm chat --server http://127.0.0.1:8470 --bundle smollm2-bundle/client
"""

DEFAULT_MODEL = "smollm2"
MODES = ("execute", "simulate", "disable")
HERE_TOKENS, SERVER_TOKENS = 256, 64
_END = ("/exit", "/quit")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("text", nargs="?", metavar="TEXT", help="one question (default: a conversation)")
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help='"smollm2", a directory, a GGUF file, or an id on the Hugging Face hub (default: smollm2)',
    )
    parser.add_argument("--system", metavar="TEXT", help="the system prompt (default: the template's)")
    parser.add_argument(
        "--max-new-tokens",
        type=positive_integer,
        metavar="N",
        help=f"tokens of an answer at most (default: {HERE_TOKENS}; {SERVER_TOKENS} at a server, which is "
        "asked for all of them, whatever ends an answer, unless --reveal-length is given)",
    )
    parser.add_argument(
        "--mode",
        choices=MODES,
        default="execute",
        help="without a server: on ciphertexts, simulated, or in the clear (default: execute)",
    )
    add_server_options(parser, required=False)
    add_reveal_length_option(parser)
    add_json_option(parser)


def run(options: argparse.Namespace) -> None:
    """Answer."""
    if not options.server:
        for name in server_options_given(options):
            raise UsageError(f"{name} goes with --server")
    elif options.mode != "execute":
        raise UsageError(f"--mode {options.mode}: a server computes on ciphertexts only")
    elif options.model:
        raise UsageError("--model was settled when the model was exported: leave it out")
    if options.max_new_tokens is None:
        short = options.server and not options.reveal_length
        options.max_new_tokens = SERVER_TOKENS if short else HERE_TOKENS
    turns = []
    with quiet_libraries(), _conversation(options) as chat:
        for text in _questions(options):
            turn = _answer(chat, text, options)
            turns.append({"question": text, "answer": turn.text, **_costs(turn)})
    if options.json:
        write_json({"turns": turns})


@contextmanager
def _conversation(options: argparse.Namespace) -> Iterator[Chat]:
    from cipherlm.models.chat import Chat

    progress = TerminalProgress()
    if options.server:
        with connect(options, progress) as remote:
            system = options.system or getattr(remote, "system", None)
            prefix = getattr(remote, "public_prefix", None)
            yield _checked(lambda: Chat(remote, remote.tokenizer, system=system, prefix=prefix))
        return
    from cipherlm.models.config import EncryptionConfig
    from cipherlm.models.integration import get_encrypted_model
    from cipherlm.models.loading import load_model, load_tokenizer

    name = options.model or DEFAULT_MODEL
    tokenizer = load_tokenizer(name)
    with progress("loading"):
        model = load_model(name)
    with progress("finding linear layers"):
        encrypted: Any = get_encrypted_model(model, EncryptionConfig("linear", scheme="ckks"))
    encrypted.set_fhe_mode(options.mode)
    yield _checked(lambda: Chat(encrypted, tokenizer, system=options.system))


def _checked(make: Any) -> Chat:
    try:
        chat: Chat = make()
    except ValueError as error:
        raise CommandError(str(error)) from error
    return chat


def _questions(options: argparse.Namespace) -> Iterator[str]:
    if options.text is not None:
        yield options.text
        return
    interactive = sys.stdin.isatty()
    while True:
        if interactive:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line or line.strip() in _END:
            return
        if line.strip():
            yield line.strip()


def _answer(chat: Chat, text: str, options: argparse.Namespace) -> Turn:
    def show(piece: str) -> None:
        if not options.json:
            print(piece, end="", flush=True)

    choice = {"reveal_length": True} if options.reveal_length else {}
    try:
        turn = chat.reply(text, max_new_tokens=options.max_new_tokens, on_text=show, **choice)
    except ValueError as error:
        raise CommandError(str(error)) from error
    if not options.json:
        print()
        print(
            f"[{turn.prompt_tokens} tokens read, {turn.cached_tokens} cached, first word after "
            f"{turn.first_token_seconds:.1f} s; {turn.new_tokens} tokens in {turn.seconds:.1f} s]",
            file=sys.stderr,
        )
    return turn


def _costs(turn: Turn) -> dict[str, Any]:
    return {name: value for name, value in asdict(turn).items() if name != "text"}
