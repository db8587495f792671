"""One target of one subject, predicted and true: what every metric is read from, each part computed once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from delineate.core.grid import Grid
from delineate.metrics.lesions import Lesions
from delineate.metrics.overlap import Overlap
from delineate.metrics.surface import SurfaceDistances, box_around, surface_distances

Mask = NDArray[np.bool_]
Part = Literal["apex", "base"]


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two masks (X, Y, Z), cropped to the box around both, of a volume with ``voxels`` known voxels.

    ``head_axis`` is the array's axis along the body, ``head_last`` whether its last slice is nearest to the head.
    ``more`` has what masks alone do not tell, by the metric's name.
    """

    reference: Mask
    prediction: Mask
    spacing_mm: tuple[float, float, float]
    voxel_ml: float
    voxels: int
    head_axis: int = 2
    head_last: bool = True
    minimum_overlap: float = 0.0
    more: Mapping[str, float] = field(default_factory=dict)

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
    ) -> Comparison:
        """Two masks on a grid; voxels outside ``known`` are left out of both.

        ``minimum_overlap`` is the share of a lesion that must be covered for it to be matched.
        """
        voxels = reference.size
        if known is not None:
            reference, prediction, voxels = reference & known, prediction & known, int(np.count_nonzero(known))
        # A voxel more than the box: outlines see what lies beyond them.
        box = box_around(reference | prediction) or (slice(0, 1),) * 3
        box = tuple(slice(max(0, b.start - 1), b.stop + 1) for b in box)
        (axis, *_), (reverse, *_) = grid.axes_to("SAR")
        return cls(
            reference[box], prediction[box], grid.spacing_mm, grid.voxel_ml, voxels, axis, not reverse,
            minimum_overlap, more or {},
        )  # fmt: skip

    @cached_property
    def overlap(self) -> Overlap:
        counts = Overlap.of(self.reference, self.prediction)
        return Overlap(counts.tp, counts.fp, counts.fn, self.voxels - counts.tp - counts.fp - counts.fn)

    @cached_property
    def surfaces(self) -> SurfaceDistances:
        return surface_distances(self.reference, self.prediction, self.spacing_mm)

    @cached_property
    def outlines(self) -> SurfaceDistances:
        """Between outlines in the slices that are furthest apart."""
        across = int(np.argmax(self.spacing_mm[::-1]))
        return surface_distances(
            self.reference, self.prediction, self.spacing_mm, edge="outlines", slice_axis=2 - across
        )

    @cached_property
    def lesions(self) -> Lesions:
        return Lesions.of(self.reference, self.prediction, minimum_overlap=self.minimum_overlap)

    @property
    def volume_ml(self) -> float:
        return (self.overlap.tp + self.overlap.fp) * self.voxel_ml

    @property
    def reference_volume_ml(self) -> float:
        return (self.overlap.tp + self.overlap.fn) * self.voxel_ml

    def part(self, part: Part) -> Comparison:
        """One of :attr:`_parts`."""
        return self._parts[part]

    @cached_property
    def _parts(self) -> dict[Part, Comparison]:
        return {"apex": self._third("apex"), "base": self._third("base")}

    def _third(self, part: Part) -> Comparison:
        """The third of the reference's slices nearest to the feet (apex) or the head (base), and what lies beyond it.

        As PROMISE12 (Litjens et al. 2014) divides the prostate; the middle third takes what does not divide.
        """
        slices = np.flatnonzero(self.reference.any(axis=tuple(a for a in range(3) if a != self.head_axis)))
        if not slices.size:
            return self
        third = (int(slices[-1]) - int(slices[0]) + 1) // 3
        at_the_end = (part == "base") == self.head_last
        chosen = slice(int(slices[-1]) + 1 - third, None) if at_the_end else slice(None, int(slices[0]) + third)
        index: Sequence[slice] = [chosen if axis == self.head_axis else slice(None) for axis in range(3)]
        return Comparison(
            self.reference[tuple(index)], self.prediction[tuple(index)], self.spacing_mm, self.voxel_ml, self.voxels,
            self.head_axis, self.head_last, self.minimum_overlap,
        )  # fmt: skip
