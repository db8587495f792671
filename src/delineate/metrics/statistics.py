"""What a sample of subjects says of all: means with intervals, and whether two methods differ.

Several scans of one patient tell less than as many patients: whole patients are resampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan, nan

import numpy as np
from numpy.typing import NDArray
from scipy import stats

RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """A metric over subjects, without the ``undefined`` (NaN or infinite) values.

    ``sd`` has ``n - 1`` in its denominator. ``ci95`` is the percentile interval of the mean under
    10 000 bootstrap resamples of the ``patients`` (Efron 1979), seeded. They are NaN for fewer than
    two subjects or patients.
    """

    mean: float
    sd: float
    ci95: tuple[float, float]
    n: int
    undefined: int
    patients: int

    @property
    def count(self) -> str:
        """``n``, and of how many patients where those are fewer."""
        return str(self.n) if self.patients == self.n else f"{self.n} of {self.patients} patients"


def estimate_means(
    values: NDArray[np.float64], patients: Sequence[str] | None = None, *, seed: int = 0
) -> list[Estimate]:
    """An estimate of each column's mean; rows are subjects, resampled for all columns together.

    ``patients`` says whose each row is; by default each is one's own.
    """
    whose = np.arange(len(values)) if patients is None else _numbered(patients)
    defined = np.isfinite(values)
    sums, counts = _added_up(np.where(defined, values, 0.0), whose), _added_up(defined.astype(float), whose)
    n, rng = len(sums), np.random.default_rng(seed)
    with np.errstate(invalid="ignore"):  # a resample without a defined value has no mean
        # How often each patient is drawn makes a resample's means one matrix product; in parts, to bound memory.
        draws = (rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES // 10).astype(float) for _ in range(10))
        means = np.concatenate([draw @ sums / (draw @ counts) for draw in draws])
    return [
        _estimate(column[use], resampled[np.isfinite(resampled)], int((~use).sum()), int(np.count_nonzero(of_patients)))
        for column, use, resampled, of_patients in zip(values.T, defined.T, means.T, counts.T, strict=True)
    ]


def _numbered(patients: Sequence[str]) -> NDArray[np.int64]:
    """Patients as numbers in the order of their first rows."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(patient, len(numbers)) for patient in patients], dtype=np.int64)


def _added_up(rows: NDArray[np.float64], whose: NDArray[np.int64]) -> NDArray[np.float64]:
    """Rows of a patient as one."""
    sums = np.zeros((int(whose.max(initial=-1)) + 1, rows.shape[1]))
    np.add.at(sums, whose, rows)
    return sums


def _estimate(defined: NDArray[np.float64], resampled: NDArray[np.float64], undefined: int, patients: int) -> Estimate:
    n = len(defined)
    mean = float(defined.mean()) if n else nan
    sd = float(defined.std(ddof=1)) if n > 1 else nan
    if patients < 2:
        return Estimate(mean, sd, (nan, nan), n, undefined, patients)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Estimate(mean, sd, (float(low), float(high)), n, undefined, patients)


@dataclass(frozen=True)
class Difference:
    """A paired difference over ``n`` patients, first minus second.

    ``ci95`` is the percentile interval of the mean under 10 000 resamples of the patients; ``p`` is
    Wilcoxon's signed-rank test (two-sided; 1 where no pair differs), Holm-corrected within its
    family; ``effect`` is the matched-pairs rank-biserial correlation (−1 … 1; Kerby 2014).
    """

    mean: float
    ci95: tuple[float, float]
    p: float
    effect: float
    n: int

    @property
    def distinguishable(self) -> bool:
        """Whether both the test (5 %) and the interval tell the two apart."""
        low, high = self.ci95
        return self.p < 0.05 and (low > 0 or high < 0)


def paired_difference(
    first: Sequence[float] | NDArray, second: Sequence[float] | NDArray, patients: Sequence[str] | None = None
) -> Difference:
    """The difference of two columns of the same subjects; pairs with an undefined value are left out.

    Differences of one patient's subjects are averaged first; by default each subject is a patient.
    Fewer than two pairs have no interval and no test: both are NaN.
    """
    difference = np.asarray(first, float) - np.asarray(second, float)
    use = np.isfinite(difference)
    difference = difference[use]
    if patients is not None:
        whose = _numbered([patient for patient, defined in zip(patients, use, strict=True) if defined])
        difference = np.bincount(whose, weights=difference) / np.bincount(whose)
    [estimate] = estimate_means(difference[:, None])
    if estimate.n < 2:
        return Difference(estimate.mean, estimate.ci95, nan, nan, estimate.n)
    moved = difference[difference != 0]
    if not moved.size:
        return Difference(estimate.mean, estimate.ci95, 1.0, 0.0, estimate.n)
    # Ties leave no exact distribution; few pairs no normal one.
    tied = len(np.unique(np.abs(moved))) < len(moved) or len(moved) < len(difference)
    p = float(stats.wilcoxon(moved, method="approx" if tied and len(moved) > 25 else "auto").pvalue)
    ranks = stats.rankdata(np.abs(moved))
    effect = float((ranks[moved > 0].sum() - ranks[moved < 0].sum()) / ranks.sum())
    return Difference(estimate.mean, estimate.ci95, p, effect, estimate.n)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979) of a family of p values; NaN stays and does not count."""
    order = sorted((i for i, value in enumerate(p) if not isnan(value)), key=lambda i: p[i])
    corrected, highest = list(p), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, p[i] * (len(order) - rank)))
        corrected[i] = highest
    return corrected
