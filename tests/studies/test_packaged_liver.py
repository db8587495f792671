"""The studies of the liver report (Lindgren, Lundin & Wallin 2020) plan what it did, in numbers copied from it."""

from __future__ import annotations

from collections import Counter
from functools import cache
from itertools import chain, combinations
from pathlib import Path

import pytest

from delineate.core.subject import Subject
from delineate.datasets.dataset import Dataset
from delineate.studies.planning import Plan, plan_runs
from delineate.studies.specification import Study, load_study

STUDIES = ("liver-volume", "liver-fat-fraction")
NEIGHBOURS = {"liver-volume": 1, "liver-fat-fraction": 4}  # section 3.2.1
SCOPES = ("slice", "patient", "cohort")  # section 3.2.2
COMBINED = {"".join(chosen) for chosen in chain.from_iterable(combinations("EVTR", n) for n in range(5))}

# Table 1, volume and fat fraction.
TABLE_1 = {
    "Base": (0.966, 0.922), "E": (0.965, 0.925), "V": (0.968, 0.930), "R": (0.965, 0.923), "T": (0.968, 0.929),
    "E + V": (0.966, 0.931), "E + R": (0.966, 0.926), "E + T": (0.969, 0.931), "V + R": (0.967, 0.931),
    "V + T": (0.971, 0.931), "R + T": (0.970, 0.928), "E + V + R": (0.968, 0.932), "E + V + T": (0.970, 0.933),
    "E + R + T": (0.970, 0.931), "V + R + T": (0.971, 0.931), "E + V + R + T": (0.971, 0.933),
}  # fmt: skip
TABLE_2 = {0: (0.493, 0.342), 1: (0.957, 0.876), 3: (0.955, 0.853), 5: (0.963, 0.895), 10: (0.968, 0.908)}

both = pytest.mark.parametrize("name", STUDIES)


def people(n: int) -> Dataset:
    return Dataset(
        "livers",
        Path(),
        "msd",
        tuple(
            Subject(f"s{i:04}", {"fat_fraction": Path("x.nii")}, Path("y.nii"), site=f"scanner{i % 2 + 1}")
            for i in range(n)
        ),
    )


@cache
def planned(name: str, size: str, *, best: str = "combinations/V+T", patients: int = 227) -> tuple[Study, Plan]:
    """A study's plan with ``--final``, of stages that build on others too: as if ``best`` were the best of each."""
    study = load_study(name)
    sets = dict.fromkeys(study.data, people(patients))
    scores = {label: float(label == best) for label in study.labels}
    return study, plan_runs(study, study.sizes[size], sets, scores=scores, final=True)  # type: ignore[index]


def options(label: str) -> str:
    arm = label.partition("/")[2]
    return "" if arm == "base" else arm.replace("+", "")


@both
def test_the_paper_size_has_the_report_s_three_steps(name: str) -> None:
    _, plan = planned(name, "paper")
    runs = plan.runs
    assert Counter(run.stage for run in runs) == {
        "normalisation": 8 * 5, "singles": 5 * 5, "combinations": 16 * 10, "final": 1, "final-base": 1,
    }  # fmt: skip
    steps = {run.stage: run.recipe.training.steps for run in runs}
    assert steps == {
        "normalisation": 75_000, "singles": 75_000, "combinations": 100_000, "final": 100_000, "final-base": 100_000,
    }  # fmt: skip
    assert {(run.recipe.training.batch_size, run.recipe.training.optimiser.learning_rate) for run in runs} == {
        (1, 1e-4)
    }
    [locked] = {run.split.held_out(run.fold) for run in runs if run.stage.startswith("final")}
    assert len(locked) == 25
    assert not any(set(locked) & run.split.subjects for run in runs if not run.stage.startswith("final"))
    assert plan.pending == ()


@both
@pytest.mark.parametrize("size", ["quick", "paper"])
def test_every_combination_is_what_its_name_says(name: str, size: str) -> None:
    _, plan = planned(name, size)
    recipes = {run.label: run.recipe for run in plan.runs}
    assert {options(label) for label in recipes if label.startswith("combinations")} == COMBINED
    assert {options(label) for label in recipes if label.startswith("singles")} == {"", *"EVTR"}
    for label, recipe in recipes.items():
        if label.startswith("normalisation"):
            continue
        chosen = options("combinations/V+T" if label == "final/best" else label)
        spatial, network = recipe.augmentation.spatial, recipe.network
        assert (spatial is not None) == ("E" in chosen)
        assert recipe.tiles.neighbours == (NEIGHBOURS[name] if "V" in chosen else 0)  # type: ignore[union-attr]
        assert network.kind == ("vgg_unet" if "T" in chosen else "unet")
        assert network.short_skips == ("encoder" if "R" in chosen else "none")  # type: ignore[union-attr]
        if size == "paper":
            assert spatial is None or (spatial.elastic_voxels, spatial.elastic_points) == (8, 8)
            assert getattr(network, "weights", "imagenet") == "imagenet"
            assert getattr(network, "widths", [64])[0] == 64


@both
def test_normalisations_are_each_scope_with_and_without_clipping(name: str) -> None:
    _, plan = planned(name, "paper")
    found = {
        run.arm: [(step.kind, getattr(step, "scope", None)) for step in run.recipe.preprocessing[3:]]
        for run in plan.runs
        if run.stage == "normalisation"
    }
    clip, scaled = [("clip_percentiles", "patient")], [[("normalise", scope)] for scope in SCOPES]
    assert sorted(found.values()) == sorted([[], clip, *scaled, *(clip + one for one in scaled)])
    assert found["none"] == []
    assert found["clip+global"] == [("clip_percentiles", "patient"), ("normalise", "cohort")]


@both
def test_table_1_is_as_printed_and_each_row_has_its_arm(name: str) -> None:
    study, _ = planned(name, "paper")
    which = STUDIES.index(name)
    table = study.published[0]
    assert {row: float(dice) for row, dice in table.rows} == {row: dice[which] for row, dice in TABLE_1.items()}
    assert {row: set(options(arm)) for row, arm in table.arms.items()} == {
        row: set() if row == "Base" else set(row.split(" + ")) for row in TABLE_1
    }
    assert study.published[1].arms == {"Base": "final-base/base", "Best": "final/best"}


@both
def test_the_fat_fraction_is_measured_in_the_study_of_it(name: str) -> None:
    _, plan = planned(name, "paper")
    assert {run.recipe.quantity and run.recipe.quantity.channel for run in plan.runs} == {
        None if name == "liver-volume" else "fat_fraction"
    }


@pytest.mark.parametrize("name", [f"{name}-scanners" for name in STUDIES])
def test_patients_move_from_the_second_scanner_into_training_on_the_first(name: str) -> None:
    study, plan = planned(name, "paper")
    which, counts = int("fat" in name), [0, 1, 3, 5, 10]
    assert Counter((run.count, run.direction) for run in plan.runs) == dict.fromkeys(
        [(count, "scanner1-to-scanner2") for count in counts], 2 * 3
    )
    site = {subject.id: subject.site for subject in people(227).subjects}
    for run in plan.runs:
        trained = Counter(site[name] for name in run.split.training_of(run.fold))
        assert trained == Counter({"scanner1": 114, "scanner2": run.count or 0})
        assert {site[name] for name in run.split.held_out(run.fold)} == {"scanner2"}
    [table] = study.published
    assert {int(moved): float(dice) for moved, dice in table.rows} == {k: dice[which] for k, dice in TABLE_2.items()}
    groups = {run.group for run in plan.runs}
    assert set(table.arms.values()) < groups
    assert {arm for claim in study.claims for arm in (claim.better, claim.worse)} < groups
    assert {run.recipe.training.steps for run in plan.runs} == {100_000}


def test_single_slices_have_a_task_for_each_data_set() -> None:
    study, plan = planned("ct-slices", "paper", patients=2151)
    assert [(run.arm, run.data, run.fold) for run in plan.runs] == [(part, part, 0) for part in study.data]
    assert {row[0].lower(): row[1] for row in study.published[0].rows} == {
        "liver": "0.968", "abdomen": "0.991", "thigh": "0.994"
    }  # fmt: skip
    for run in plan.runs:
        assert len(run.split.held_out(0)) in (215, 216)
        assert (run.recipe.training.steps, run.recipe.preprocessing[1].kind) == (100_000, "resize")
        assert run.recipe.tiles.shape == (256, 256)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", [*STUDIES, *(f"{name}-scanners" for name in STUDIES), "ct-slices"])
def test_the_quick_size_is_quick_and_leaves_nothing_out(name: str) -> None:
    study, plan = planned(name, "quick", patients=load_study(name).sizes["quick"].subjects or 0)
    assert {run.label for run in plan.runs} == set(study.labels)
    assert sum(run.recipe.training.steps or 10**9 for run in plan.runs) <= 4000
    assert all(run.recipe.training.minutes is None for run in plan.runs)
    for run in plan.runs:
        assert run.split.held_out(run.fold)
        network = run.recipe.network
        assert (network.kind, getattr(network, "weights", "random")) in (("unet", "random"), ("vgg_unet", "random"))
        assert getattr(network, "widths", (16,))[0] == 16
        assert run.recipe.preprocessing[2].shape[:2] == run.recipe.tiles.shape  # type: ignore[union-attr]
