"""Frozen quantisation parameters on disk: one safetensors file for all encrypted modules of a model."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from cipherlm.models.attention import EncryptedAttention
from cipherlm.schemes.tfhe.attention import QuantizedAttention

QUANTIZATION_NAME = "quantisation.safetensors"


def save_quantization(directory: str | os.PathLike[str], modules: Mapping[str, EncryptedAttention]) -> None:
    """Write the parameters of all calibrated ``modules``, each array named after its module.

    Where nothing is calibrated there is no file, not even an older one.
    """
    arrays = {
        f"{name}.{key}": array
        for name, module in modules.items()
        if module.quantized is not None
        for key, array in module.quantized.to_arrays().items()
    }
    path = Path(directory) / QUANTIZATION_NAME
    if arrays:
        save_file(arrays, path, metadata={"format": "np"})
    else:
        path.unlink(missing_ok=True)


def load_quantization(
    directory: str | os.PathLike[str], modules: Mapping[str, EncryptedAttention]
) -> dict[str, QuantizedAttention]:
    """Read the parameters of ``modules``; an empty dict if they were saved before calibration.

    Raises ``ValueError``, naming the file, if it is damaged or belongs to another model or configuration.
    """
    path = Path(directory) / QUANTIZATION_NAME
    if not path.is_file():
        return {}
    try:
        arrays = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return {name: _restore(path, module, _arrays_of(name, arrays)) for name, module in modules.items()}


def _arrays_of(name: str, arrays: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
    return {key[len(name) + 1 :]: array for key, array in arrays.items() if key.startswith(f"{name}.")}


def _restore(
    path: Path, module: EncryptedAttention, arrays: dict[str, NDArray[np.generic]]
) -> QuantizedAttention:
    if not arrays:
        raise ValueError(f"{path} is damaged: nothing in it for {module.name}")
    try:
        quantized = QuantizedAttention.from_arrays(arrays)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {module.name}: {error}") from error
    config = module.config
    saved = (
        quantized.width,
        quantized.head_dim,
        list(quantized.heads),
        quantized.n_bits,
        quantized.project,
    )
    expected = (module.width, module.head_dim, module.heads, config.n_bits, config.heads is None)
    if saved != expected:
        raise ValueError(f"{path} does not fit the model or its configuration: {module.name}")
    return quantized
