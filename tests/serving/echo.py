"""A server whose modules are easy to foretell, in this process or, to be killed, in another one.

``python -m tests.serving.echo DIRECTORY PORT`` serves until it is killed.
"""

import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from cipherlm.errors import Refused
from cipherlm.serving.auth import Tokens
from cipherlm.serving.computation import Exchange, Report
from cipherlm.serving.keys import KeyStore
from cipherlm.serving.run import Server, create_server, running
from cipherlm.serving.service import Limits, Service

FINGERPRINT = "f1" * 32


class EchoModel:
    def __init__(self, fingerprint: str = FINGERPRINT) -> None:
        self.description: dict[str, Any] = {
            "scheme": "echo",
            "name": "echo",
            "modules": ["echo", "remember", "stall", "dawdle", "refuse"],
            "parameters": {"size": 1},
            "fingerprint": fingerprint,
            "keys": {"evaluation": 1 << 26, "public": 1 << 20},
            "max_tokens": 16,
            "message_bytes": 1 << 22,
        }
        self.release = threading.Event()
        """Ends what dawdles."""
        self.cancelled = threading.Event()
        self.releases = 0

    def open(self, keys: Mapping[str, Path]) -> "Echo":
        if keys["public"].read_bytes() == b"damaged":
            raise Refused("these keys are damaged")
        return Echo(self)


class Echo:
    def __init__(self, model: EchoModel) -> None:
        self._model = model
        self._remembered: list[bytes] = []

    def evaluate(
        self, module: str, start: int, count: int, inputs: Sequence[bytes], exchange: Exchange, report: Report
    ) -> list[bytes]:
        if module == "refuse":
            raise Refused("inputs that\nno module takes")
        if module == "remember":
            self._remembered += inputs
            return list(self._remembered)
        try:
            while module == "stall":
                report(1, 2)
                time.sleep(0.01)
            if module == "dawdle":
                report(0, 1)
            while module == "dawdle" and not self._model.release.is_set():
                time.sleep(0.01)
            replies = []
            for k in range(count):
                report(k + 1, count)
                replies.append(exchange(b"round %d" % k))
            return [data[::-1] for data in inputs] + replies
        except BaseException:
            self._model.cancelled.set()
            raise

    def release_keys(self) -> None:
        self._model.releases += 1

    def close(self) -> None:
        pass


def echo_server(
    directory: Path, port: int = 0, model: EchoModel | None = None, **options: Any
) -> AbstractContextManager[str]:
    """Serve in a thread; the context's value is the URL."""
    return running(_server(directory, port, model or EchoModel(), **options))


def _server(
    directory: Path,
    port: int,
    model: EchoModel,
    tokens: Tokens | None = None,
    limits: Limits | None = None,
    **options: Any,
) -> Server:
    keys = KeyStore(directory, model.description["keys"], 1 << 28)
    return create_server(Service(model, keys, tokens, limits), port=port, **options)


if __name__ == "__main__":
    _server(Path(sys.argv[1]), int(sys.argv[2]), EchoModel()).run()
