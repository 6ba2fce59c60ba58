"""How a command finds a server, proves who it is, and which keys it uses."""

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

from cipherlm.cli import UsageError
from cipherlm.cli.common import positive_integer
from cipherlm.cli.passphrase import add_passphrase_options, read_passphrase

if TYPE_CHECKING:
    from cipherlm.progress import Progress
    from cipherlm.serving.remote import RemoteModel
    from cipherlm.serving.remote_linear import RemoteLinearModel


_NO_DRAFT = (
    "--draft: the client's bundle has no draft. The model's owner adds one (cipherlm export --draft); "
    "--prompt-lookup N needs none"
)


def add_server_options(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Add ``--server`` and what goes with it."""
    group = parser.add_argument_group("server")
    group.add_argument(
        "--server", required=required, metavar="URL", help="the server with the encrypted model"
    )
    group.add_argument(
        "--bundle",
        metavar="CLIENT_BUNDLE",
        help="the client's bundle of its model (default: the one that the keys were made from)",
    )
    group.add_argument(
        "--keys",
        metavar="NAME",
        help="the keys to use, of those on this machine; made where there are none (default: any that fit)",
    )
    group.add_argument(
        "--key-budget",
        type=positive_integer,
        metavar="N",
        help="texts that keys serve before new ones are made and sent: a server that cheats could learn a "
        "bit of a key from each (default: 256)",
    )
    group.add_argument(
        "--token", metavar="TOKEN", help="the server's token (default: CIPHERLM_TOKEN in the environment)"
    )
    add_transport_options(group)
    add_passphrase_options(group)


def add_transport_options(group: argparse._ActionsContainer) -> None:
    """Add what says which server is trusted."""
    group.add_argument("--ca", metavar="FILE", help="certificates to trust the server by, in PEM format")
    group.add_argument(
        "--insecure-plain-http",
        action="store_true",
        help="allow http:// to another machine: whoever is on the way can read the token and be the server",
    )


def add_reveal_length_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--reveal-length``."""
    parser.add_argument(
        "--reveal-length",
        action="store_true",
        help="end with the text: faster, but the server sees how long texts are, and one that cheats reads "
        "bits of the key or the prompt from that (default: a server is asked until the limit of tokens is "
        "reached, and up to 3 times more, whatever ends a text; each costs as much as a token)",
    )


def add_draft_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--draft`` and ``--prompt-lookup``."""
    drafts = parser.add_mutually_exclusive_group()
    drafts.add_argument(
        "--draft",
        action="store_true",
        help="propose tokens with the draft in the bundle, and verify them in one pass: the same text in "
        "fewer passes. A server sees how many were right, so with one this needs --reveal-length",
    )
    drafts.add_argument(
        "--prompt-lookup",
        type=positive_integer,
        metavar="N",
        help="as --draft, with up to N tokens that followed the last ones earlier in the text: no draft is "
        "needed, and it helps where a text repeats itself",
    )


def check_drafts(options: argparse.Namespace) -> None:
    """Refuse drafts where the length of texts is hidden from a server."""
    if not options.server or options.reveal_length:
        return
    for name in ("draft", "prompt_lookup"):
        if getattr(options, name):
            raise UsageError(
                f"--{name.replace('_', '-')} shows the server how many proposals are right, and so how long "
                "a text is: add --reveal-length"
            )


def drafts_of(options: argparse.Namespace, model: Any) -> dict[str, Any]:
    """Return the options of ``generate`` with which tokens are proposed for a model, if any are.

    Raises ``UsageError`` for ``--draft`` with a bundle that has none.
    """
    if options.prompt_lookup:
        return {"prompt_lookup_num_tokens": options.prompt_lookup}
    if not options.draft:
        return {}
    draft = getattr(model, "draft", None)
    if draft is None:
        raise UsageError(_NO_DRAFT)
    return {"assistant_model": draft}


def server_options_given(options: argparse.Namespace) -> list[str]:
    """Return the options that only make sense with ``--server``."""
    names = (
        "bundle",
        "keys",
        "key_budget",
        "token",
        "ca",
        "insecure_plain_http",
        "passphrase_file",
        "ask_passphrase",
        "reveal_length",
        "draft",
    )
    return ["--" + name.replace("_", "-") for name in names if getattr(options, name)]


def connect(options: argparse.Namespace, progress: "Progress") -> "RemoteModel | RemoteLinearModel":
    """Return the model at the server that the options name."""
    from cipherlm.serving.bundle import Bundle

    if options.bundle:
        bundle = Bundle.read(options.bundle, "client")
        # Before keys are made and sent, which takes a while.
        if getattr(options, "draft", False) and bundle.is_linear:
            raise UsageError(
                "--draft is for blocks on ciphertexts: with linear layers, use --prompt-lookup N"
            )
        if getattr(options, "draft", False) and not bundle.has_draft:
            raise UsageError(_NO_DRAFT)
        if bundle.is_linear:
            return _connect_linear(options, progress)
    from cipherlm.serving.key_use import BUDGET
    from cipherlm.serving.remote import RemoteModel

    return RemoteModel.connect(
        options.server,
        bundle=options.bundle,
        keys=options.keys,
        token=options.token or os.environ.get("CIPHERLM_TOKEN") or None,
        passphrase=lambda: read_passphrase(options),
        verify=options.ca or True,
        insecure_plain_http=options.insecure_plain_http,
        key_budget=options.key_budget or BUDGET,
        tell=lambda text: print(text, file=sys.stderr),
        progress=progress,
    )


def _connect_linear(options: argparse.Namespace, progress: "Progress") -> "RemoteLinearModel":
    for name in ("keys", "passphrase_file", "ask_passphrase"):
        if getattr(options, name):
            raise UsageError(
                f"--{name.replace('_', '-')} is about stored keys, and those of linear layers are made for "
                "each run: leave it out"
            )
    from cipherlm.serving.key_use import BUDGET
    from cipherlm.serving.remote_linear import RemoteLinearModel

    return RemoteLinearModel.connect(
        options.server,
        bundle=options.bundle,
        token=options.token or os.environ.get("CIPHERLM_TOKEN") or None,
        verify=options.ca or True,
        insecure_plain_http=options.insecure_plain_http,
        key_budget=options.key_budget or BUDGET,
        progress=progress,
    )
