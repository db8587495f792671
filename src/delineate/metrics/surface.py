"""How far apart the surfaces of two masks lie, in millimetres.

Definition: a surface voxel belongs to its mask and has a face neighbour (6-connectivity) that does
not; what lies outside the array does not. Distances run between centres of surface voxels,
unweighted, as in MONAI and MedPy; :mod:`delineate.metrics.surfels` weighs surfaces by their area.
Outlines, slice by slice, are what the WMH 2017 challenge measures between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Literal

import numpy as np
import scipy  # its parts are imported when first used
from numpy.typing import NDArray

from delineate.core.grid import box_around, orthogonal

Mask = NDArray[np.bool_]
Spacing = Sequence[float] | NDArray[np.float64]
Edge = Literal["surface", "outlines"]

ROUNDING = 1 + 1e-6
"""By how much a limit in millimetres is widened: a header's last digit must not decide whether 1 mm is within 1 mm."""


@dataclass(frozen=True, eq=False)
class SurfaceDistances:
    """From each surface voxel of one mask, the distance (mm) to the nearest of the other.

    Both masks empty: both arrays are empty and every metric is 0. One empty: the distances from the
    other are infinite, and so is every metric.
    """

    from_reference: NDArray[np.float64]
    from_prediction: NDArray[np.float64]

    def hausdorff_mm(self, percentile: float = 100) -> float:
        """The larger of the two directed distances' percentiles; 100 is the Hausdorff distance."""
        return max(_percentile(self.from_reference, percentile), _percentile(self.from_prediction, percentile))

    @property
    def hausdorff95_mm(self) -> float:
        """The larger of the two directed distances' 95th percentiles."""
        return self.hausdorff_mm(95)

    @property
    def mean_mm(self) -> float:
        """Average symmetric surface distance: the mean over the surface voxels of both masks."""
        return float(self._both.mean()) if self._both.size else 0.0

    @property
    def rms_mm(self) -> float:
        """Root mean square symmetric surface distance, over the surface voxels of both masks."""
        return float(np.sqrt(np.square(self._both).mean())) if self._both.size else 0.0

    @property
    def directed_means_mm(self) -> tuple[float, float]:
        """Mean distance from the reference's surface to the prediction's, and back."""
        forth, back = (float(d.mean()) if d.size else 0.0 for d in (self.from_reference, self.from_prediction))
        # Where one mask is empty there is nothing to run back from; the distance is as infinite as forth.
        return (inf, inf) if inf in (forth, back) else (forth, back)

    def surface_dice(self, tolerance_mm: float) -> float:
        """Share of both surfaces' voxels within ``tolerance_mm`` of the other (Nikolov et al. 2018, by voxel).

        Both empty: 1; one empty: 0.
        """
        return float(np.mean(self._both <= tolerance_mm * ROUNDING)) if self._both.size else 1.0

    @property
    def _both(self) -> NDArray[np.float64]:
        return np.concatenate([self.from_reference, self.from_prediction])


def surface_distances(
    reference: Mask,
    prediction: Mask,
    spacing_mm: Spacing,
    known: Mask | None = None,
    *,
    edge: Edge = "surface",
    slice_axis: int = 2,
) -> SurfaceDistances:
    """Distances between the surfaces of two boolean masks (X, Y, Z), or (X, Y), of one shape.

    ``spacing_mm`` has one entry for each of orthogonal axes; or it is a matrix whose columns are the axes' steps
    from voxel to voxel in world millimetres (``Grid.affine[:3, :3]``), which may be turned, mirrored and
    sheared. Voxels outside ``known`` count as background in both masks. ``edge``: the masks'
    ``surface``, or their ``outlines`` in the slices across ``slice_axis``.
    """
    steps_mm = steps_of(spacing_mm, reference.ndim)
    if known is not None:
        reference, prediction = reference & known, prediction & known
    box = box_around(reference | prediction)
    if box is None:
        return SurfaceDistances(np.empty(0), np.empty(0))
    # Nothing lies beyond the union's box but background, so cropping to it moves no surface.
    if edge == "surface":
        surfaces = surface(reference[box]), surface(prediction[box])
    else:
        # The array's border is no outline: what touches it may go on. So the crop keeps a voxel around the box.
        box = tuple(slice(max(0, b.start - 1), b.stop + 1) for b in box)
        surfaces = outlines(reference[box], slice_axis), outlines(prediction[box], slice_axis)
    return SurfaceDistances(nearest_mm(*surfaces, steps_mm), nearest_mm(*surfaces[::-1], steps_mm))


def surface(mask: Mask) -> Mask:
    """The voxels of a mask with a face neighbour outside it, or outside the array."""
    inner = mask.copy(order="K")
    for axis in range(mask.ndim):
        core, whole = np.moveaxis(inner, axis, 0), np.moveaxis(mask, axis, 0)
        core[1:] &= whole[:-1]
        core[:-1] &= whole[1:]
        core[[0, -1]] = False
    return mask & ~inner


def outlines(mask: Mask, slice_axis: int) -> Mask:
    """The voxels of a mask with one of eight neighbours in their slice outside it, as the WMH 2017 challenge.

    What lies outside the array belongs to every mask.
    """
    inner = mask
    for axis in range(mask.ndim):
        if axis != slice_axis:
            # One axis after the other: the neighbours of neighbours are the eight.
            whole, inner = np.moveaxis(inner, axis, 0), inner.copy(order="K")
            core = np.moveaxis(inner, axis, 0)
            core[1:] &= whole[:-1]
            core[:-1] &= whole[1:]
    return mask & ~inner


def steps_of(spacing_mm: Spacing, axes: int) -> NDArray[np.float64]:
    """The matrix of steps that a spacing stands for: a diagonal one, unless it is one already.

    Turned and mirrored orthogonal axes become a diagonal too, for distances do not change with them.
    """
    given = np.asarray(spacing_mm, dtype=np.float64)
    steps = given if given.ndim == 2 else np.diag(given)
    if steps.shape != (axes, axes):
        raise ValueError(f"a mask of {axes} axes needs as many spacings, or a matrix of them; got {given.shape}")
    return np.diag(np.linalg.norm(steps, axis=0)) if orthogonal(steps) else steps


def nearest_mm(sources: Mask, targets: Mask, steps_mm: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distance from each source voxel to the nearest target voxel, in the sources' index order.

    ``steps_mm`` is what :func:`steps_of` gives.
    """
    index, there = np.argwhere(sources), np.argwhere(targets)
    distances = np.full(len(index), inf)
    if not len(there):
        return distances
    # Where the surfaces are one, nothing needs to be looked for.
    distances[targets[sources]] = 0
    spacing_mm = np.linalg.norm(steps_mm, axis=0)
    if np.count_nonzero(steps_mm) > len(spacing_mm):
        # Sheared: transforms know spacings only, so everything is asked of the tree.
        left = np.isinf(distances)
        distances[left] = scipy.spatial.cKDTree(there @ steps_mm.T, balanced_tree=False).query(
            index[left] @ steps_mm.T
        )[0]
        return distances
    # A tree over the targets answers in microseconds where surfaces are thin and near each other; the
    # rest (noise, or one surface deep inside the other) is bounded by one distance transform of the box.
    if len(index) + len(there) < sources.size / 8:
        # Sliding-midpoint splits: medians of lattice points, many of them equal, are slow to build.
        tree = scipy.spatial.cKDTree(there * spacing_mm, balanced_tree=False)
        for limit_mm, most in ((10 * min(spacing_mm), len(index)), (inf, sources.size // 500)):
            left = np.flatnonzero(np.isinf(distances))
            if 0 < len(left) <= most:
                distances[left] = tree.query(index[left] * spacing_mm, distance_upper_bound=limit_mm)[0]
    far = np.isinf(distances)
    if far.any():
        nearest = scipy.ndimage.distance_transform_edt(
            ~targets, sampling=spacing_mm, return_distances=False, return_indices=True
        )
        index = index[far]
        offset = nearest[(slice(None), *index.T)].T - index
        distances[far] = np.linalg.norm(offset * spacing_mm, axis=1)
    return distances


def _percentile(distances: NDArray[np.float64], percentile: float) -> float:
    if not distances.size:
        return 0.0
    # Infinite distances come all together; interpolating between them would give NaN.
    return inf if np.isinf(distances[0]) else float(np.percentile(distances, percentile))
