"""What the transport knows about encryption: bytes in, bytes out, and questions to the client on the way."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

Exchange = Callable[[bytes], bytes]
"""Sends a refresh request to the client and returns its reply. Blocks; raises :class:`Cancelled`."""

Report = Callable[[int, int], None]
"""Says that block k of n is done. Raises :class:`Cancelled` when nobody waits for the rest."""


class Cancelled(Exception):  # noqa: N818 - not an error of anyone's
    """The client has gone, has changed its mind or was too slow: let go of everything and pass this on."""


class WorkerLost(Exception):  # noqa: N818 - nobody's error
    """The machine that computes for a session is gone, with what it remembered; another one may take over.

    The client has to begin anew: open a session, evaluate from the first token on.
    """


class WorkerBroke(RuntimeError):  # noqa: N818 - says what happened
    """A fault on the machine that computes for a session; its log has it under ``reference``."""

    def __init__(self, reference: str) -> None:
        super().__init__(f"a computation broke: its worker's log has it under {reference}")
        self.reference = reference


class Computation(Protocol):
    """What is evaluated for one session: a model with one client's keys, and what it remembers (KV cache).

    One thread at a time uses it, not always the same one.
    """

    def evaluate(
        self, module: str, start: int, count: int, inputs: Sequence[bytes], exchange: Exchange, report: Report
    ) -> list[bytes]:
        """Evaluate a remote module on the ciphertexts of ``count`` tokens, from position ``start`` on.

        Calls ``report`` often, so that a client that has gone does not keep the machine busy. Raises
        :class:`~cipherlm.errors.Refused` for what the client got wrong, and :class:`WorkerLost`.
        """

    def release_keys(self) -> None:
        """Drop keys that can be read again for the next evaluation: the session is idle."""

    def close(self) -> None:
        """Let go of the keys and of what is remembered."""


class HostedModel(Protocol):
    """A server bundle, loaded: shared by all sessions, thread-safe."""

    @property
    def description(self) -> dict[str, Any]:
        """What clients may know, as JSON.

        ``{"scheme": "ckks", "name": ..., "modules": [...], "parameters": {...}, "fingerprint": hex,
        "keys": {kind: greatest bytes}, "max_tokens": n, "message_bytes": greatest bytes of blobs in a
        message}``, and of CKKS ``"chunks"``, which go in one evaluation at most.
        """

    def open(self, keys: Mapping[str, Path]) -> Computation:
        """Start a session with a client's keys, by kind.

        Raises :class:`~cipherlm.errors.Refused` for keys that are damaged or another model's, and
        :class:`WorkerLost` where no machine can take the session now.
        """


class Products(Protocol):
    """Products with the weights of linear layers, for one client's keys. Nothing is remembered between them.

    Several threads may use it.
    """

    def multiply(self, group: str, transposed: bool, rows: int, inputs: Sequence[bytes]) -> list[bytes]:
        """Return the ciphertexts of ``rows`` products, row by row, for those of as many inputs.

        Raises :class:`~cipherlm.errors.Refused` for what the client got wrong, and :class:`WorkerLost`.
        """

    def close(self) -> None:
        """Let go of the keys."""


class HostedProducts(Protocol):
    """A server bundle of linear layers, loaded: shared by all connections, thread-safe."""

    @property
    def description(self) -> dict[str, Any]:
        """What clients may know, as JSON.

        ``{"scheme": "ckks", "placement": "linear", "name": ..., "modules": [names of groups], "fingerprint":
        hex, "plan": hex, "keys": {}, "max_rows": n, "key_bytes": n, "message_bytes": n, "max_tokens": n}``
        """

    def connect(self, keys: bytes) -> Products:
        """Take a client's evaluation keys.

        Raises :class:`~cipherlm.errors.Refused` for keys that are damaged or another plan's.
        """


class Evaluator(Protocol):
    """What the client's side of a scheme needs of a connection to a server."""

    def evaluate(
        self,
        module: str,
        start: int,
        count: int,
        inputs: Sequence[bytes],
        refresh: Callable[[bytes], bytes],
        report: Report | None = None,
    ) -> list[bytes]:
        """Have the server evaluate a module; see :meth:`Computation.evaluate`."""

    def reopen(self) -> None:
        """Open a new session with the same keys."""
