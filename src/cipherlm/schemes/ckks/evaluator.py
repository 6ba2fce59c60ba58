"""What encrypted tensors need of an engine that computes on ciphertexts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from cipherlm.engine import (
    Chebyshev,
    Ciphertext,
    Held,
    LinearTransformation,
    Parameters,
    Plaintext,
    PublicKey,
    RefreshMask,
    RefreshReply,
    RefreshRequest,
)


class Evaluator(Protocol):
    """Arithmetic on ciphertexts with one client's evaluation keys.

    :class:`cipherlm.engine.Evaluator` is Lattigo's, and says what each operation does;
    :class:`cipherlm.cli.counting.CountingEvaluator` counts them and computes nothing. Another engine brings
    ciphertexts of its own class, with a level, a scale and parameters.
    """

    @property
    def parameters(self) -> Parameters:
        """The parameters of the encryption."""

    def add(self, a: Ciphertext, b: Any, *, out: Ciphertext | None = None) -> Ciphertext:
        """Return the sum with a ciphertext, a plaintext or a number."""

    def multiply(
        self,
        a: Ciphertext,
        b: Any,
        *,
        rescale: bool = True,
        relinearize: bool = True,
        out: Ciphertext | None = None,
    ) -> Ciphertext:
        """Return the product with a ciphertext, a plaintext or a number."""

    def dot(
        self, a: Sequence[Ciphertext], b: Sequence[Ciphertext] | Sequence[Plaintext], *, rescale: bool = True
    ) -> Ciphertext:
        """Return the sum of products, relinearised and rescaled once."""

    def rescale(self, a: Ciphertext, *, out: Ciphertext | None = None) -> Ciphertext:
        """Divide by the last prime, the scale too."""

    def drop_level(self, a: Ciphertext, level: int, *, out: Ciphertext | None = None) -> Ciphertext:
        """Return the ciphertext at a lower level."""

    def set_scale(self, a: Ciphertext, scale: float, *, out: Ciphertext | None = None) -> Ciphertext:
        """Declare another scale: the message is divided by their ratio."""

    def adjust_scale(self, a: Ciphertext, scale: float, *, out: Ciphertext | None = None) -> Ciphertext:
        """Bring the scale to another value and leave the message, for one level."""

    def rotate(self, a: Ciphertext, by: int, *, out: Ciphertext | None = None) -> Ciphertext:
        """Rotate the slots."""

    def rotate_hoisted(self, a: Ciphertext, by: Sequence[int]) -> list[Ciphertext]:
        """Rotate by several amounts, with one decomposition."""

    def conjugate(self, a: Ciphertext, *, out: Ciphertext | None = None) -> Ciphertext:
        """Conjugate the slots."""

    def split(self, a: Ciphertext) -> tuple[Ciphertext, Ciphertext]:
        """Return twice the real and twice the imaginary part."""

    def inner_sum(self, a: Ciphertext, step: int, count: int, *, out: Ciphertext | None = None) -> Ciphertext:
        """Return the sum of ``count`` rotations by multiples of ``step``."""

    def transform(self, a: Ciphertext, matrix: LinearTransformation) -> Ciphertext:
        """Apply a matrix of clear numbers."""

    def transform_many(
        self, inputs: Sequence[Ciphertext], matrices: Sequence[LinearTransformation]
    ) -> list[list[Ciphertext]]:
        """Apply all matrices to all inputs."""

    def polynomial(self, a: Ciphertext, polynomial: Chebyshev) -> Ciphertext:
        """Evaluate a polynomial on every slot."""

    def mask(
        self,
        inputs: Sequence[Ciphertext],
        public_key: PublicKey,
        *,
        level: int = 1,
        to_level: int | None = None,
        shift: int = 0,
        held: Sequence[Held] | None = None,
    ) -> tuple[RefreshRequest, RefreshMask]:
        """Return a request to refresh, and what takes the masks off again."""

    def unmask(self, reply: RefreshReply, mask: RefreshMask) -> list[Ciphertext]:
        """Return what a client has refreshed."""

    def rerandomize(self, a: Ciphertext, public_key: PublicKey, *, flood: int = 0) -> Ciphertext:
        """Add an encryption of zero and flooding noise to a result."""
