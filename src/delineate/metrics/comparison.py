"""One target in one subject, predicted and true: all metrics are derived from it, each part computed once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from delineate.core.grid import Grid, box_around
from delineate.metrics.lesions import Lesions
from delineate.metrics.overlap import Overlap
from delineate.metrics.surface import SurfaceDistances, extended_axes, surface_distances
from delineate.metrics.surfels import SurfelDistances, surfel_distances

Mask = NDArray[np.bool_]
Part = Literal["apex", "base"]


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two masks (X, Y, Z) cropped to the box around both, its grid, and the number of known ``voxels`` in the volume.

    ``more`` holds values that masks alone cannot give, by metric name. ``axes`` are those along which the whole scan
    has more than one voxel, and masks have surfaces; ``slice_axis`` is the whole scan's.
    """

    reference: Mask
    prediction: Mask
    grid: Grid
    voxels: int
    minimum_overlap: float = 0.0
    more: Mapping[str, float] = field(default_factory=dict)
    axes: tuple[int, ...] = (0, 1, 2)
    slice_axis: int = 2

    @classmethod
    def of(
        cls,
        reference: Mask,
        prediction: Mask,
        grid: Grid,
        known: Mask | None = None,
        *,
        minimum_overlap: float = 0.0,
        more: Mapping[str, float] | None = None,
        beyond: int = 0,
    ) -> Comparison:
        """Compare two masks on a grid; voxels outside ``known`` are left out of both.

        ``minimum_overlap`` is the fraction of a lesion that must be covered for a match. Masks that are cropped from
        a scan need a voxel around them, where there is one; ``beyond`` is how many known voxels were cut off.
        """
        voxels, axes = reference.size, extended_axes(reference.shape)
        if known is not None:
            reference, prediction, voxels = reference & known, prediction & known, int(np.count_nonzero(known))
        # One voxel more than the box: outlines depend on what lies just outside.
        box = box_around(reference | prediction) or (slice(0, 1),) * 3
        box = tuple(slice(max(0, b.start - 1), b.stop + 1) for b in box)
        masks, cropped = (reference[box], prediction[box]), grid.crop([b.start for b in box], reference[box].shape)
        return cls(*masks, cropped, voxels + beyond, minimum_overlap, more or {}, axes, grid.slice_axis)

    @cached_property
    def overlap(self) -> Overlap:
        counts = Overlap.of(self.reference, self.prediction)
        return Overlap(counts.tp, counts.fp, counts.fn, self.voxels - counts.tp - counts.fp - counts.fn)

    @cached_property
    def surfaces(self) -> SurfaceDistances:
        return surface_distances(self.reference, self.prediction, self._steps_mm, axes=self.axes)

    @cached_property
    def surfels(self) -> SurfelDistances:
        """Distances between surface elements, weighted by area."""
        return surfel_distances(self.reference, self.prediction, self._steps_mm, axes=self.axes)

    @cached_property
    def outlines(self) -> SurfaceDistances:
        """Distances between outlines in the slices."""
        return surface_distances(
            self.reference, self.prediction, self._steps_mm, edge="outlines", slice_axis=self.slice_axis
        )

    @cached_property
    def lesions(self) -> Lesions:
        return Lesions.of(self.reference, self.prediction, minimum_overlap=self.minimum_overlap)

    @property
    def _steps_mm(self) -> NDArray[np.float64]:
        steps: NDArray[np.float64] = self.grid.affine[:3, :3]
        return steps

    @property
    def voxel_ml(self) -> float:
        return self.grid.voxel_ml

    @property
    def volume_ml(self) -> float:
        return (self.overlap.tp + self.overlap.fp) * self.voxel_ml

    @property
    def reference_volume_ml(self) -> float:
        return (self.overlap.tp + self.overlap.fn) * self.voxel_ml

    def part(self, part: Part) -> Comparison | None:
        """The third of the reference's slices nearest to the feet (apex) or head (base), and all slices beyond it.

        None where the reference has fewer than three slices, and so no thirds.
        """
        return self._parts[part]

    @cached_property
    def _parts(self) -> dict[Part, Comparison | None]:
        return {"apex": self._third("apex"), "base": self._third("base")}

    def _third(self, part: Part) -> Comparison | None:
        """Divide as PROMISE12 (Litjens et al. 2014) does the prostate; the middle third takes any remainder.

        Slices are across the array axis nearest to the body's long axis, from the reference's first to its last,
        gaps included.
        """
        (axis, *_), (head_first, *_) = self.grid.axes_to("SAR")
        slices = np.flatnonzero(self.reference.any(axis=tuple(a for a in range(3) if a != axis)))
        extent = int(slices[-1]) - int(slices[0]) + 1 if slices.size else 0
        if extent < 3:
            return None
        third, all_slices = extent // 3, self.reference.shape[axis]
        at_the_start = (part == "base") == head_first
        chosen = slice(0, int(slices[0]) + third) if at_the_start else slice(int(slices[-1]) + 1 - third, all_slices)
        index = tuple(chosen if a == axis else slice(0, n) for a, n in enumerate(self.reference.shape))
        reference, prediction = self.reference[index], self.prediction[index]
        grid = self.grid.crop([s.start for s in index], reference.shape)
        return Comparison(
            reference, prediction, grid, self.voxels, self.minimum_overlap, axes=self.axes, slice_axis=self.slice_axis
        )
