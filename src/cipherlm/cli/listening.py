"""The address that a verb listens on."""

import argparse
import socket
from pathlib import Path

from cipherlm.cli import CommandError, UsageError
from cipherlm.cli.common import existing_file


def port_argument(text: str) -> int:
    """Return a port number, or 0."""
    try:
        port = int(text)
    except ValueError:
        port = -1
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, 0 to 65535")
    return port


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens. Raises ``CommandError`` if the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise CommandError(
            f"cannot listen on {host}, port {port}: {error.strerror}; --port N takes another"
        ) from None


def add_tls_options(group: argparse._ActionsContainer) -> None:
    """Add what TLS needs."""
    group.add_argument("--certfile", metavar="FILE", help="certificate chain for TLS, as PEM")
    group.add_argument("--keyfile", metavar="FILE", help="the certificate's key, as PEM")


def tls_files(options: argparse.Namespace, insecure_flag: str) -> tuple[Path | None, Path | None]:
    """Return the certificate and its key, if they are given.

    Raises ``UsageError`` for one without the other, and for none on an address that other machines reach,
    unless the option ``insecure_flag`` allows that.
    """
    from cipherlm.serving.auth import is_loopback

    if (options.certfile is None) != (options.keyfile is None):
        raise UsageError("--certfile and --keyfile belong together")
    insecure = getattr(options, insecure_flag.removeprefix("--").replace("-", "_"))
    if options.certfile is None and not is_loopback(options.host) and not insecure:
        raise UsageError(
            f"{options.host} can be reached from other machines, and without TLS anybody on the way can read "
            f"tokens and answer in this machine's name: give --certfile and --keyfile, or add {insecure_flag}"
        )
    return existing_file(options.certfile), existing_file(options.keyfile)
