"""Frozen parameters on disk, in one file for all encrypted modules of a model.

Those of TFHE are arrays, in safetensors. Those of CKKS are ranges, in JSON, from which polynomials follow.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from cipherlm.models.attention import EncryptedAttention
from cipherlm.models.remote import Placement, Ranges, RemoteModule, fingerprint
from cipherlm.schemes.tfhe.attention import QuantizedAttention

QUANTIZATION_NAME = "quantisation.safetensors"
CALIBRATION_NAME = "calibration.json"
CALIBRATION_VERSION = 2


def delete_frozen(directory: str | os.PathLike[str]) -> None:
    """Delete the frozen parameters of an earlier model, whatever its scheme."""
    for name in (QUANTIZATION_NAME, CALIBRATION_NAME):
        (Path(directory) / name).unlink(missing_ok=True)


def save_quantization(directory: str | os.PathLike[str], modules: Mapping[str, EncryptedAttention]) -> None:
    """Write the parameters of all calibrated ``modules``, each array named after its module.

    Where nothing is calibrated there is no file.
    """
    arrays = {
        f"{name}.{key}": array
        for name, module in modules.items()
        if module.quantized is not None
        for key, array in module.quantized.to_arrays().items()
    }
    if arrays:
        save_file(arrays, Path(directory) / QUANTIZATION_NAME, metadata={"format": "np"})


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


def save_ranges(
    directory: str | os.PathLike[str], modules: Mapping[str, RemoteModule], placement: Placement
) -> None:
    """Write the ranges of calibrated remote ``modules``, with the prefix and a hash of their weights.

    Where nothing is calibrated there is no file.
    """
    if not all(module.is_calibrated for module in modules.values()):
        return
    path = Path(directory) / CALIBRATION_NAME
    values = {
        "version": CALIBRATION_VERSION,
        "fingerprint": fingerprint(modules, placement),
        "prefix": placement.prefix,
        "context": placement.geometry.context,
        "modules": {name: module.ranges for name, module in modules.items()},
    }
    path.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def load_ranges(
    directory: str | os.PathLike[str],
    modules: Mapping[str, RemoteModule],
    placement: Placement,
    *,
    context: bool = False,
) -> dict[str, Ranges]:
    """Read the ranges of remote ``modules``; an empty dict if they were saved before calibration.

    Raises ``ValueError``, naming the file, if it is damaged or belongs to another model or configuration:
    with ``context``, also if it was made for shorter contexts.
    """
    path = Path(directory) / CALIBRATION_NAME
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or not isinstance(values.get("modules"), dict):
            raise ValueError("not a calibration")
        if values.get("version") != CALIBRATION_VERSION:
            raise ValueError(f"version {values.get('version')!r} is not known: calibrate again")
        ranges = {
            name: _checked_ranges(name, module, values["modules"].get(name))
            for name, module in modules.items()
        }
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if values.get("prefix") != placement.prefix or values.get("fingerprint") != fingerprint(
        modules, placement
    ):
        raise ValueError(f"{path} does not fit the model or its configuration: calibrate again")
    if context and not placement.geometry.context <= values.get("context", 0):
        raise ValueError(f"{path} is for contexts of {values.get('context')} tokens: calibrate again")
    return ranges


def _checked_ranges(name: str, module: RemoteModule, given: Any) -> Ranges:
    expected = module.range_names
    if not isinstance(given, dict) or set(given) != set(expected):
        raise ValueError(f"{name} needs {len(expected)} ranges: {expected[0]} and others")
    return {key: _checked_range(f"{name}.{key}", given[key]) for key in expected}


def _checked_range(name: str, interval: Any) -> tuple[float, float]:
    if (
        not isinstance(interval, list)
        or len(interval) != 2
        or not all(isinstance(end, (int, float)) and math.isfinite(end) for end in interval)
        or not interval[0] <= interval[1]
    ):
        raise ValueError(f"{name}: {interval!r} is not a range")
    return float(interval[0]), float(interval[1])
