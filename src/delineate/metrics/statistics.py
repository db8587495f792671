"""What a sample of subjects says of all: means with intervals, and whether two methods differ."""

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
    10 000 bootstrap resamples of the subjects (Efron 1979), seeded. Both are NaN for fewer than two.
    """

    mean: float
    sd: float
    ci95: tuple[float, float]
    n: int
    undefined: int


def estimate_means(values: NDArray[np.float64], *, seed: int = 0) -> list[Estimate]:
    """An estimate of each column's mean; rows are subjects, resampled for all columns together."""
    defined = np.isfinite(values)
    filled = np.where(defined, values, 0.0)
    n, rng = len(values), np.random.default_rng(seed)
    with np.errstate(invalid="ignore"):  # a resample without a defined value has no mean
        # How often each subject is drawn makes a resample's means one matrix product; in parts, to bound memory.
        draws = (rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES // 10).astype(float) for _ in range(10))
        means = np.concatenate([draw @ filled / (draw @ defined) for draw in draws])
    return [
        _estimate(column[use], resampled[np.isfinite(resampled)], undefined=int(n - use.sum()))
        for column, use, resampled in zip(values.T, defined.T, means.T, strict=True)
    ]


def _estimate(defined: NDArray[np.float64], resampled: NDArray[np.float64], undefined: int) -> Estimate:
    n = len(defined)
    mean = float(defined.mean()) if n else nan
    if n < 2:
        return Estimate(mean, nan, (nan, nan), n, undefined)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Estimate(mean, float(defined.std(ddof=1)), (float(low), float(high)), n, undefined)


@dataclass(frozen=True)
class Difference:
    """A paired difference over ``n`` subjects, first minus second.

    ``ci95`` is the percentile interval of the mean under 10 000 resamples of the subjects; ``p`` is
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


def paired_difference(first: Sequence[float] | NDArray, second: Sequence[float] | NDArray) -> Difference:
    """The difference of two columns of the same subjects; pairs with an undefined value are left out.

    Fewer than two pairs have no interval and no test: both are NaN.
    """
    difference = np.asarray(first, float) - np.asarray(second, float)
    difference = difference[np.isfinite(difference)]
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
