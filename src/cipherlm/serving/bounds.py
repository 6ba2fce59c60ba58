"""What a server may ask of its client at most.

A server says itself how large its messages are and asks for refreshes as it likes. What is right, the client
knows from its own bundle; what is beyond would only exhaust it.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Bounds:
    """``message_bytes`` of ciphertexts in a message, and ``rounds`` of refreshes in one evaluation."""

    message_bytes: int
    rounds: int


UNKNOWN = Bounds(message_bytes=256 << 20, rounds=4096)
"""Before there is a bundle: more than any model needs."""
