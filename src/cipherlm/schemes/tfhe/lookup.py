"""Table lookups on the leading bits of a wide accumulator, in the clear and traced by Concrete.

A programmable bootstrap (PBS) reads a ciphertext on the whole torus, of which a table with ``bits`` bits
fills only half; on the other half it returns the table once more with the opposite sign. A sum that leaves
its calibrated range therefore comes out *negated* from an ordinary table. Here every table is shifted by a
constant so that its two ends are opposite, ``f(-1) = -f(1)``; then it goes on without a jump:

- a square ``x**2 - 1`` keeps rising on both sides, as ``1 - (2 - |x|)**2``, up to twice the range;
- a function that is flat at its ends, such as a sigmoid or a clipped exponential, stays flat.

So a table saturates up to twice its range, without a bit spent on it, and the clear evaluation below follows
the encrypted one outside the range too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

# A Concrete tracer or an integer array: the circuits are written once for both.
Integers = Any
Function = Callable[[Any], Any]

ACCUMULATOR_BITS = 16
"""Width of every accumulator that a table reads. Its low bits cost nothing: the lookup drops them."""

FULL_SCALE = 1 << (ACCUMULATOR_BITS - 1)
"""The accumulator's value that stands for the end of the calibrated range."""


def lookup(accumulator: Integers, bits: int, function: Function) -> Integers:
    """Round ``accumulator`` to its leading ``bits`` bits and apply ``function`` to them: one PBS a value.

    ``function`` maps the accumulator as a fraction of its range, from -1 to 1, to the result, which is
    rounded to an integer. It must satisfy ``f(-1) = -f(1)`` (see the module's text) and may hold arrays that
    broadcast against the accumulator, which gives each position a table of its own.

    In the clear, rounding is exact. On ciphertexts it is approximate: the noise of a ciphertext may push a
    value that lies near the edge of a cell into the neighbouring cell, whose result is a close one. (Exact
    rounding would cost one more PBS for each of the dropped bits.)
    """
    cell = 1 << (ACCUMULATOR_BITS - bits)
    if isinstance(accumulator, np.ndarray):
        half = 1 << (bits - 1)
        index = (accumulator + cell // 2) // cell
        index = (index + half) % (4 * half) - half
        negated = index >= half
        index = np.where(negated, index - 2 * half, index)
        value = np.rint(function(index / half)).astype(np.int64)
        return np.where(negated, -value, value)

    from concrete import fhe

    with fhe.tag(f"{bits} bits"):
        rounded = fhe.round_bit_pattern(
            fhe.hint(accumulator, bit_width=ACCUMULATOR_BITS),
            lsbs_to_remove=ACCUMULATOR_BITS - bits,
            overflow_protection=False,
            exactness=fhe.Exactness.APPROXIMATE,
        )
        return np.rint(function(rounded / float(FULL_SCALE))).astype(np.int64)
