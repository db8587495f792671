"""Individual lesions: which are detected, which predicted ones are real, and how large they are."""

from __future__ import annotations

from dataclasses import dataclass
from math import nan

import numpy as np
from numpy.typing import NDArray

from delineate.core.components import connected_components

Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Lesions:
    """The components of a reference and of a prediction, and how much of each the other covers.

    Sizes are in voxels, ``covered`` is the fraction (0 … 1) of a component's voxels in the other mask. A
    component is matched if more than ``minimum_overlap`` of it is covered: by default, any overlap.
    """

    reference_sizes: NDArray[np.int64]
    reference_covered: NDArray[np.float64]
    prediction_sizes: NDArray[np.int64]
    prediction_covered: NDArray[np.float64]
    minimum_overlap: float = 0.0

    @classmethod
    def of(cls, reference: Mask, prediction: Mask, *, minimum_overlap: float = 0.0) -> Lesions:
        """The 26-connected components of two masks (X, Y, Z) of the same shape."""
        return cls(*_components(reference, prediction), *_components(prediction, reference), minimum_overlap)

    @property
    def count(self) -> int:
        """Number of lesions in the reference."""
        return len(self.reference_sizes)

    @property
    def predicted(self) -> int:
        """Number of lesions in the prediction."""
        return len(self.prediction_sizes)

    @property
    def found(self) -> NDArray[np.bool_]:
        """For each reference lesion, whether the prediction detects it."""
        return self.reference_covered > self.minimum_overlap

    @property
    def right(self) -> NDArray[np.bool_]:
        """For each predicted lesion, whether the reference confirms it."""
        return self.prediction_covered > self.minimum_overlap

    @property
    def recall(self) -> float:
        """Fraction of reference lesions that are detected. No lesion: undefined (the WMH 2017 script says 1)."""
        return float(self.found.mean()) if self.count else nan

    @property
    def precision(self) -> float:
        """Fraction of predicted lesions that are real. None predicted: undefined (the WMH 2017 script says 1)."""
        return float(self.right.mean()) if self.predicted else nan

    @property
    def f1(self) -> float:
        """Harmonic mean of recall and precision. No lesion in either mask: 1; in only one: 0."""
        if not self.count and not self.predicted:
            return 1.0
        if not self.found.any() or not self.right.any():
            return 0.0
        return 2 * self.recall * self.precision / (self.recall + self.precision)


def _components(mask: Mask, other: Mask) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Sizes of a mask's components, and the fraction of each that lies in the other mask."""
    labels, count = connected_components(mask)
    inside = labels[mask]  # only the mask's voxels: a fraction of the volume
    sizes = np.bincount(inside, minlength=count + 1)[1:]
    covered = np.bincount(inside, weights=other[mask], minlength=count + 1)[1:]
    return sizes.astype(np.int64), covered / np.maximum(sizes, 1)
