"""What a sample of subjects says about all: means with intervals, and whether two methods differ.

The unit is the patient. Every mean here is the mean over patients of each patient's mean over their
scans, so that a table of means and a comparison of methods refer to the same number. Several scans of one
patient say less than as many patients would, so whole patients are resampled.

An infinite value is an outcome, a failure: the target was missed, or marked where there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import inf, isnan, nan, pi, sqrt

import numpy as np
import scipy  # loads its submodules on first use
from numpy.typing import NDArray

RESAMPLES = 10_000
SIGNIFICANCE = 0.05
POWER = 0.8

_EXACT_UP_TO = 100
"""Up to this many patients, the signed-rank test uses its exact distribution; beyond, the normal one is as good."""

_SIMULATED_UP_TO = 40
"""Up to this many patients, the smallest detectable difference is simulated; beyond, the formula is as good."""

_ROUNDING = 1e-9
"""Fraction of the largest value that counts as rounding: differences within it are zero, or tie."""


@dataclass(frozen=True)
class Estimate:
    """A metric's mean over ``patients`` of each patient's mean over their scans, ``n`` scans in all.

    Left out and counted are ``failed`` scans, whose value is infinite, and ``undefined`` ones (NaN).
    ``sd`` is the standard deviation of the patients' means, with ``patients - 1`` in the denominator.
    ``ci95`` is the percentile interval of the mean from 10 000 seeded bootstrap resamples of patients, at levels
    widened for small samples (Hesterberg 2015, section 4.3.3). Both are NaN for fewer than two patients.
    """

    mean: float
    sd: float
    ci95: tuple[float, float]
    n: int
    failed: int
    undefined: int
    patients: int

    @property
    def count(self) -> str:
        """``n``, with the number of patients if that is smaller."""
        return counted(self.n, self.patients)

    @property
    def failures(self) -> str:
        """How many scans failed out of how many; empty if none did."""
        return f"{self.failed} of {self.n + self.failed + self.undefined}" if self.failed else ""


def counted(scans: int, patients: int) -> str:
    """The number of scans, with the number of patients if that is smaller."""
    return str(scans) if patients == scans else f"{scans} of {patients} patients"


def estimate_means(
    values: NDArray[np.float64], patients: Sequence[str] | None = None, *, seed: int = 0
) -> list[Estimate]:
    """An estimate of each column's mean; rows are scans, and patients are resampled for all columns together.

    ``patients`` names each row's patient; by default each row is from a different one.
    """
    whose = numbered(patients, len(values))
    defined = np.isfinite(values)
    sums, counts = _added_up(np.where(defined, values, 0.0), whose), _added_up(defined.astype(float), whose)
    has = counts > 0
    means = np.divide(sums, counts, out=np.zeros_like(sums), where=has)
    n, rng = len(sums), np.random.default_rng(seed)
    with np.errstate(invalid="ignore"):  # a resample without a defined value has no mean
        # Counting how often each patient is drawn turns all means into one matrix product; in chunks, to bound memory.
        draws = (_resamples(n, RESAMPLES // 10, rng) for _ in range(10) if n)
        resampled = np.concatenate([means[:0], *(draw @ means / (draw @ has) for draw in draws)])
    failed, undefined = np.isinf(values).sum(axis=0), np.isnan(values).sum(axis=0)
    return [
        _estimate(means[has[:, i], i], resampled[:, i], int(defined[:, i].sum()), int(failed[i]), int(undefined[i]))
        for i in range(values.shape[1])
    ]


def _resamples(n: int, many: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """How often each of ``n`` is drawn, in each of ``many`` samples of ``n`` with replacement.

    NumPy's ``multinomial`` counts the same, several times slower.
    """
    drawn = rng.integers(n, size=(many, n)) + n * np.arange(many)[:, None]
    return np.bincount(drawn.ravel(), minlength=many * n).reshape(many, n).astype(float)


def numbered(patients: Sequence[str] | None, scans: int) -> NDArray[np.int64]:
    """The patient of each scan, numbered in order of first appearance; without ``patients``, all are different."""
    if patients is None:
        return np.arange(scans)
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(patient, len(numbers)) for patient in patients], dtype=np.int64)


def _added_up(rows: NDArray[np.float64], whose: NDArray[np.int64]) -> NDArray[np.float64]:
    """The sum of each patient's rows."""
    sums = np.zeros((int(whose.max(initial=-1)) + 1, rows.shape[1]))
    np.add.at(sums, whose, rows)
    return sums


def _estimate(
    means: NDArray[np.float64], resampled: NDArray[np.float64], scans: int, failed: int, undefined: int
) -> Estimate:
    n = len(means)
    mean = float(means.mean()) if n else nan
    if n < 2:
        return Estimate(mean, nan, (nan, nan), scans, failed, undefined, n)
    # A resample varies less than a sample, by (n − 1) / n, and few patients call for Student's t, not the normal.
    tail = scipy.special.ndtr(sqrt(n / (n - 1)) * scipy.special.stdtrit(n - 1, 0.025))
    low, high = np.quantile(resampled[np.isfinite(resampled)], [tail, 1 - tail])
    return Estimate(mean, float(means.std(ddof=1)), (float(low), float(high)), scans, failed, undefined, n)


@dataclass(frozen=True)
class Difference:
    """A paired difference over ``n`` patients, first minus second.

    ``mean`` is over the ``measured`` patients, who have at least one scan with finite values from both methods:
    the mean of each one's mean difference over such scans; ``sd`` and ``ci95`` as in :class:`Estimate`.

    ``p`` is from Wilcoxon's signed-rank test over all ``n``, two-sided, Holm-corrected for ``comparisons``.
    A patient for whom one method failed on more scans than the other ranks beyond every finite difference;
    ``decided_by_failure`` counts such patients. Differences within 1e-9 of the largest value are zero, which
    take ranks but no side (Pratt 1959); values that close to each other tie. The distribution is exact,
    given the ranks, for up to 100 patients. ``effect`` is the matched-pairs rank-biserial correlation
    (−1 … 1; Kerby 2014).
    """

    mean: float
    sd: float
    ci95: tuple[float, float]
    p: float
    effect: float
    n: int
    measured: int
    decided_by_failure: int = 0
    comparisons: int = 1

    @property
    def distinguishable(self) -> bool:
        """Whether the test tells the two apart, and so does the interval where it covers what was tested."""
        low, high = self.ci95
        sides = low > 0 and self.effect > 0, high < 0 and self.effect < 0
        return self.p < SIGNIFICANCE and (self.decided_by_failure > 0 or any(sides))

    @property
    def needed(self) -> int:
        """The fewest patients with whom any outcome could tell two methods apart, given the number of comparisons."""
        return fewest_patients(self.comparisons)

    @property
    def too_few(self) -> bool:
        """Whether there are too few patients for any outcome to tell the two apart."""
        return self.n < self.needed

    @property
    def detectable(self) -> float:
        """The smallest true mean difference that as many patients, as variable as these, reveal in 80 % of studies.

        In the metric's unit; infinite if there are too few patients.
        """
        return self.sd * detectable_in_sd(self.measured, self.comparisons)


def paired_difference(
    first: Sequence[float] | NDArray, second: Sequence[float] | NDArray, patients: Sequence[str] | None = None
) -> Difference:
    """The difference between two columns for the same scans; by default each scan is from a different patient.

    Infinite is worse, or better, than any finite value, and ties with itself. Pairs with a NaN are left
    out. For fewer than two patients there is no interval and no test: both are NaN.
    """
    a, b = np.asarray(first, float), np.asarray(second, float)
    use = ~(np.isnan(a) | np.isnan(b))
    kept = None if patients is None else [p for p, defined in zip(patients, use, strict=True) if defined]
    a, b, whose = a[use], b[use], numbered(kept, int(use.sum()))
    both = np.isfinite(a) & np.isfinite(b)
    finite = np.where(both, a, 0.0) - np.where(both, b, 0.0)
    sides = np.where(both, 0.0, np.sign(np.where(a == b, 0.0, np.where(np.isinf(a), a, -b))))
    measured, sums, failures = (np.bincount(whose, weights=w) for w in (both, finite, sides))
    means = np.divide(sums, measured, out=np.full(len(sums), nan), where=measured > 0)
    [estimate] = estimate_means(means[:, None])
    outcomes = np.where(failures != 0, np.copysign(inf, failures), np.nan_to_num(means, nan=0.0))
    decided, n = int(np.count_nonzero(failures)), len(outcomes)
    largest = float(np.abs(np.concatenate([a[both], b[both]])).max(initial=0.0))
    p, effect = signed_rank(outcomes, _ROUNDING * largest) if n > 1 else (nan, nan)
    return Difference(estimate.mean, estimate.sd, estimate.ci95, p, effect, n, estimate.patients, decided)


def signed_rank(differences: NDArray[np.float64], tolerance: float = 0.0) -> tuple[float, float]:
    """Wilcoxon's signed-rank test: two-sided p, and the rank-biserial correlation; 1 and 0 where nothing differs.

    Differences of at most ``tolerance`` are zero, and neighbours no further apart than that tie.
    """
    sizes = np.abs(differences)
    sizes = np.where(sizes <= tolerance, 0.0, sizes)
    order = np.argsort(sizes)
    with np.errstate(invalid="ignore"):  # there is no step between equal infinities
        steps = np.diff(sizes[order], prepend=0.0) > tolerance
    groups = np.empty(len(sizes), dtype=np.int64)
    groups[order] = np.cumsum(steps)
    ranks, signs = scipy.stats.rankdata(groups), np.sign(np.where(sizes > 0, differences, 0.0))
    ranks = ranks[signs != 0]
    signs = signs[signs != 0]
    if not ranks.size:
        return 1.0, 0.0
    total = float(ranks @ signs)
    effect = total / float(ranks.sum())
    if len(ranks) > _EXACT_UP_TO:
        return float(2 * scipy.special.ndtr(-abs(total) / sqrt(float(ranks @ ranks)))), effect
    halves = np.rint(2 * ranks).astype(int)  # ranks of ties are halves
    positive = int(halves[signs > 0].sum())
    chances = _rank_sums(halves)
    return min(1.0, 2 * float(min(chances[: positive + 1].sum(), chances[positive:].sum()))), effect


def _rank_sums(ranks: NDArray[np.int64]) -> NDArray[np.float64]:
    """The probability of each sum of positive ranks, from 0 on, if every sign is a fair coin toss."""
    chances = np.zeros(int(ranks.sum()) + 1)
    chances[0] = 1.0
    for rank in ranks:
        chances[rank:] = (chances[rank:] + chances[:-rank]) / 2
        chances[:rank] /= 2
    return chances


def fewest_patients(comparisons: int = 1) -> int:
    """The fewest patients with whom the signed-rank test can be significant, as one of ``comparisons`` (Holm)."""
    n = 1
    while comparisons * 2.0 ** (1 - n) >= SIGNIFICANCE:
        n += 1
    return n


@lru_cache(maxsize=256)
def detectable_in_sd(n: int, comparisons: int = 1) -> float:
    """The smallest mean of ``n`` normal differences, in their SDs, that is told from zero with 80 % power.

    Both the signed-rank test, at the level of Holm's first step for ``comparisons``, and the interval must show it.
    Simulated with a seed for up to 40 patients; beyond, from Student's test at the signed-rank test's
    efficiency of 3 / π. Infinite if n is too small.
    """
    if n < fewest_patients(comparisons):
        return inf
    level = SIGNIFICANCE / comparisons
    if n > _SIMULATED_UP_TO:
        t = scipy.special.stdtrit(n - 1, 1 - level / 2) + scipy.special.stdtrit(n - 1, POWER)
        return float(t * sqrt(pi / 3 / n))
    tails = np.cumsum(_rank_sums(np.arange(1, n + 1))[::-1])[::-1]
    least = int(np.flatnonzero(2 * tails < level)[0])
    # The sum of positive ranks is the number of positive Walsh averages: it reaches `least` as soon as the
    # shift lifts the average of that rank above zero.
    i, j = np.triu_indices(n)
    d = np.random.default_rng(0).standard_normal((2000, n))
    walsh = (d[:, i] + d[:, j]) / 2
    place = walsh.shape[1] - least
    tested = -np.partition(walsh, place, axis=1)[:, place]
    # The mean's interval must lie above zero too; Student's is close to the bootstrap's.
    beside = scipy.special.stdtrit(n - 1, 0.975) * d.std(axis=1, ddof=1) / sqrt(n) - d.mean(axis=1)
    return float(np.quantile(np.maximum(tested, beside), POWER))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979) for a family of p values; NaN stays NaN and does not count."""
    order = sorted((i for i, value in enumerate(p) if not isnan(value)), key=lambda i: p[i])
    corrected, highest = list(p), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, p[i] * (len(order) - rank)))
        corrected[i] = highest
    return corrected
