"""Sessions on the machines of a Ray cluster, behind the same server.

The server's process keeps connections, keys on disk and the queue; it needs not even the model. Each worker,
an actor of Ray, has loaded the server's bundle and holds sessions: each is on one worker until it ends.

The server drives an evaluation: every call returns the next thing that happens (:class:`Event`), and the
client's answer to a refresh is an argument of the next call. So nothing has to reach the server from outside,
and a call to a worker that dies fails. What crosses is numbers, texts of ours and bytes, never an object that
a client had a hand in.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import secrets
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from cipherlm import __version__
from cipherlm.engine import set_threads
from cipherlm.errors import Refused
from cipherlm.serving.computation import (
    Cancelled,
    Computation,
    Exchange,
    HostedModel,
    Report,
    WorkerBroke,
    WorkerLost,
)
from cipherlm.serving.logs import log, log_exception, log_to

try:
    import ray
    from ray.exceptions import GetTimeoutError, RayError, RayTaskError
except ImportError as error:
    raise ImportError('Ray is not installed: pip install "cipherlm[ray]"', name="ray") from error

CHUNK_BYTES = 8 << 20
"""Keys go to a worker in pieces: neither the server nor Ray's object store ever has a whole one."""

START_SECONDS = 600.0
"""For the workers to find their cores and to load the model."""

_CONNECT_SECONDS = 10.0

_REST_SECONDS = 15.0
"""A worker that has just been lost comes last for so long: Ray starts it again and it loads the model."""


class ClusterError(RuntimeError):
    """A cluster that cannot be reached, is too small, or cannot load the model."""


class Event(NamedTuple):
    """What happens in a worker. ``kind`` says which of the other fields mean something."""

    kind: str
    """``progress``, ``refresh``; at the end ``result``, ``refused``, ``cancelled``, ``broke`` or ``lost``."""
    blobs: Sequence[bytes] = ()
    text: str = ""
    done: int = 0
    total: int = 0


_GOES_ON = ("progress", "refresh")


class RayHostedModel:
    """A model on the workers of a cluster; see ``HostedModel``.

    ``load`` is called on every worker, each of which has ``threads`` cores to itself: use
    :func:`cores_per_worker`. It must find the same files everywhere. The caller has called ``ray.init``.
    Raises :class:`ClusterError` if not all of the workers start within ``seconds`` or they differ.
    """

    def __init__(
        self,
        load: Callable[[], HostedModel],
        workers: int,
        threads: int = 1,
        *,
        seconds: float = START_SECONDS,
    ) -> None:
        # Calls in flight fail with their worker: an evaluation cannot be repeated without its client.
        actor = ray.remote(Worker).options(
            num_cpus=threads, max_restarts=-1, max_task_retries=0, scheduling_strategy="SPREAD"
        )
        self._workers = [Place(actor.remote(load, threads), index) for index in range(workers)]
        self._lock = threading.Lock()
        try:
            self._description = described(self._workers, seconds)
        except BaseException:
            self.close()
            raise

    @property
    def description(self) -> dict[str, Any]:
        """What clients may know, as JSON: see ``HostedModel.description``."""
        return dict(self._description)

    def open(self, keys: Mapping[str, Path]) -> RayComputation:
        """Start a session on the worker that has the fewest, and bring the keys there.

        Raises ``Refused`` for keys that are refused, and :class:`WorkerLost` if there is no worker.
        """
        left = list(self._workers)
        while left:
            place = self._reserve(left)
            left.remove(place)
            computation = RayComputation(place, self._vacate)
            try:
                computation.open(keys, self._description["fingerprint"])
            except WorkerLost:
                computation.close()
            except BaseException:
                computation.close()
                raise
            else:
                return computation
        raise WorkerLost("no worker of the cluster can take a session now")

    def close(self) -> None:
        """End the workers."""
        for place in self._workers:
            ray.kill(place.actor)

    def _reserve(self, among: Sequence[Place]) -> Place:
        with self._lock:
            now = time.monotonic()
            place = min(among, key=lambda place: (place.rests_until > now, place.sessions))
            place.sessions += 1
            return place

    def _vacate(self, place: Place) -> None:
        with self._lock:
            place.sessions -= 1


def described(workers: Sequence[Place], seconds: float) -> dict[str, Any]:
    """Return what all workers say of their model. Raises :class:`ClusterError` unless they all do, alike."""
    asked = [place.actor.describe.remote() for place in workers]
    try:
        answers: list[dict[str, Any]] = ray.get(asked, timeout=seconds)
    except GetTimeoutError:
        raise ClusterError(
            f"not all {len(asked)} workers started within {seconds:.0f} s: are their cores free?"
        ) from None
    except RayError as error:
        why = str(error).strip().splitlines()[-1].strip()
        raise ClusterError(f"a worker did not start: {why}") from error
    for answer in answers:
        if answer["version"] != __version__:
            raise ClusterError(f"{answer['host']} has CipherLM {answer['version']}, not {__version__}")
        if "fault" in answer:
            raise ClusterError(f"{answer['host']}: {answer['fault']}")
        if answer["description"] != answers[0]["description"]:
            raise ClusterError(f"{answer['host']} and {answers[0]['host']} have different models there")
    log("workers started", workers=len(answers), hosts=sorted({answer["host"] for answer in answers}))
    description: dict[str, Any] = answers[0]["description"]
    return description


class RayComputation:
    """One session, as the server's process sees it: see ``Computation``."""

    def __init__(self, place: Place, vacate: Callable[[Place], None]) -> None:
        self._id = secrets.token_hex(8)
        self._place = place
        self._vacate: Callable[[Place], None] | None = vacate

    def open(self, keys: Mapping[str, Path], fingerprint: str) -> None:
        """Bring the keys to the worker and open them there."""
        for kind, path in keys.items():
            with path.open("rb") as file:
                offset = 0
                while chunk := file.read(CHUNK_BYTES):
                    self._check(self._call("receive", kind, offset, chunk))
                    offset += len(chunk)
        self._check(self._call("open", list(keys), fingerprint))

    def evaluate(
        self, module: str, start: int, count: int, inputs: Sequence[bytes], exchange: Exchange, report: Report
    ) -> list[bytes]:
        """See ``Computation.evaluate``. Raises :class:`WorkerLost` if the worker dies."""
        event = self._call("evaluate", module, start, count, list(inputs))
        while event.kind in _GOES_ON:
            reply = None
            try:
                if event.kind == "refresh":
                    reply = exchange(event.blobs[0])
                else:
                    report(event.done, event.total)
            except BaseException:
                with suppress(WorkerLost):
                    self._call("cancel")
                raise
            event = self._call("go_on", reply)
        return list(self._check(event).blobs)

    def release_keys(self) -> None:
        """Keep the keys: the worker has no file from which to read them again."""

    def close(self) -> None:
        """Let go of the keys and of what is remembered, on the worker."""
        vacate, self._vacate = self._vacate, None
        if vacate is not None:
            vacate(self._place)
            self._place.close(self._id)

    def _call(self, method: str, *arguments: Any) -> Event:
        return self._place.call(method, self._id, *arguments)

    def _check(self, event: Event) -> Event:
        if event.kind == "refused":
            raise Refused(event.text)
        if event.kind == "cancelled":
            raise Cancelled
        if event.kind == "lost":  # the worker has been started again since
            raise WorkerLost("the machine that computed for this session has lost it")
        if event.kind == "broke":
            raise WorkerBroke(event.text)
        return event


class Worker:
    """What runs on a machine of the cluster: a model, its sessions, one computing at a time."""

    def __init__(self, load: Callable[[], HostedModel], threads: int) -> None:
        log_to()
        set_threads(threads)
        self._computing = threading.Lock()
        self._uploads: dict[str, Path] = {}
        self._sessions: dict[str, Computation] = {}
        self._evaluations: dict[str, _Evaluation] = {}
        self._fault = ""
        try:
            self._model = load()
        except (ValueError, OSError) as error:
            self._fault = str(error)

    async def describe(self) -> dict[str, Any]:
        """Return the model's description or why it could not be loaded, where, and with which version."""
        about = {"version": __version__, "host": socket.gethostname(), "process": os.getpid()}
        if self._fault:
            return {**about, "fault": self._fault}
        return {**about, "description": self._model.description}

    async def receive(self, session: str, kind: str, offset: int, chunk: bytes) -> Event:
        """Take a piece of a key."""
        if session not in self._uploads:
            self._uploads[session] = Path(tempfile.mkdtemp(prefix="cipherlm-keys-"))
        written = await asyncio.to_thread(_append, self._uploads[session] / kind, offset, chunk)
        return Event("received" if written else "lost")

    async def open(self, session: str, kinds: Sequence[str], fingerprint: str) -> Event:
        """Open the keys that have arrived. Their files are not needed any more then."""
        directory = self._uploads.get(session)
        if self._fault or self._model.description["fingerprint"] != fingerprint or directory is None:
            return Event("lost")
        paths = {kind: directory / kind for kind in kinds}
        if not all(path.is_file() for path in paths.values()):
            return Event("lost")
        try:
            self._sessions[session] = await asyncio.to_thread(self._model.open, paths)
        except Refused as error:
            return Event("refused", text=str(error))
        except Exception as error:
            reference = log_exception("keys could not be opened", error, session=session)
            return Event("broke", text=reference)
        finally:
            await self._discard(session)
        return Event("opened")

    async def evaluate(
        self, session: str, module: str, start: int, count: int, inputs: Sequence[bytes]
    ) -> Event:
        """Begin an evaluation; return its first event."""
        if session not in self._sessions:
            return Event("lost")
        evaluation = _Evaluation(self._computing)
        self._evaluations[session] = evaluation
        evaluation.start(self._sessions[session], module, start, count, inputs)
        return await evaluation.events.get()

    async def go_on(self, session: str, reply: bytes | None) -> Event:
        """Hand in the answer, if the last event was a request to refresh; return the next event."""
        if session not in self._evaluations:
            return Event("lost")
        evaluation = self._evaluations[session]
        if reply is not None:
            evaluation.replies.put(reply)
        return await evaluation.events.get()

    async def cancel(self, session: str) -> Event:
        """Cancel an evaluation whose last event is not there yet; return that."""
        if session not in self._evaluations:
            return Event("lost")
        evaluation = self._evaluations[session]
        evaluation.cancel()
        while (event := await evaluation.events.get()).kind in _GOES_ON:
            pass
        return event

    async def close(self, session: str) -> Event:
        """Let go of a session, of however much of one there is."""
        if (evaluation := self._evaluations.pop(session, None)) is not None:
            evaluation.cancel()
            await asyncio.to_thread(evaluation.ended.wait)
        if (computation := self._sessions.pop(session, None)) is not None:
            await asyncio.to_thread(computation.close)
        await self._discard(session)
        return Event("closed")

    async def _discard(self, session: str) -> None:
        if (directory := self._uploads.pop(session, None)) is not None:
            await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)


class Place:
    """A worker, as the server's process sees it."""

    def __init__(self, actor: Any, index: int) -> None:
        self.actor = actor
        self.index = index
        self.sessions = 0
        self.rests_until = 0.0
        self._lock = threading.Lock()
        self._unclosed: list[str] = []
        """Sessions that have ended while the worker could not be told."""

    def call(self, method: str, session: str, *arguments: Any) -> Event:
        """Call the worker. Raises :class:`WorkerLost`."""
        try:
            event: Event = ray.get(getattr(self.actor, method).remote(session, *arguments))
        except RayTaskError:
            # Ray makes it an instance of the worker's exception too: of a ValueError for the client, even.
            raise RuntimeError("a worker broke") from None
        except RayError as error:
            self.rests_until = time.monotonic() + _REST_SECONDS
            log("worker lost", worker=self.index, session=session, error=type(error).__name__)
            raise WorkerLost("the machine that computed for this session is gone") from None
        return event

    def close(self, session: str) -> None:
        """End a session, and those that could not be told before: a worker may have been away, not dead."""
        with self._lock:
            ended, self._unclosed = [*self._unclosed, session], []
        try:
            while ended:
                self.call("close", ended[-1])
                ended.pop()
        except WorkerLost:
            with self._lock:
                self._unclosed += ended


class _Evaluation:
    """One evaluation in a worker: a thread that computes, and what it and the actor's loop tell."""

    def __init__(self, computing: threading.Lock) -> None:
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.replies: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.ended = threading.Event()
        self._cancelled = False
        self._computing = computing
        self._loop = asyncio.get_running_loop()

    def start(self, *arguments: Any) -> None:
        threading.Thread(target=self._run, args=arguments, name="evaluation", daemon=True).start()

    def cancel(self) -> None:
        self._cancelled = True
        self.replies.put(None)

    def _run(
        self, computation: Computation, module: str, start: int, count: int, inputs: Sequence[bytes]
    ) -> None:
        event = Event("broke")
        try:
            with self._computing:
                self._look_up()
                results = computation.evaluate(module, start, count, inputs, self._exchange, self._report)
            event = Event("result", results)
        except Cancelled:
            event = Event("cancelled")
        except Refused as error:
            event = Event("refused", text=str(error))
        except Exception as error:
            event = Event("broke", text=log_exception("evaluation broke", error))
        finally:
            self.ended.set()
            self._tell(event)

    def _exchange(self, request: bytes) -> bytes:
        self._look_up()
        self._tell(Event("refresh", [request]))
        with _released(self._computing):
            reply = self.replies.get()
        if reply is None:
            raise Cancelled
        return reply

    def _report(self, done: int, total: int) -> None:
        self._look_up()
        self._tell(Event("progress", done=done, total=total))

    def _look_up(self) -> None:
        if self._cancelled:
            raise Cancelled

    def _tell(self, event: Event) -> None:
        self._loop.call_soon_threadsafe(self.events.put_nowait, event)


def connect(address: str) -> None:
    """Connect to a cluster: ``host:port``, ``auto`` for this machine's, ``local`` for one of our own.

    Raises :class:`ClusterError` if it is not there.
    """
    host, colon, port = address.rpartition(":")
    try:
        if colon and port.isdecimal():
            # Ray itself tries for a minute and then ends the process.
            socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    except (RayError, RuntimeError, OSError, ValueError) as error:
        raise ClusterError(f"there is no Ray cluster to connect to at {address}: {error}") from error


def cluster_cores() -> list[int]:
    """Return the number of cores of each machine in the cluster that has any."""
    nodes: Any = ray.nodes  # it has no types
    machines = [node["Resources"].get("CPU", 0) for node in nodes() if node["Alive"]]
    return [int(cores) for cores in machines if cores >= 1]


def cores_per_worker(machines: Sequence[int], workers: int) -> int:
    """Return the most cores that each of ``workers`` can have on machines with so many cores.

    Raises :class:`ClusterError` if there is not one for each.
    """
    for cores in range(max(machines, default=0), 0, -1):
        if sum(own // cores for own in machines) >= workers:
            return cores
    raise ClusterError(f"the cluster has {sum(machines)} cores, fewer than {workers} workers need")


def _append(path: Path, offset: int, chunk: bytes) -> bool:
    """Write a piece of a file unless those before it are not there: a worker that was started again."""
    with path.open("ab") as file:
        if file.tell() != offset:
            return False
        file.write(chunk)
    return True


@contextmanager
def _released(lock: threading.Lock) -> Iterator[None]:
    lock.release()
    try:
        yield
    finally:
        lock.acquire()
