"""CKKS parameters."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from . import _native
from .errors import InsecureParametersError
from .serialization import BinaryReader, Serializable, read_frame

Ring = Literal["standard", "conjugate_invariant"]


class Parameters(Serializable):
    """Checked CKKS parameters: ring, moduli and scale.

    ``log_q`` are the sizes in bits of the primes of the ciphertext modulus (one more
    than there are levels), ``log_p`` those of the modulus that key switching adds.
    The secret is uniform ternary, the error Gaussian with standard deviation 3.2.
    What falls short of 128 bits of security is refused with the figure.

    The standard ring of degree N has N/2 complex slots, the conjugate-invariant ring
    N real slots.
    """

    __slots__ = ("_about",)
    _frame_type: ClassVar[int] = 1
    _about: dict[str, Any]

    def __init__(
        self,
        log_degree: int,
        log_q: Sequence[int],
        log_p: Sequence[int],
        log_scale: int,
        ring: Ring = "standard",
    ) -> None:
        literal = {
            "log_n": log_degree,
            "log_q": list(log_q),
            "log_p": list(log_p),
            "log_scale": log_scale,
            "ring": ring,
        }
        self._take(_check(literal))

    def _take(self, handle: int) -> None:
        super().__init__(handle)
        self._about = json.loads(_native.describe("cl_parameters_describe", handle))

    @classmethod
    def _adopt(cls, handle: int, parameters: Parameters | None = None) -> Parameters:
        result = cls.__new__(cls)
        result._take(handle)
        return result

    @classmethod
    def preset(cls, log_degree: int, *, post_quantum: bool = False) -> Parameters:
        """Return the preset of a ring degree, 2^12 to 2^16; see ``PRESETS``.

        With ``post_quantum``, one of ``POST_QUANTUM_PRESETS``. Raises :class:`InsecureParametersError` should
        that fall short.
        """
        if not post_quantum:
            return cls(log_degree, **PRESETS[log_degree])
        parameters = cls(log_degree, **POST_QUANTUM_PRESETS[log_degree])
        if not parameters.post_quantum:
            raise InsecureParametersError(
                f"log2(QP) is {parameters.log_qp:.2f}, and 128 bits of security against quantum computers "
                f"allow {POST_QUANTUM_LIMITS[log_degree]} at 2^{log_degree}"
            )
        return parameters

    @classmethod
    def from_dict(cls, literal: Mapping[str, Any]) -> Parameters:
        """Return the parameters that :meth:`to_dict` described."""
        return cls._adopt(_check(dict(literal)))

    def to_dict(self) -> dict[str, Any]:
        """Return what the parameters are made of, with the primes."""
        return {name: self._about[name] for name in ("log_n", "q", "p", "log_scale", "ring")}

    @classmethod
    def read_from(cls, file: BinaryReader, parameters: Parameters | None = None) -> Parameters:
        """Read parameters from a file."""
        return cls._adopt(read_frame(file, cls._frame_type, None))

    @classmethod
    def from_bytes(
        cls, data: bytes | bytearray | memoryview, parameters: Parameters | None = None
    ) -> Parameters:
        """Read parameters from bytes."""
        return super().from_bytes(data, parameters)  # type: ignore[arg-type]

    @property
    def log_degree(self) -> int:
        """log2 of the ring degree."""
        return int(self._about["log_n"])

    @property
    def degree(self) -> int:
        """The ring degree."""
        return 1 << self.log_degree

    @property
    def slots(self) -> int:
        """The number of values in a ciphertext."""
        return int(self._about["slots"])

    @property
    def max_level(self) -> int:
        """The level of a fresh ciphertext: how many times it can be rescaled."""
        return int(self._about["max_level"])

    @property
    def q(self) -> tuple[int, ...]:
        """The primes of the ciphertext modulus."""
        return tuple(self._about["q"])

    @property
    def p(self) -> tuple[int, ...]:
        """The primes of the key-switching modulus."""
        return tuple(self._about["p"])

    @property
    def scale(self) -> float:
        """The default scale."""
        return float(2.0 ** self._about["log_scale"])

    @property
    def log_qp(self) -> float:
        """log2 of the largest modulus, which security depends on."""
        return float(self._about["log_qp"])

    @property
    def post_quantum(self) -> bool:
        """Whether there are 128 bits of security against quantum computers: see ``POST_QUANTUM_LIMITS``."""
        return self.log_qp <= POST_QUANTUM_LIMITS.get(self.log_degree, 0)

    @property
    def ring(self) -> Ring:
        """The kind of ring."""
        ring: Ring = self._about["ring"]
        return ring

    @property
    def real(self) -> bool:
        """Whether slots are real numbers."""
        return self.ring == "conjugate_invariant"

    @property
    def fingerprint(self) -> str:
        """A hash of the parameters, which every object of theirs carries."""
        return str(self._about["fingerprint"])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Parameters) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        return (
            f"Parameters(degree=2^{self.log_degree}, levels={self.max_level}, log_qp={self.log_qp:.1f}, "
            f"scale=2^{self._about['log_scale']}, ring={self.ring!r}, fingerprint={self.fingerprint[:8]})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return Parameters.from_dict, (self.to_dict(),)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__reduce__()


def _check(literal: dict[str, Any]) -> int:
    text = json.dumps(literal).encode()
    return _native.create("cl_parameters_new", text, len(text))


# One set for each ring degree. 2^14 is the one that the models use.
PRESETS: dict[int, dict[str, Any]] = {
    12: {"log_q": [38, 28], "log_p": [38], "log_scale": 28},
    13: {"log_q": [42] + [32] * 4, "log_p": [46], "log_scale": 32},
    14: {"log_q": [50] + [36] * 8, "log_p": [50, 49], "log_scale": 36},
    15: {"log_q": [50] + [36] * 19, "log_p": [49, 49, 48], "log_scale": 36},
    16: {"log_q": [50] + [40] * 24, "log_p": [50] * 4, "log_scale": 40},
}

# log2(QP) for 128 bits of security against quantum computers with a uniform ternary secret: the Homomorphic
# Encryption Standard (2018), table 2. The engine itself holds all parameters to the classical limits.
POST_QUANTUM_LIMITS = {12: 101, 13: 202, 14: 411, 15: 827}

# The same levels in fewer bits: what is computed has about twice the error.
POST_QUANTUM_PRESETS: dict[int, dict[str, Any]] = {
    14: {"log_q": [45] + [35] * 8, "log_p": [43, 42], "log_scale": 35},
}
