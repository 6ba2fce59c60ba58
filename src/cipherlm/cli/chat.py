"""Talk to a chat model that computes on encrypted text.

With the placement "whole", all blocks are computed on ciphertexts (CKKS), block after block: neither the text
nor the weights are shown to the other side. With "linear", the linear layers are products on ciphertexts, and
all else is with the client: text is hidden from the server, weights are not hidden from the client, and it is
many times faster. Both are at a server or, without one, in this process. With TEXT, one question is answered;
without, a conversation goes on until the end of the input (Ctrl-D) or "/exit".
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

from cipherlm.cli import CommandError, UsageError
from cipherlm.cli.common import add_json_option, positive_integer, quiet_libraries, write_json
from cipherlm.cli.server_options import (
    add_draft_options,
    add_reveal_length_option,
    add_server_options,
    check_drafts,
    connect,
    drafts_of,
    server_options_given,
)
from cipherlm.cli.whole import CONTEXT, whole_chat_model
from cipherlm.progress import Progress, TerminalProgress

if TYPE_CHECKING:
    from cipherlm.models.chat import Chat, Turn

EXAMPLES = """\
examples:
  cipherlm chat "What is the capital of France?"
  cipherlm chat --placement linear
  cipherlm chat --model smollm2 --system "Answer in one sentence."
  cipherlm chat --server http://127.0.0.1:8470 --bundle smollm2-bundle/client
"""

Made = TypeVar("Made")

DEFAULT_MODEL = "smollm2"
MODES = ("execute", "simulate", "disable")
PLACEMENTS = ("whole", "linear")
MOST_NEW_TOKENS = 64
_END = ("/exit", "/quit")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("text", nargs="?", metavar="TEXT", help="one question (default: a conversation)")
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help='"smollm2", a directory, a GGUF file, or an id on the Hugging Face hub (default: smollm2)',
    )
    parser.add_argument(
        "--placement",
        choices=PLACEMENTS,
        help="what is computed on ciphertexts: the whole model, or its linear layers (default: whole)",
    )
    parser.add_argument(
        "--context",
        type=positive_integer,
        metavar="N",
        help=f"the most tokens of a conversation, with the placement whole (default: {CONTEXT})",
    )
    parser.add_argument("--system", metavar="TEXT", help="the system prompt (default: the template's)")
    parser.add_argument(
        "--max-new-tokens",
        type=positive_integer,
        metavar="N",
        help=f"tokens of an answer at most (default: {MOST_NEW_TOKENS}; a server is asked for all of them, "
        "whatever ends an answer, unless --reveal-length is given)",
    )
    parser.add_argument(
        "--mode",
        choices=MODES,
        default="execute",
        help="without a server: on ciphertexts, simulated, or in the clear (default: execute)",
    )
    add_server_options(parser, required=False)
    add_reveal_length_option(parser)
    add_draft_options(parser)
    add_json_option(parser)


def run(options: argparse.Namespace) -> None:
    """Answer."""
    if not options.server:
        for name in server_options_given(options):
            raise UsageError(f"{name} goes with --server")
    elif options.mode != "execute":
        raise UsageError(f"--mode {options.mode}: a server computes on ciphertexts only")
    else:
        for name in ("model", "placement", "context"):
            if getattr(options, name):
                raise UsageError(f"--{name} was settled when the model was exported: leave it out")
    check_drafts(options)
    if options.context and options.placement == "linear":
        raise UsageError("--context is for the placement whole: linear layers take a text of any length")
    options.max_new_tokens = options.max_new_tokens or MOST_NEW_TOKENS
    turns = []
    with quiet_libraries(), _conversation(options) as chat:
        drafts = drafts_of(options, chat.model)
        for text in _questions(options):
            turn = _answer(chat, text, options, drafts)
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
    from cipherlm.models.chat import template_ids
    from cipherlm.models.loading import load_model, load_tokenizer

    name = options.model or DEFAULT_MODEL
    tokenizer = load_tokenizer(name)
    _checked(lambda: template_ids(tokenizer, [{"role": "user", "content": "a"}]))
    with progress("loading"):
        model = load_model(name)
    encrypted: Any
    if options.placement == "linear":
        encrypted = _linear(model, progress)
    else:
        encrypted = whole_chat_model(
            model, tokenizer, progress, system=options.system, context=options.context
        )
    encrypted.set_fhe_mode(options.mode)
    yield _checked(lambda: Chat(encrypted, tokenizer, system=options.system))


def _linear(model: Any, progress: Progress) -> Any:
    from cipherlm.models.config import EncryptionConfig
    from cipherlm.models.integration import get_encrypted_model

    with progress("finding linear layers"):
        return get_encrypted_model(model, EncryptionConfig("linear", scheme="ckks"))


def _checked(make: Callable[[], Made]) -> Made:
    try:
        return make()
    except ValueError as error:
        raise CommandError(str(error)) from error


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


def _answer(chat: Chat, text: str, options: argparse.Namespace, drafts: dict[str, Any]) -> Turn:
    def show(piece: str) -> None:
        if not options.json:
            print(piece, end="", flush=True)

    choice = {**drafts, **({"reveal_length": True} if options.reveal_length else {})}
    try:
        turn = chat.reply(text, max_new_tokens=options.max_new_tokens, on_text=show, **choice)
    except ValueError as error:
        raise CommandError(str(error)) from error
    if not options.json:
        print()
        print(
            f"[{turn.prompt_tokens} tokens read, {turn.cached_tokens} cached, first word after "
            f"{turn.first_token_seconds:.1f} s; {turn.new_tokens} tokens in {turn.passes} passes, "
            f"{turn.seconds:.1f} s]",
            file=sys.stderr,
        )
    return turn


def _costs(turn: Turn) -> dict[str, Any]:
    return {name: value for name, value in asdict(turn).items() if name != "text"}
