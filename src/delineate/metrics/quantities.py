"""Quantities read off a segmentation, and how far a predicted one is off."""

from __future__ import annotations

from collections.abc import Sequence
from math import nan

import numpy as np
from numpy.typing import NDArray


def volume_ml(mask: NDArray[np.bool_], voxel_ml: float, known: NDArray[np.bool_] | None = None) -> float:
    """Volume of a boolean mask in millilitres, without the voxels outside ``known``.

    ``voxel_ml`` is one voxel's volume (``Grid.voxel_ml``).
    """
    return int(np.count_nonzero(mask if known is None else mask & known)) * voxel_ml


def within(
    values: NDArray, mask: NDArray[np.bool_], spacing_mm: Sequence[float], margin_mm: float = 0.0
) -> tuple[float, float]:
    """Mean and median of a map of a quantity (X, Y, Z) in a mask, ``margin_mm`` or more inside its surface.

    The margin keeps out voxels that hold part of what lies around. Nothing left: undefined (NaN).
    """
    if not mask.any():
        return nan, nan
    box = tuple(
        slice(int(f[0]), int(f[-1]) + 1)
        for axis in range(3)
        for f in [np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis})))]
    )
    inner = mask[box]
    if margin_mm > 0:
        from scipy.ndimage import distance_transform_edt  # slow to import

        # A frame of background: what leaves the scan ends there.
        inner = distance_transform_edt(np.pad(inner, 1), sampling=spacing_mm)[1:-1, 1:-1, 1:-1] > margin_mm
    chosen = values[box][inner].astype(np.float64)
    return (float(chosen.mean()), float(np.median(chosen))) if chosen.size else (nan, nan)


def error_percent(value: float, reference: float) -> float:
    """Signed error in percent of the reference. Reference 0: undefined (NaN), whatever the value."""
    return 100 * (value - reference) / reference if reference else nan
