"""What all sessions of a server share, and what it allows them."""

import asyncio
import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cipherlm.serving import protocol
from cipherlm.serving.auth import Tokens
from cipherlm.serving.computation import HostedModel, HostedProducts
from cipherlm.serving.failures import Failure
from cipherlm.serving.fairness import may_have_another
from cipherlm.serving.keys import KeyStore
from cipherlm.serving.logs import log
from cipherlm.serving.metrics import Metrics
from cipherlm.serving.rate import HourlyBudget
from cipherlm.serving.scheduler import Scheduler

if TYPE_CHECKING:
    from cipherlm.serving.conversation import Conversation

FAREWELL_SECONDS = 5.0
"""For a client to take the server's last words."""
_LOADS_AT_ONCE = 2
_UPLOADS_AT_ONCE = 16
"""Chunks that are in memory at a time."""
_UNOPENED_SESSIONS = 4
"""WebSockets of one owner beyond those that can be sessions: what is being opened or closed."""


@dataclass(frozen=True)
class Limits:
    """What clients may ask of a server. Times are in seconds."""

    workers: int = 1
    """Evaluations that compute at once; one uses all cores."""
    queue: int = 32
    """Evaluations that wait."""
    sessions: int = 8
    """Sessions at once: each holds what it remembers in memory, and keys while it is not idle."""
    sessions_per_owner: int | None = None
    """Of one owner. Unless given, those that the others can do without: each can count on an equal share."""
    connections: int = 128
    """Connections of all kinds at once."""
    max_tokens: int | None = None
    """Greatest length of a text, if less than the model's."""
    head_seconds: float = 10
    """From a connection to the head of its request, and from a WebSocket to its "open"."""
    upload_seconds: float = 120
    """For one chunk of a key to arrive."""
    upload_idle_seconds: float = 10
    """From one piece of a chunk to the next: who sends nothing holds no place."""
    idle_seconds: float = 900
    """From one evaluation to the next."""
    keys_seconds: float = 60
    """From an evaluation until its session's keys leave the memory; the next reads them again."""
    reply_seconds: float = 120
    """For the answer to a refresh, and for taking a message."""
    evaluation_seconds: float = 3600
    """For one evaluation, with its wait in the queue."""
    evaluations_per_hour: int = 10_000
    """Of the whole model, for one owner, in any hour: that of one of n remote modules counts as 1/n."""
    grace_seconds: float = 30
    """For what runs when the server is told to end."""


LINEAR_LIMITS = Limits(queue=64, sessions=64)
"""Defaults for linear layers, whose keys are small.

A session has one product in the queue at a time, so that all sessions have a place there.
"""


class Service:
    """A model, its clients' keys, who may use them, and who does. Belongs to the loop that serves.

    ``keys`` is None for a model whose keys come with each connection.
    """

    def __init__(
        self,
        model: HostedModel | HostedProducts,
        keys: KeyStore | None,
        tokens: Tokens | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.model = model
        self.keys = keys
        self.tokens = tokens or Tokens()
        self.limits = limits or Limits()
        self.description = dict(model.description)
        if "max_tokens" in self.description:
            most = self.description["max_tokens"]
            self.description["max_tokens"] = min(self.limits.max_tokens or most, most)
        self.owners = max(1, len(self.tokens.owners))
        self.scheduler = Scheduler(self.limits.workers, self.limits.queue, self.owners)
        # In evaluations of one module, of which a token takes one each.
        self.budget = HourlyBudget(
            self.limits.evaluations_per_hour * max(1, len(self.description["modules"]))
        )
        self.loading = asyncio.Semaphore(_LOADS_AT_ONCE)
        self.draining = False
        self.conversations: set[Conversation] = set()
        self._admitted: Counter[str] = Counter()
        self._uploading: Counter[str] = Counter()
        self._reading: set[asyncio.Task[bytes]] = set()
        self.metrics = Metrics()
        self.metrics.sessions.set_function(lambda: self.sessions)
        self.metrics.waiting.set_function(lambda: self.scheduler.waiting)
        self.metrics.running.set_function(lambda: self.scheduler.running)
        self.metrics.key_bytes.set_function(lambda: self.keys.size if self.keys is not None else 0)

    @property
    def sessions(self) -> int:
        """How many sessions hold keys in memory."""
        return self._admitted.total()

    def admit(self, owner: str) -> None:
        """Count a session in. Raises :class:`Failure` if there are as many as may be."""
        if self.draining:
            raise shutting_down()
        if self.sessions >= self.limits.sessions:
            raise Failure(protocol.BUSY, "the server has all the sessions that it can hold", retry=True)
        most = self.limits.sessions_per_owner
        if most is None:
            admitted = may_have_another(self._admitted, owner, self.limits.sessions, self.owners)
        else:
            admitted = self._admitted[owner] < most
        if not admitted:
            raise Failure(
                protocol.BUSY, "you have all the sessions that you may have: close one first", retry=True
            )
        self._admitted[owner] += 1

    def dismiss(self, owner: str) -> None:
        """Count a session out."""
        self._admitted -= Counter([owner])

    def greet(self, owner: str) -> None:
        """Check whether an owner may have one more connection for a session. Raises :class:`Failure`."""
        if self.draining:
            raise shutting_down()
        self.check_budget(owner)
        there = sum(session.owner == owner for session in self.conversations)
        if there >= self.limits.sessions + _UNOPENED_SESSIONS:
            raise Failure(protocol.BUSY, "you have too many connections that are no session", retry=True)

    def check_budget(self, owner: str) -> None:
        """Raise :class:`Failure` where an owner has had the evaluations that it may have in an hour."""
        seconds = math.ceil(self.budget.wait(owner))
        if seconds:
            raise Failure(
                protocol.RATE_LIMITED,
                f"you have had {self.limits.evaluations_per_hour} evaluations of the model within an hour, "
                f"as many as you may here: try again in {seconds} s",
                retry=True,
                retry_after=seconds,
            )

    @contextmanager
    def uploading(self, owner: str) -> Iterator[None]:
        """Take a place for a chunk. Raises :class:`Failure` where there is none for this owner now."""
        if not may_have_another(self._uploading, owner, _UPLOADS_AT_ONCE, self.owners):
            raise Failure(protocol.BUSY, "too many chunks arrive at once: send this one again", retry=True)
        self._uploading[owner] += 1
        try:
            yield
        finally:
            self._uploading -= Counter([owner])

    @contextmanager
    def reading(self, task: "asyncio.Task[bytes]") -> Iterator["asyncio.Task[bytes]"]:
        """Let a task read a body in the block; it is cancelled at the end of that, and of the server."""
        self._reading.add(task)
        if self.draining:
            task.cancel()
        try:
            yield task
        finally:
            self._reading.discard(task)
            task.cancel()

    async def drain(self) -> None:
        """End all sessions: idle ones now, others when they have evaluated or the grace time is over.

        What uploads ends now too: it goes on where it is when the server is back.
        """
        self.draining = True
        for task in self._reading:
            task.cancel()
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
