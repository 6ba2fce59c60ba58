"""What the parties have in common: which layers make one product, and who multiplies."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class LinearGroup:
    """Linear layers with one input, stacked: one product.

    ``name`` is the first member's. ``members`` are names of modules, in the order of their rows in the
    stacked matrix, and ``out_features`` has the rows of each. Raises ``ValueError`` where these do not fit.
    """

    name: str
    members: tuple[str, ...]
    in_features: int
    out_features: tuple[int, ...]

    def __post_init__(self) -> None:
        names, sizes = (self.name, *self.members), (self.in_features, *self.out_features)
        if not all(isinstance(name, str) and name for name in names):
            raise ValueError(f"a group of linear layers has names, not {names!r}")
        if not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes):
            raise ValueError(f"the linear layers of {self.name} have positive sizes, not {sizes!r}")
        if not self.members or self.name != self.members[0] or len(set(self.members)) < len(self.members):
            raise ValueError(f"a group of linear layers is called as its first member, not {names!r}")
        if len(self.members) != len(self.out_features):
            raise ValueError(f"{self.name} has {len(self.members)} members, {len(self.out_features)} sizes")

    @property
    def rows(self) -> int:
        """The rows of the stacked matrix."""
        return sum(self.out_features)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> "LinearGroup":
        """Return the group that ``to_dict`` gave. Raises ``ValueError`` on anything else."""
        fields = {"name", "members", "in_features", "out_features"}
        if not isinstance(values, Mapping) or set(values) != fields:
            raise ValueError(f"a group of linear layers has the fields {', '.join(sorted(fields))}")
        members, sizes = values["members"], values["out_features"]
        if not isinstance(members, (list, tuple)) or not isinstance(sizes, (list, tuple)):
            raise ValueError("members and out_features of a group of linear layers are lists")
        return cls(values["name"], tuple(members), values["in_features"], tuple(sizes))


class Products(Protocol):
    """Multiplies by the weights of groups, wherever these are."""

    def product(self, group: str, x: Float64, *, transposed: bool = False) -> Float64:
        """Return x @ W.T (n, rows) for x (n, in_features), W the stacked matrix of the group.

        ``transposed``: x @ W, (n, rows) to (n, in_features), which is what gradients need. Raises
        ``ValueError`` for values that are not finite, and for a wrong shape.
        """
