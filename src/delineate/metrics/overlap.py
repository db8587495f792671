"""How much two masks overlap: voxels are counted once, and every overlap metric follows from the counts."""

from __future__ import annotations

from dataclasses import dataclass
from math import nan

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Overlap:
    """Voxel counts of a prediction against a reference: true and false positives, false and true negatives.

    F1 is Dice by another name. An undefined metric is NaN, so that tables can count it; nothing is
    added to denominators.
    Counts of disjoint parts add up: ``Overlap.of(a) + Overlap.of(b)`` is the overlap of both together.
    """

    tp: int
    fp: int
    fn: int
    tn: int

    @classmethod
    def of(
        cls, reference: NDArray[np.bool_], prediction: NDArray[np.bool_], known: NDArray[np.bool_] | None = None
    ) -> Overlap:
        """Counts for two boolean masks of the same shape; voxels outside ``known`` are left out of both."""
        voxels = reference.size
        if known is not None:
            reference, prediction, voxels = reference & known, prediction & known, int(np.count_nonzero(known))
        tp = int(np.count_nonzero(reference & prediction))
        fp, fn = int(np.count_nonzero(prediction)) - tp, int(np.count_nonzero(reference)) - tp
        return cls(tp, fp, fn, voxels - tp - fp - fn)

    def __add__(self, other: Overlap) -> Overlap:
        return Overlap(self.tp + other.tp, self.fp + other.fp, self.fn + other.fn, self.tn + other.tn)

    @property
    def dice(self) -> float:
        """2 TP / (2 TP + FP + FN). Both empty: 1; one empty: 0."""
        return _ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn, empty=1.0)

    @property
    def jaccard(self) -> float:
        """TP / (TP + FP + FN). Both empty: 1; one empty: 0."""
        return _ratio(self.tp, self.tp + self.fp + self.fn, empty=1.0)

    @property
    def precision(self) -> float:
        """TP / (TP + FP), the fraction of the prediction that is right. Prediction empty: undefined."""
        return _ratio(self.tp, self.tp + self.fp, empty=nan)

    @property
    def recall(self) -> float:
        """TP / (TP + FN), the fraction of the reference that is found. Reference empty: undefined."""
        return _ratio(self.tp, self.tp + self.fn, empty=nan)

    @property
    def specificity(self) -> float:
        """TN / (TN + FP), the fraction of the background that is predicted as such. No background: undefined."""
        return _ratio(self.tn, self.tn + self.fp, empty=nan)


def _ratio(part: int, whole: int, *, empty: float) -> float:
    return part / whole if whole else empty
