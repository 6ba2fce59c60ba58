"""Evaluate a model on ciphertexts, for clients that keep their text and their secret keys.

The server has the model's weights and its clients' evaluation keys. It listens on the loopback, where it
needs no token; anywhere else it needs one, and TLS. What it does is on stderr, as JSON.
"""

import argparse
import dataclasses
import functools
import os
import re
import signal
import sys
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cipherlm.cli import CommandError, UsageError
from cipherlm.cli.common import positive_integer
from cipherlm.cli.listening import add_tls_options, listen, port_argument, tls_files

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cipherlm.serving.auth import Tokens
    from cipherlm.serving.computation import HostedModel, HostedProducts
    from cipherlm.serving.keys import KeyStore
    from cipherlm.serving.page import Page
    from cipherlm.serving.service import Limits

EXAMPLES = """\
examples:
  cipherlm serve gpt2-bundle/server
  cipherlm serve tiny-bundle/server --page
  cipherlm serve smollm2-bundle/server
  cipherlm serve gpt2-bundle/server --host 0.0.0.0 --token-file tokens --certfile cert.pem --keyfile key.pem
  cipherlm serve /shared/gpt2-bundle/server --ray 10.0.0.5:6379

a file of tokens has one a line, each with the name of its owner; owners do not see each other's keys:
  alice 6f1ed002ab5595859014ebf0951522d9
  bob   a5e744d0164540d33b1d7ea616c28f2f

environment:
  CIPHERLM_TOKEN  the token, where neither --token nor --token-file is given
  CIPHERLM_HOME   where clients' keys are kept, in "server", where --data-dir is not given
"""

DEFAULT_PORT = 8470
_UNITS = {"": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("bundle", metavar="BUNDLE", help="directory that `cipherlm export` has made")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument(
        "--port",
        type=port_argument,
        default=DEFAULT_PORT,
        metavar="N",
        help=f"port to listen on, 0 for any that is free (default: {DEFAULT_PORT})",
    )
    access = parser.add_argument_group("access")
    tokens = access.add_mutually_exclusive_group()
    tokens.add_argument("--token", help="what clients must have; other users of this machine can see it here")
    tokens.add_argument("--token-file", metavar="FILE", help="tokens, one a line, each with its owner's name")
    add_tls_options(access)
    access.add_argument(
        "--insecure-plain-http",
        action="store_true",
        help="let other machines in without TLS: whoever is on the way can read tokens and be the server",
    )

    pages = parser.add_argument_group("web pages")
    pages.add_argument(
        "--page",
        nargs="?",
        const="",
        metavar="CLIENT_BUNDLE",
        help="serve a page too, where people try the model in a browser (default: for the bundle `client` "
        "beside BUNDLE); for demonstrations: who does not trust the server needs a page from elsewhere, see "
        "`cipherlm page`",
    )
    pages.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let web pages from there in, such as https://chat.example.org; may be repeated (default: none "
        "but the server's own page)",
    )

    limits = parser.add_argument_group("limits")
    for option, default, text in (
        ("--workers", 1, "evaluations that compute at once; one uses all cores"),
        ("--max-connections", 128, "connections at once"),
        ("--idle-seconds", 900, "a session may do nothing for so long"),
        ("--keys-seconds", 60, "an idle session's evaluation keys leave the memory after so long"),
        ("--reply-seconds", 120, "a client may take so long to refresh"),
        ("--evaluation-seconds", 3600, "an evaluation may take so long"),
        ("--evaluations-per-hour", 10_000, "evaluations of the whole model for one owner in any hour"),
        ("--grace-seconds", 30, "what runs may take so long when the server is told to end"),
    ):
        limits.add_argument(
            option, type=positive_integer, default=default, metavar="N", help=f"{text} (default: {default})"
        )
    for option, default, linear, text in (
        ("--queue", 32, 64, "evaluations that may wait; more are refused"),
        ("--max-sessions", 8, 64, "sessions at once; each holds its keys in memory"),
    ):
        limits.add_argument(
            option,
            type=positive_integer,
            metavar="N",
            help=f"{text} (default: {default}, with linear layers {linear})",
        )
    limits.add_argument(
        "--max-sessions-per-owner",
        type=positive_integer,
        metavar="N",
        help="of one owner (default: an equal share, and what the others can do without)",
    )
    limits.add_argument(
        "--max-tokens", type=positive_integer, metavar="N", help="length of a text (default: the model's)"
    )

    cluster = parser.add_argument_group("several machines")
    cluster.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="compute on the workers of a Ray cluster: host:port, or auto for the one of this machine; "
        "they must all find BUNDLE under the same path",
    )
    cluster.add_argument(
        "--ray-workers",
        type=positive_integer,
        metavar="N",
        help="workers, and so evaluations that compute at once (default: one a machine, with all its cores)",
    )

    disk = parser.add_argument_group("clients' keys")
    disk.add_argument(
        "--data-dir", metavar="DIR", help="where they are kept (default: the user's data directory)"
    )
    disk.add_argument(
        "--disk-budget",
        type=size_argument,
        default="50GB",
        metavar="SIZE",
        help="room for them, such as 500MB or 50GB, shared equally by owners; the least recently used make "
        "room (default: 50GB)",
    )


def size_argument(text: str) -> int:
    """Return a number of bytes."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(|kB|MB|GB|TB)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500MB or 50GB")
    return int(float(match[1]) * _UNITS[match[2]])


def run(options: argparse.Namespace) -> None:
    """Serve until SIGTERM or SIGINT."""
    if options.ray_workers is not None and options.ray is None:
        raise UsageError("--ray-workers needs --ray")
    try:
        from cipherlm.serving.auth import is_loopback
        from cipherlm.serving.logs import log_to
        from cipherlm.serving.run import create_server
        from cipherlm.serving.service import Service
    except ImportError as error:
        raise CommandError(f'{error.name} is missing: pip install "cipherlm[serve]"') from None
    tokens = read_tokens(options)
    if not tokens and not is_loopback(options.host):
        raise UsageError(
            f"{options.host} can be reached from other machines, and a server there needs a token: "
            "--token-file, or CIPHERLM_TOKEN"
        )
    certfile, keyfile = tls_files(options, "--insecure-plain-http")
    page = page_of(options)
    origins = [origin_option(origin) for origin in options.allow_origin]

    # Before the model is loaded, which takes a while.
    with closing(listen(options.host, options.port)) as listener, ExitStack() as stack:
        log_to()
        model: HostedModel | HostedProducts
        workers = 1
        if options.ray is None:
            model = load_hosted_model(Path(options.bundle))
        else:
            model, workers = ray_hosted_model(Path(options.bundle), options.ray, options.ray_workers, stack)
        keys = key_store(options, model.description["keys"], tokens)
        limits = limits_of(options, linear=keys is None)
        limits = dataclasses.replace(limits, workers=max(workers, limits.workers))
        service = Service(model, keys, tokens, limits)
        server = create_server(
            service,
            options.host,
            options.port,
            certfile=certfile,
            keyfile=keyfile,
            insecure_plain_http=options.insecure_plain_http,
            page=page,
            allowed_origins=origins,
        )
        # uvicorn ends gracefully and then sends itself the signal again.
        previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        try:
            server.run(sockets=[listener])
        finally:
            signal.signal(signal.SIGTERM, previous)


def load_hosted_model(bundle: Path) -> "HostedModel | HostedProducts":
    """Return the model in a server bundle."""
    from cipherlm.serving.bundle import load_hosted_model

    return load_hosted_model(bundle)


def page_of(options: argparse.Namespace) -> "Page | None":
    """Return the page that is to be served, if any, for the model of the bundle."""
    if options.page is None:
        return None
    from cipherlm.serving.bundle import Bundle
    from cipherlm.serving.page import compose

    server = Bundle.read(options.bundle, "server")
    client = Bundle.load(options.page or Path(options.bundle).resolve().parent / "client", "client")
    if client.about.get("fingerprint") != server.about.get("fingerprint"):
        raise UsageError(f"{client.directory} is the client's bundle of another model")
    return compose(client)


def origin_option(text: str) -> str:
    """Return an origin that pages may come from."""
    from cipherlm.serving.browsers import origin_argument

    try:
        return origin_argument(text)
    except ValueError as error:
        raise UsageError(f"--allow-origin: {error}") from None


def ray_hosted_model(
    bundle: Path, address: str, workers: int | None, stack: ExitStack
) -> "tuple[HostedModel | HostedProducts, int]":
    """Return the model in a bundle on a cluster's workers, which end with ``stack``, and their number."""
    from cipherlm.serving import bundle as bundles
    from cipherlm.serving import ray_cluster

    ray_cluster.connect(address)
    machines = ray_cluster.cluster_cores()
    number = workers or max(len(machines), 1)
    load: Any = functools.partial(bundles.load_hosted_model, str(bundle.resolve()))
    cores = ray_cluster.cores_per_worker(machines, number)
    if bundles.Bundle.read(bundle, "server").is_linear:
        from cipherlm.serving.ray_products import RayHostedProducts

        return stack.enter_context(closing(RayHostedProducts(load, number, cores))), number
    return stack.enter_context(closing(ray_cluster.RayHostedModel(load, number, cores))), number


def key_store(options: argparse.Namespace, kinds: "Mapping[str, int]", tokens: "Tokens") -> "KeyStore | None":
    """Return where keys of these kinds are kept, or None for a model whose keys come with connections."""
    from cipherlm.serving.keys import KeyStore

    if not kinds:
        return None
    return KeyStore(data_directory(options.data_dir), kinds, options.disk_budget, owners=tokens.owners)


def read_tokens(options: argparse.Namespace) -> "Tokens":
    """Return the tokens that the options or the environment give, if any."""
    from cipherlm.serving.auth import DEFAULT_OWNER, Tokens

    if options.token_file is not None:
        return Tokens.read(Path(options.token_file))
    token = options.token if options.token is not None else os.environ.get("CIPHERLM_TOKEN")
    if token is None or (options.token is None and not token):
        return Tokens()
    return Tokens([(DEFAULT_OWNER, token)])


def data_directory(given: str | None) -> Path:
    """Return where clients' keys are kept."""
    if given is not None:
        return Path(given)
    import platformdirs

    return Path(os.environ.get("CIPHERLM_HOME") or platformdirs.user_data_dir("cipherlm")) / "server"


def limits_of(options: argparse.Namespace, *, linear: bool = False) -> "Limits":
    """Return the limits that the options set."""
    from cipherlm.serving.service import LINEAR_LIMITS, Limits

    defaults = LINEAR_LIMITS if linear else Limits()
    return Limits(
        workers=options.workers,
        queue=options.queue or defaults.queue,
        sessions=options.max_sessions or defaults.sessions,
        sessions_per_owner=options.max_sessions_per_owner,
        connections=options.max_connections,
        max_tokens=options.max_tokens,
        idle_seconds=options.idle_seconds,
        keys_seconds=options.keys_seconds,
        reply_seconds=options.reply_seconds,
        evaluation_seconds=options.evaluation_seconds,
        evaluations_per_hour=options.evaluations_per_hour,
        grace_seconds=options.grace_seconds,
    )
