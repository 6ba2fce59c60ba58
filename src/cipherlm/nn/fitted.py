"""Functions by polynomials, and what they tell of themselves: which polynomials, what for, and how exact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from cipherlm.nn.approximation import Approximation, Float64, largest_error
from cipherlm.nn.module import Module
from cipherlm.nn.ranges import Interval
from cipherlm.nn.tensor import depth


@dataclass(frozen=True)
class Stage:
    """One polynomial of a function, with the Newton steps that refine it and the products around it.

    Its arguments lie in ``interval``. ``tolerance`` is the error that it was chosen for, and ``error`` the
    largest that is found on a grid of the interval, both behind the last Newton step; ``relative`` to the
    values, or absolute. ``levels`` is the multiplicative depth of all of it.
    """

    name: str
    degree: int
    steps: int
    levels: int
    interval: Interval
    tolerance: float
    error: float
    relative: bool

    @classmethod
    def of(
        cls,
        name: str,
        polynomial: Approximation,
        *,
        products: int = 0,
        steps: int = 0,
        refined: Callable[[Float64], Float64] | None = None,
    ) -> Stage:
        """Measure and describe a polynomial.

        ``products`` is how many products are behind each other beside those of the polynomial, and
        ``refined`` what the Newton steps make of its argument.
        """
        error = largest_error(
            refined or polynomial, polynomial.function, polynomial.within, relative=polynomial.relative
        )
        return cls(
            name,
            polynomial.degree,
            steps,
            depth(polynomial) + products,
            polynomial.within,
            polynomial.tolerance,
            error,
            polynomial.relative,
        )


@dataclass(frozen=True)
class Choice:
    """How a function is computed: its stages, one after the other.

    Where that depends on how many keys there are: ``keys`` is the most that this is for, in rows of
    ``places``. ``cost`` is in products of two ciphertexts (:mod:`cipherlm.nn.cost`).
    """

    stages: tuple[Stage, ...]
    cost: float
    keys: int | None = None
    places: int | None = None

    @property
    def levels(self) -> int:
        """The multiplicative depth of the function; refreshes may come between its levels."""
        return sum(stage.levels for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it, for JSON."""
        stages = [{**asdict(stage), "interval": list(stage.interval)} for stage in self.stages]
        return {**asdict(self), "stages": stages, "levels": self.levels}


class Fitted(Module):
    """A function by polynomials, each the cheapest that keeps a stated error."""

    def choices(self) -> list[Choice]:
        """Describe how it is computed, with errors that are measured now."""
        raise NotImplementedError
