"""What a client raises when something is wrong with a server or with the way to it.

Texts name what was being done and what to do now. None holds a token, a key or a ciphertext.
"""


class RemoteError(RuntimeError):
    """Base of all of them."""


class ConnectionFailed(RemoteError):  # noqa: N818 - says what happened
    """The server cannot be reached, is not trusted, or is none of CipherLM's."""


class InsecureConnection(ConnectionFailed):
    """The server would be another machine without TLS, or an unverified one given a token.

    Nothing was sent.
    """


class TimedOut(ConnectionFailed):
    """The server did not answer in time."""


class SessionLost(RemoteError):  # noqa: N818
    """The session is gone, and with it what the server remembered of earlier tokens.

    Open it again and evaluate from the first token on.
    """


class WrongModel(RemoteError):  # noqa: N818
    """The server hosts another model than the one that is expected."""


class ServerError(RemoteError):
    """The server refused or failed.

    ``code`` is one of those in :mod:`cipherlm.serving.protocol`, ``retry`` whether the same may work later,
    ``status`` the HTTP status, if there is one, and ``retry_after`` when, in seconds, if the server knows.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        retry: bool = False,
        status: int | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.retry = retry
        self.status = status
        self.retry_after = retry_after
