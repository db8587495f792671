"""Means with intervals, and paired differences: by hand, and scipy as oracle."""

from __future__ import annotations

from dataclasses import replace
from math import inf, isnan, nan

import numpy as np
import pytest
from scipy import stats

from delineate.metrics.statistics import detectable_in_sd, estimate_means, holm, paired_difference, signed_rank


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
    # Hesterberg 2015: at this level for 30 values.
    level = 1 - 2 * stats.norm.cdf(np.sqrt(30 / 29) * stats.t.ppf(0.025, 29))
    scipy = bootstrap((values,), np.mean, method="percentile", rng=1, confidence_level=level).confidence_interval
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
    assert [e.mean for e in once] == pytest.approx([e.mean for e in twice])
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


def test_every_patient_weighs_the_same() -> None:
    [found] = estimate_means(np.array([[1.0], [3.0], [8.0], [inf], [nan]]), ["a", "a", "b", "b", "c"])
    assert found.mean == 5, "of 2 and 8"
    assert (found.n, found.patients, found.failed, found.undefined) == (3, 2, 1, 1)
    assert (found.count, found.failures) == ("3 of 2 patients", "1 of 5")


def test_swapped_methods_swap_the_sign(rng: np.random.Generator) -> None:
    first, second = rng.random((2, 20))
    there, back = paired_difference(first, second), paired_difference(second, first)
    assert there.mean == -back.mean
    assert there.effect == pytest.approx(-back.effect)
    assert there.p == back.p


def test_the_test_is_that_of_scipy(rng: np.random.Generator) -> None:
    first, second = rng.normal(0.3, 1, 40), rng.normal(0, 1, 40)
    assert paired_difference(first, second).p == pytest.approx(stats.wilcoxon(first, second).pvalue)


def test_the_test_is_exact_with_ties_and_zeros(rng: np.random.Generator) -> None:
    every_sign = stats.PermutationMethod(n_resamples=10**6)
    for _ in range(5):
        d = rng.integers(-3, 5, 10).astype(float)
        assert signed_rank(d)[0] == pytest.approx(stats.wilcoxon(d, zero_method="pratt", method=every_sign).pvalue)


def test_many_patients_have_the_normal_distribution(rng: np.random.Generator) -> None:
    d = np.round(rng.normal(0.1, 1, 150), 1)
    assert signed_rank(d[:100])[0] == pytest.approx(
        stats.wilcoxon(d[:100], zero_method="pratt", method="asymptotic").pvalue, abs=0.01
    )
    assert signed_rank(d)[0] == pytest.approx(
        stats.wilcoxon(d, zero_method="pratt", method="asymptotic").pvalue, abs=1e-6
    )


def test_rounding_is_no_difference(rng: np.random.Generator) -> None:
    """Sums in another order leave zeros of 1e-17 and ties that are none: neither may change the test."""
    first, second = np.round(rng.random((2, 14)), 1)
    clean = paired_difference(first, second)
    for scale in (1e-6, 1.0, 1e6):
        noise = 1e-13 * scale * rng.standard_normal(14)
        found = paired_difference(scale * first + noise, scale * second)
        assert (found.p, found.effect) == (clean.p, clean.effect)


@pytest.mark.parametrize("seed", range(10))
def test_a_failure_is_worse_than_any_value(seed: int) -> None:
    """Whoever fails on one patient more never gains by it; both failing is a tie."""
    rng = np.random.default_rng(seed)
    first, second = rng.normal(0, 1, (2, 9))
    before = paired_difference(first, second)
    for i in range(9):
        for failure in (inf, -inf):  # the worst of a distance, and of a score
            failing = np.where(np.arange(9) == i, failure, first)
            after = paired_difference(failing, second)
            assert np.sign(failure) * after.effect >= np.sign(failure) * before.effect
            assert (after.n, after.measured, after.decided_by_failure) == (9, 8, 1)
            assert after.mean == pytest.approx(np.delete(first - second, i).mean()), "of those that neither failed"
            both = paired_difference(failing, np.where(np.arange(9) == i, failure, second))
            assert (both.n, both.measured, both.decided_by_failure) == (9, 8, 0)


def test_who_misses_half_is_not_better() -> None:
    """Ten subjects missed, ten a little nearer: dropped, that was a better method with p = .002."""
    other = np.linspace(3, 6, 20)
    half = np.where(np.arange(20) < 10, inf, other - 1)
    found = paired_difference(half, other)
    assert (found.mean, found.measured, found.n) == (pytest.approx(-1), 10, 20)
    assert found.effect > 0, "larger distances"
    assert not found.distinguishable


def test_scans_of_a_patient_are_one_outcome() -> None:
    patients = ["a"] * 3 + ["b"]
    found = paired_difference([inf, 1, 1, 2], [1, 2, inf, 1], patients)  # a: one failure each, then −1
    assert (found.n, found.decided_by_failure, found.mean) == (2, 0, 0)
    assert paired_difference([inf, 1, 1, 2], [1, 2, 3, 1], patients).decided_by_failure == 1


@pytest.mark.parametrize("comparisons", [1, 3, 10])
def test_too_few_are_those_of_whom_no_outcome_tells(comparisons: int) -> None:
    for n in range(2, 15):
        clearest = paired_difference(np.arange(1.0, n + 1), np.zeros(n))
        corrected = holm([clearest.p] * comparisons)[0]
        found = replace(clearest, p=corrected, comparisons=comparisons)
        assert found.too_few == (corrected >= 0.05)
        assert (found.detectable == inf) == found.too_few
        assert (n >= found.needed) == (not found.too_few)


@pytest.mark.parametrize("n", [7, 12, 25, 60])
def test_the_detectable_difference_is_shown_in_four_of_five_studies(n: int) -> None:
    rng, shown = np.random.default_rng(n), 0
    d = rng.normal(detectable_in_sd(n), 1, (300, n))
    low = d.mean(axis=1) - stats.t.ppf(0.975, n - 1) * d.std(axis=1, ddof=1) / np.sqrt(n)
    shown = np.mean([signed_rank(one)[0] < 0.05 for one in d] & (low > 0))
    assert shown == pytest.approx(0.8, abs=0.07)
    assert detectable_in_sd(n, 3) > detectable_in_sd(n)


def test_a_clear_difference_is_told_apart_and_none_is_not(rng: np.random.Generator) -> None:
    base = rng.random(30)
    assert paired_difference(base + 0.1 + 0.01 * rng.random(30), base).distinguishable
    equal = paired_difference(base, base)
    assert (equal.mean, equal.p, equal.effect, equal.distinguishable) == (0, 1, 0, False)


def test_pairs_with_an_undefined_value_are_left_out() -> None:
    found = paired_difference([1.0, nan, 3.0], [0.5, 1.0, 2.0])
    assert (found.n, found.mean) == (2, 0.75)
    assert isnan(paired_difference([1.0, nan], [0.5, 1.0]).p)
    assert isnan(paired_difference([nan, nan], [0.5, 1.0]).mean)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, nan]) == pytest.approx([0.03, 0.06, 0.06, nan], nan_ok=True)
    assert holm([0.6, 0.9]) == [1.0, 1.0]
