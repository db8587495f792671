"""Where voxels lie in the patient: shape, affine, and what follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations, product

import numpy as np
from numpy.typing import NDArray

AXES = "xyz"
"""An array's axes (X, Y, Z), by their names in recipes and options."""

Shape3 = tuple[int, int, int]
Affine = NDArray[np.float64]

_NEGATIVE, _POSITIVE = "LPI", "RAS"

SAME_SPACING = 0.01
"""Spacings that differ by no more than this fraction count as the same: headers round them."""

_SAME_COSINE = 1e-3
"""Rounding changes directions by a few millionths at most, far less than this."""


@dataclass(frozen=True, eq=False)
class Grid:
    """A box of voxels in the patient.

    ``shape`` counts voxels along (x, y, z); ``affine`` (4, 4) maps a voxel index to world
    millimetres, RAS+. Compare two grids with :meth:`matches`, which goes by the distance between
    corners, never by exact equality of floats.

    >>> grid = Grid.of_spacing((100, 80, 20), spacing_mm=(1, 1, 5))
    >>> grid
    100 × 80 × 20 voxels of 1 × 1 × 5 mm, RAS
    >>> grid.crop(start=(1, 0, 0), shape=grid.shape).corner_distance_mm(grid)
    1.0
    """

    shape: Shape3
    affine: Affine

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        affine = np.array(self.affine, dtype=np.float64)
        affine.setflags(write=False)
        object.__setattr__(self, "affine", affine)

    @classmethod
    def of_spacing(cls, shape: Sequence[int], spacing_mm: Sequence[float] = (1, 1, 1)) -> Grid:
        """An axis-aligned RAS grid with its first voxel at the origin."""
        x, y, z = shape
        return cls((x, y, z), np.diag([*map(float, spacing_mm), 1.0]))

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between neighbouring voxel centres along each axis."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(x), float(y), float(z)

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel in millilitres; right for sheared grids too."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000

    @property
    def slice_axis(self) -> int:
        """The axis across the slices: that of a single slice, or else the one with the largest spacing.

        A single slice has one voxel along this axis alone, however thick it is. Among axes whose spacings are the same
        within :data:`SAME_SPACING`, it is the one nearest to the body's feet–head axis (then front–back, then the
        array's last). Rounding in a header does not change it.
        """
        single = [axis for axis in range(3) if self.shape[axis] == 1]
        if len(single) == 1:
            return single[0]
        spacing, cosines = np.array(self.spacing_mm), np.abs(self._cosines)
        axes = [axis for axis in range(3) if spacing[axis] >= (1 - SAME_SPACING) * spacing.max()]
        for world in (2, 1):
            nearest = max(cosines[world, axis] for axis in axes)
            axes = [axis for axis in axes if cosines[world, axis] >= nearest - _SAME_COSINE]
        return axes[-1]

    @property
    def orientation(self) -> str:
        """Direction of increasing index along each axis, as three of the letters RLAPSI."""
        world, sign = self._world_axes()
        return "".join((_POSITIVE if s > 0 else _NEGATIVE)[w] for w, s in zip(world, sign, strict=True))

    @property
    def corners_mm(self) -> NDArray[np.float64]:
        """The eight outermost voxel centres (8, 3) in world millimetres."""
        index = np.array(list(product(*((0, n - 1) for n in self.shape))), dtype=np.float64)
        return self.world(index)

    def world(self, index: NDArray[np.float64]) -> NDArray[np.float64]:
        """World millimetres (n, 3) of voxel indices (n, 3)."""
        return index @ self.affine[:3, :3].T + self.affine[:3, 3]

    def corner_distance_mm(self, other: Grid) -> float:
        """Largest distance between corresponding corners; infinite where the shapes differ."""
        if self.shape != other.shape:
            return float("inf")
        return float(np.linalg.norm(self.corners_mm - other.corners_mm, axis=1).max())

    def matches(self, other: Grid, tolerance_mm: float = 0.01) -> bool:
        """Whether both grids have the same shape and the same corners within the tolerance."""
        return self.corner_distance_mm(other) <= tolerance_mm

    def crop(self, start: Sequence[int], shape: Sequence[int]) -> Grid:
        """The grid of the box of ``shape`` that begins at ``start`` (negative: outside the grid, that is, padding)."""
        affine = self.affine.copy()
        affine[:3, 3] = self.world(np.array([start], dtype=np.float64))[0]
        x, y, z = shape
        return Grid((x, y, z), affine)

    def resample(self, shape: Sequence[int]) -> Grid:
        """The grid with a different number of voxels over the same extent (outer voxel borders kept)."""
        scale = np.array(self.shape, dtype=np.float64) / np.array(shape)
        affine = self.affine.copy()
        affine[:3, :3] = self.affine[:3, :3] * scale
        # The first voxel's outer corner stays; its centre moves by half the change in size.
        affine[:3, 3] = self.world(((scale - 1) / 2)[None])[0]
        x, y, z = shape
        return Grid((x, y, z), affine)

    def axes_to(self, orientation: str) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
        """How to view this grid in an orientation such as ``"RAS"``.

        Returns ``order`` and ``flip``: axis ``i`` of the view is this grid's axis ``order[i]``,
        reversed where ``flip[i]``.
        """
        world, sign = self._world_axes()
        order, flip = [], []
        for letter in orientation:
            wanted = _POSITIVE.find(letter) if letter in _POSITIVE else _NEGATIVE.find(letter)
            axis = world.index(wanted)
            order.append(axis)
            flip.append((sign[axis] > 0) != (letter in _POSITIVE))
        return (order[0], order[1], order[2]), (flip[0], flip[1], flip[2])

    def permute(self, order: Sequence[int], flip: Sequence[bool]) -> Grid:
        """The grid of ``permute_axes(array, order, flip)``."""
        affine = self.affine.copy()
        affine[:3, :3] = self.affine[:3, list(order)]
        shape = [self.shape[axis] for axis in order]
        for i, reverse in enumerate(flip):
            if reverse:
                affine[:3, 3] += affine[:3, i] * (shape[i] - 1)
                affine[:3, i] *= -1
        return Grid((shape[0], shape[1], shape[2]), affine)

    def __repr__(self) -> str:
        spacing = " × ".join(f"{s:.4g}" for s in self.spacing_mm)
        return f"{' × '.join(map(str, self.shape))} voxels of {spacing} mm, {self.orientation}"

    def _world_axes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """For each voxel axis, the world axis it runs along, and its sign."""
        cosines = self._cosines
        orders = {order: sum(abs(cosines[order[i], i]) for i in range(3)) for order in permutations(range(3))}
        # At 45° several orders are equally near; rounding must not choose among them.
        world = next(order for order, near in orders.items() if near >= max(orders.values()) - _SAME_COSINE)
        return world, tuple(1 if cosines[world[i], i] >= 0 else -1 for i in range(3))

    @property
    def _cosines(self) -> NDArray[np.float64]:
        """World direction of each voxel axis, one column each."""
        cosines: NDArray[np.float64] = self.affine[:3, :3] / np.linalg.norm(self.affine[:3, :3], axis=0)
        return cosines


def orthogonal(steps_mm: NDArray[np.float64]) -> bool:
    """Whether axes are at right angles, given their steps from voxel to voxel as columns (d, d).

    If so, distances computed from spacings alone are right to a millionth.
    """
    cosines = steps_mm / np.linalg.norm(steps_mm, axis=0)
    return bool(np.abs(cosines.T @ cosines - np.eye(len(cosines))).max() <= 1e-6)


def permute_axes(array: NDArray, order: Sequence[int], flip: Sequence[bool]) -> NDArray:
    """View of ``array`` (..., X, Y, Z) with its last three axes reordered, then flipped."""
    lead = array.ndim - 3
    array = array.transpose(*range(lead), *(lead + axis for axis in order))
    return array[(..., *(slice(None, None, -1 if reverse else None) for reverse in flip))]


def permute_axes_back(array: NDArray, order: Sequence[int], flip: Sequence[bool]) -> NDArray:
    """Inverse of :func:`permute_axes` with the same arguments."""
    lead = array.ndim - 3
    array = array[(..., *(slice(None, None, -1 if reverse else None) for reverse in flip))]
    return array.transpose(*range(lead), *(lead + list(order).index(axis) for axis in range(3)))


def box_around(mask: NDArray[np.bool_], margin: int = 0) -> tuple[slice, ...] | None:
    """The smallest box around the true voxels of ``mask``, widened by ``margin`` within the array; None if empty."""
    plane = np.logical_or.reduce(mask, axis=-1)  # once: the last axis is the longest way through memory
    axes = range(plane.ndim)
    lines = [plane.any(axis=tuple(other for other in axes if other != axis)) for axis in axes]
    hits = [np.flatnonzero(line) for line in (*lines, np.logical_or.reduce(mask, axis=tuple(axes)))]
    if not hits[-1].size:
        return None
    return tuple(
        slice(max(0, int(hit[0]) - margin), min(size, int(hit[-1]) + 1 + margin))
        for hit, size in zip(hits, mask.shape, strict=True)
    )
