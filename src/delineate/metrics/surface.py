"""How far apart the surfaces of two masks lie, in millimetres.

Definition: a surface voxel belongs to its mask and has a face neighbour (6-connectivity) that does
not; nothing outside the array does. An axis along which the whole scan has one voxel has no neighbours:
a single slice is measured as the figure that it shows. Distances run between centres of surface voxels,
unweighted, as in MONAI and MedPy; :mod:`delineate.metrics.surfels` weights surfaces by area. The WMH 2017
challenge measures between slice-by-slice outlines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Literal

import numpy as np
import scipy  # loads its submodules on first use
from numpy.typing import NDArray

from delineate.core.grid import box_around, orthogonal

Mask = NDArray[np.bool_]
Spacing = Sequence[float] | NDArray[np.float64]
Edge = Literal["surface", "outlines"]

ROUNDING = 1 + 1e-6
"""How much a limit in mm is widened, so that a header's last digit does not decide whether 1 mm is within 1 mm."""


@dataclass(frozen=True, eq=False)
class SurfaceDistances:
    """From each surface voxel of one mask, the distance (mm) to the nearest of the other.

    Both masks empty: both arrays are empty and all distance metrics are 0. One empty: the distances
    from the other are infinite, and so are these metrics.
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
        # An empty mask has no distances of its own: take the other direction's, which are infinite.
        return (inf, inf) if inf in (forth, back) else (forth, back)

    def surface_dice(self, tolerance_mm: float) -> float:
        """Fraction of both surfaces' voxels within ``tolerance_mm`` of the other (Nikolov et al. 2018, by voxel).

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
    axes: Sequence[int] | None = None,
) -> SurfaceDistances:
    """Distances between the surfaces of two boolean masks (X, Y, Z), or (X, Y), of the same shape.

    ``spacing_mm`` has one entry per axis if the axes are orthogonal; otherwise it is a matrix whose columns are the
    axes' steps from voxel to voxel in world millimetres (``Grid.affine[:3, :3]``), which may be rotated, mirrored
    and sheared. Voxels outside ``known`` count as background in both masks. ``edge``: the masks'
    ``surface``, or their ``outlines`` in the slices across ``slice_axis``. ``axes``, for masks cropped from a scan:
    its :func:`extended_axes`.
    """
    if axes is None:
        axes = extended_axes(reference.shape)
    steps_mm = steps_of(spacing_mm, reference.ndim)
    if known is not None:
        reference, prediction = reference & known, prediction & known
    box = box_around(reference | prediction)
    if box is None:
        return SurfaceDistances(np.empty(0), np.empty(0))
    # Outside the union's box is only background, so cropping to it moves no surface.
    if edge == "surface":
        surfaces = surface(reference[box], axes), surface(prediction[box], axes)
    else:
        # The array's border is not an outline, since a mask may continue beyond it: keep a voxel around the box.
        box = tuple(slice(max(0, b.start - 1), b.stop + 1) for b in box)
        surfaces = outlines(reference[box], slice_axis), outlines(prediction[box], slice_axis)
    return SurfaceDistances(nearest_mm(*surfaces, steps_mm), nearest_mm(*surfaces[::-1], steps_mm))


def extended_axes(shape: Sequence[int]) -> tuple[int, ...]:
    """The axes along which a scan has more than one voxel, or all if it is a single voxel.

    Surfaces are looked for along these: a single slice does not end above and below, there is just nothing known.
    """
    return tuple(axis for axis, n in enumerate(shape) if n > 1) or tuple(range(len(shape)))


def surface(mask: Mask, axes: Sequence[int] | None = None) -> Mask:
    """A mask's voxels with a face neighbour along ``axes`` outside the mask or the array.

    ``axes``: by default, the :func:`extended_axes` of the array.
    """
    inner = mask.copy(order="K")
    for axis in extended_axes(mask.shape) if axes is None else axes:
        core, whole = np.moveaxis(inner, axis, 0), np.moveaxis(mask, axis, 0)
        core[1:] &= whole[:-1]
        core[:-1] &= whole[1:]
        core[[0, -1]] = False
    return mask & ~inner


def outlines(mask: Mask, slice_axis: int) -> Mask:
    """A mask's voxels with any of the eight neighbours in their slice outside it, as in the WMH 2017 challenge.

    Everything outside the array counts as part of the mask.
    """
    inner = mask
    for axis in range(mask.ndim):
        if axis != slice_axis:
            # One axis after the other: neighbours of neighbours make up the eight.
            whole, inner = np.moveaxis(inner, axis, 0), inner.copy(order="K")
            core = np.moveaxis(inner, axis, 0)
            core[1:] &= whole[:-1]
            core[:-1] &= whole[1:]
    return mask & ~inner


def steps_of(spacing_mm: Spacing, axes: int) -> NDArray[np.float64]:
    """The matrix of steps for a spacing: diagonal, unless the spacing is a matrix already.

    Rotated and mirrored orthogonal axes become diagonal too, since distances do not depend on them.
    """
    given = np.asarray(spacing_mm, dtype=np.float64)
    steps = given if given.ndim == 2 else np.diag(given)
    if steps.shape != (axes, axes):
        raise ValueError(f"a mask with {axes} axes needs that many spacings, or a square matrix; got {given.shape}")
    return np.diag(np.linalg.norm(steps, axis=0)) if orthogonal(steps) else steps


def nearest_mm(sources: Mask, targets: Mask, steps_mm: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distance from each source voxel to the nearest target voxel, in the sources' index order.

    ``steps_mm`` is what :func:`steps_of` gives.
    """
    index, there = np.argwhere(sources), np.argwhere(targets)
    distances = np.full(len(index), inf)
    if not len(there):
        return distances
    # Where the surfaces coincide, there is nothing to search.
    distances[targets[sources]] = 0
    spacing_mm = np.linalg.norm(steps_mm, axis=0)
    if np.count_nonzero(steps_mm) > len(spacing_mm):
        # Sheared: distance transforms only know spacings, so the tree answers everything.
        left = np.isinf(distances)
        distances[left] = scipy.spatial.cKDTree(there @ steps_mm.T, balanced_tree=False).query(
            index[left] @ steps_mm.T
        )[0]
        return distances
    # A tree over the targets answers in microseconds where surfaces are thin and near each other; the
    # rest (noise, or one surface deep inside the other) is bounded by one distance transform of the box.
    if len(index) + len(there) < sources.size / 8:
        # Sliding-midpoint splits: median splits of lattice points, with many ties, are slow to build.
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
    # Distances are infinite all together or not at all; interpolating between them would give NaN.
    return inf if np.isinf(distances[0]) else float(np.percentile(distances, percentile))
