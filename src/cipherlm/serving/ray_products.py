"""Linear layers on the machines of a Ray cluster, a part on each: a model may outgrow any of them.

Each worker, an actor of Ray, has mapped the server's bundle and reads the matrices of its layers only. A
client's keys go to all workers. Nothing is remembered between products, so a worker that was lost and started
again gets the keys once more, and no client notices.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any

import ray

from cipherlm import __version__
from cipherlm.engine import set_threads
from cipherlm.errors import Refused
from cipherlm.serving.computation import HostedProducts, Products, WorkerBroke, WorkerLost
from cipherlm.serving.logs import log_exception, log_to
from cipherlm.serving.ray_cluster import START_SECONDS, Event, Place, described


class RayHostedProducts:
    """Linear layers on the workers of a cluster, the first of a model on the first; see ``HostedProducts``.

    ``load``, ``workers``, ``threads`` and ``seconds`` are as for
    :class:`~cipherlm.serving.ray_cluster.RayHostedModel`, and so is what is raised.
    """

    def __init__(
        self,
        load: Callable[[], HostedProducts],
        workers: int,
        threads: int = 1,
        *,
        seconds: float = START_SECONDS,
    ) -> None:
        actor = ray.remote(ProductsWorker).options(
            num_cpus=threads, max_restarts=-1, max_task_retries=0, scheduling_strategy="SPREAD"
        )
        self._workers = [Place(actor.remote(load, threads), index) for index in range(workers)]
        try:
            self._description = described(self._workers, seconds)
        except BaseException:
            self.close()
            raise
        modules = self._description["modules"]
        self._places = {
            name: self._workers[index * workers // len(modules)] for index, name in enumerate(modules)
        }

    @property
    def description(self) -> dict[str, Any]:
        """What clients may know, as JSON: see ``HostedProducts.description``."""
        return dict(self._description)

    def connect(self, keys: bytes) -> RayProducts:
        """Bring a client's keys to all workers.

        Raises ``Refused`` for keys that are refused, and :class:`WorkerLost` if a worker is not there.
        """
        products = RayProducts(self._workers, self._places, keys)
        try:
            products.open()
        except BaseException:
            products.close()
            raise
        return products

    def close(self) -> None:
        """End the workers."""
        for place in self._workers:
            ray.kill(place.actor)


class RayProducts:
    """One client's products, as the server's process sees them: see ``Products``."""

    def __init__(self, workers: Sequence[Place], places: dict[str, Place], keys: bytes) -> None:
        self._id = secrets.token_hex(8)
        self._workers, self._places, self._keys = workers, places, keys

    def open(self) -> None:
        """Bring the keys to the workers."""
        for place in self._workers:
            self._connect(place)

    def multiply(self, group: str, transposed: bool, rows: int, inputs: Sequence[bytes]) -> list[bytes]:
        """See ``Products.multiply``. Raises :class:`WorkerLost` if the worker dies."""
        place = self._places.get(group)
        if place is None:
            raise Refused(f"there is no product {group!r} in this model")
        arguments = (group, transposed, rows, list(inputs))
        event = place.call("multiply", self._id, *arguments)
        if event.kind == "lost":  # it was started again
            self._connect(place)
            event = place.call("multiply", self._id, *arguments)
        return list(_checked(event).blobs)

    def close(self) -> None:
        """Let go of the keys, on all workers."""
        for place in self._workers:
            place.close(self._id)

    def _connect(self, place: Place) -> None:
        _checked(place.call("connect", self._id, self._keys))


class ProductsWorker:
    """What runs on a machine of the cluster: matrices, the keys of all clients, one product at a time."""

    def __init__(self, load: Callable[[], HostedProducts], threads: int) -> None:
        log_to()
        set_threads(threads)
        self._computing = threading.Lock()
        self._clients: dict[str, Products] = {}
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

    async def connect(self, client: str, keys: bytes) -> Event:
        """Take a client's keys."""
        if self._fault:
            return Event("lost")
        try:
            self._clients[client] = await asyncio.to_thread(self._model.connect, keys)
        except Refused as error:
            return Event("refused", text=str(error))
        except Exception as error:
            return Event("broke", text=log_exception("keys could not be opened", error, session=client))
        return Event("opened")

    async def multiply(
        self, client: str, group: str, transposed: bool, rows: int, inputs: Sequence[bytes]
    ) -> Event:
        """Return the products, or "lost" where the client's keys are not here."""
        products = self._clients.get(client)
        if products is None:
            return Event("lost")
        return await asyncio.to_thread(self._multiplied, products, group, transposed, rows, inputs)

    async def close(self, client: str) -> Event:
        """Let go of a client's keys, if they are here."""
        products = self._clients.pop(client, None)
        if products is not None:
            products.close()
        return Event("closed")

    def _multiplied(self, products: Products, *arguments: Any) -> Event:
        try:
            with self._computing:
                return Event("result", products.multiply(*arguments))
        except Refused as error:
            return Event("refused", text=str(error))
        except Exception as error:
            return Event("broke", text=log_exception("product broke", error))


def _checked(event: Event) -> Event:
    if event.kind == "refused":
        raise Refused(event.text)
    if event.kind == "lost":
        raise WorkerLost("the machine that has these layers was started again")
    if event.kind == "broke":
        raise WorkerBroke(event.text)
    return event
