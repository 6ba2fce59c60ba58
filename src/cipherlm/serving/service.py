"""What all sessions of a server share, and what it allows them."""

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cipherlm.serving import protocol
from cipherlm.serving.auth import Tokens
from cipherlm.serving.computation import HostedModel
from cipherlm.serving.failures import Failure
from cipherlm.serving.keys import KeyStore
from cipherlm.serving.logs import log
from cipherlm.serving.metrics import Metrics
from cipherlm.serving.scheduler import Scheduler

if TYPE_CHECKING:
    from cipherlm.serving.sessions import Session

FAREWELL_SECONDS = 5.0
"""For a client to take the server's last words."""
_LOADS_AT_ONCE = 2


@dataclass(frozen=True)
class Limits:
    """What clients may ask of a server. Times are in seconds."""

    workers: int = 1
    """Evaluations that compute at once; one uses all cores."""
    queue: int = 32
    """Evaluations that wait."""
    sessions: int = 8
    """Sessions at once: each holds its keys and what it remembers in memory."""
    sessions_per_owner: int | None = None
    """Of one owner; as many as there may be, unless given."""
    connections: int = 128
    """Connections of all kinds at once."""
    max_tokens: int | None = None
    """Greatest length of a text, if less than the model's."""
    head_seconds: float = 10
    """From a connection to the head of its request, and from a WebSocket to its "open"."""
    upload_seconds: float = 120
    """For one chunk of a key to arrive."""
    idle_seconds: float = 900
    """From one evaluation to the next."""
    reply_seconds: float = 120
    """For the answer to a refresh, and for taking a message."""
    evaluation_seconds: float = 3600
    """For one evaluation, with its wait in the queue."""
    grace_seconds: float = 30
    """For what runs when the server is told to end."""


class Service:
    """A model, its clients' keys, who may use them, and who does. Belongs to the loop that serves."""

    def __init__(
        self, model: HostedModel, keys: KeyStore, tokens: Tokens | None = None, limits: Limits | None = None
    ) -> None:
        self.model = model
        self.keys = keys
        self.tokens = tokens or Tokens()
        self.limits = limits or Limits()
        self.description = dict(model.description)
        self.description["max_tokens"] = min(
            self.limits.max_tokens or self.description["max_tokens"], self.description["max_tokens"]
        )
        self.scheduler = Scheduler(self.limits.workers, self.limits.queue)
        self.loading = asyncio.Semaphore(_LOADS_AT_ONCE)
        self.draining = False
        self.conversations: set[Session] = set()
        self._admitted: list[str] = []
        self.metrics = Metrics()
        self.metrics.sessions.set_function(lambda: len(self._admitted))
        self.metrics.waiting.set_function(lambda: self.scheduler.waiting)
        self.metrics.running.set_function(lambda: self.scheduler.running)
        self.metrics.key_bytes.set_function(lambda: self.keys.size)

    @property
    def sessions(self) -> int:
        """How many sessions hold keys in memory."""
        return len(self._admitted)

    def admit(self, owner: str) -> None:
        """Count a session in. Raises :class:`Failure` if there are as many as may be."""
        if self.draining:
            raise shutting_down()
        if len(self._admitted) >= self.limits.sessions:
            raise Failure(protocol.BUSY, "the server has all the sessions that it can hold", retry=True)
        if self._admitted.count(owner) >= (self.limits.sessions_per_owner or self.limits.sessions):
            raise Failure(protocol.BUSY, "you have all the sessions that you may have", retry=True)
        self._admitted.append(owner)

    def dismiss(self, owner: str) -> None:
        """Count a session out."""
        self._admitted.remove(owner)

    async def drain(self) -> None:
        """End all sessions: idle ones now, others when they have evaluated or the grace time is over."""
        self.draining = True
        log("shutting down", sessions=self.sessions, grace_seconds=self.limits.grace_seconds)
        for at_once, seconds in ((False, self.limits.grace_seconds), (True, FAREWELL_SECONDS)):
            for session in list(self.conversations):
                session.end(at_once=at_once)
            deadline = time.monotonic() + seconds
            while self.conversations and time.monotonic() < deadline:
                await asyncio.sleep(0.02)


def shutting_down() -> Failure:
    """Return what clients hear of a server that ends."""
    return Failure(protocol.SHUTTING_DOWN, "the server is shutting down", retry=True)
