"""The address that a verb listens on."""

import argparse
import socket

from cipherlm.cli import CommandError


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
