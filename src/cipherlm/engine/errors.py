"""The engine's exceptions."""

from __future__ import annotations


class EngineError(RuntimeError):
    """Base of everything the engine raises."""


class InvalidArgumentError(EngineError, ValueError):
    """An argument that makes no sense."""


class ParametersError(EngineError, ValueError):
    """Malformed parameters, or objects of different parameters together."""


class InsecureParametersError(ParametersError):
    """Parameters that fall short of 128 bits of security."""


class KeyMaterialError(EngineError):
    """A key that is missing, serves too low a level, or belongs to somebody else."""


class LevelError(EngineError, ValueError):
    """Not enough levels left."""


class ScaleError(EngineError, ValueError):
    """Scales that do not match, or values that do not fit."""


class CorruptDataError(EngineError, ValueError):
    """Bytes that are not a valid object."""


class InternalError(EngineError):
    """The native side failed in a way that it should not."""


BY_KIND: dict[str, type[EngineError]] = {
    "V": InvalidArgumentError,
    "S": InsecureParametersError,
    "P": ParametersError,
    "K": KeyMaterialError,
    "L": LevelError,
    "C": ScaleError,
    "D": CorruptDataError,
    "I": InternalError,
}
