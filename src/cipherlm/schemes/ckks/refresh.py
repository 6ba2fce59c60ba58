"""Giving ciphertexts their levels back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from cipherlm.engine import (
    Ciphertext,
    Held,
    PublicKey,
    RefreshReply,
    RefreshRequest,
)
from cipherlm.engine.errors import EngineError, InternalError
from cipherlm.errors import Refused
from cipherlm.schemes.ckks.evaluator import Evaluator

MASK_LEVEL = 1
"""Where ciphertexts are masked: the modulus there is what hides them."""


class Refresher(Protocol):
    """Brings what ciphertexts hold to a higher level. Scales are divided by ``2^shift``; the values stay."""

    def __call__(
        self, ciphertexts: Sequence[Ciphertext], held: Sequence[Held], level: int, shift: int
    ) -> list[Ciphertext]:
        """Return ciphertexts at ``level``, one for each vector that is held."""


class MaskedRefresh:
    """Refreshes with the client, who sees uniformly random numbers.

    ``exchange`` brings a request to the client and returns the reply of
    :meth:`~cipherlm.engine.SecretKey.refresh`: one round trip for any number of ciphertexts.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        public_key: PublicKey,
        exchange: Callable[[RefreshRequest], RefreshReply],
    ) -> None:
        self._evaluator, self._public_key, self._exchange = evaluator, public_key, exchange

    def __call__(
        self, ciphertexts: Sequence[Ciphertext], held: Sequence[Held], level: int, shift: int
    ) -> list[Ciphertext]:
        """Return ciphertexts at ``level``, one for each vector that is held.

        Raises ``Refused`` for a reply to another request.
        """
        request, mask = self._evaluator.mask(
            ciphertexts,
            self._public_key,
            level=MASK_LEVEL,
            to_level=level,
            shift=shift,
            held=held,
        )
        reply = self._exchange(request)
        try:
            return self._evaluator.unmask(reply, mask)
        except InternalError:
            raise
        except EngineError as error:  # all that unmasking checks is whether the reply answers the request
            raise Refused(f"a reply to another refresh: {error}") from error
