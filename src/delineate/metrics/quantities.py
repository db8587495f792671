"""Quantities read off a segmentation, and how far a predicted one is off."""

from __future__ import annotations

from math import nan

import numpy as np
from numpy.typing import NDArray


def volume_ml(mask: NDArray[np.bool_], voxel_ml: float, known: NDArray[np.bool_] | None = None) -> float:
    """Volume of a boolean mask in millilitres, without the voxels outside ``known``.

    ``voxel_ml`` is one voxel's volume (``Grid.voxel_ml``).
    """
    return int(np.count_nonzero(mask if known is None else mask & known)) * voxel_ml


def error_percent(value: float, reference: float) -> float:
    """Signed error in percent of the reference. Reference 0: undefined (NaN), whatever the value."""
    return 100 * (value - reference) / reference if reference else nan
