from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from delineate.core.subject import Subject
from delineate.datasets.dataset import Dataset
from delineate.datasets.splits import (
    Split,
    drawn_over_sites,
    leave_one_site_out,
    load_or_make_split,
    load_split,
    make_split,
    save_split,
    sites_of,
)
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


@given(cohorts(), st.sampled_from([0.0, 0.1, 0.25]), st.sampled_from([0.1, 0.2]), st.integers(0, 3))
def test_laws_of_a_fixed_split(
    subjects: list[Subject], test_fraction: float, validation_fraction: float, seed: int
) -> None:
    patients = {s.id: s.patient for s in subjects}
    assume(len(set(patients.values())) >= 10)
    last = 0 if test_fraction else 1
    assume(not last or sum(p == patients[max(patients)] for p in patients.values()) == 1)
    split = make_split(subjects, 1, test_fraction, seed, test_last=last, validation_fraction=validation_fraction)
    (training,) = split.folds
    assert sorted((*training, *split.validation, *split.test)) == sorted(patients), "every subject has one place"
    assert all((training, split.validation, split.test))
    together = [{patients[name] for name in part} for part in (training, split.validation, split.test)]
    assert sum(map(len, together)) == len(set(patients.values())), "no patient is in two parts"
    assert split.held_out(0) == split.test
    assert split.training_of(0) == split.training_of(None) == training
    with pytest.raises(BadSplit, match="fold 0 only"):
        split.held_out(1)


@given(cohorts(), st.integers(0, 12), st.integers(0, 5))
def test_validation_has_every_site_s_share_of_whole_patients(subjects: list[Subject], wanted: int, seed: int) -> None:
    drawn = set(drawn_over_sites(subjects, wanted, np.random.default_rng(seed)))
    patients = {s.patient for s in subjects if s.id in drawn}
    assert drawn == {s.id for s in subjects if s.patient in patients}, "patients are whole"
    largest = max(Counter(s.patient for s in subjects).values())
    assert min(wanted, len(subjects)) <= len(drawn) <= wanted + (largest - 1 if wanted else 0)
    everyone = {s.patient: s.site for s in subjects}
    for site, of_site in Counter(everyone.values()).items():
        share = of_site * len(patients) / len(everyone)
        assert abs(sum(everyone[p] == site for p in patients) - share) < 1


def test_three_sites_alike_give_as_many_subjects_each() -> None:
    """The split of the white matter report: 48, 6 and 6 of 60, evenly over three sites."""
    subjects = many(60, "ABC")
    split = make_split(subjects, 1, 0.1, validation_fraction=0.1)
    sites = {s.id: s.site for s in subjects}
    counts = [Counter(sites[name] for name in part) for part in (*split.folds, split.validation, split.test)]
    assert counts == [dict.fromkeys("ABC", 16), dict.fromkeys("ABC", 2), dict.fromkeys("ABC", 2)]


def test_the_last_subjects_are_the_last_by_number() -> None:
    subjects = [subject(f"case{i}") for i in (10, 2, 9, 1, 11, 3)]
    split = make_split(subjects, 1, test_last=2)
    assert (split.folds, split.test) == ((("case1", "case2", "case3", "case9"),), ("case10", "case11"))
    assert set(make_split(subjects, 2, test_last=2).test) == {"case10", "case11"}
    with pytest.raises(BadSplit, match="last 6 of 6"):
        make_split(subjects, 1, test_last=6)
    with pytest.raises(BadSplit, match=r"p \(the last subjects, those before\)"):
        make_split([subject("a", "", "p"), subject("b"), subject("c", "", "p")], 1, test_last=1)
    with pytest.raises(BadSplit, match="holds nothing out"):
        make_split(subjects, 1)


def test_moved_subjects_are_trained_on_in_every_fold() -> None:
    subjects = many(20, "AB")
    split = make_split(subjects, 4, 0.2, validation_fraction=0.1)
    moved = {*split.folds[0][:2], *split.test[:1], *split.validation[:1]}
    after = split.with_always_train(moved)
    assert after.subjects == split.subjects
    for fold in (0, 1, 2, 3, None):
        assert moved <= set(after.training_of(fold))
        assert fold is None or not moved & set(after.held_out(fold))
    assert not moved & {*after.test, *after.validation}
    assert after.with_always_train(moved) == after
    with pytest.raises(BadSplit, match="s099 cannot always be trained on"):
        split.with_always_train(["s099"])


@pytest.mark.parametrize(("test", "validation"), [(0.2, 0.2), (0.5, 0.4), (0.1, 0.5)])
@pytest.mark.parametrize("sites", ["ABCDEFGHIJ", "ABCDE", "AAAAAAABCD"])
def test_every_part_has_its_share_however_few_patients_a_site_has(sites: str, test: float, validation: float) -> None:
    split = make_split(many(10, sites), 1, test, validation_fraction=validation)
    assert (len(split.test), len(split.validation)) == (round(10 * test), round(10 * validation))


def test_moving_all_of_a_part_to_training_is_refused() -> None:
    split = make_split(many(20, "AB"), 4, 0.2, validation_fraction=0.1)
    for part, name in ((split.folds[1], "fold 1"), (split.test, "the test set"), (split.validation, "validation")):
        assert split.with_always_train(part[1:]).subjects == split.subjects
        with pytest.raises(BadSplit, match=f"leaves nobody in {name}"):
            split.with_always_train(part)
    fixed = make_split(many(10), 1, 0.2)
    assert fixed.with_always_train(fixed.folds[0]).training_of(0) == fixed.folds[0], "they are all trained on"


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

    def test_a_fixed_one_may_be_written_by_hand(self, tmp_path: Path) -> None:
        path = tmp_path / "split.json"
        path.write_text('{"training": ["s000", "s003"], "validation": ["s001"], "test": ["s002"]}', encoding="utf-8")
        split = load_or_make_split(path, dataset(many(4)))
        assert (split.training_of(0), split.validation, split.held_out(0)) == (("s000", "s003"), ("s001",), ("s002",))
        path.write_text('{"training": ["s000"], "vaildation": ["s001"], "test": ["s002"]}', encoding="utf-8")
        with pytest.raises(BadSplit, match="vaildation: no such field; did you mean 'validation'"):
            load_split(path)

    @pytest.mark.parametrize("folds", [1, 3])
    def test_it_reads_back_as_it_was_written(self, tmp_path: Path, folds: int) -> None:
        path = tmp_path / "split.json"
        made = make_split(many(20), folds, 0.1, 4, validation_fraction=0.1)
        for split in (made, made.with_always_train(["s001", "s002"])):
            save_split(path, split)
            assert load_split(path) == split

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
        with pytest.raises(BadSplit, match="has 5 folds, not the requested 3"):
            load_or_make_split(path, dataset(many(10)), folds=3)
        for what, asked in {
            "test set": {"test_fraction": 0.1},
            "test set, which": {"test_last": 1},
            "validation subjects": {"validation_fraction": 0.1},
            "such always_train subjects": {"always_train": ["s001"]},
        }.items():
            with pytest.raises(BadSplit, match=f"no {what}"):
                load_or_make_split(path, dataset(many(10)), **asked)

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
        path.write_text(text, encoding="utf-8")
        with pytest.raises(BadSplit):
            load_or_make_split(path, dataset(many(10)))
        assert path.read_text(encoding="utf-8") == text
