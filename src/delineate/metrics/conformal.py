"""How far off a prediction may be, judging by the errors of other predictions with known truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from math import inf, isnan, nan

import numpy as np
from numpy.typing import NDArray

from delineate.metrics.statistics import numbered


@dataclass(frozen=True)
class Conformal:
    """Hierarchical conformal prediction (Lee et al. 2023) from ``errors``, true minus predicted, by patient.

    An interval covers a new patient's scan with at least its level if patients, and scans within each,
    are exchangeable with those that the errors come from; nothing else is assumed. Every patient has the
    same weight, however many scans there are. With one scan each it is split conformal prediction
    (Lei et al. 2018). An infinite error counts; undefined ones (NaN) are left out.
    """

    errors: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        defined = (tuple(sorted(e for e in of_one if not isnan(e))) for of_one in self.errors)
        object.__setattr__(self, "errors", tuple(sorted(of_one for of_one in defined if of_one)))

    @classmethod
    def of(cls, errors: Sequence[float], patients: Sequence[str] | None = None) -> Conformal:
        """Calibrate on one error per scan; by default each scan is from a different patient."""
        whose = numbered(patients, len(errors))
        by_patient: list[list[float]] = [[] for _ in range(int(whose.max(initial=-1)) + 1)]
        for patient, error in zip(whose, errors, strict=True):
            by_patient[patient].append(error)
        return cls(tuple(map(tuple, by_patient)))

    @staticmethod
    def fewest(level: float) -> int:
        """The smallest number of patients whose errors make an interval of this level."""
        return next(n for n in count() if _best_level(n) >= level)

    @property
    def best_level(self) -> float:
        """The highest level for which there are enough patients; 0 if there are none."""
        return _best_level(len(self.errors))

    def interval(self, level: float) -> tuple[float, float]:
        """The low and high values to add to a prediction; infinite if there are too few patients for the level."""
        errors = np.array([e for of_one in self.errors for e in of_one])
        # The new patient has the same weight as each of the others, but an unknown error.
        weights = np.array([1 / len(of_one) for of_one in self.errors for _ in of_one]) / (len(self.errors) + 1)
        share = (1 + level) / 2
        return -_reached(-errors, weights, share), _reached(errors, weights, share)

    def coverage(self, errors: Sequence[float], level: float, patients: Sequence[str] | None = None) -> float:
        """Mean over other patients of the fraction of their ``errors`` within the interval. Undefined without any.

        Meant for patients of another kind: among those of the same kind it is the level by construction.
        """
        low, high = self.interval(level)
        others = Conformal.of(errors, patients).errors
        held = [sum(low <= error <= high for error in of_one) / len(of_one) for of_one in others]
        return sum(held) / len(held) if held else nan


def _best_level(patients: int) -> float:
    return max(0.0, 1 - 2 / (patients + 1))


def _reached(values: NDArray[np.float64], weights: NDArray[np.float64], share: float) -> float:
    """The smallest value up to which the weights add up to ``share``; infinite if they never do."""
    order = np.argsort(values)
    # Rounded, since ten times 0.1 is a little less than 1.
    place = int(np.searchsorted(np.round(np.cumsum(weights[order]), 9), round(share, 9)))
    return float(values[order][place]) if place < len(values) else inf
