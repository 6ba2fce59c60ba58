"""Table lookups on the leading bits of a wide accumulator: in the clear, simulated, traced by Concrete.

A programmable bootstrap (PBS) reads a ciphertext on the whole torus, of which a table with ``bits`` bits
fills only half; on the other half it returns the table once more with the opposite sign. A sum that leaves
its calibrated range therefore comes out *negated* from an ordinary table. Here every table is shifted by a
constant so that its two ends are opposite, ``f(-1) = -f(1)``; then it goes on without a jump:

- a square ``x**2 - 1`` keeps rising on both sides, as ``1 - (2 - |x|)**2``, up to twice the range;
- a function that is flat at its ends, such as a sigmoid, stays flat until it is as far outside as its slope
  lies inside.

A function that is flat at one end only, such as an exponential, saturates past its steep end, and past its
flat end comes out negated all the same: its range must cover what occurs.

So most tables saturate where they would wrap, without a bit spent on it, and the clear evaluation below
follows the encrypted one outside the range too.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import numpy as np

# A Concrete tracer or an integer array: the circuits are written once for both.
Integers = Any
Function = Callable[[Any], Any]
Lookup = Callable[[Integers, int, Function], Integers]

ACCUMULATOR_BITS = 16
"""Width of every accumulator that a table reads. Its low bits cost nothing: the lookup drops them."""

FULL_SCALE = 1 << (ACCUMULATOR_BITS - 1)
"""The accumulator's value that stands for the end of the calibrated range."""


def lookup(accumulator: Integers, bits: int, function: Function) -> Integers:
    """Round ``accumulator`` to its leading ``bits`` bits and apply ``function`` to them, in the clear.

    ``function`` maps the accumulator as a fraction of its range, from -1 to 1, to the result, which is
    rounded to an integer. It must satisfy ``f(-1) = -f(1)`` (see the module's text) and may hold arrays that
    broadcast against the accumulator, which gives each position a table of its own.
    """
    cell = 1 << (ACCUMULATOR_BITS - bits)
    half = 1 << (bits - 1)
    index = (accumulator + cell // 2) // cell
    index = (index + half) % (4 * half) - half
    negated = index >= half
    index = np.where(negated, index - 2 * half, index)
    value = np.rint(function(index / half)).astype(np.int64)
    return np.where(negated, -value, value)


def traced_lookup(accumulator: Integers, bits: int, function: Function) -> Integers:
    """``lookup`` for Concrete's tracers: one PBS a value.

    Rounding is approximate: the noise of a ciphertext may push a value that lies near the edge of a cell into
    the neighbouring cell, whose result is a close one. (Exact rounding would cost one more PBS for each of
    the dropped bits.)
    """
    from concrete import fhe

    with fhe.tag(f"{bits} bits"):
        rounded = fhe.round_bit_pattern(
            fhe.hint(accumulator, bit_width=ACCUMULATOR_BITS),
            lsbs_to_remove=ACCUMULATOR_BITS - bits,
            overflow_protection=False,
            exactness=fhe.Exactness.APPROXIMATE,
        )
        return np.rint(function(fhe.hint(rounded, bit_width=ACCUMULATOR_BITS) / float(FULL_SCALE))).astype(
            np.int64
        )


def noisy_lookup(p_error: float, rng: np.random.Generator) -> Lookup:
    """Return ``lookup`` with the noise of ciphertexts, simulated.

    Noise is Gaussian, as wide as ``p_error`` allows: it leaves half a cell with that probability. Concrete
    chooses parameters whose noise is at most that.
    """
    cells = 0.5 / NormalDist().inv_cdf(1.0 - p_error / 2.0)

    def noisy(accumulator: Integers, bits: int, function: Function) -> Integers:
        deviation = cells * (1 << (ACCUMULATOR_BITS - bits))
        noise = np.rint(rng.normal(0.0, deviation, np.shape(accumulator))).astype(np.int64)
        return lookup(accumulator + noise, bits, function)

    return noisy
