"""The class of models that each scheme encrypts: ``MODEL`` in the scheme's file beside this one."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from cipherlm.models.config import SCHEMES

if TYPE_CHECKING:
    from cipherlm.models.encrypted import EncryptedModel


def model_class_of(scheme: str) -> type[EncryptedModel]:
    """Return the class of models that a scheme encrypts. Raises ``ValueError`` for an unknown scheme."""
    if scheme not in SCHEMES:
        raise ValueError(f"the scheme {scheme!r} is not known: choose one of {', '.join(SCHEMES)}")
    found: type[EncryptedModel] = import_module(f"cipherlm.models.{scheme}").MODEL
    return found
