"""Means with intervals, and paired differences: by hand, and scipy as oracle."""

from __future__ import annotations

from math import isnan, nan

import numpy as np
import pytest
from scipy import stats

from delineate.metrics.statistics import estimate_means, holm, paired_difference


def test_all_undefined() -> None:
    [estimate] = estimate_means(np.full((4, 1), nan))
    assert (estimate.n, estimate.undefined) == (0, 4)
    assert isnan(estimate.mean)


def test_the_interval_is_that_of_the_normal_mean(rng: np.random.Generator) -> None:
    values = rng.normal(5, 2, size=(400, 1))
    [estimate] = estimate_means(values)
    half = 1.96 * values.std(ddof=1) / np.sqrt(400)
    assert estimate.ci95 == pytest.approx((values.mean() - half, values.mean() + half), abs=0.05 * half)


def test_the_interval_is_that_of_scipy(rng: np.random.Generator) -> None:
    from scipy.stats import bootstrap

    values = rng.gamma(2, size=30)
    scipy = bootstrap((values,), np.mean, method="percentile", rng=1).confidence_interval
    [estimate] = estimate_means(values[:, None])
    assert estimate.ci95 == pytest.approx((scipy.low, scipy.high), rel=0.03)


def test_an_estimate_is_the_same_each_time(rng: np.random.Generator) -> None:
    values = rng.random((9, 2))
    assert estimate_means(values) == estimate_means(values)


def test_a_scan_that_is_there_twice_tells_nothing_new(rng: np.random.Generator) -> None:
    values, patients = rng.random((12, 2)), [f"p{i}" for i in range(12)]
    values[3, 0] = nan
    once, twice = estimate_means(values, patients), estimate_means(np.repeat(values, 2, axis=0), np.repeat(patients, 2))
    assert [e.ci95 for e in once] == [e.ci95 for e in twice] == [e.ci95 for e in estimate_means(values)]
    assert [(e.n, e.patients, e.count) for e in twice] == [(22, 11, "22 of 11 patients"), (24, 12, "24 of 12 patients")]
    [alone] = estimate_means(np.array([[1.0], [2.0]]), ["p", "p"])
    assert isnan(alone.ci95[0]), "one patient has no interval"
    first, second = values.T
    doubled = paired_difference(np.repeat(first, 2), np.repeat(second, 2), np.repeat(patients, 2))
    assert doubled == paired_difference(first, second)


def test_a_difference_by_hand() -> None:
    found = paired_difference([8, 7, 9, 6], [7, 5, 6, 7])  # +1, +2, +3, −1
    assert found.mean == 1.25
    # Ranks 1.5, 3, 4 of ten are with the first, 1.5 with the second.
    assert found.effect == pytest.approx((8.5 - 1.5) / 10)
    assert found.n == 4
    assert not found.distinguishable


def test_swapped_methods_swap_the_sign(rng: np.random.Generator) -> None:
    first, second = rng.random((2, 20))
    there, back = paired_difference(first, second), paired_difference(second, first)
    assert there.mean == -back.mean
    assert there.effect == pytest.approx(-back.effect)
    assert there.p == back.p


def test_the_test_is_that_of_scipy(rng: np.random.Generator) -> None:
    first, second = rng.normal(0.3, 1, 40), rng.normal(0, 1, 40)
    assert paired_difference(first, second).p == stats.wilcoxon(first, second).pvalue


def test_a_clear_difference_is_told_apart_and_none_is_not(rng: np.random.Generator) -> None:
    base = rng.random(30)
    assert paired_difference(base + 0.1 + 0.01 * rng.random(30), base).distinguishable
    equal = paired_difference(base, base)
    assert (equal.mean, equal.p, equal.effect, equal.distinguishable) == (0, 1, 0, False)


def test_pairs_with_an_undefined_value_are_left_out() -> None:
    found = paired_difference([1.0, nan, np.inf, 3.0], [0.5, 1.0, 1.0, 2.0])
    assert (found.n, found.mean) == (2, 0.75)
    assert isnan(paired_difference([1.0, nan], [0.5, 1.0]).p)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, nan]) == pytest.approx([0.03, 0.06, 0.06, nan], nan_ok=True)
    assert holm([0.6, 0.9]) == [1.0, 1.0]
