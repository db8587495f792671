"""Whether probabilities mean what they say, and whether tiles leave seams."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Reliability:
    """Voxels by predicted probability, in bins of equal width from 0 to 1; parts of a whole add up.

    ``voxels``, ``sum_predicted`` and ``sum_true`` count each bin's voxels, add up their
    probabilities, and count those that are truly the target. ``sum_error`` adds up absolute errors.
    """

    voxels: NDArray[np.int64]
    sum_predicted: NDArray[np.float64]
    sum_true: NDArray[np.float64]
    sum_error: NDArray[np.float64]

    @classmethod
    def of(
        cls,
        probability: NDArray,
        reference: NDArray[np.bool_],
        known: NDArray[np.bool_] | None = None,
        *,
        bins: int = 15,
    ) -> Reliability:
        """Of probabilities and a mask of one shape; voxels outside ``known`` are left out."""
        p, truth = (probability, reference) if known is None else (probability[known], reference[known])
        p, truth = p.ravel(order="F").astype(np.float64), truth.ravel(order="F")
        place = np.minimum((p * bins).astype(np.int64), bins - 1)
        voxels, predicted, true, error = (
            np.bincount(place, weights=w, minlength=bins) for w in (None, p, truth.astype(float), np.abs(p - truth))
        )
        return cls(
            voxels.astype(np.int64),
            predicted.astype(np.float64),
            true.astype(np.float64),
            error.astype(np.float64),
        )

    def __add__(self, other: Reliability) -> Reliability:
        return Reliability(
            self.voxels + other.voxels,
            self.sum_predicted + other.sum_predicted,
            self.sum_true + other.sum_true,
            self.sum_error + other.sum_error,
        )

    def rows(self) -> list[dict[str, float]]:
        """A row for each bin, as a table holds them; :meth:`of_columns` takes them back."""
        return [
            {"bin": i, "voxels": int(n), "sum_predicted": p, "sum_true": t, "sum_error": e}
            for i, (n, p, t, e) in enumerate(
                zip(self.voxels, self.sum_predicted, self.sum_true, self.sum_error, strict=True)
            )
        ]

    @classmethod
    def of_columns(cls, columns: Mapping[str, NDArray]) -> Reliability:
        """From the columns of :meth:`rows`, in the order of bins."""
        voxels, *sums = (np.asarray(columns[name]) for name in ("voxels", "sum_predicted", "sum_true", "sum_error"))
        return cls(voxels.astype(np.int64), *(s.astype(np.float64) for s in sums))

    @property
    def curve(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean probability and share of true voxels of each bin; NaN where a bin is empty."""
        with np.errstate(invalid="ignore"):
            return self.sum_predicted / self.voxels, self.sum_true / self.voxels

    @property
    def expected_error(self) -> float:
        """Expected calibration error (Guo et al. 2017): the bins' gaps by their voxels. No voxels: undefined."""
        total = int(self.voxels.sum())
        return float(np.abs(self.sum_predicted - self.sum_true).sum() / total) if total else nan

    @property
    def mean_absolute_error(self) -> float:
        """Mean of \\|probability − truth\\| over all voxels. No voxels: undefined."""
        total = int(self.voxels.sum())
        return float(self.sum_error.sum()) / total if total else nan


def seam_score(values: NDArray, borders: Sequence[Sequence[int]]) -> float:
    """How much more ``values`` (X, Y, Z) jump across tiles' borders than elsewhere: 1 is no seam.

    ``borders`` are, for each axis, the first planes of tiles, and those after their last. The ratio of
    the mean absolute difference of neighbouring planes across borders to that of planes one and two
    steps beside them, where the image itself changes alike. An axis all of whose planes are borders
    does not count. No border, or values that change nowhere: undefined.
    """
    across, beside = [], []
    for axis, planes in enumerate(borders):
        moved = np.moveaxis(values, axis, 0)
        seams = {p - 1 for p in planes if 0 < p < len(moved)}  # the step from plane i to i + 1 is called i
        near = {n for s in seams for d in (-2, -1, 1, 2) if 0 <= (n := s + d) < len(moved) - 1} - seams
        if near:
            across += [_step(moved, i) for i in seams]
            beside += [_step(moved, i) for i in near]
    if not across or np.mean(beside) == 0:
        return nan
    return float(np.mean(across) / np.mean(beside))


def _step(planes: NDArray, i: int) -> float:
    """Mean absolute difference of planes i and i + 1."""
    return float(np.abs(np.subtract(planes[i + 1], planes[i], dtype=np.float32)).mean(dtype=np.float64))
