"""Calibrations that need not be made again: those that come with the package, and those made before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path

import torch
from platformdirs import user_cache_path

from cipherlm.models.ckks import CkksModel
from cipherlm.models.storage import load_ranges, save_ranges

_SHIPPED = ("smollm2",)


def calibrate_once(model: CkksModel, texts: Callable[[], Sequence[torch.Tensor]]) -> bool:
    """Calibrate a model on ``texts()``, unless that was done before; say whether it was done now.

    A calibration belongs to weights and public prefix, and serves contexts as long as its own. Those made
    here are kept in the user's cache directory.
    """
    if model.is_calibrated:
        return False
    cached = user_cache_path("cipherlm") / "calibrations" / model.fingerprint[:32]
    shipped = [Path(str(files("cipherlm.models").joinpath(name))) for name in _SHIPPED]
    if any(_taken(model, directory) for directory in (*shipped, cached)):
        return False
    model.calibrate(list(texts()))
    try:
        cached.mkdir(parents=True, exist_ok=True)
        save_ranges(cached, model.remote_modules, model.placement)
    except OSError:  # a directory that cannot be written makes it slower, and no more
        pass
    return True


def shipped(name: str) -> Path | None:
    """Return the directory of the calibration that comes with the package for a model of that name."""
    return Path(str(files("cipherlm.models").joinpath(name))) if name in _SHIPPED else None


def _taken(model: CkksModel, directory: Path) -> bool:
    """Use the ranges in a directory, if they are for this model."""
    try:
        ranges = load_ranges(directory, model.remote_modules, model.placement, context=True)
    except ValueError:  # of another model, prefix or version
        return False
    if ranges:
        model.freeze(ranges)
    return bool(ranges)
