"""Methods compared on the same subjects, in words."""

from __future__ import annotations

from math import inf, nan

import numpy as np
import pandas as pd
import pytest

from delineate.errors import DatasetError, RecipeError
from delineate.evaluation.methods import compare_methods, on_common_subjects
from delineate.evaluation.table import Evaluation
from delineate.reporting.figures import methods_chart


def evaluation(dice: np.ndarray, hd95_mm: np.ndarray | None = None, target: str = "organ") -> Evaluation:
    n = len(dice)
    hd95_mm = np.ones(n) if hd95_mm is None else hd95_mm
    columns = {"subject": [f"s{i}" for i in range(n)], "site": "", "target": target, "dice": dice, "hd95_mm": hd95_mm}
    return Evaluation(pd.DataFrame(columns | {"case": "both"}))


def test_the_better_way_depends_on_the_metric(rng: np.random.Generator) -> None:
    base, worse = rng.uniform(0.6, 0.8, 20), rng.uniform(2, 4, 20)
    a, b = evaluation(base + 0.1, worse - 1), evaluation(base, worse)
    said = [str(d) for d in compare_methods({"new": a, "old": b})]
    assert said[0].startswith("Dice: new is better than old (new minus old: 0.100 (0.100 to 0.100)")
    assert said[1].startswith("HD95: new is better than old (new minus old: −1.00 mm")


def test_what_cannot_be_told_apart_is_said_so(rng: np.random.Generator) -> None:
    base = rng.uniform(0.6, 0.8, 8)
    said = str(compare_methods({"a": evaluation(base), "b": evaluation(base + rng.normal(0, 0.05, 8))}, ["dice"])[0])
    assert "a and b are not distinguishable" in said
    assert "n = 8" in said


def test_five_subjects_tell_nothing_apart_however_far(rng: np.random.Generator) -> None:
    base = rng.uniform(0.6, 0.8, 5)
    said = str(compare_methods({"a": evaluation(base), "b": evaluation(base - 0.5)}, ["dice"])[0])
    assert said.startswith(
        "Dice: 5 patients are too few to tell a and b apart, whatever the difference; at least 6 are needed ("
    )


def test_six_subjects_are_too_few_for_three_methods(rng: np.random.Generator) -> None:
    base = rng.uniform(0.6, 0.8, 7)
    methods = {name: evaluation(base[:6] - shift) for name, shift in (("a", 0), ("b", 0.2), ("c", 0.4))}
    for found in compare_methods(methods, ["dice"]):
        assert found.verdict == "too few to tell"
        assert "6 patients are too few" in str(found)
        assert "at least 7 are needed" in str(found)
        assert (found.as_dict()["difference"]["needed"], found.as_dict()["difference"]["detectable"]) == (7, inf)
    seven = {name: evaluation(base - shift) for name, shift in (("a", 0), ("b", 0.2), ("c", 0.4))}
    assert [found.better for found in compare_methods(seven, ["dice"])] == ["a", "a", "b"]


def test_no_difference_is_said_with_the_least_that_could_have_shown(rng: np.random.Generator) -> None:
    base, noise = rng.uniform(0.6, 0.8, 20), rng.normal(0, 0.05, 20)
    [found] = compare_methods({"a": evaluation(base), "b": evaluation(base + noise - noise.mean())}, ["dice"])
    assert found.verdict == "not distinguishable"
    d = found.difference
    assert d.detectable == pytest.approx(0.69 * d.sd, rel=0.02)
    assert str(found).endswith(
        f"; with 20 patients, 80 % of studies detect a true difference only if it is {d.detectable:.3f} or more"
    )


def test_misses_are_losses_and_are_counted() -> None:
    """Infinite distances were dropped: whoever missed twelve of twenty was better on the eight that are left."""
    distance = np.linspace(3, 6, 20)
    half, dice = np.where(np.arange(20) < 12, np.inf, distance - 1), np.full(20, 0.8)
    [found] = compare_methods({"half": evaluation(dice, half), "all": evaluation(dice, distance)}, ["hd95_mm"])
    assert (found.better, found.failed, found.subjects) == ("all", (12, 0), 20)
    assert "all is better than half (half minus all: −1.00 mm" in str(found)
    assert "over the 8 of 20 patients on whom neither failed" in str(found)
    assert "failures, which rank last: half 12 of 20, all 0 of 20" in str(found)
    page = methods_chart({"half": evaluation(dice, half)}, "hd95_mm", "HD95").svg
    assert "12 failed" in page


def with_cases(precision: list[float], case: list[str]) -> Evaluation:
    made = evaluation(np.ones(len(case)))
    return Evaluation(made.table.assign(precision=precision, case=case))


def test_an_undefined_value_is_a_miss_where_the_target_was_missed() -> None:
    """Precision has no value where nothing is predicted: a miss if there is a target, and right if there is none."""
    found_it, missed, right, invented = "both", "prediction empty", "both empty", "reference empty"
    careful = with_cases([0.9] * 6 + [nan] * 6, [found_it] * 6 + [right] * 6)
    rash = with_cases([0.9] * 6 + [0.0] * 6, [found_it] * 6 + [invented] * 6)
    blind = with_cases([nan] * 12, [missed] * 6 + [right] * 6)
    for one, other, n, failed in ((careful, rash, 12, (0, 6)), (careful, blind, 6, (0, 6)), (blind, blind, 6, (6, 6))):
        [found] = compare_methods({"one": one, "other": other}, ["precision"])
        assert (found.difference.n, found.failed) == (n, failed)
        assert found.better == ("one" if one is careful else None)
        [back] = compare_methods({"other": other, "one": one}, ["precision"])
        assert (back.better, back.failed) == (found.better, failed[::-1])


def repeated(*tests: Evaluation) -> Evaluation:
    """Several tests of the same subjects, such as by the networks of several folds."""
    return Evaluation(pd.concat([test.table for test in tests], ignore_index=True))


def test_a_subject_tested_several_times_counts_once_by_the_mean_of_its_tests(rng: np.random.Generator) -> None:
    base, noise = rng.uniform(0.6, 0.8, 12), rng.normal(0, 0.05, 12)
    near, missed = np.linspace(3, 6, 12), np.arange(12) == 0
    twice = repeated(evaluation(base + noise, np.where(missed, inf, near)), evaluation(base - noise, near + 2))
    means, other = evaluation(base, np.where(missed, inf, near + 1)), evaluation(rng.uniform(0.6, 0.8, 12), near)
    found, wanted = (compare_methods({"one": one, "other": other}) for one in (twice, means))
    for of_tests, of_means in zip(found, wanted, strict=True):
        assert (of_tests.subjects, of_tests.failed) == (of_means.subjects, of_means.failed)
        assert of_tests.difference.n == 12
        for name in ("mean", "sd", "p", "effect"):
            assert getattr(of_tests.difference, name) == pytest.approx(getattr(of_means.difference, name)), name
    [same] = compare_methods({"one": twice, "other": twice}, ["dice"])
    assert (same.subjects, same.difference.mean) == (12, pytest.approx(0))


def test_who_was_right_in_one_of_two_tests_is_better_than_who_never_was() -> None:
    right, wrong = with_cases([nan] * 6, ["both empty"] * 6), with_cases([0.0] * 6, ["reference empty"] * 6)
    half = repeated(right, wrong)
    for better, worse in ((right, half), (half, wrong), (right, wrong)):
        [found] = compare_methods({"better": better, "worse": worse}, ["precision"])
        assert (found.better, found.failed, found.subjects) == ("better", (0, 6), 6)
    [found] = compare_methods({"one": half, "other": half}, ["precision"])
    assert (found.better, found.failed) == (None, (6, 6))


@pytest.mark.parametrize("seed", range(20))
def test_tables_and_comparisons_speak_of_one_number(seed: int) -> None:
    """Some patients have many scans, and other methods suit those: by scan and by patient, signs would differ."""
    rng = np.random.default_rng(seed)
    scans = rng.integers(1, 12, 9)
    patients = np.repeat([f"p{i}" for i in range(9)], scans)
    suits = np.repeat(np.where(scans > 6, -0.05, 0.05), scans)
    base = rng.uniform(0.6, 0.8, len(patients))
    methods = {
        name: Evaluation(evaluation(values, 1 + values).table.assign(patient=patients))
        for name, values in (("a", base + suits + rng.normal(0, 0.02, len(base))), ("b", base))
    }
    for found in compare_methods(methods):
        tables = [m.summary()["organ"][found.metric] for m in methods.values()]
        assert found.difference.mean == pytest.approx(tables[0].mean - tables[1].mean, abs=1e-12)
        assert found.difference.n == tables[0].patients == 9


def test_three_methods_are_three_pairs_and_corrected_together(rng: np.random.Generator) -> None:
    base = rng.uniform(0.6, 0.8, 12)
    methods = {
        name: evaluation(base + rng.normal(shift, 0.01, 12)) for name, shift in (("a", 0), ("b", 0.01), ("c", 0))
    }
    three = {(d.first, d.second): d.difference.p for d in compare_methods(methods, ["dice"])}
    assert set(three) == {("a", "b"), ("a", "c"), ("b", "c")}
    two = compare_methods({name: methods[name] for name in ("a", "b")}, ["dice"])[0].difference.p
    assert three["a", "b"] >= two


def test_only_subjects_that_all_have_count() -> None:
    short = evaluation(np.array([0.5, 0.6, 0.7]))
    methods = {"a": evaluation(np.linspace(0.5, 0.9, 9)), "b": short}
    assert compare_methods(methods)[0].difference.n == 3
    assert {e.summary()["organ"]["dice"].n for e in on_common_subjects(methods).values()} == {3}


def test_like_is_compared_with_like() -> None:
    two = np.array([0.5, 0.6])
    with pytest.raises(DatasetError, match="compare methods on the same targets"):
        compare_methods({"a": evaluation(two), "b": evaluation(two, target="lesion")})
    with pytest.raises(DatasetError, match="choose from dice, hd95_mm"):
        compare_methods({"a": evaluation(two), "b": evaluation(two)}, ["jaccard"])
    with pytest.raises(DatasetError, match="1 subjects in common"):
        compare_methods({"a": evaluation(two), "b": evaluation(two[:1])})


def test_a_metric_that_is_asked_for_is_compared_or_refused() -> None:
    """Its name was left out without a word where another could be compared; of a set, what there is counts."""
    both = {name: evaluation(np.array([0.5, 0.6])) for name in "ab"}
    assert {found.metric for found in compare_methods(both, ["standard"])} == {"dice", "hd95_mm"}
    with pytest.raises(DatasetError, match=r"better end: assd_mm; choose from dice, hd95_mm"):
        compare_methods(both, ["dice", "assd_mm"])
    with pytest.raises(RecipeError, match="no metric 'dicee'"):
        compare_methods(both, ["dicee"])
