"""Ranges of values that functions meet on text."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
Interval = tuple[float, float]

MARGIN = 1.25
"""How far beyond the range that was seen approximations keep their precision, as a factor."""


class Range:
    """The smallest and the largest value that was seen. Of ``positive`` ones, the margin is a ratio."""

    def __init__(self, *, positive: bool = False) -> None:
        self.low, self.high, self.positive = math.inf, -math.inf, positive

    def see(self, values: Float64) -> None:
        """Take values into account."""
        if values.size:
            self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))

    @property
    def interval(self) -> Interval:
        """The range with its margin: around zero, or of positive values with the margin's square.

        Raises ``ValueError`` if nothing was seen.
        """
        if self.high < self.low:
            raise ValueError("not calibrated: run the model on text first")
        if self.positive:
            return self.low / MARGIN**2, self.high * MARGIN**2
        return MARGIN * min(self.low, 0.0), MARGIN * max(self.high, 0.0)
