"""Write a web page where people use an encrypted model on a server, with their keys in the browser.

The page is static files for any web server. Whoever serves it could change it, and read what is typed: serve
it from where those who use it have reason to trust, not from the server with the model, and publish the
digest that is printed. The server has to let the page in: `cipherlm serve --allow-origin ORIGIN`.
"""

import argparse
import json
from pathlib import Path

from cipherlm.cli import UsageError

EXAMPLES = """\
examples:
  cipherlm page tiny-bundle/client page --server https://llm.example.org:8470
  cipherlm page tiny-bundle/client page --server http://127.0.0.1:8470
  python -m http.server --directory page 8000 --bind 127.0.0.1

then, at the server:
  cipherlm serve tiny-bundle/server --allow-origin http://127.0.0.1:8000
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("bundle", metavar="CLIENT_BUNDLE", help="the client's bundle of the model")
    parser.add_argument("out", metavar="OUT", help="new directory for the page")
    parser.add_argument(
        "--server",
        action="append",
        default=[],
        metavar="URL",
        help="a server with the model; may be repeated: people choose, and the page cannot talk to any other",
    )
    parser.add_argument(
        "--any-server",
        action="store_true",
        help="let people type the address of another server: the page may then talk to every server",
    )
    parser.add_argument("--json", action="store_true", help="write one JSON object")


def run(options: argparse.Namespace) -> None:
    """Write a page."""
    if not options.server and not options.any_server:
        raise UsageError("name the server with the model: --server URL, or --any-server")
    from cipherlm.serving.bundle import Bundle
    from cipherlm.serving.page import INDEX_NAME, compose

    out = Path(options.out)
    page = compose(Bundle.load(options.bundle, "client"), options.server, any_server=options.any_server)
    page.write(out)
    if options.json:
        print(json.dumps({"page": str(out), "sha256": page.digest, "policy": page.policy}))
        return
    print(f"page      {out}")
    print(f"SHA-256   {page.digest}  {INDEX_NAME}")
    print("          publish it: it stands for every file of the page")
    print(f"headers   Content-Security-Policy: {page.policy}")
