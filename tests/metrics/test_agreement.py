"""Limits of agreement, concordance and threshold crossings: by hand, by simulation, and what changes nothing."""

from __future__ import annotations

from math import isnan, nan

import numpy as np
import pytest

from delineate.metrics.agreement import agreement, concordance, crossing
from delineate.metrics.quantities import FATTY_LIVER_PERCENT


def test_limits_by_hand() -> None:
    found = agreement([11, 9, 12, 8], [10, 10, 10, 10])  # +1, −1, +2, −2
    assert found.bias == 0
    assert found.sd == pytest.approx(np.sqrt(10 / 3))
    assert found.limits == pytest.approx((-1.96 * found.sd, 1.96 * found.sd))
    assert found.bias_ci95 == pytest.approx((-3.182 * found.sd / 2, 3.182 * found.sd / 2), rel=1e-3)
    assert (found.n, found.outliers) == (4, ())


def test_relative_differences_are_percent_of_the_truth() -> None:
    assert agreement([11, 18], [10, 20], relative=True).bias == 0
    found = agreement([11, 24, 5, 0], [10, 20, 0, 0], relative=True)
    assert (found.n, found.left_out) == (2, 2)  # percent of nothing is undefined


def test_an_outlier_is_named_by_its_place_among_all_pairs() -> None:
    truth = np.zeros(30)
    said = np.where(np.arange(30) % 2, 1.0, -1.0)
    said[7], said[3] = 30.0, nan
    assert agreement(said, truth).outliers == (7,)


def test_limits_hold_95_percent_and_their_interval_the_true_limit(rng: np.random.Generator) -> None:
    inside, held = [], 0
    for _ in range(300):
        d = rng.normal(1, 2, 40)
        found = agreement(d, np.zeros(40))
        low, high = found.limits
        fresh = rng.normal(1, 2, 400)
        inside.append(np.mean((fresh > low) & (fresh < high)))
        held += found.high_ci95[0] < 1 + 1.96 * 2 < found.high_ci95[1]
    assert np.mean(inside) == pytest.approx(0.94, abs=0.01)  # estimated from 40, they are a little narrow
    assert held / 300 == pytest.approx(0.95, abs=0.04)


def test_limits_of_few_are_exact_on_both_sides(rng: np.random.Generator) -> None:
    """The approximate standard error of Bland and Altman misses to one side alone: of six, 7.8 % instead of 2.5."""
    beside = np.array([agreement(d, np.zeros(6)).high_ci95 for d in rng.normal(0, 1, (3000, 6))])
    assert np.mean(beside[:, 0] > 1.96) == pytest.approx(0.025, abs=0.01)
    assert np.mean(beside[:, 1] < 1.96) == pytest.approx(0.025, abs=0.01)


def test_limits_of_few_by_the_book() -> None:
    """Carkeet 2015: the noncentral t, here from its definition, a normal over a chi."""
    found = agreement([-1.0, 0.0, 2.0, 0.5, -0.3], np.zeros(5))
    rng = np.random.default_rng(1)
    t = (rng.standard_normal(400_000) + 1.96 * np.sqrt(5)) / np.sqrt(rng.chisquare(4, 400_000) / 4)
    low, high = np.quantile(t, [0.025, 0.975]) / np.sqrt(5)
    assert found.high_ci95 == pytest.approx((found.bias + low * found.sd, found.bias + high * found.sd), rel=0.01)
    assert found.low_ci95 == pytest.approx((found.bias - high * found.sd, found.bias - low * found.sd), rel=0.01)
    assert found.method.startswith("exact")


def test_limits_of_several_scans_by_hand() -> None:
    # Means 1, 3, 5; variances within 2, 2, 2.
    found = agreement([0, 2, 2, 4, 4, 6], [0] * 6, list("aabbcc"))
    assert (found.bias, found.n, found.patients, found.count) == (3, 6, 3, "6 of 3 patients")
    assert found.sd == pytest.approx(np.sqrt(4 + 2 * (1 - 1 / 2)))
    assert found.bias_ci95 == pytest.approx((3 - 4.303 * 2 / np.sqrt(3), 3 + 4.303 * 2 / np.sqrt(3)), rel=1e-3)
    assert found.method.startswith("MOVER")


def test_a_scan_that_is_there_twice_tells_nothing_new(rng: np.random.Generator) -> None:
    truth, patients = rng.normal(50, 10, 12), [f"p{i}" for i in range(12)]
    said = truth + rng.normal(1, 2, 12)
    once = agreement(said, truth, patients), concordance(said, truth, patients)
    twice = (f(np.repeat(said, 2), np.repeat(truth, 2), np.repeat(patients, 2)) for f in (agreement, concordance))
    for one, two in zip(once, twice, strict=True):
        assert two.patients == one.patients == one.n == two.n / 2
    limits, line = (
        f(np.repeat(said, 2), np.repeat(truth, 2), np.repeat(patients, 2)) for f in (agreement, concordance)
    )
    assert limits.bias_ci95 == pytest.approx(once[0].bias_ci95)
    assert limits.limits == pytest.approx(once[0].limits)
    assert (line.value, *line.ci95) == pytest.approx((once[1].value, *once[1].ci95))


def test_one_pair_has_no_limits() -> None:
    assert isnan(agreement([1], [2]).bias)


def test_concordance_by_hand() -> None:
    # Means 2 and 3, variances 2/3 each, covariance 2/3: 2 · 2/3 / (2/3 + 2/3 + 1).
    assert concordance([1, 2, 3], [2, 3, 4]).value == pytest.approx((4 / 3) / (7 / 3))
    assert concordance([1, 2, 3], [1, 2, 3]).value == pytest.approx(1)
    assert concordance([1, 2, 3], [3, 2, 1]).value == pytest.approx(-1)
    assert isnan(concordance([1, 1, 1], [1, 1, 1]).value)
    assert isnan(concordance([1, 2], [1, 2]).value)


def test_concordance_without_correlation_is_none() -> None:
    assert concordance([2.088, 1.848, 1.608], [2.088] * 3).ci95 == (0, 0), "one of both does not vary"
    found = concordance([1, 2, 1, 2], [1, 1, 2, 2])
    assert found.value == 0
    assert found.ci95[0] == -found.ci95[1] < 0


def test_concordance_is_at_most_correlation_and_symmetric(rng: np.random.Generator) -> None:
    for _ in range(20):
        a = rng.normal(size=15)
        b = 0.7 * a + 0.3 * rng.normal(size=15) + 0.5
        found = concordance(a, b)
        assert abs(found.value) <= abs(np.corrcoef(a, b)[0, 1]) + 1e-12
        assert concordance(b, a).value == pytest.approx(found.value)
        assert concordance(10 * a + 3, 10 * b + 3).value == pytest.approx(found.value)


def test_the_interval_of_concordance_holds_the_truth_as_often_as_it_says(rng: np.random.Generator) -> None:
    # Equal means and variances: the true concordance is the correlation.
    held = 0
    for _ in range(400):
        a, b = rng.multivariate_normal([0, 0], [[1, 0.8], [0.8, 1]], 60).T
        low, high = concordance(a, b).ci95
        held += low < 0.8 < high
    assert held / 400 == pytest.approx(0.95, abs=0.03)


def test_who_crosses_the_threshold() -> None:
    found = crossing([5.6, 5.5, 7.0, 2.0, nan], [5.5, 5.6, 8.0, 1.0, 6.0], FATTY_LIVER_PERCENT)
    assert (found.over, found.under, found.n, found.right) == ((0,), (1,), 4, 2)
    assert crossing([5.56], [5.56], 5.56).right == 1
