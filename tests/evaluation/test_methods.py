"""Methods compared on the same subjects, in words."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from delineate.errors import DatasetError
from delineate.evaluation.methods import compare_methods, on_common_subjects
from delineate.evaluation.table import Evaluation


def evaluation(dice: np.ndarray, hd95_mm: np.ndarray | None = None, target: str = "organ") -> Evaluation:
    n = len(dice)
    hd95_mm = np.ones(n) if hd95_mm is None else hd95_mm
    columns = {"subject": [f"s{i}" for i in range(n)], "site": "", "target": target, "dice": dice, "hd95_mm": hd95_mm}
    return Evaluation(pd.DataFrame(columns | {"case": "both"}))


def test_the_better_way_depends_on_the_metric(rng: np.random.Generator) -> None:
    base, worse = rng.uniform(0.6, 0.8, 20), rng.uniform(2, 4, 20)
    a, b = evaluation(base + 0.1, worse - 1), evaluation(base, worse)
    said = [str(d) for d in compare_methods({"new": a, "old": b})]
    assert said[0].startswith("Dice: new is better than old (difference 0.100 (0.100 to 0.100)")
    assert said[1].startswith("HD95: new is better than old (difference −1.00 mm")


def test_what_cannot_be_told_apart_is_said_so(rng: np.random.Generator) -> None:
    base = rng.uniform(0.6, 0.8, 8)
    said = str(compare_methods({"a": evaluation(base), "b": evaluation(base + rng.normal(0, 0.05, 8))}, ["dice"])[0])
    assert "a and b are not distinguishable" in said
    assert "n = 8" in said


def test_five_subjects_tell_nothing_apart_however_far(rng: np.random.Generator) -> None:
    base = rng.uniform(0.6, 0.8, 5)
    said = str(compare_methods({"a": evaluation(base), "b": evaluation(base - 0.5)}, ["dice"])[0])
    assert said.startswith("Dice: 5 subjects are too few to tell a and b apart (difference 0.500")


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
    with pytest.raises(DatasetError, match="compare like"):
        compare_methods({"a": evaluation(two), "b": evaluation(two, target="lesion")})
    with pytest.raises(DatasetError, match="in common are dice, hd95_mm"):
        compare_methods({"a": evaluation(two), "b": evaluation(two)}, ["jaccard"])
    with pytest.raises(DatasetError, match="1 subjects in common"):
        compare_methods({"a": evaluation(two), "b": evaluation(two[:1])})
