"""What goes between the two parties, counted at the client."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cipherlm.engine import EvaluationKeys, PublicKey, RefreshReply, RefreshRequest
from cipherlm.schemes.ckks.geometry import Geometry
from cipherlm.schemes.ckks.session import Client, Float64


@dataclass
class Traffic:
    """What goes between client and server, in bytes, and how often the server asks back."""

    keys: int = 0
    to_server: int = 0
    to_client: int = 0
    refreshes: int = 0


class MeteredClient(Client):
    """A client that counts what it would send to a server elsewhere, and receive from it."""

    def __init__(self, secret_key: Any, geometry: Geometry) -> None:
        super().__init__(secret_key, geometry)
        self.traffic = Traffic()

    def evaluation_keys(self) -> EvaluationKeys:
        """See :class:`Client`."""
        keys = super().evaluation_keys()
        self.traffic.keys += _size(keys)
        return keys

    def public_key(self) -> PublicKey:
        """See :class:`Client`."""
        key = super().public_key()
        self.traffic.keys += _size(key)
        return key

    def encrypt(self, hidden: Float64, start: int) -> list[Any]:
        """See :class:`Client`."""
        ciphertexts = super().encrypt(hidden, start)
        self.traffic.to_server += sum(map(_size, ciphertexts))
        return ciphertexts

    def decrypt(self, ciphertexts: Sequence[Any], count: int, start: int) -> Float64:
        """See :class:`Client`."""
        self.traffic.to_client += sum(map(_size, ciphertexts))
        return super().decrypt(ciphertexts, count, start)

    def refresh(self, request: RefreshRequest) -> RefreshReply:
        """See :class:`Client`."""
        reply = super().refresh(request)
        self.traffic.to_client += _size(request)
        self.traffic.to_server += _size(reply)
        self.traffic.refreshes += 1
        return reply


class _Counter:
    def __init__(self) -> None:
        self.size = 0

    def write(self, data: memoryview, /) -> None:
        self.size += len(data)


def _size(value: Any) -> int:
    """Return how many bytes a value of the engine is when it is sent."""
    counter = _Counter()
    value.write_to(counter)
    return counter.size
