"""What a client is told when something does not work."""

from typing import Any

from cipherlm.serving import protocol


class Failure(Exception):  # noqa: N818 - the client's more often than ours
    """A code of the protocol, one line for the person at the client, and whether trying again may help.

    ``retry_after`` is when, in seconds. ``details`` go into an HTTP answer beside the error.
    """

    def __init__(
        self, code: str, message: str, *, retry: bool = False, retry_after: int | None = None, **details: Any
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry = retry
        self.retry_after = retry_after
        self.details = details


def broken(what: str, reference: str) -> Failure:
    """Return what a client is told of a fault of ours: a fixed text, and where the log has more."""
    return Failure(protocol.INTERNAL, f"{what}: its log has more under the reference {reference}")
