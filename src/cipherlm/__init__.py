"""Run language models of ``transformers`` on encrypted text.

The names below are imported when they are first used, so that ``import cipherlm`` and the layers without
models load neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cipherlm.models.config import EncryptionConfig
    from cipherlm.models.encrypted import EncryptedModel
    from cipherlm.models.integration import get_encrypted_model
    from cipherlm.models.linear import EncryptedLinearModel
    from cipherlm.models.loading import load_model, load_tokenizer
    from cipherlm.models.published import MultiHeadsQGPT2Model, SingleHeadQGPT2Model
    from cipherlm.serving.remote import RemoteModel
    from cipherlm.serving.remote_linear import RemoteLinearModel

__version__ = "0.1.0"

_EXPORTS = {
    "EncryptedModel": "cipherlm.models.encrypted",
    "EncryptedLinearModel": "cipherlm.models.linear",
    "EncryptionConfig": "cipherlm.models.config",
    "MultiHeadsQGPT2Model": "cipherlm.models.published",
    "SingleHeadQGPT2Model": "cipherlm.models.published",
    "RemoteLinearModel": "cipherlm.serving.remote_linear",
    "RemoteModel": "cipherlm.serving.remote",
    "get_encrypted_model": "cipherlm.models.integration",
    "load_model": "cipherlm.models.loading",
    "load_tokenizer": "cipherlm.models.loading",
}

__all__ = [
    "EncryptedLinearModel",
    "EncryptedModel",
    "EncryptionConfig",
    "MultiHeadsQGPT2Model",
    "RemoteLinearModel",
    "RemoteModel",
    "SingleHeadQGPT2Model",
    "get_encrypted_model",
    "load_model",
    "load_tokenizer",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
