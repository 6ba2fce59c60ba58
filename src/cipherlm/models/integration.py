"""Encryption for a ``transformers`` model in two lines, as PEFT adds adapters.

    config = EncryptionConfig()  # the whole model on CKKS
    model = get_encrypted_model(model, config)

The model keeps its class's behaviour, its weights and their names; the modules named in the configuration
are replaced in place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from cipherlm.models.config import EncryptionConfig
from cipherlm.models.encrypted import EncryptedModel
from cipherlm.models.linear import EncryptedLinearModel, encrypt_linear
from cipherlm.models.targets import means_linear
from cipherlm.progress import Progress, silent


def get_encrypted_model(
    model: nn.Module,
    config: EncryptionConfig,
    *,
    example: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> EncryptedModel | EncryptedLinearModel:
    """Encrypt the modules of ``model`` that ``config`` names, and return it.

    The model is changed in place: it stays the same object, with a few methods more. With linear layers, of
    any architecture, it is an ``EncryptedLinearModel`` and ready to run; ``example`` is for models that take
    unusual arguments (see ``find_groups``). Otherwise next is ``model.compile(calibration_ids)``, or
    ``model.calibrate(calibration_ids)`` for its parameters alone. ``progress`` hears of each long step.

    Raises ``ValueError``, and changes nothing, if the model's architecture is not supported or if it lacks
    a module or head that ``config`` names.
    """
    if isinstance(model, (EncryptedModel, EncryptedLinearModel)):
        raise ValueError("this model is encrypted already: load the clear one again")
    if means_linear(model, config):
        return encrypt_linear(model, config, example, progress)
    return EncryptedModel.encrypt(model, config, progress=progress)
