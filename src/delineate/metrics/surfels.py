"""Distances between surfaces, weighted by area, as measured by DeepMind's surface-distance (Nikolov et al. 2018).

A cell between eight neighbouring voxel centres is a surface element if the mask holds some of the eight
but not all. Its area is that of the surface between them: polygons through the midpoints of the edges
between voxels inside and outside (marching cubes, Lorensen & Cline 1987). Distances run between cell
centres. Everything outside the array is background, but a scan of a single slice is measured as if it continued
unchanged above and below.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from math import inf

import numpy as np
from numpy.typing import NDArray

from delineate.core.grid import box_around
from delineate.metrics.surface import ROUNDING, Mask, Spacing, extended_axes, nearest_mm, steps_of

_CORNERS = tuple(product((0, 1), repeat=3))


@dataclass(frozen=True, eq=False)
class SurfelDistances:
    """For each surface element of one mask, the distance (mm) to the nearest of the other, and its area (mm²).

    Both masks empty: all arrays are empty, and metrics of distance are 0. One empty: the other's are infinite.
    """

    from_reference: NDArray[np.float64]
    from_prediction: NDArray[np.float64]
    reference_areas: NDArray[np.float64]
    prediction_areas: NDArray[np.float64]

    @property
    def hausdorff95_mm(self) -> float:
        """The larger of the two directed distances within which 95 % of a surface's area lies."""
        sides = ((self.from_reference, self.reference_areas), (self.from_prediction, self.prediction_areas))
        return max(_percentile(distances, areas, 95) for distances, areas in sides)

    def surface_dice(self, tolerance_mm: float) -> float:
        """Fraction of both surfaces' area within ``tolerance_mm`` of the other. Both empty: 1; one empty: 0."""
        areas = np.concatenate([self.reference_areas, self.prediction_areas])
        near = np.concatenate([self.from_reference, self.from_prediction]) <= tolerance_mm * ROUNDING
        return float(areas[near].sum() / areas.sum()) if areas.size else 1.0


def surfel_distances(
    reference: Mask, prediction: Mask, spacing_mm: Spacing, *, axes: Sequence[int] | None = None
) -> SurfelDistances:
    """Distances between the surface elements of two boolean masks (X, Y, Z) of the same shape.

    ``spacing_mm`` and ``axes`` as for :func:`delineate.metrics.surface.surface_distances`.
    """
    steps_mm = steps_of(spacing_mm, 3)
    if axes is None:
        axes = extended_axes(reference.shape)
    box = box_around(reference | prediction)
    if box is None:
        return SurfelDistances(*(np.empty(0) for _ in range(4)))
    codes = [_codes(_framed(mask[box], axes)) for mask in (reference, prediction)]
    cells = [(code > 0) & (code < 255) for code in codes]
    # Areas transform with the cofactor matrix, which is right for sheared axes too.
    cofactors = np.linalg.det(steps_mm) * np.linalg.inv(steps_mm).T
    areas = np.linalg.norm(_normals() @ cofactors.T, axis=2).sum(axis=1)  # (256,)
    return SurfelDistances(
        nearest_mm(cells[0], cells[1], steps_mm),
        nearest_mm(cells[1], cells[0], steps_mm),
        areas[codes[0][cells[0]]],
        areas[codes[1][cells[1]]],
    )


def _framed(mask: Mask, axes: Sequence[int]) -> Mask:
    """A mask with background around it along ``axes``; along others, its one slice twice, with one cell between."""
    frame = np.pad(mask, [(1, 1) if axis in axes else (0, 0) for axis in range(3)])
    return np.pad(frame, [(0, 0) if axis in axes else (0, 1) for axis in range(3)], mode="edge")


def _codes(mask: Mask) -> NDArray[np.uint8]:
    """For each cell between eight voxels, a code whose bits say which of :data:`_CORNERS` are inside."""
    codes = np.zeros([n - 1 for n in mask.shape], np.uint8)
    for bit, (x, y, z) in enumerate(_CORNERS):
        i, j, k = codes.shape
        codes |= mask[x : x + i, y : y + j, z : z + k].astype(np.uint8) << np.uint8(bit)
    return codes


@cache
def _normals() -> NDArray[np.float64]:
    """Normals (256, 8, 3) of a cell's triangles by code, whose lengths are areas in voxel units; padded with 0."""
    normals = np.zeros((256, 8, 3))
    for code in range(1, 255):
        inside = [bool(code >> bit & 1) for bit in range(8)]
        # A surface has the same area from either side: let it enclose the side with fewer voxels.
        if sum(inside) > 4:
            inside = [not corner for corner in inside]
        polygons = _polygons(dict(zip(_CORNERS, inside, strict=True)))
        found = [normal for polygon in polygons for normal in _triangles(polygon)]
        normals[code, : len(found)] = found
    return normals


def _polygons(inside: dict[tuple[int, ...], bool]) -> list[NDArray[np.float64]]:
    """Closed polygons (n, 3) through the midpoints of a cell's edges that lead from inside to outside."""
    neighbours: dict[tuple[float, ...], list[tuple[float, ...]]] = {}
    for axis, side in product(range(3), (0, 1)):
        around = [np.insert(corner, axis, side) for corner in ((0, 0), (0, 1), (1, 1), (1, 0))]
        held = [inside[tuple(int(n) for n in corner)] for corner in around]
        middles = [tuple(((around[i - 1] + around[i]) / 2).tolist()) for i in range(4)]  # before corner i
        left = [i for i in range(4) if held[i - 1] != held[i]]
        ends = [(left[0], left[1])] if len(left) == 2 else []
        if len(left) == 4:  # two opposite corners are inside: cut off each separately
            ends = [(i, (i + 1) % 4) for i in range(4) if held[i]]
        for a, b in ends:
            neighbours.setdefault(middles[a], []).append(middles[b])
            neighbours.setdefault(middles[b], []).append(middles[a])
    polygons = []
    while neighbours:
        point = next(iter(neighbours))
        polygon = []
        while point in neighbours:
            polygon.append(point)
            point = next((p for p in neighbours.pop(point) if p in neighbours), point)
        polygons.append(np.array(polygon))
    return polygons


def _triangles(polygon: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    """Normals of a polygon's triangles, fanned out from a point whose opposite in the cell also belongs to the polygon.

    If there is such a pair, half come from each of the two, so that neither is preferred. With axes at right
    angles both give the same area.
    """
    points = [tuple(point) for point in polygon.tolist()]
    first = [i for i, point in enumerate(points) if tuple(1 - n for n in point) in points][:1] or [0]
    opposite = tuple(1 - n for n in points[first[0]])
    starts = [*first, *([points.index(opposite)] if opposite in points else [])]
    fans = [np.roll(polygon, -start, axis=0) for start in starts]
    return [
        np.cross(fan[i] - fan[0], fan[i + 1] - fan[0]) / 2 / len(fans)
        for fan in fans
        for i in range(1, len(polygon) - 1)
    ]


def _percentile(distances: NDArray[np.float64], areas: NDArray[np.float64], percentile: float) -> float:
    if not distances.size:
        return 0.0
    if np.isinf(distances[0]):
        return inf
    order = np.argsort(distances, kind="stable")
    share = np.cumsum(areas[order]) / areas.sum()
    # Rounding may leave the total slightly below 1.
    return float(distances[order[min(int(np.searchsorted(share, percentile / 100)), len(order) - 1)]])
