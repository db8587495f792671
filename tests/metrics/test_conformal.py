"""Conformal intervals cover what they promise, and say when they cannot."""

from __future__ import annotations

from math import inf, isnan, nan

import numpy as np
import pytest

from delineate.metrics.conformal import Conformal


def test_by_hand() -> None:
    errors = Conformal.of(range(1, 20))  # 19 of them: 90 % leaves the outermost on either side
    assert errors.interval(0.9) == (1, 19)
    assert errors.interval(0.8) == (2, 18)
    assert errors.interval(0.91) == (-inf, inf)
    assert errors.best_level == pytest.approx(0.9)


@pytest.mark.parametrize(("level", "patients"), [(0.5, 3), (0.8, 9), (0.9, 19), (0.95, 39)])
def test_the_fewest_patients_are_those_that_give_an_interval(level: float, patients: int) -> None:
    assert Conformal.fewest(level) == patients
    assert np.isfinite(Conformal.of(range(patients)).interval(level)).all()
    assert not np.isfinite(Conformal.of(range(patients - 1)).interval(level)).any()


def test_undefined_errors_do_not_count() -> None:
    assert Conformal.of([nan, 3.0, 1.0, inf, nan, 2.0], list("abcabb")).errors == ((1.0,), (2.0, 3.0), (inf,))
    assert Conformal(()).best_level == 0
    assert Conformal(()).interval(0.9) == (-inf, inf)
    assert isnan(Conformal.of([1.0, 2.0]).coverage([nan], 0.2))


def test_a_patient_of_many_scans_weighs_as_much_as_one_of_one() -> None:
    errors, patients = [*range(1, 20)], [f"p{i}" for i in range(19)]
    many = Conformal.of([*errors, *[19] * 8], [*patients, *["p18"] * 8])
    assert many.interval(0.9) == Conformal.of(errors).interval(0.9) == (1, 19)
    assert many.best_level == pytest.approx(0.9), "nineteen patients, whatever the scans"


def test_an_infinite_error_is_one() -> None:
    assert Conformal.of([-inf, *range(1, 20)]).interval(0.9) == (-inf, 19)


@pytest.mark.parametrize("level", [0.5, 0.8, 0.9])
def test_new_subjects_of_the_same_kind_are_covered(level: float, rng: np.random.Generator) -> None:
    covered = []
    for _ in range(2000):
        *known, new = rng.exponential(size=40)
        low, high = Conformal.of(known).interval(level)
        covered.append(low <= new <= high)
    assert level - 0.03 < np.mean(covered) < level + 2 / 40 + 0.03


def test_coverage_is_of_others() -> None:
    errors = Conformal.of(range(1, 20))
    assert errors.coverage([0.0, 5.0, 19.0, 25.0, nan], 0.9) == 0.5
    assert errors.coverage([0.0, 5.0, 5.0, 25.0], 0.9, list("aaab")) == pytest.approx(1 / 3), "by patient"
