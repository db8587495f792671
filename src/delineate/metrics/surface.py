"""How far apart the surfaces of two masks lie, in millimetres.

Definition: a surface voxel belongs to its mask and has a face neighbour (6-connectivity) that does
not; what lies outside the array does not. Distances run between centres of surface voxels,
unweighted, as in MONAI and MedPy; surfel-weighted tools (DeepMind's surface-distance) differ by a
fraction of a voxel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

Mask = NDArray[np.bool_]


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
        both = np.concatenate([self.from_reference, self.from_prediction])
        return float(both.mean()) if both.size else 0.0


def surface_distances(
    reference: Mask, prediction: Mask, spacing_mm: Sequence[float], known: Mask | None = None
) -> SurfaceDistances:
    """Distances between the surfaces of two boolean masks (X, Y, Z), or (X, Y), of one shape.

    ``spacing_mm`` has one entry per axis; axes are taken as orthogonal. Voxels outside ``known``
    count as background in both masks.
    """
    if known is not None:
        reference, prediction = reference & known, prediction & known
    box = _box(reference | prediction)
    if box is None:
        return SurfaceDistances(np.empty(0), np.empty(0))
    # Nothing lies beyond the union's box but background, so cropping to it moves no surface.
    surfaces = surface(reference[box]), surface(prediction[box])
    return SurfaceDistances(_nearest(*surfaces, spacing_mm), _nearest(*surfaces[::-1], spacing_mm))


def surface(mask: Mask) -> Mask:
    """The voxels of a mask with a face neighbour outside it, or outside the array."""
    inner = mask.copy(order="K")
    for axis in range(mask.ndim):
        core, whole = np.moveaxis(inner, axis, 0), np.moveaxis(mask, axis, 0)
        core[1:] &= whole[:-1]
        core[:-1] &= whole[1:]
        core[[0, -1]] = False
    return mask & ~inner


def _nearest(sources: Mask, targets: Mask, spacing_mm: Sequence[float]) -> NDArray[np.float64]:
    """Distance from each source voxel to the nearest target voxel, in the sources' index order."""
    index = np.argwhere(sources)
    distances = np.full(len(index), inf)
    if not targets.any():
        return distances
    # A tree over the targets answers in microseconds where surfaces are thin and near each other; the
    # rest (noise, or one surface deep inside the other) is bounded by one distance transform of the box.
    if len(index) + np.count_nonzero(targets) < sources.size / 8:
        # Sliding-midpoint splits: medians of lattice points, many of them equal, are slow to build.
        tree = cKDTree(np.argwhere(targets) * spacing_mm, balanced_tree=False)
        distances = tree.query(index * spacing_mm, distance_upper_bound=10 * min(spacing_mm))[0]
    far = np.isinf(distances)
    if far.any():
        nearest = ndimage.distance_transform_edt(
            ~targets, sampling=spacing_mm, return_distances=False, return_indices=True
        )
        index = index[far]
        offset = nearest[(slice(None), *index.T)].T - index
        distances[far] = np.linalg.norm(offset * spacing_mm, axis=1)
    return distances


def _box(mask: Mask) -> tuple[slice, ...] | None:
    """The smallest box around a mask; None where it is empty."""
    axes = range(mask.ndim)
    filled = [np.flatnonzero(mask.any(axis=tuple(other for other in axes if other != axis))) for axis in axes]
    return tuple(slice(int(f[0]), int(f[-1]) + 1) for f in filled) if filled[0].size else None


def _percentile(distances: NDArray[np.float64], percentile: float) -> float:
    if not distances.size:
        return 0.0
    # Infinite distances come all together; interpolating between them would give NaN.
    return inf if np.isinf(distances[0]) else float(np.percentile(distances, percentile))
