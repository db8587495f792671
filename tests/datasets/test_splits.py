from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from delineate.core.subject import Subject
from delineate.datasets.dataset import Dataset
from delineate.datasets.splits import Split, leave_one_site_out, load_or_make_split, make_split, save_split, sites_of
from delineate.errors import BadSplit


def subject(name: str, site: str = "", patient: str = "") -> Subject:
    return Subject(name, {}, site=site, patient=patient)


def many(count: int, sites: str = "A") -> list[Subject]:
    return [subject(f"s{i:03}", sites[i % len(sites)]) for i in range(count)]


def dataset(subjects: list[Subject]) -> Dataset:
    return Dataset("set", Path(), "scans", tuple(subjects))


@st.composite
def cohorts(draw: st.DrawFn) -> list[Subject]:
    """Up to 60 subjects of up to four sites, several of one patient among them, each patient at one site."""
    count = draw(st.integers(12, 60))
    patients = draw(st.lists(st.integers(0, 30), min_size=count, max_size=count))
    sites = draw(st.lists(st.sampled_from("ABCD"), min_size=31, max_size=31))
    return [subject(f"s{i:02}", sites[p], f"p{p}") for i, p in enumerate(patients)]


@given(cohorts(), st.integers(2, 4), st.sampled_from([0.0, 0.1, 0.25]), st.integers(0, 3))
def test_laws_of_a_split(subjects: list[Subject], folds: int, test_fraction: float, seed: int) -> None:
    patients = {s.id: s.patient for s in subjects}
    assume(len(set(patients.values())) >= 10)
    split = make_split(subjects, folds, test_fraction, seed)
    parts = [*split.folds, split.test]

    assert sorted(name for part in parts for name in part) == sorted(patients), "every subject has one place"
    for a, b in ((a, b) for a in parts for b in parts if a is not b):
        assert not {patients[name] for name in a} & {patients[name] for name in b}, "no patient is in two parts"
    for site in sites_of(subjects):
        here = [len({patients[s.id] for s in subjects if s.site == site and s.id in part}) for part in split.folds]
        assert max(here) - min(here) <= 1, "every fold has its share of each site"
    sizes = [len({patients[name] for name in part}) for part in split.folds]
    assert max(sizes) - min(sizes) <= 1
    assert bool(split.test) == (test_fraction > 0)
    assert split == make_split(subjects[::-1], folds, test_fraction, seed), "the order of subjects does not matter"
    for fold in range(folds):
        together = {*split.training_of(fold), *split.held_out(fold), *split.test}
        assert together == set(patients)
        assert not set(split.training_of(fold)) & {*split.held_out(fold), *split.test}


def test_another_seed_is_another_split() -> None:
    assert make_split(many(30), seed=0) != make_split(many(30), seed=1)


def test_the_test_set_takes_its_share_of_each_site() -> None:
    subjects = many(30, "AAB")
    split = make_split(subjects, 5, 0.2)
    assert Counter(s.site for s in subjects if s.id in split.test) == {"A": 4, "B": 2}


@pytest.mark.parametrize(
    ("count", "folds", "test_fraction"), [(4, 5, 0.0), (6, 5, 0.5), (10, 1, 0.0), (10, 5, 1.0), (10, 5, -0.1)]
)
def test_splits_that_cannot_be_made_are_refused(count: int, folds: int, test_fraction: float) -> None:
    with pytest.raises(BadSplit):
        make_split(many(count), folds, test_fraction)


def test_there_is_no_other_fold() -> None:
    split = make_split(many(10), 5)
    with pytest.raises(BadSplit, match="folds 0 to 4"):
        split.held_out(5)
    with pytest.raises(BadSplit):
        split.training_of(-1)


def test_leave_one_site_out_has_a_fold_a_site() -> None:
    subjects = many(9, "BAC")
    split = leave_one_site_out(subjects)
    for fold, site in enumerate(sites_of(subjects)):
        assert set(split.held_out(fold)) == {s.id for s in subjects if s.site == site}
    with pytest.raises(BadSplit, match="one site"):
        leave_one_site_out(many(4))
    with pytest.raises(BadSplit, match=r"p \(A, B\)"):
        leave_one_site_out([subject("a", "A", "p"), subject("b", "B", "p")])


class TestFile:
    def test_later_runs_reuse_it(self, tmp_path: Path) -> None:
        path = tmp_path / "runs" / "split.json"
        made = load_or_make_split(path, dataset(many(20, "AB")), folds=4, test_fraction=0.2, seed=3)
        assert load_or_make_split(path, dataset(many(20, "AB")), seed=99) == made
        assert len(made.folds) == 4

    def test_new_subjects_are_reported_and_never_move_the_others(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = tmp_path / "split.json"
        made = load_or_make_split(path, dataset(many(10)))
        with caplog.at_level(logging.WARNING):
            later = load_or_make_split(path, dataset(many(12)))
        assert later == made
        assert later.unassigned(many(12)) == ("s010", "s011")
        assert "s010, s011" in caplog.text

    def test_subjects_that_are_gone_are_named(self, tmp_path: Path) -> None:
        path = tmp_path / "split.json"
        load_or_make_split(path, dataset(many(10)))
        with pytest.raises(BadSplit, match="s008, s009"):
            load_or_make_split(path, dataset(many(8)))

    def test_what_is_asked_for_must_be_in_it(self, tmp_path: Path) -> None:
        path = tmp_path / "split.json"
        load_or_make_split(path, dataset(many(10)), folds=5)
        with pytest.raises(BadSplit, match="has 5 folds, 3"):
            load_or_make_split(path, dataset(many(10)), folds=3)
        with pytest.raises(BadSplit, match="no test set"):
            load_or_make_split(path, dataset(many(10)), test_fraction=0.1)

    def test_a_torn_patient_is_named(self, tmp_path: Path) -> None:
        save_split(tmp_path / "split.json", Split((("a",), ("b",))))
        with pytest.raises(BadSplit, match=r"p \(fold 0, fold 1\)"):
            load_or_make_split(tmp_path / "split.json", dataset([subject("a", "", "p"), subject("b", "", "p")]))

    @pytest.mark.parametrize(
        "text",
        ["", "{", "[]", '{"folds": [["s000"]]}', json.dumps({"seed": 0, "folds": [["s000"], ["s000"]], "test": []})],
    )
    def test_a_damaged_one_is_refused(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "split.json"
        path.write_text(text)
        with pytest.raises(BadSplit):
            load_or_make_split(path, dataset(many(10)))
        assert path.read_text() == text
