"""How well two ways of measuring one quantity agree: Bland and Altman's limits, and concordance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import atanh, nan, sqrt, tanh

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Interval = tuple[float, float]
LIMITS = 1.96
"""Deviations from the bias to the limits of agreement: 95 % of normal differences lie within."""


@dataclass(frozen=True)
class Agreement:
    """Differences of predicted and true values, ``bias`` ± 1.96 ``sd`` (Bland & Altman 1986).

    Intervals are 95 %: of the bias by Student's t, of the limits by their approximate standard error
    (Bland & Altman 1999). ``outliers`` are the indices of pairs beyond the limits. All but ``n`` are
    NaN for fewer than two pairs.
    """

    n: int
    bias: float
    sd: float
    bias_ci95: Interval
    low_ci95: Interval
    high_ci95: Interval
    outliers: tuple[int, ...]

    @property
    def limits(self) -> Interval:
        """Between which 95 % of differences lie."""
        return self.bias - LIMITS * self.sd, self.bias + LIMITS * self.sd


def agreement(
    predicted: Sequence[float] | NDArray, true: Sequence[float] | NDArray, *, relative: bool = False
) -> Agreement:
    """Limits of agreement of paired values; pairs with an undefined one are left out.

    ``relative``: differences in percent of the true value, for errors that grow with what is measured.
    """
    said, truth = np.asarray(predicted, float), np.asarray(true, float)
    difference = said - truth
    if relative:
        with np.errstate(divide="ignore", invalid="ignore"):
            difference = 100 * difference / truth
    places = np.flatnonzero(np.isfinite(difference))
    d = difference[places]
    if len(d) < 2:
        return Agreement(len(d), nan, nan, (nan, nan), (nan, nan), (nan, nan), ())
    n, bias, sd = len(d), float(d.mean()), float(d.std(ddof=1))
    t = float(stats.t.ppf(0.975, n - 1))
    of_bias, of_limits = t * sd / sqrt(n), t * sd * sqrt(1 / n + LIMITS**2 / (2 * (n - 1)))
    low, high = bias - LIMITS * sd, bias + LIMITS * sd
    beyond = (d < low) | (d > high)
    return Agreement(
        n,
        bias,
        sd,
        (bias - of_bias, bias + of_bias),
        (low - of_limits, low + of_limits),
        (high - of_limits, high + of_limits),
        tuple(int(i) for i in places[beyond]),
    )


@dataclass(frozen=True)
class Concordance:
    """Lin's concordance correlation (1989): 1 where every pair is equal.

    0 where one of both does not vary; NaN where nothing does, or n < 3.
    """

    value: float
    ci95: Interval
    n: int


def concordance(predicted: Sequence[float] | NDArray, true: Sequence[float] | NDArray) -> Concordance:
    """Agreement of paired values with the line of identity, with Lin's interval by Fisher's z."""
    a, b = np.asarray(predicted, float), np.asarray(true, float)
    use = np.isfinite(a) & np.isfinite(b)
    a, b, n = a[use], b[use], int(use.sum())
    if n < 3 or not _varies(np.concatenate([a, b])):
        return Concordance(nan, (nan, nan), n)
    if not _varies(a) or not _varies(b):
        return Concordance(0.0, (0.0, 0.0), n)
    shift = float((a.mean() - b.mean()) ** 2 / (a.std() * b.std()))
    accuracy = float(2 / (a.std() / b.std() + b.std() / a.std() + shift))
    r = float(np.corrcoef(a, b)[0, 1])
    value = r * accuracy
    if abs(value) >= 1 - 1e-12:
        return Concordance(value, (value, value), n)
    # Lin 1989 with the correction of 2000, in terms that stay finite where r is 0: the variance of Fisher's z.
    rest = 1 - value**2
    variance = (
        (1 - r**2) * accuracy**2 / rest
        + 2 * r**2 * accuracy**3 * (1 - value) * shift / rest**2
        - r**2 * accuracy**4 * shift**2 / (2 * rest**2)
    ) / (n - 2)
    half = 1.96 * sqrt(max(variance, 0.0))
    return Concordance(value, (tanh(atanh(value) - half), tanh(atanh(value) + half)), n)


def _varies(values: NDArray[np.float64]) -> bool:
    """By more than rounding."""
    return bool(np.ptp(values) > 1e-12 * np.abs(values).max())


@dataclass(frozen=True)
class Crossing:
    """Who is on the other side of a threshold than the truth: indices of pairs, ``n`` in all."""

    over: tuple[int, ...]
    """Predicted at or above, truly below."""
    under: tuple[int, ...]
    """Predicted below, truly at or above."""
    n: int

    @property
    def right(self) -> int:
        """Pairs that are on one side."""
        return self.n - len(self.over) - len(self.under)


FATTY_LIVER_PERCENT = 5.56
"""Fat fraction from which a liver counts as fatty (Szczepaniak et al. 2005)."""


def crossing(predicted: Sequence[float] | NDArray, true: Sequence[float] | NDArray, threshold: float) -> Crossing:
    """Which pairs the prediction puts on the wrong side of ``threshold``; undefined ones are left out."""
    a, b = np.asarray(predicted, float), np.asarray(true, float)
    use = np.isfinite(a) & np.isfinite(b)
    over = np.flatnonzero(use & (a >= threshold) & (b < threshold))
    under = np.flatnonzero(use & (a < threshold) & (b >= threshold))
    return Crossing(tuple(over.tolist()), tuple(under.tolist()), int(use.sum()))
