"""Who is trained on and who is held out, in every design; laws over seeds and counts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from delineate.core.subject import Subject
from delineate.datasets.dataset import Dataset
from delineate.errors import DelineateError, RecipeError, StudyError
from delineate.studies.planning import in_turn, plan_runs
from delineate.studies.specification import Size, Study, load_study, packaged_studies


def subjects(a: int, b: int, scans: int = 1) -> tuple[Subject, ...]:
    """Patients of two sites, each with a number of scans."""
    return tuple(
        Subject(f"{site}{i}-{s}", {"MR": Path("x.nii")}, Path("y.nii"), site=site, patient=f"{site}{i}")
        for site, n in (("A", a), ("B", b))
        for i in range(n)
        for s in range(scans)
    )


def dataset(*people: Subject) -> Dataset:
    return Dataset("d", Path(), "msd", people)


def study(**design: object) -> Study:
    return Study.model_validate(
        {"name": "s", "question": "?", "recipe": "hippocampus", "design": design, "sizes": {"quick": {}},
         "arms": {"plain": {}, "wide": {"set": ["network.widths=[32, 64, 128]"]}}}
    )  # fmt: skip


def test_folds_hold_everybody_out_once_and_are_the_same_for_every_arm_and_seed() -> None:
    people = subjects(20, 7, scans=2)
    runs = plan_runs(study(kind="cross_validation", folds=4), Size(seeds=(0, 3)), dataset(*people))
    assert len(runs) == 2 * 2 * 4
    assert len({run.name for run in runs}) == len(runs)
    assert len({run.split for run in runs}) == 1
    for arm in ("plain", "wide"):
        for seed in (0, 3):
            held = [name for run in runs if (run.arm, run.seed) == (arm, seed) for name in run.split.held_out(run.fold)]
            assert sorted(held) == sorted(person.id for person in people)
    assert {run.recipe.training.seed for run in runs} == {0, 3}
    assert {len(run.recipe.network.widths) for run in runs if run.arm == "wide"} == {3}


@settings(max_examples=40, deadline=None)
@given(st.integers(8, 30), st.integers(8, 30), st.integers(1, 3), st.integers(0, 2**32))
def test_more_labelled_subjects_contain_fewer_and_nobody_held_out(a: int, b: int, scans: int, seed: int) -> None:
    people = dataset(*subjects(a, b, scans))
    size = Size(seeds=(seed,), counts=(2, 4, 8))
    runs = [run for run in plan_runs(study(kind="learning_curve", counts=[2]), size, people) if run.arm == "plain"]
    trained = [set(run.split.training_of(run.fold)) for run in runs]
    assert trained[0] < trained[1] < trained[2]
    assert [run.count for run in runs] == [2, 4, 8]
    assert all(count <= len(names) < count + scans for count, names in zip((2, 4, 8), trained, strict=True))
    assert len({run.split.held_out(run.fold) for run in runs}) == 1
    patient = {person.id: person.patient for person in people.subjects}
    held = {patient[name] for name in runs[0].split.held_out(0)}
    assert not held & {patient[name] for name in trained[-1]}


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 30), st.integers(8, 30), st.integers(0, 2**32), st.integers(0, 2**32))
def test_moved_subjects_are_never_judged_and_the_judged_never_change(a: int, b: int, one: int, two: int) -> None:
    people = subjects(a, b)
    size = Size(seeds=(one, two), counts=(0, 1, 3))
    design = {"kind": "moved_subjects", "source": "A", "target": "B"}
    runs = plan_runs(study(**design), size, dataset(*people))
    assert len({run.split.held_out(run.fold) for run in runs}) == 1
    for run in runs:
        trained, judged = run.split.training_of(run.fold), run.split.held_out(run.fold)
        assert not set(trained) & set(judged)
        assert sum(name.startswith("A") for name in trained) == a
        assert sum(name.startswith("B") for name in trained) == run.count
        assert all(name.startswith("B") for name in judged)
        assert len(judged) in (b // 2, (b + 1) // 2)


def test_both_directions_are_studied_where_none_is_named() -> None:
    runs = plan_runs(study(kind="moved_subjects", counts=[0]), Size(), dataset(*subjects(8, 8)))
    assert {run.direction for run in runs} == {"A-to-B", "B-to-A"}
    assert {run.group for run in runs if run.arm == "wide"} == {"wide A-to-B 0", "wide B-to-A 0"}


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 2**32))
def test_any_beginning_of_the_order_has_each_sites_share(a: int, b: int, seed: int) -> None:
    sites = [scans[0].site for scans in in_turn(subjects(a, b), seed)]
    for n in range(len(sites) + 1):
        assert abs(sites[:n].count("A") - n * a / (a + b)) <= 1


@pytest.mark.parametrize("name", packaged_studies())
def test_a_packaged_study_has_both_sizes_and_plans_different_runs(name: str) -> None:
    packaged = load_study(name)
    assert packaged.name == name
    assert set(packaged.sizes) == {"quick", "paper"}
    people = dataset(*subjects(110, 110))
    for size in packaged.sizes.values():
        runs = plan_runs(packaged, size, people)
        assert len({run.name for run in runs}) == len(runs)
        minutes = [run.recipe.training.minutes for run in runs]
        assert size is not packaged.sizes["quick"] or sum(m or 0 for m in minutes) <= 12, "a quarter of an hour"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"metric": "dicee"}, "did you mean 'dice'"),
        ({"recipe": "hippocampuss"}, "did you mean 'hippocampus'"),
        ({"arms": {"../x": {}}}, "arms"),
        ({"claims": [{"text": "x", "better": "a", "worse": "b"}]}, "the arms are base"),
        ({"published": [{"source": "x", "columns": ["a"], "rows": [["1", "2"]]}]}, "2 cells for 1 columns"),
        ({"sizes": {"quick": {"counts": [1]}}}, "has counts"),
        ({"sizes": {"quick": {"folds": [5]}}}, "has fold 5"),
        ({"design": {"kind": "crossvalidation"}}, "cross_validation"),
        ({"set": ["network.widthss=[1]"]}, "did you mean 'widths'"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, object], says: str, tmp_path: Path) -> None:
    values = {
        "name": "s", "question": "?", "recipe": "hippocampus", "design": {"kind": "cross_validation"},
        "sizes": {"quick": {}}, **change,
    }  # fmt: skip
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(values))

    def planned() -> None:
        found = load_study(tmp_path / "s.yaml")
        plan_runs(found, found.sizes["quick"], dataset(*subjects(5, 5)), tmp_path)

    with pytest.raises((StudyError, RecipeError)) as error:
        planned()
    assert says in str(error.value)


def test_a_design_that_does_not_fit_the_data_is_refused() -> None:
    people = dataset(*subjects(5, 5))
    for design, size in (
        ({"kind": "learning_curve", "counts": [9]}, Size()),
        ({"kind": "learning_curve", "counts": [1]}, Size()),
        ({"kind": "moved_subjects", "counts": [4]}, Size()),
        ({"kind": "moved_subjects", "source": "C", "target": "B"}, Size()),
        ({"kind": "cross_validation", "folds": 11}, Size()),
    ):
        with pytest.raises(DelineateError) as error:
            plan_runs(study(**design), size, people)
        assert error.value.fix
    with pytest.raises(StudyError, match="has 1 sites"):
        plan_runs(study(kind="moved_subjects"), Size(), dataset(*subjects(9, 0)))


def test_the_study_of_the_documentation_is_one() -> None:
    page = (Path(__file__).parents[2] / "docs" / "studies.md").read_text(encoding="utf-8")
    [text] = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    shown = Study.model_validate(yaml.safe_load(text))
    for size in shown.sizes.values():
        assert {run.arm for run in plan_runs(shown, size, dataset(*subjects(20, 20)))} == {"narrow", "wide"}
