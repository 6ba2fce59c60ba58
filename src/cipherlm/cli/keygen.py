"""Make the keys that a model on a server needs, and keep them on this machine.

The secret key stays here, in a directory that only you can read, under a passphrase if you give one. The rest
is what the server computes with; it is uploaded when it is needed and does not lead to the secret key.
"""

import argparse
import os
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

from cipherlm.cli import CommandError, UsageError
from cipherlm.cli.common import add_json_option, human_bytes, print_pairs, quiet_libraries, write_json
from cipherlm.cli.passphrase import add_passphrase_options, read_passphrase
from cipherlm.cli.server_options import add_transport_options
from cipherlm.progress import TerminalProgress

if TYPE_CHECKING:
    from cipherlm.progress import Progress
    from cipherlm.serving.keystore import KeyMaterial, KeySet

EXAMPLES = """\
examples:
  cipherlm keygen --server https://models.example.org:8470 --ask-passphrase
  cipherlm keygen --bundle gpt2.client --name work
  cipherlm keygen --list
  cipherlm keygen --delete work

environment:
  CIPHERLM_HOME   where keys are kept, in its directory keys (default: your data directory)
  CIPHERLM_TOKEN  the server's token, where --token is not given
"""

DEFAULT_NAME = "default"


class Bundles(Protocol):
    """What makes keys: the module ``cipherlm.serving.bundle``."""

    def client_description(self, bundle: str) -> dict[str, Any]:
        """Return the description in a client bundle, a server's ``/v1/model`` in a file."""

    def generate_keys(self, description: Mapping[str, Any], progress: "Progress") -> "KeyMaterial":
        """Make keys of the description's scheme and parameters."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--bundle", metavar="CLIENT_BUNDLE", help="make keys for the model of a client bundle")
    what.add_argument("--server", metavar="URL", help="make keys for the model of a server")
    what.add_argument("--list", action="store_true", help="list the keys on this machine")
    what.add_argument("--delete", metavar="NAME", help="delete keys: what they encrypted is lost then")
    parser.add_argument("--name", metavar="NAME", help=f"name for the keys (default: {DEFAULT_NAME})")
    parser.add_argument("--token", metavar="TOKEN", help="the server's token")
    add_transport_options(parser)
    add_passphrase_options(parser)
    add_json_option(parser)


def run(options: argparse.Namespace) -> None:
    """Make, list or delete keys."""
    making = options.bundle is not None or options.server is not None
    given = {
        "--name": options.name,
        "--passphrase-file": options.passphrase_file,
        "--ask-passphrase": options.ask_passphrase or None,
    }
    for option, value in given.items():
        if value is not None and not making:
            raise UsageError(f"{option} goes with --bundle or --server")
    if options.server is None and (options.token is not None or options.ca or options.insecure_plain_http):
        raise UsageError("--token, --ca and --insecure-plain-http go with --server")
    if options.list:
        _list(as_json=options.json)
    elif options.delete is not None:
        _delete(options.delete, as_json=options.json)
    else:
        _make(options)


def _make(options: argparse.Namespace) -> None:
    from cipherlm.serving import keystore
    from cipherlm.serving.key_lock import making_keys

    name = options.name if options.name is not None else DEFAULT_NAME
    keystore.check_free(None, name)  # before what takes minutes, and before a person types a passphrase
    passphrase = read_passphrase(options, confirm=True)
    progress = TerminalProgress()
    with quiet_libraries():
        bundles = _bundles()
        description = _served(options) if options.server else bundles.client_description(options.bundle)
        with making_keys(progress):
            keystore.check_free(None, name)  # whoever was waited for may have taken it
            with progress("making keys"):
                material = bundles.generate_keys(description, progress)
            with progress("storing keys"):
                keys = keystore.KeySet.create(
                    None, name, description, material.secret, material.public, passphrase
                )
    if options.json:
        write_json(_figures(keys))
        return
    print_pairs(
        [
            ("keys", keys.name),
            ("in", str(keys.directory)),
            ("secret key", "under a passphrase" if keys.has_passphrase else "without a passphrase"),
            *((f"{kind} keys", human_bytes(size)) for kind, size in keys.sizes.items()),
        ]
    )


def _served(options: argparse.Namespace) -> dict[str, Any]:
    from cipherlm.serving.client import Connection

    token = options.token or os.environ.get("CIPHERLM_TOKEN") or None
    with Connection(
        options.server,
        token=token,
        verify=options.ca or True,
        insecure_plain_http=options.insecure_plain_http,
    ) as connection:
        return connection.describe()


def _bundles() -> Bundles:
    return cast(Bundles, import_module("cipherlm.serving.bundle"))


def _list(*, as_json: bool) -> None:
    from cipherlm.serving import keystore

    found = [(name, _loaded(name)) for name in keystore.names()]
    if as_json:
        figures = {
            name: {"error": str(keys)} if isinstance(keys, ValueError) else _figures(keys)
            for name, keys in found
        }
        write_json({"directory": str(keystore.keys_directory()), "keys": figures})
    elif found:
        print_pairs([(name, _summary(keys)) for name, keys in found])
    else:
        print(f"no keys in {keystore.keys_directory()}")


def _loaded(name: str) -> "KeySet | ValueError":
    """Return keys or, so that one damaged set does not hide the others, what is wrong with them."""
    from cipherlm.serving import keystore

    try:
        return keystore.KeySet.load(None, name)
    except keystore.KeyStoreError as error:
        return error


def _summary(keys: "KeySet | ValueError") -> str:
    if isinstance(keys, ValueError):
        return f"unusable: {keys}"
    parts = [
        str(keys.description["scheme"]),
        f"for {keys.description.get('name', 'any model of its parameters')}",
        human_bytes(sum(keys.sizes.values())),
        f"made {keys.created}",
        "with a passphrase" if keys.has_passphrase else "without a passphrase",
    ]
    return ", ".join(parts)


def _figures(keys: "KeySet") -> dict[str, Any]:
    return {
        "name": keys.name,
        "directory": str(keys.directory),
        "scheme": keys.description["scheme"],
        "model": keys.description.get("name"),
        "parameters_fingerprint": keys.parameters_fingerprint,
        "created": keys.created,
        "passphrase": keys.has_passphrase,
        "files": {
            kind: {"size": keys.sizes[kind], "sha256": sha256} for kind, sha256 in keys.fingerprints.items()
        },
    }


def _delete(name: str, *, as_json: bool) -> None:
    from cipherlm.serving import keystore

    try:
        keystore.delete(None, name)
    except OSError as error:
        raise CommandError(f"{error.filename}: {error.strerror}: delete it by hand") from error
    if as_json:
        write_json({"deleted": name})
    else:
        print(f"deleted {name}")
