"""Quantities measured with a segmentation, and the error of a predicted one."""

from __future__ import annotations

from math import nan

import numpy as np
from numpy.typing import NDArray

from delineate.core.grid import box_around
from delineate.metrics.surface import ROUNDING, Spacing, steps_of


def volume_ml(mask: NDArray[np.bool_], voxel_ml: float, known: NDArray[np.bool_] | None = None) -> float:
    """Volume of a boolean mask in millilitres, without voxels outside ``known``.

    ``voxel_ml`` is the volume of one voxel (``Grid.voxel_ml``).
    """
    return int(np.count_nonzero(mask if known is None else mask & known)) * voxel_ml


def within(
    values: NDArray, mask: NDArray[np.bool_], spacing_mm: Spacing, margin_mm: float = 0.0
) -> tuple[float, float]:
    """Mean and median of a quantity map (X, Y, Z) in a mask, ``margin_mm`` or more inside its surface.

    The margin excludes partial-volume voxels at the surface. Nothing left: undefined (NaN).
    ``spacing_mm`` as for :func:`delineate.metrics.surface.surface_distances`.
    """
    box = box_around(mask)
    if box is None:
        return nan, nan
    inner = mask[box]
    if margin_mm > 0:
        inner = _inside(inner, steps_of(spacing_mm, 3), margin_mm)
    chosen = values[box][inner].astype(np.float64)
    return (float(chosen.mean()), float(np.median(chosen))) if chosen.size else (nan, nan)


def _inside(mask: NDArray[np.bool_], steps_mm: NDArray[np.float64], margin_mm: float) -> NDArray[np.bool_]:
    """The mask's voxels that are farther than a margin from every voxel outside the mask or the array."""
    from scipy import ndimage  # slow to import

    margin_mm *= ROUNDING
    if np.count_nonzero(steps_mm) == 3:
        # A frame of background: a mask that reaches the edge of the scan ends there.
        depth_mm = ndimage.distance_transform_edt(np.pad(mask, 1), sampling=np.diag(steps_mm))
        return np.asarray(depth_mm[1:-1, 1:-1, 1:-1] > margin_mm)
    # Sheared: distance transforms only know spacings, so check that everything within the margin is in the mask.
    if margin_mm >= (mask.shape * np.linalg.norm(steps_mm, axis=0)).min():
        return np.zeros_like(mask)  # no voxel is that deep along this axis
    reach = [int(n) for n in margin_mm * np.linalg.norm(np.linalg.inv(steps_mm), axis=1)]
    offsets = np.indices([2 * n + 1 for n in reach]) - np.array(reach)[:, None, None, None]
    within_margin = np.linalg.norm(np.tensordot(steps_mm, offsets, 1), axis=0) <= margin_mm
    return np.asarray(ndimage.binary_erosion(mask, within_margin))


def error_percent(value: float, reference: float) -> float:
    """Signed error in percent of the reference. Reference 0: undefined (NaN), whatever the value."""
    return 100 * (value - reference) / reference if reference else nan
