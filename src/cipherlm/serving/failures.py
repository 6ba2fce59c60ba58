"""What a client is told when something does not work."""

from typing import Any


class Failure(Exception):  # noqa: N818 - the client's more often than ours
    """A code of the protocol, one line for the person at the client, and whether trying again may help.

    ``details`` go into an HTTP answer beside the error.
    """

    def __init__(self, code: str, message: str, *, retry: bool = False, **details: Any) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry = retry
        self.details = details
