"""One description of the arithmetic: parameters, packings, scales, keys and what travels.

The products need no level. Parameters have one prime, inputs are encrypted at level 0, and the sums stay
below half the prime, always: a client divides its input by its norm, the plan knows the greatest norm that
the slots of an output can take for an input of norm 1, and the slots have random signs
(:mod:`cipherlm.linear.packing`), so that a coefficient beyond :data:`DEVIATIONS` times ``norm / degree`` has
a probability below 2**-33 (Hoeffding's inequality). Nothing depends on ranges seen in calibration, and no
input makes a server see a retry.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cipherlm.engine import Parameters, split_rotations
from cipherlm.linear.packing import Packing, choose_packing
from cipherlm.linear.products import LinearGroup

VERSION = 1
DEVIATIONS = 7.0
_LITERAL: dict[str, Any] = {
    "log_degree": 12,
    # Primes below 2^51 take the vector code. The key switch's error is 2^49 / 2^51 times that of a fresh
    # encryption, times the root of the degree: near that of the rounding that ends it.
    "log_q": [49],
    "log_p": [51],
    "log_scale": 24,
    "ring": "conjugate_invariant",
}
_KEY_SWITCH_ERROR = 30.0
"""The standard deviation of a coefficient's error after a baby step: calculated, and measured as 30.1."""
_COEFFICIENT = 2.0**12.7
"""The root mean square of a diagonal's coefficients: five times it fits 16 bits. More bits would take as many
from the inputs, whose error is nearly as large as that of the weights' rounding."""
_GIANT_STEPS = (8, 16, 32, 64)


@dataclass(frozen=True)
class GroupPlan:
    """How one group's matrix is multiplied.

    Rotations are split by ``giant_step``. ``weight_scale`` is the scale of the diagonals, ``input_scale``
    that of an input of norm 1. An input's first component loses ``sent`` low bits before it leaves; the
    components of an output lose ``first`` and ``second``.
    """

    packing: Packing
    giant_step: int
    weight_scale: float
    input_scale: float
    sent: int
    first: int
    second: int


@dataclass(frozen=True)
class Plan:
    """What client and server have in common: no weights, and nothing that depends on a text.

    ``groups`` are the products by name. ``backward`` has the plans of their transposes, for gradients: of all
    groups or of none.
    """

    groups: Mapping[str, LinearGroup]
    forward: Mapping[str, GroupPlan]
    backward: Mapping[str, GroupPlan]

    @cached_property
    def parameters(self) -> Parameters:
        """The parameters, of 128-bit security."""
        return Parameters(**_LITERAL)

    @cached_property
    def rotations(self) -> frozenset[int]:
        """The rotations that keys are needed for."""
        parts = [split_rotations(range(plan.packing.depth), plan.giant_step) for plan in self.all()]
        return frozenset().union(*parts)

    def all(self) -> list[GroupPlan]:
        """Return the plans of all matrices."""
        return [*self.forward.values(), *self.backward.values()]

    def of(self, group: str, transposed: bool = False) -> GroupPlan:
        """Return the plan of one matrix. Raises ``ValueError`` where there is none."""
        plans = self.backward if transposed else self.forward
        if group not in self.groups:
            raise ValueError(f"there is no product {group!r} in this model")
        if group not in plans:
            raise ValueError("this model was exported without training: its products have no gradients")
        return plans[group]

    def to_dict(self) -> dict[str, Any]:
        """Return everything, ready for JSON."""
        return {
            "version": VERSION,
            "parameters": self.parameters.to_dict(),
            "groups": [group.to_dict() for group in self.groups.values()],
            "forward": {name: asdict(plan) for name, plan in self.forward.items()},
            "backward": {name: asdict(plan) for name, plan in self.backward.items()},
        }

    @cached_property
    def digest(self) -> str:
        """The name of this plan: 32 hexadecimal digits that differ if anything does."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @classmethod
    def from_dict(cls, values: Any) -> "Plan":
        """Return the plan that ``to_dict`` gave. Raises ``ValueError`` on anything else."""
        if not isinstance(values, Mapping):
            raise ValueError("a plan is a JSON object")
        if values.get("version") != VERSION:
            raise ValueError(
                f"version {values.get('version')!r} of a plan is not known, only {VERSION}: "
                "was it written by another CipherLM?"
            )
        expected = {"version", "parameters", "groups", "forward", "backward"}
        if set(values) != expected:
            raise ValueError(
                f"fields of a plan that are unknown or missing: {sorted(set(values) ^ expected)}"
            )
        try:
            groups = [LinearGroup.from_dict(group) for group in values["groups"]]
            plan = cls(
                {group.name: group for group in groups},
                {name: _group_plan(entry) for name, entry in values["forward"].items()},
                {name: _group_plan(entry) for name, entry in values["backward"].items()},
            )
            plan._check(values["parameters"])
        except (TypeError, KeyError, AttributeError, OverflowError) as error:
            raise ValueError("a damaged plan") from error
        return plan

    def _check(self, literal: Any) -> None:
        if literal != self.parameters.to_dict():
            raise ValueError("a plan with parameters that this CipherLM does not use")
        if list(self.forward) != list(self.groups) or list(self.backward) not in ([], list(self.groups)):
            raise ValueError("the products of a plan are not those of its groups")
        for name, group in self.groups.items():
            shapes = [
                (self.forward, (group.rows, group.in_features)),
                (self.backward, (group.in_features, group.rows)),
            ]
            for plans, shape in shapes:
                if name in plans:
                    _check_group(name, plans[name], shape, self.parameters)


def _group_plan(values: Mapping[str, Any]) -> GroupPlan:
    return GroupPlan(
        Packing(**values["packing"]), **{name: values[name] for name in values if name != "packing"}
    )


def _check_group(name: str, plan: GroupPlan, shape: tuple[int, int], parameters: Parameters) -> None:
    packing = plan.packing
    integers = [*asdict(packing).values(), plan.sent, plan.first, plan.second]
    if not all(isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in integers):
        raise ValueError(f"the plan of {name} has sizes that are not integers")
    if (packing.rows, packing.columns) != shape or packing.slots != parameters.slots:
        raise ValueError(f"the plan of {name} is for another shape")
    if not (1 <= packing.inputs <= packing.columns and 1 <= packing.outputs <= packing.rows):
        raise ValueError(f"the plan of {name} has {packing.inputs} inputs and {packing.outputs} outputs")
    if not 1 <= packing.runs <= packing.period or packing.capacity < packing.per_output:
        raise ValueError(f"the plan of {name} does not fit its slots")
    if plan.giant_step not in _GIANT_STEPS:
        raise ValueError(f"the plan of {name} has the giant step {plan.giant_step!r}")
    if max(plan.sent, plan.first, plan.second) > 40:
        raise ValueError(f"the plan of {name} rounds everything away")
    for scale in (plan.weight_scale, plan.input_scale):
        if not (isinstance(scale, float) and 1.0 <= scale < 2.0**61):
            raise ValueError(f"the plan of {name} has the scale {scale!r}")


def make_plan(
    groups: list[LinearGroup],
    weights: Mapping[str, NDArray[np.floating[Any]]],
    *,
    training: bool = False,
) -> Plan:
    """Choose packing, scales and rounding for every group; ``weights`` are (rows, in_features).

    ``training`` plans the transposes too. Raises ``ValueError`` for weights that are not finite or that do
    not have their group's shape.
    """
    parameters = Parameters(**_LITERAL)
    forward, backward = {}, {}
    for group in groups:
        matrix = weights[group.name]
        if matrix.shape != (group.rows, group.in_features):
            raise ValueError(f"the weights of {group.name} have the shape {matrix.shape}")
        if not np.isfinite(matrix).all():
            raise ValueError(f"the weights of {group.name} are not all finite")
        forward[group.name] = _plan_matrix(matrix, parameters)
        if training:
            backward[group.name] = _plan_matrix(matrix.T, parameters)
    return Plan({group.name: group for group in groups}, forward, backward)


def _plan_matrix(matrix: NDArray[np.floating[Any]], parameters: Parameters) -> GroupPlan:
    packing = choose_packing(matrix.shape[0], matrix.shape[1], parameters.slots)
    degree, half = parameters.degree, parameters.q[0] / 2
    # Slots of root mean square r have coefficients of r / sqrt(2 * degree).
    energy = float(np.linalg.norm(matrix)) or 1.0
    slot = energy / math.sqrt(packing.diagonals * packing.slots)
    weight_scale = max(1.0, _COEFFICIENT * math.sqrt(2 * degree) / slot)
    norm = (packing.norm(matrix) or 1.0) * weight_scale
    input_scale = min(0.95 * half * degree / (DEVIATIONS * norm), 2.0**60)
    # The error of an input's coefficients goes through as many diagonals.
    error = _KEY_SWITCH_ERROR * weight_scale * energy / math.sqrt(packing.outputs * packing.slots)
    bits = math.log2(error)
    first = max(0, math.floor(bits + 0.5))
    second = max(0, math.floor(bits + 0.5 - math.log2(4 * degree / 3) / 2))
    limit = parameters.q[0].bit_length() - 12
    return GroupPlan(
        packing, _giant_step(packing), weight_scale, input_scale, 5, min(first, limit), min(second, limit)
    )


def _giant_step(packing: Packing) -> int:
    """Return the step with the fewest key switches: babies once an input, giants for every block."""
    return min(
        _GIANT_STEPS, key=lambda step: min(step, packing.depth) + packing.outputs * -(-packing.depth // step)
    )


@dataclass(frozen=True)
class Errors:
    """Standard deviations: of a weight, of a feature of an input of norm 1, and of its product's rounding."""

    weight: float
    input: float
    output: float


def errors(group: GroupPlan, plan: Plan) -> Errors:
    """Return the errors that a product has by calculation, for an input of norm 1."""
    degree = plan.parameters.degree
    slot = math.sqrt(2 * degree)  # from coefficients to slots
    rounding = 1 / math.sqrt(12)
    fresh = math.hypot(_KEY_SWITCH_ERROR, rounding * 2**group.sent)
    key = math.sqrt(4 * degree / 3)  # what the secret key makes of an error in the second component
    lost = rounding * math.hypot(2**group.first, 2**group.second * key)
    return Errors(
        # A few diagonals have coefficients beyond 16 bits, and are rounded to multiples of two or more.
        weight=rounding * slot / group.weight_scale,
        input=fresh * slot / group.input_scale,
        output=lost * slot * math.sqrt(group.packing.runs) / (group.weight_scale * group.input_scale),
    )
