"""The primitive operations of CKKS that encrypted models consist of, measured one by one at every level."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import numpy as np

from cipherlm.engine import (
    Chebyshev,
    Ciphertext,
    Evaluator,
    LinearTransformation,
    Parameters,
    Plaintext,
    RefreshMask,
    RefreshRequest,
    SecretKey,
    set_threads,
    threads,
)
from cipherlm.schemes.ckks.arithmetic import PLAIN_SHIFT

Primitive = tuple[str, int]
"""Name and level of the operands; for ``mask``, the level that a refresh goes to."""

NAMES = (
    "rotation",
    "hoisted_rotation",
    "product",
    "further_product",
    "plaintext_product",
    "diagonal",
    "further_diagonal",
    "rescaling",
    "addition",
    "encoding",
    "mask",
    "rerandomization",
)
"""All but polynomials, which are ``polynomial_`` and the degree."""

DEGREES = (3, 7, 15, 31, 63, 127)
BABY_STEPS = 8

BATCH = 16
"""How many runs are measured together of what goes on in the background."""


class Primitives:
    """Processor seconds of single operations, on one thread: the fastest of several runs.

    Differences, such as those of a matrix with more diagonals, and shares, such as those of one among eight
    hoisted rotations, are what an operation takes inside of a larger one.
    """

    def __init__(self, parameters: Parameters, budget: float = 0.2) -> None:
        self.parameters, self._budget = parameters, budget
        self._known: dict[Primitive, float] = {}
        self._random = np.random.default_rng(0)

    def seconds(self, name: str, level: int) -> float:
        """Return the seconds of an operation. Raises ``ValueError`` for a name that is not known."""
        if (name, level) not in self._known:
            with _one_thread():
                self._known[name, level] = self._measured(name, level)
        return self._known[name, level]

    def table(self) -> dict[str, dict[str, float]]:
        """Return the seconds of everything there is, by level and name."""
        levels = range(1, self.parameters.max_level + 1)
        polynomials = {f"polynomial_{degree}": degree.bit_length() for degree in DEGREES}
        return {
            str(level): {
                name: self.seconds(name, level)
                for name in (*NAMES, *polynomials)
                if polynomials.get(name, 0) <= level
            }
            for level in levels
        }

    @cached_property
    def secret_key(self) -> SecretKey:
        """The key that everything is encrypted under."""
        return SecretKey.generate(self.parameters)

    @cached_property
    def _public_key(self) -> Any:
        return self.secret_key.public_key()

    @cached_property
    def _evaluator(self) -> Evaluator:
        steps = {*range(1, BABY_STEPS + 1), *(BABY_STEPS * k for k in range(1, BABY_STEPS))}
        return Evaluator(self.parameters, self.secret_key.evaluation_keys(sorted(steps)))

    def request(self, level: int, to_level: int) -> RefreshRequest:
        """Return what a server sends to have a ciphertext refreshed."""
        return self._masked(self._ciphertext(level), to_level)[0]

    def _masked(self, ct: Ciphertext, to_level: int) -> tuple[RefreshRequest, RefreshMask]:
        return self._evaluator.mask(
            [ct], self._public_key, level=ct.level, to_level=to_level, shift=PLAIN_SHIFT
        )

    def _vector(self) -> Any:
        return self._random.uniform(-1, 1, self.parameters.slots)

    def _ciphertext(self, level: int) -> Ciphertext:
        fresh = self.secret_key.encrypt(self._vector(), level)
        return self._evaluator.add(fresh, fresh)  # no longer compressed

    def _measured(self, name: str, level: int) -> float:
        evaluator, ct = self._evaluator, self._ciphertext(level)
        if name in ("diagonal", "further_diagonal"):
            return self._diagonal(level, ct, further=name == "further_diagonal")
        if name == "further_product":
            many = [ct] * BABY_STEPS
            difference = self._fastest(lambda: evaluator.dot(many, many))
            difference -= self._fastest(lambda: evaluator.dot(many[:1], many[:1]))
            return max(0.0, difference) / (BABY_STEPS - 1)
        if name == "hoisted_rotation":
            steps = list(range(1, BABY_STEPS + 1))
            return self._fastest(lambda: evaluator.rotate_hoisted(ct, steps)) / BABY_STEPS
        if name.startswith("polynomial_"):
            curve = Chebyshev(np.full(int(name.split("_")[1]) + 1, 0.01), (-1.0, 1.0))
            return self._fastest(lambda: evaluator.polynomial(ct, curve))
        simple: dict[str, Callable[[], Any]] = {
            "rotation": lambda: evaluator.rotate(ct, 1),
            "product": lambda: evaluator.multiply(ct, ct),
            "addition": lambda: evaluator.add(ct, ct),
            "encoding": partial(self._plaintext, self._vector(), level),
            "rerandomization": lambda: evaluator.rerandomize(ct, self._public_key),
        }
        if name in ("plaintext_product", "rescaling"):
            plain = self._plaintext(self._vector(), level)
            product = evaluator.multiply(ct, plain, rescale=False)
            simple["plaintext_product"] = lambda: evaluator.multiply(ct, plain, rescale=False)
            simple["rescaling"] = lambda: evaluator.rescale(product)
        if name == "mask":
            low = evaluator.drop_level(ct, 1)
            simple[name] = lambda: self._masked(low, level)
        if name not in simple:
            raise ValueError(f"{name!r} is no primitive operation")
        # The next mask is made in the background, and its processor time falls into later runs.
        return self._fastest(simple[name], BATCH if name == "mask" else 1)

    def _plaintext(self, values: Any, level: int) -> Plaintext:
        return Plaintext.encode(self.parameters, values, level, float(self.parameters.q[level]))

    def _diagonal(self, level: int, ct: Ciphertext, *, further: bool) -> float:
        """Return what one more diagonal takes in a matrix that has the same rotations anyway.

        ``further``: what it takes for one more input.
        """
        rotations = range(BABY_STEPS * BABY_STEPS)
        few = [k for k in rotations if k < BABY_STEPS or k % BABY_STEPS == 0]
        taken = []
        for chosen in (list(rotations), few):
            matrix = LinearTransformation(
                self.parameters,
                ((k, self._vector()) for k in chosen),
                level=level,
                giant_step=BABY_STEPS,
                storage="int16",
                scale=None if level else 2.0**16,
            )
            times = [
                self._fastest(partial(self._evaluator.transform_many, [ct] * inputs, [matrix]))
                for inputs in range(1, 3 if further else 2)
            ]
            taken.append(times[-1] - times[0] if further else times[0])
        return max(0.0, taken[0] - taken[1]) / (len(rotations) - len(few))

    def _fastest(self, operation: Callable[[], Any], batch: int = 1) -> float:
        operation()
        least, runs, end = float("inf"), 0, time.perf_counter() + self._budget
        while runs < 3 or time.perf_counter() < end:
            began = time.process_time()
            for _ in range(batch):
                operation()
            least, runs = min(least, (time.process_time() - began) / batch), runs + 1
        return least


@contextmanager
def _one_thread() -> Iterator[None]:
    before = threads()
    set_threads(1)
    try:
        yield
    finally:
        set_threads(before)
