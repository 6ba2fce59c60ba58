"""The two classes of the published system, as thin wrappers, with the calls that code for it makes.

    model = SingleHeadQGPT2Model.from_pretrained("gpt2_model", n_bits=4, use_cache=False)
    circuit = model.compile(input_ids)
    model.set_fhe_mode(fhe="simulate")
    model.generate(input_ids, max_new_tokens=1)

One thing differs: parameters are calibrated once, by ``compile``, and never on the input that is evaluated,
so ``compile`` (or ``calibrate``) comes first in the mode ``"disable"`` too.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import GPT2LMHeadModel

from cipherlm.models.config import CONFIG_NAME, EncryptionConfig
from cipherlm.models.loading import load_model
from cipherlm.models.tfhe import TfheModel
from cipherlm.progress import Progress, silent

if TYPE_CHECKING:
    from typing_extensions import Self


class _PublishedModel(TfheModel, GPT2LMHeadModel):  # type: ignore[no-untyped-call, misc]
    @classmethod
    def _load(
        cls,
        name: str | os.PathLike[str],
        n_bits: int,
        use_cache: bool,
        layer: int,
        heads: list[int] | None,
        progress: Progress,
    ) -> Self:
        if use_cache:
            raise ValueError("an encrypted model keeps no key-value cache: leave use_cache=False")
        config = EncryptionConfig([f"transformer.h.{layer}.attn"], "tfhe", n_bits=n_bits, heads=heads)
        if not Path(name, CONFIG_NAME).is_file():
            return cls.encrypt(load_model(name), config, progress=progress)
        saved = EncryptionConfig.from_pretrained(name)
        if saved != config:
            raise ValueError(
                f"{os.fspath(name)!r} was saved with {saved}, which is not what this call asks for; "
                "EncryptedModel.from_pretrained loads it as it is"
            )
        return super().from_pretrained(name, progress=progress)


class SingleHeadQGPT2Model(_PublishedModel):  # type: ignore[no-untyped-call]
    """GPT-2 with one attention head of one block on encrypted data."""

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        name: str | os.PathLike[str],
        n_bits: int = 4,
        use_cache: bool = False,
        layer: int = 0,
        head: int = 0,
        *,
        progress: Progress = silent,
    ) -> Self:
        """Load the model ``name`` and encrypt head ``head`` of block ``layer``.

        What ``save_pretrained`` wrote is loaded with its frozen parameters.
        """
        return cls._load(name, n_bits, use_cache, layer, [head], progress)


class MultiHeadsQGPT2Model(_PublishedModel):  # type: ignore[no-untyped-call]
    """GPT-2 with the whole multi-head attention of one block, its projection too, on encrypted data."""

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        name: str | os.PathLike[str],
        n_bits: int = 4,
        use_cache: bool = False,
        layer: int = 0,
        *,
        progress: Progress = silent,
    ) -> Self:
        """Load the model ``name`` and encrypt the attention of block ``layer``.

        What ``save_pretrained`` wrote is loaded with its frozen parameters.
        """
        return cls._load(name, n_bits, use_cache, layer, None, progress)
