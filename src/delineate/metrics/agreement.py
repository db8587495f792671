"""How well two ways of measuring a quantity agree: Bland and Altman's limits, and concordance.

Patients are the unit: biases are means over patients of each patient's mean over their scans, and every
interval is wider the more alike a patient's scans are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import atanh, hypot, nan, sqrt, tanh

import numpy as np
import scipy  # loads its submodules on first use
from numpy.typing import NDArray

from delineate.metrics.statistics import counted, numbered

Interval = tuple[float, float]
LIMITS = 1.96
"""Standard deviations from the bias to the limits of agreement: 95 % of normal differences lie within."""


@dataclass(frozen=True)
class Agreement:
    """Differences between predicted and true values of ``n`` scans of ``patients``: ``bias`` ± 1.96 ``sd``.

    ``bias`` is the mean over patients of each one's mean difference, ``sd`` the standard deviation of one
    scan's difference, from the variances between and within patients (Bland & Altman 2007; Zou 2013).

    Intervals are 95 %: for the bias, Student's t on the patients' means; for the limits, exact where each
    patient has one scan (noncentral t; Carkeet 2015), otherwise from the intervals of both variances
    (MOVER; Zou 2013). ``outliers`` are the indices of pairs beyond the limits. ``left_out`` counts pairs
    that have no difference. Everything but counts is NaN for fewer than two patients.
    """

    n: int
    patients: int
    left_out: int
    bias: float
    sd: float
    bias_ci95: Interval
    low_ci95: Interval
    high_ci95: Interval
    outliers: tuple[int, ...]

    @property
    def limits(self) -> Interval:
        """The limits of agreement, between which 95 % of differences lie."""
        return self.bias - LIMITS * self.sd, self.bias + LIMITS * self.sd

    @property
    def method(self) -> str:
        """How the intervals of the limits were computed."""
        return "exact (noncentral t)" if self.patients == self.n else "MOVER (variances between and within patients)"

    @property
    def count(self) -> str:
        """``n``, with the number of patients if that is smaller."""
        return counted(self.n, self.patients)


def agreement(
    predicted: Sequence[float] | NDArray,
    true: Sequence[float] | NDArray,
    patients: Sequence[str] | None = None,
    *,
    relative: bool = False,
) -> Agreement:
    """Limits of agreement for paired values; by default each pair comes from a different patient.

    ``relative``: differences in percent of the true value, for errors that grow with the quantity; pairs
    with a true value of zero have no such difference and are left out, as are undefined ones.
    """
    said, truth = np.asarray(predicted, float), np.asarray(true, float)
    difference = said - truth
    if relative:
        with np.errstate(divide="ignore", invalid="ignore"):
            difference = 100 * difference / truth
    places = np.flatnonzero(np.isfinite(difference))
    d, n = difference[places], len(places)
    whose = numbered(None if patients is None else [patients[i] for i in places.tolist()], n)
    scans = np.bincount(whose)
    p, left_out = len(scans), len(difference) - n
    if p < 2:
        return Agreement(n, p, left_out, nan, nan, (nan, nan), (nan, nan), (nan, nan), ())
    means = np.bincount(whose, weights=d) / scans
    bias, between = float(means.mean()), float(means.var(ddof=1))
    within = float(((d - means[whose]) ** 2).sum() / (n - p)) if n > p else 0.0
    # The variance of a patient's mean contains only part of the variance within: add what a single scan's lacks.
    missing = within * float(1 - (1 / scans).mean())
    sd, half = sqrt(between + missing), float(scipy.special.stdtrit(p - 1, 0.975)) * sqrt(between / p)
    if n == p:
        least, most = _of_limit(n)
        inner, outer = sd * (LIMITS - least), sd * (most - LIMITS)
    else:
        inner, outer = _mover(half, [(between, p - 1), (missing, n - p)])
    low, high = bias - LIMITS * sd, bias + LIMITS * sd
    return Agreement(
        n,
        p,
        left_out,
        bias,
        sd,
        (bias - half, bias + half),
        (low - outer, low + inner),
        (high - inner, high + outer),
        tuple(int(i) for i in places[(d < low) | (d > high)]),
    )


def _of_limit(n: int) -> Interval:
    """Both ends of the interval for the upper limit of ``n`` normal differences, in SDs from their mean."""
    least, most = scipy.stats.nct.ppf([0.025, 0.975], n - 1, LIMITS * sqrt(n)) / sqrt(n)
    return float(least), float(most)


def _mover(half: float, variances: Sequence[tuple[float, int]]) -> Interval:
    """How far a limit's interval extends towards the bias, and away from it.

    Computed from ``half`` the width of the bias's interval, and the parts of a variance with their degrees of
    freedom, by the method of variance estimates recovery (Zou 2013, eq. 7).
    """
    total = sum(variance for variance, _ in variances)
    down = hypot(*(v * (1 - df / scipy.stats.chi2.ppf(0.975, df)) for v, df in variances))
    up = hypot(*(v * (df / scipy.stats.chi2.ppf(0.025, df) - 1) for v, df in variances))
    sd, least, most = sqrt(total), sqrt(max(total - down, 0.0)), sqrt(total + up)
    return hypot(half, LIMITS * (sd - least)), hypot(half, LIMITS * (most - sd))


@dataclass(frozen=True)
class Concordance:
    """Lin's concordance correlation (1989) of ``n`` scans of ``patients``: 1 if every pair is equal.

    0 if only one of the two varies; NaN if neither does, or for fewer than three patients.
    """

    value: float
    ci95: Interval
    n: int
    patients: int


def concordance(
    predicted: Sequence[float] | NDArray, true: Sequence[float] | NDArray, patients: Sequence[str] | None = None
) -> Concordance:
    """Agreement of paired values with the line of identity; by default each pair comes from a different patient.

    Every patient has the same weight. The interval is from a jackknife over patients on Fisher's z, with
    Student's t (Feng et al. 2013).
    """
    a, b = np.asarray(predicted, float), np.asarray(true, float)
    use = np.isfinite(a) & np.isfinite(b)
    whose = numbered(None if patients is None else [patients[i] for i in np.flatnonzero(use).tolist()], int(use.sum()))
    a, b, n = a[use], b[use], len(whose)
    scans = np.bincount(whose)
    p = len(scans)
    if p < 3 or not _varies(np.concatenate([a, b])):
        return Concordance(nan, (nan, nan), n, p)
    if not _varies(a) or not _varies(b):
        return Concordance(0.0, (0.0, 0.0), n, p)
    # Centred, so that the squares of large values do not swamp differences.
    a, b = a - b.mean(), b - b.mean()
    moments = np.stack([np.bincount(whose, weights=w) / scans for w in (a, b, a * a, b * b, a * b)])
    value = float(_lin(moments.mean(axis=1)))
    if abs(value) >= 1 - 1e-12:
        return Concordance(value, (value, value), n, p)
    without = np.clip(_lin((moments.sum(axis=1, keepdims=True) - moments) / (p - 1)), -1 + 1e-12, 1 - 1e-12)
    z = np.arctanh(without)
    half = float(scipy.special.stdtrit(p - 1, 0.975)) * sqrt((p - 1) / p * float(((z - z.mean()) ** 2).sum()))
    return Concordance(value, (tanh(atanh(value) - half), tanh(atanh(value) + half)), n, p)


def _lin(moments: NDArray[np.float64]) -> NDArray[np.float64]:
    """Lin 1989, eq. 1, from the means of a, b, a², b² and ab; 0 where nothing varies."""
    a, b, aa, bb, ab = moments
    spread = aa - a**2 + bb - b**2 + (a - b) ** 2
    return np.divide(2 * (ab - a * b), spread, out=np.zeros_like(spread), where=spread > 0)


def _varies(values: NDArray[np.float64]) -> bool:
    """Whether values vary by more than rounding."""
    return bool(np.ptp(values) > 1e-12 * np.abs(values).max())


@dataclass(frozen=True)
class Crossing:
    """Pairs that the prediction puts on the wrong side of a threshold, as indices; ``n`` pairs in all.

    ``above`` counts pairs with both values at or above it.
    """

    over: tuple[int, ...]
    """Predicted at or above, truly below."""
    under: tuple[int, ...]
    """Predicted below, truly at or above."""
    n: int
    above: int

    @property
    def below(self) -> int:
        """Number of pairs with both values below the threshold."""
        return self.right - self.above

    @property
    def right(self) -> int:
        """Number of pairs on the right side."""
        return self.n - len(self.over) - len(self.under)


def crossing(predicted: Sequence[float] | NDArray, true: Sequence[float] | NDArray, threshold: float) -> Crossing:
    """Find the pairs that the prediction puts on the wrong side of ``threshold``; undefined ones are left out."""
    a, b = np.asarray(predicted, float), np.asarray(true, float)
    use = np.isfinite(a) & np.isfinite(b)
    over = np.flatnonzero(use & (a >= threshold) & (b < threshold))
    under = np.flatnonzero(use & (a < threshold) & (b >= threshold))
    above = int(np.count_nonzero(use & (a >= threshold) & (b >= threshold)))
    return Crossing(tuple(over.tolist()), tuple(under.tolist()), int(use.sum()), above)
