"""Who is trained on and who is held out, in every design; laws over seeds and counts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from delineate.core.subject import Subject
from delineate.core.targets import Targets
from delineate.datasets.dataset import Dataset
from delineate.derivation import AutoSpec
from delineate.errors import DelineateError, RecipeError, StudyError
from delineate.recipe import Recipe, load_recipe
from delineate.studies.designs import PlannedRun, in_turn
from delineate.studies.planning import plan_runs
from delineate.studies.specification import MovedSubjects, Size, Study, load_study, packaged_studies


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


def planned(what: Study, size: Size, people: Dataset, beside: Path = Path(), **more: Any) -> tuple[PlannedRun, ...]:
    return plan_runs(what, size, dict.fromkeys(what.data, people), beside, **more).runs


def test_folds_hold_everybody_out_once_and_are_the_same_for_every_arm_and_seed() -> None:
    people = subjects(20, 7, scans=2)
    runs = planned(study(kind="cross_validation", folds=4), Size(seeds=(0, 3)), dataset(*people))
    assert len(runs) == 2 * 2 * 4
    assert len({run.name for run in runs}) == len(runs)
    assert len({run.split for run in runs}) == 1
    for arm in ("plain", "wide"):
        for seed in (0, 3):
            held = [name for run in runs if (run.arm, run.seed) == (arm, seed) for name in run.split.held_out(run.fold)]
            assert sorted(held) == sorted(person.id for person in people)
    assert {run.recipe.training.seed for run in runs} == {0, 3}
    assert {len(run.recipe.network.widths) for run in runs if run.arm == "wide"} == {3}


@settings(max_examples=40)
@given(st.integers(8, 30), st.integers(8, 30), st.integers(1, 3), st.integers(0, 2**32))
def test_more_labelled_subjects_contain_fewer_and_nobody_held_out(a: int, b: int, scans: int, seed: int) -> None:
    people = dataset(*subjects(a, b, scans))
    size = Size(seeds=(seed,), counts=(2, 4, 8))
    runs = [run for run in planned(study(kind="learning_curve", counts=[2]), size, people) if run.arm == "plain"]
    trained = [set(run.split.training_of(run.fold)) for run in runs]
    assert trained[0] < trained[1] < trained[2]
    assert [run.count for run in runs] == [2, 4, 8]
    assert all(count <= len(names) < count + scans for count, names in zip((2, 4, 8), trained, strict=True))
    assert len({run.split.held_out(run.fold) for run in runs}) == 1
    patient = {person.id: person.patient for person in people.subjects}
    held = {patient[name] for name in runs[0].split.held_out(0)}
    assert not held & {patient[name] for name in trained[-1]}


@settings(max_examples=40)
@given(st.integers(2, 30), st.integers(8, 30), st.integers(0, 2**32), st.integers(0, 2**32))
def test_moved_subjects_are_never_judged_and_the_judged_never_change(a: int, b: int, one: int, two: int) -> None:
    people = subjects(a, b)
    size = Size(seeds=tuple({one, two}), counts=(0, 1, 3))
    design = {"kind": "moved_subjects", "source": "A", "target": "B"}
    runs = planned(study(**design), size, dataset(*people))
    assert len({run.split.held_out(run.fold) for run in runs}) == 1
    for run in runs:
        trained, judged = run.split.training_of(run.fold), run.split.held_out(run.fold)
        assert not set(trained) & set(judged)
        assert sum(name.startswith("A") for name in trained) == a
        assert sum(name.startswith("B") for name in trained) == run.count
        assert all(name.startswith("B") for name in judged)
        assert len(judged) in (b // 2, (b + 1) // 2)


ORDERED = {"kind": "moved_subjects", "counts": [0, 2, 4], "order": ["uncertainty", "random", "distance"]}


def test_every_order_begins_without_moved_subjects_and_moves_those_that_it_ranks_first() -> None:
    people = dataset(*subjects(6, 12, scans=2))
    what = study(**ORDERED, source="A", target="B")
    size = Size(seeds=(0, 1))
    first = plan_runs(what, size, {"scans": people})
    assert {(run.order, run.count) for run in first.runs if not run.ranks} == {("", 0), ("", 2), ("", 4)}
    assert len(first.pending) == 3, "one by distance, and one by uncertainty for each seed"
    rank = [run for run in first.runs if run.ranks]
    assert [(run.weights_of, run.seed) for run in rank] == [("plain-A-to-B-0-draw0", 0), ("plain-A-to-B-0-draw1", 1)]
    [compared] = first.comparisons
    judged = set(first.runs[0].split.held_out(0))
    assert set(compared.candidates) == set(rank[0].split.held_out(0)) == {
        one.id for one in people.subjects if one.site == "B"
    } - judged  # fmt: skip
    assert {name[0] for name in compared.trained} == {"A"}
    turns = {rank[0].name: compared.candidates[::-1], rank[1].name: compared.candidates[2:] + compared.candidates[:2]}
    rankings = {compared.name: compared.candidates, **turns}
    whole = plan_runs(what, size, {"scans": people}, rankings=rankings)
    assert all(run in whole.runs for run in first.runs)
    assert (whole.pending, whole.comparisons) == ((), ())
    for run in (run for run in whole.runs if run.order and not run.ranks):
        turn = rankings[compared.name if run.order == "distance" else rank[run.seed].name]
        moved = [name for name in turn if name in run.split.always_train]
        assert set(moved) == set(turn[: run.count])
        assert run.split.held_out(0) == first.runs[0].split.held_out(0)
    assert {run.group for run in whole.runs if run.arm == "wide" and run.count != 4} == {
        "wide A-to-B 0", "wide A-to-B 2", "wide A-to-B distance 2", "wide A-to-B uncertainty 2",
    }  # fmt: skip


def test_an_arm_starts_from_the_network_of_its_own_order_though_orders_may_move_the_same_subjects() -> None:
    values = {
        "name": "s", "question": "?", "recipe": "hippocampus", "sizes": {"quick": {}},
        "design": {**ORDERED, "source": "A", "target": "B"},
        "arms": {"first": {}, "then": {"start_from": "first"}, "again": {"weights_of": "first"}},
    }  # fmt: skip
    what, people = Study.model_validate(values), dataset(*subjects(4, 8))
    rank = [run for run in planned(what, Size(), people) if run.ranks]
    candidates = rank[0].split.held_out(0)
    runs = planned(what, Size(), people, rankings={rank[0].name: candidates, "scans A-to-B": candidates})
    assert {run.name.removeprefix("then-"): run.start_from for run in runs if run.arm == "then"} == {
        run.name.removeprefix("first-"): run.name for run in runs if run.arm == "first" and not run.ranks
    }
    assert not any(run.weights_of == rank[0].name for run in runs)


def test_both_directions_are_studied_where_none_is_named() -> None:
    runs = planned(study(kind="moved_subjects", counts=[0]), Size(), dataset(*subjects(8, 8)))
    assert {run.direction for run in runs} == {"A-to-B", "B-to-A"}
    assert {run.group for run in runs if run.arm == "wide"} == {"wide A-to-B 0", "wide B-to-A 0"}


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 2**32))
def test_any_beginning_of_the_order_has_each_sites_share(a: int, b: int, seed: int) -> None:
    sites = [scans[0].site for scans in in_turn(subjects(a, b), seed)]
    for n in range(len(sites) + 1):
        assert abs(sites[:n].count("A") - n * a / (a + b)) <= 1


def derived(name: str, people: Dataset, changes: Sequence[str]) -> Recipe:
    """What `auto` might derive if there were scans."""
    return load_recipe("generic_3d", AutoSpec.of_changes(changes)[1])


@pytest.mark.parametrize("name", packaged_studies())
def test_a_packaged_study_has_both_sizes_and_plans_different_runs(name: str) -> None:
    packaged = load_study(name)
    assert packaged.name == name
    assert set(packaged.sizes) == {"quick", "paper"}
    assert all(claim.text.endswith(".") for claim in packaged.claims), "sentences, before what we found"
    moved = [stage.design for stage in packaged.parts if isinstance(stage.design, MovedSubjects)]
    sites = {"A": moved[0].source or "A", "B": moved[0].target or "B"} if moved else {"A": "A", "B": "B"}
    people = dataset(*(replace(one, site=sites[one.site]) for one in subjects(110, 110)))
    for size in packaged.sizes.values():
        runs = planned(packaged, size, people, derive=derived)
        assert len({run.name for run in runs}) == len(runs)
        minutes = [run.recipe.training.minutes for run in runs]
        assert size is not packaged.sizes["quick"] or sum(m or 0 for m in minutes) <= 12, "a quarter of an hour"


SIX = {
    "name": "s", "question": "?", "recipe": "hippocampus", "sizes": {"quick": {}},
    "design": {"kind": "cross_validation", "folds": 2},
    "factors": {
        "size": {"narrow": {"set": ["network.widths=[8, 16]"]}, "wide": {"set": ["network.widths=[16, 32]"]}},
        "E": ["augmentation.intensity=null"],
    },
}  # fmt: skip


def test_factors_make_every_combination_or_each_alone() -> None:
    both = Study.model_validate(SIX)
    assert both.labels == ("narrow", "wide", "narrow+E", "wide+E")
    recipes = {run.arm: run.recipe for run in planned(both, Size(), dataset(*subjects(5, 5)))}
    assert recipes["wide+E"].augmentation.intensity is None
    assert recipes["wide"].augmentation.intensity is not None
    assert {name: recipe.network.widths for name, recipe in recipes.items()} == {  # type: ignore[union-attr]
        "narrow": (8, 16), "narrow+E": (8, 16), "wide": (16, 32), "wide+E": (16, 32)
    }  # fmt: skip
    [(one, other, pairs), (effect, _, paired)] = list(both.parts[0].opposites())
    assert (one, other, pairs) == ("wide", "narrow", [("wide", "narrow"), ("wide+E", "narrow+E")])
    assert (effect, paired) == ("E", [("narrow+E", "narrow"), ("wide+E", "wide")])
    alone = Study.model_validate({**SIX, "combine": "alone"})
    assert alone.labels == ("narrow", "wide", "narrow+E")
    options = {name: [f"training.seed={i}"] for i, name in enumerate("EVRT")}
    sixteen = Study.model_validate({**SIX, "factors": options}).labels
    assert len(set(sixteen)) == 16
    assert {"base", "E", "E+T", "E+V+R+T"} < set(sixteen)
    assert Study.model_validate({**SIX, "factors": options, "combine": "alone"}).labels == ("base", *"EVRT")


STAGED = {
    "name": "s", "question": "?", "recipe": "hippocampus", "sizes": {"quick": {}},
    "data": {"scans": {"locked": 0.2}},
    "stages": [
        {"name": "first", "factors": {"E": ["augmentation.intensity=null"], "W": ["network.widths=[8, 16]"]},
         "set": ["training.ema=0.9"], "combine": "alone", "design": {"kind": "cross_validation", "folds": 2}},
        {"name": "second", "best_of": "first", "arms": {"slow": {"set": ["training.optimiser.learning_rate=1e-4"]}},
         "design": {"kind": "cross_validation", "folds": 3}},
        {"name": "final", "best_of": "second", "design": {"kind": "locked_test"}},
    ],
}  # fmt: skip


def test_a_stage_builds_on_the_best_of_another_and_the_locked_subjects_are_seen_once_at_the_end() -> None:
    what, people = Study.model_validate(STAGED), dataset(*subjects(20, 10, scans=2))
    scores: dict[str, float | None] = {}
    first = plan_runs(what, Size(), {"scans": people}, scores=scores, final=True)
    assert {run.stage for run in first.runs} == {"first"}
    assert {run.recipe.training.ema for run in first.runs} == {0.9}
    assert len(first.pending) == 2
    scores |= {"first/base": 0.7, "first/E": None, "first/W": 0.8}
    second = plan_runs(what, Size(), {"scans": people}, scores=scores, final=True)
    assert second.runs[: len(first.runs)] == first.runs
    slow = [run for run in second.runs if run.stage == "second"]
    assert {(run.recipe.network.widths, run.recipe.training.optimiser.learning_rate) for run in slow} == {  # type: ignore[union-attr]
        ((8, 16), 1e-4)
    }
    assert 0.9 not in {run.recipe.training.ema for run in slow}, "a stage's own changes are for its own runs"
    scores |= {"second/slow": 0.9}
    assert plan_runs(what, Size(), {"scans": people}, scores=scores).runs == second.runs, "not without --final"
    whole = plan_runs(what, Size(), {"scans": people}, scores=scores, final=True)
    [last] = whole.runs[len(second.runs) :]
    assert last.recipe.training.optimiser.learning_rate == 1e-4
    locked = set(last.split.held_out(0))
    assert len(locked) == 12, "a fifth of 30 patients, with both scans"
    assert set(last.split.training_of(0)) == {person.id for person in people.subjects} - locked
    for run in second.runs:
        assert not locked & run.split.subjects
    with pytest.raises(StudyError, match="every arm of stage 'first' failed"):
        plan_runs(what, Size(), {"scans": people}, scores=dict.fromkeys(["first/base", "first/E", "first/W"]))


def test_a_network_of_other_data_is_tested_on_locked_subjects_by_a_locked_test_alone() -> None:
    sets = {"old": dataset(*subjects(10, 0)), "new": dataset(*subjects(20, 10))}
    stages = [
        {"name": "before", "arms": {"a": {}}, "data": "old", "design": {"kind": "cross_validation", "folds": 2}},
        {"name": "tests", "data": "new", "design": {"kind": "cross_validation", "folds": 2}, "arms": {
            "elsewhere": {"weights_of": "before/a"}, "b": {}, "held-out": {"weights_of": "b"}}},
        {"name": "final", "data": "new", "design": {"kind": "locked_test"}, "arms": {
            "elsewhere": {"weights_of": "before/a"}, "held-out": {"weights_of": "tests/b"}}},
    ]  # fmt: skip
    values = {**STAGED, "data": {"old": {}, "new": {"locked": 0.2}}, "stages": stages}
    runs = plan_runs(Study.model_validate(values), Size(), sets, final=True).runs
    locked = {name for run in runs if run.stage == "final" for name in run.split.test}
    assert len(locked) == 6
    for run in runs:
        tested = set(run.split.held_out(run.fold))
        assert tested
        if run.data == "new":
            assert tested == locked if run.stage == "final" else not tested & locked


def test_the_locked_test_waits_until_nothing_else_does_and_the_best_arm_keeps_what_the_size_changed_in_it() -> None:
    base = {"name": "base", "arms": {"plain": {}}, "design": {"kind": "locked_test"}}
    what = Study.model_validate({**STAGED, "stages": [base, *STAGED["stages"]]})  # type: ignore[misc]
    everywhere, there = ("training.batch_size=3",), ("network.short_skips=encoder", "training.batch_size=5")
    size, sets = Size(set=everywhere, arms={"*/W": there}), {"scans": dataset(*subjects(20, 10))}
    scores: dict[str, float | None] = {"first/base": 0.7, "first/E": 0.7, "first/W": 0.8}
    before = plan_runs(what, size, sets, scores=scores, final=True)
    assert {run.stage for run in before.runs} == {"first", "second"}
    assert [line.partition(" ")[0] for line in before.pending] == ["base", "final"]
    scores |= {"second/slow": 0.9}
    runs = plan_runs(what, size, sets, scores=scores, final=True).runs
    assert [run.stage for run in runs[len(before.runs) :]] == ["base", "final"]
    changed = {run.label: (run.recipe.network.short_skips, run.recipe.training.batch_size) for run in runs}  # type: ignore[union-attr]
    kept = {"first/W", "second/slow", "final/base"}
    assert {label for label, (skips, _) in changed.items() if skips == "encoder"} == kept
    assert {label: batch for label, (_, batch) in changed.items()} == {k: 5 if k in kept else 3 for k in changed}


TRANSFER = {
    "name": "s", "question": "?", "recipe": "hippocampus", "sizes": {"quick": {"seeds": [0, 1]}},
    "data": {"new": {}, "old": {}, "elsewhere": {}},
    "stages": [
        {"name": "before", "arms": {"old": {}}, "data": "old", "design": {"kind": "recipe_split"}},
        {"name": "after", "design": {"kind": "cross_validation", "folds": 2}, "arms": {
            "scratch": {},
            "transferred": {"start_from": "before/old"},
            "again": {"start_from": "scratch"},
            "forgotten": {"weights_of": "transferred", "data": "old"},
            "external": {"weights_of": "transferred", "data": "elsewhere"},
            "overlapping": {"weights_of": "scratch", "set": ["inference.overlap=0.75"]},
        }},
    ],
}  # fmt: skip


def test_a_network_starts_from_its_own_seed_and_fold_and_is_tested_on_nobody_it_was_trained_on() -> None:
    what = Study.model_validate(TRANSFER)
    sets = {
        name: dataset(*(replace(one, id=f"{name}-{one.id}") for one in subjects(9, 9))) for name in ("new", "old")
    } | {"elsewhere": dataset(*subjects(3, 3))}
    runs = plan_runs(what, what.sizes["quick"], sets).runs
    by_name = {run.name: run for run in runs}
    assert len(runs) == 2 + 3 * 4 + 3 * 4
    order = list(by_name)
    for run in runs:
        assert run.needs is None or order.index(run.needs) < order.index(run.name)
        if run.start_from is not None:
            source = by_name[run.start_from]
            assert source.seed == run.seed
            assert run.arm != "again" or (source.arm, source.fold, source.split) == ("scratch", run.fold, run.split)
        if run.weights_of is not None:
            tested, trained = set(run.split.held_out(run.fold)), set[str]()
            needed: PlannedRun | None = run
            while needed is not None:
                trained |= set(needed.split.training_of(needed.fold)) if needed.weights_of is None else set()
                needed = by_name.get(needed.needs or "")
            assert tested
            assert not tested & trained
    assert {run.data for run in runs if run.arm == "forgotten"} == {"old"}
    assert all(len(run.split.held_out(0)) == 6 for run in runs if run.arm == "external")
    assert {run.group for run in runs if run.arm == "overlapping"} == {"after/overlapping"}


def test_networks_are_tested_on_all_that_no_run_was_trained_on_and_another_data_set_is_read_its_own_way() -> None:
    """Where runs keep to their recipe's split, networks from elsewhere are tested on the same subjects as theirs."""
    what = Study.model_validate({
        **TRANSFER, "sizes": {"quick": {"set": ["training.folds=3"]}}, "stages": [
            {"name": "before", "arms": {"old": {"set": ["data.images='*/artery.nii'"]}}, "data": "old",
             "design": {"kind": "recipe_split"}},
            {"name": "after", "data": "new", "design": {"kind": "recipe_split"}, "arms": {
                "scratch": {"set": ["training.folds=2"]},
                "transferred": {"start_from": "before/old"},
                "forgotten": {"weights_of": "transferred", "data": "old"},
                "never-knew": {"weights_of": "scratch", "data": "old"},
            }},
        ],
    })  # fmt: skip
    sets = dict.fromkeys(what.data, dataset(*subjects(9, 9)))
    runs = {run.arm: run for run in plan_runs(what, what.sizes["quick"], sets).runs}
    tested = [set(runs[arm].split.held_out(0)) for arm in ("forgotten", "never-knew")]
    assert tested[0] == tested[1] == set(runs["old"].split.held_out(0))
    assert runs["forgotten"].recipe.data.images == "*/artery.nii"
    assert runs["transferred"].recipe.data.images is None


def test_compute_is_counted_for_the_channels_and_targets_that_the_recipe_names() -> None:
    what, named = Study.model_validate({**SIX, "factors": {}}), {"Anterior": (1,), "Posterior": (2,)}
    size = Size(
        set=("network.widths=[8, 16]", "data.channels=[MR]", "data.targets.values={Anterior: 1, Posterior: 2}"),
        gflop=1e6,
    )
    more = tuple(replace(one, scans={"T1": Path("z.nii"), **one.scans}) for one in subjects(4, 4))
    steps = [
        {run.recipe.training.steps for run in planned(what, size, replace(people, targets=Targets(targets)))}
        for people, targets in ((dataset(*subjects(4, 4)), named), (dataset(*more), {**named, "cyst": (3,)}))
    ]
    assert steps[0] == steps[1] != {None}


def test_a_search_draws_the_same_trials_from_the_same_scores() -> None:
    values = {
        **SIX, "factors": {},
        "design": {"kind": "search", "trials": 6, "at_a_time": 2, "parameters": {
            "training.optimiser.learning_rate": {"low": 1e-5, "high": 1e-1, "log": True},
            "training.batch_size": {"low": 1, "high": 8},
            "network.widths": ["[8, 16]", "[16, 32]"],
        }},
    }  # fmt: skip
    what, people = Study.model_validate(values), dataset(*subjects(5, 5))
    scores: dict[str, float | None] = {}
    before: tuple[PlannedRun, ...] = ()
    for batch in (2, 4, 6):
        runs = planned(what, Size(), people, scores=scores)
        assert [run.arm for run in runs] == [f"trial{k}" for k in range(batch)]
        assert runs[: len(before)] == before
        rates = [run.recipe.training.optimiser.learning_rate for run in runs]
        assert all(1e-5 <= rate <= 1e-1 for rate in rates)
        assert all(1 <= run.recipe.training.batch_size <= 8 for run in runs)
        scores |= {run.label: None if run.arm == "trial1" else -rate for run, rate in zip(runs, rates, strict=True)}
        before = runs
    assert planned(what, Size(), people, scores=scores) == before
    assert planned(what, Size(trials=3), people) == planned(what, Size(trials=2), people)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"metric": "dicee"}, "did you mean 'dice'"),
        ({"metric": "volume_error_ml"}, "neither which arm is better"),
        ({"metric": "assd_mm"}, "does not measure: its metrics are standard"),
        ({"recipe": "hippocampuss"}, "did you mean 'hippocampus'"),
        ({"arms": {"../x": {}}}, "arms"),
        ({"claims": [{"text": "x", "better": "a", "worse": "b"}]}, "the arms are base"),
        ({"published": [{"source": "x", "columns": ["a"], "rows": [["1", "2"]]}]}, "2 cells for 1 columns"),
        ({"sizes": {"quick": {"counts": [1]}}}, "has counts"),
        ({"sizes": {"quick": {"folds": [5]}}}, "has fold 5"),
        ({"design": {"kind": "crossvalidation"}}, "cross_validation"),
        ({"set": ["network.widthss=[1]"]}, "did you mean 'widths'"),
        ({"stages": [{"name": "x", "design": {"kind": "recipe_split"}}]}, "either a design or stages"),
        ({"design": {"kind": "locked_test"}}, "give data.scans.locked a share"),
        ({"arms": {"a": {"start_from": "b"}}}, "refers to arm 'b'"),
        ({"arms": {"a": {}, "b": {"weights_of": "a", "set": ["training.steps=3"]}}}, "can change inference"),
        ({"arms": {"a": {"data": "mr"}}}, "on data set 'mr'"),
        ({"sizes": {"quick": {"seeds": [1, 1]}}}, "holds 1 twice"),
        ({"sizes": {"quick": {"trials": 3}}}, "has trials"),
        ({"design": {**ORDERED, "counts": [1]}}, "add it to counts"),
        ({"design": {**ORDERED, "order": ["random", "random"]}}, "holds an entry twice"),
        ({"sizes": {"quick": {"arms": {"x": []}}}}, "changes arm 'x'"),
        ({"claims": [{"text": "x", "better": "base", "worse": "base", "metric": "parameters"}]}, "no metric"),
        ({"claims": [{"text": "x", "better": "base", "worse": "base"}]}, "compares arm 'base' with itself"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, object], says: str, tmp_path: Path) -> None:
    values = {
        "name": "s", "question": "?", "recipe": "hippocampus", "design": {"kind": "cross_validation"},
        "sizes": {"quick": {}}, **change,
    }  # fmt: skip
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")

    def plan() -> None:
        found = load_study(tmp_path / "s.yaml")
        planned(found, found.sizes["quick"], dataset(*subjects(5, 5)), tmp_path)

    with pytest.raises((StudyError, RecipeError)) as error:
        plan()
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
            planned(study(**design), size, people)
        assert error.value.fix
    with pytest.raises(StudyError, match="has 1 sites"):
        planned(study(kind="moved_subjects"), Size(), dataset(*subjects(9, 0)))


def test_the_study_of_the_documentation_is_one() -> None:
    page = (Path(__file__).parents[2] / "docs" / "studies.md").read_text(encoding="utf-8")
    [text] = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    shown = Study.model_validate(yaml.safe_load(text))
    for size in shown.sizes.values():
        assert {run.arm for run in planned(shown, size, dataset(*subjects(20, 20)))} == {"narrow", "wide"}
