"""Let any OpenAI program on this machine use an encrypted model.

Speaks OpenAI's HTTP API (models, completions, chat completions, streamed or not) to programs on this machine,
and sends only ciphertexts on to the server. Prompts and replies are in the clear here, so it listens on the
loopback unless told otherwise, web pages cannot reach it, and programs need an API key: without --api-key,
one is made at each start and printed.
"""

import argparse
import os
import secrets
import signal
import socket
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

from cipherlm.cli import UsageError
from cipherlm.cli.common import positive_integer, quiet_libraries
from cipherlm.cli.listening import add_tls_options, listen, port_argument, tls_files
from cipherlm.cli.server_options import (
    add_draft_options,
    add_reveal_length_option,
    add_server_options,
    check_drafts,
    drafts_of,
)
from cipherlm.cli.server_options import connect as open_remote
from cipherlm.progress import TerminalProgress

EXAMPLES = """\
examples:
  cipherlm proxy --server https://models.example.org:8470
  CIPHERLM_PROXY_API_KEY="$(openssl rand -hex 16)" cipherlm proxy --server http://127.0.0.1:8470 --port 9000

then, in another terminal:
  export OPENAI_BASE_URL=http://127.0.0.1:8471/v1
  export OPENAI_API_KEY=...           # both lines as the proxy prints them
  python -c 'import openai; client = openai.OpenAI(); print(client.models.list().data)'

environment:
  CIPHERLM_TOKEN          the server's token, where --token is not given
  CIPHERLM_PROXY_API_KEY  the key of this endpoint, where --api-key is not given
"""

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8471


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_server_options(parser, required=True)
    parser.add_argument(
        "--name", metavar="NAME", help="name under which programs ask for the model (default: the server's)"
    )
    parser.add_argument(
        "--host", default=DEFAULT_HOST, help=f"address to listen on (default: {DEFAULT_HOST})"
    )
    parser.add_argument(
        "--port",
        type=port_argument,
        default=DEFAULT_PORT,
        metavar="N",
        help=f"port to listen on, 0 for any that is free (default: {DEFAULT_PORT})",
    )
    access = parser.add_mutually_exclusive_group()
    access.add_argument(
        "--api-key",
        metavar="KEY",
        help="what programs must give as their API key; other users of this machine can see it here "
        "(default: CIPHERLM_PROXY_API_KEY in the environment, or a new one that is printed)",
    )
    access.add_argument(
        "--no-api-key",
        action="store_true",
        help="let every program and every user of this machine in: they spend your keys and your token",
    )
    parser.add_argument(
        "--allow-remote",
        action="store_true",
        help="let other machines in, with TLS and an API key; their prompts are in the clear here",
    )
    add_tls_options(parser)
    parser.add_argument(
        "--insecure-listen-plain-http",
        action="store_true",
        help="let other machines in without TLS: whoever is on the way reads prompts, replies and the key",
    )
    parser.add_argument(
        "--waiting",
        type=positive_integer,
        default=8,
        metavar="N",
        help="requests that may wait while one is generated; more are refused (default: 8)",
    )
    parser.add_argument(
        "--max-tokens",
        type=positive_integer,
        metavar="N",
        help="tokens of a reply when a request does not say (default: 16; in a chat what the context leaves)",
    )
    add_reveal_length_option(parser)
    add_draft_options(parser)


def run(options: argparse.Namespace) -> None:
    """Serve until interrupted."""
    from cipherlm.serving.auth import is_loopback

    check_drafts(options)
    if not is_loopback(options.host) and not options.allow_remote:
        raise UsageError(
            f"{options.host} can be reached from other machines, and prompts are in the clear here: "
            "leave --host out, or add --allow-remote"
        )
    if options.allow_remote and options.no_api_key:
        raise UsageError("--allow-remote lets other machines use your keys: leave --no-api-key out")
    certfile, keyfile = tls_files(options, "--insecure-listen-plain-http")
    # Before the model is loaded and keys are sent, which takes a while.
    with closing(listen(options.host, options.port)) as listener, quiet_libraries():
        model, tokenizer, name = connect(options)
        try:
            serve(options, listener, model, tokenizer, name=name, tls=(certfile, keyfile))
        finally:
            model.close()


def connect(options: argparse.Namespace) -> tuple[Any, Any, str]:
    """Return the remote model, its tokeniser, and the name under which it is served."""
    model = open_remote(options, TerminalProgress())
    return model, model.tokenizer, options.name or model.name


def serve(
    options: argparse.Namespace,
    listener: socket.socket,
    model: Any,
    tokenizer: Any,
    *,
    name: str,
    tls: tuple[Path | None, Path | None] = (None, None),
) -> None:
    """Serve on a listening socket until SIGINT or SIGTERM."""
    from cipherlm.serving.hosts import LOOPBACK_HOSTS, in_url
    from cipherlm.serving.logs import log_to
    from cipherlm.serving.proxy import create_proxy
    from cipherlm.serving.proxy_run import ProxyServer

    log_to()
    host = in_url(options.host)
    given = options.api_key or os.environ.get("CIPHERLM_PROXY_API_KEY")
    api_key = None if options.no_api_key else given or secrets.token_urlsafe(24)
    app = create_proxy(
        model,
        tokenizer,
        name=name,
        api_key=api_key,
        # The API key keeps web pages out where names cannot be known.
        allowed_hosts=None if options.allow_remote else {*LOOPBACK_HOSTS, host},
        waiting=options.waiting,
        default_max_tokens=options.max_tokens,
        context_length=model.context_length,
        reveal_length=options.reveal_length,
        drafts=drafts_of(options, model),
    )
    certfile, keyfile = tls
    url = f"http{'s' if certfile else ''}://{host}:{listener.getsockname()[1]}/v1"
    print(f"{name} is served at {url}; stop with Ctrl-C", file=sys.stderr)
    print(f"export OPENAI_BASE_URL={url}", flush=True)
    if api_key is None or not given:  # a key that was given is known, and need not be on a screen
        print(f"export OPENAI_API_KEY={api_key or 'unused'}", flush=True)
    # uvicorn ends gracefully and then sends itself the signal again: this lets the model be closed.
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        ProxyServer(app, certfile=certfile, keyfile=keyfile).run(sockets=[listener])
    finally:
        signal.signal(signal.SIGTERM, previous)
