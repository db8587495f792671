"""The study of the liver tumour report: its arms, its numbers, and who is trained on and tested."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from delineate.core.grid import Grid
from delineate.core.subject import Subject
from delineate.core.targets import Targets
from delineate.core.volume import LabelVolume
from delineate.datasets.dataset import Dataset
from delineate.io.formats import write_label
from delineate.recipe import load_recipe
from delineate.studies.designs import PlannedRun
from delineate.studies.planning import plan_runs
from delineate.studies.specification import load_study

STUDY = load_study("liver-tumour-transfer")
PRETRAINED = {
    f"batch{size}{rate}": (size, 5e-5 if rate else 1e-4) for size in (5, 10, 20) for rate in ("", "+half-rate")
} | {"within-liver": (10, 1e-4)}
ON_CT = {"pre-trained-on-ct", "A-on-ct", "B-on-ct", "C-on-ct"}
DISCUSSED = {"vnet", "recurrent-residual", "dice", "generalised-dice", "filtered-slices"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Dataset]:
    """36 scans on MR, and 30 CTs of 60 slices, 35 of which hold liver: 50 are taken from each."""
    folder, grid = tmp_path_factory.mktemp("ct"), Grid.of_spacing((4, 4, 60), (1, 1, 1))
    liver = np.zeros(grid.shape, np.uint8)
    liver[1:3, 1:3, 10:45] = 1
    write_label(folder / "segmentation.nii", LabelVolume(liver, grid))
    ct = [Subject(f"volume-{i}", {"CT": Path("x.nii")}, folder / "segmentation.nii") for i in range(30)]
    mr = [Subject(f"FZMC{i:03}", {"MR": Path("x.nii")}, Path("y.nii")) for i in range(36)]
    lits = Targets({"liver": (1, 2), "tumour": (2,)}, "overlapping")
    return {
        "mr": Dataset("mr", Path(), "patterns", tuple(mr)),
        "ct": Dataset("ct", folder, "lits", tuple(ct), lits, "CT"),
    }


def planned(size: str, data: dict[str, Dataset]) -> list[PlannedRun]:
    return list(plan_runs(STUDY, STUDY.sizes[size], data).runs)  # type: ignore[index]


@pytest.mark.parametrize("size", ["quick", "paper"])
def test_both_sizes_have_all_arms(size: str, data: dict[str, Dataset]) -> None:
    arms: dict[str, set[str]] = {}
    for run in planned(size, data):
        arms.setdefault(run.stage, set()).add(run.arm)
    assert arms == {"pretraining": set(PRETRAINED), "transfer": {"A", "B", "C"} | ON_CT, "discussion": DISCUSSED}


def test_the_paper_size_trains_as_the_report_did(data: dict[str, Dataset]) -> None:
    runs = planned("paper", data)
    assert set(Counter((run.stage, run.arm) for run in runs).values()) == {5}, "five seeds"
    names = {run.name: run for run in runs}
    for run in runs:
        training = run.recipe.training
        if run.weights_of is not None:
            continue
        if run.stage == "pretraining":
            assert (training.batch_size, training.optimiser.learning_rate) == PRETRAINED[run.arm]
            assert (training.epochs, training.steps) == (5, None)
        else:
            assert (training.batch_size, training.optimiser.learning_rate) == (18, 1e-4)
            budget = (None, 8 * 128) if run.arm == "filtered-slices" else (8, None)
            assert (training.epochs, training.steps) == budget
        source = run.start_from and (names[run.start_from].label, names[run.start_from].seed)
        assert source == (("pretraining/batch10", run.seed) if run.arm in ("B", "C") else None)
    for arm, recipe in (("A", "liver_tumour_a"), ("B", "liver_tumour_b"), ("C", "liver_tumour_c")):
        found = names[f"transfer-{arm}-seed0"].recipe
        assert found.model_copy(update={"start": None}) == load_recipe(recipe).model_copy(update={"start": None})
    assert names["pretraining-batch10-seed0"].recipe == load_recipe("liver_tumour_lits")
    assert names["transfer-C-seed0"].recipe.training.frozen


def test_slices_come_from_22_cts_and_forgetting_is_tested_on_all_that_were_not_trained_on(
    data: dict[str, Dataset],
) -> None:
    names = {f"volume-{i}" for i in range(30)}
    for run in planned("paper", data):
        trained, held_out = (set(found) for found in (run.split.training_of(run.fold), run.split.held_out(run.fold)))
        if run.arm in ON_CT:
            assert held_out == {f"volume-{i}" for i in range(20, 30)}
            assert run.recipe.data.images is None, "read as CT, not by the patterns of MR"
        elif run.data == "ct":
            assert trained == {f"volume-{i}" for i in range(20)}, "1000 slices"
            assert held_out == {"volume-20", "volume-21"}, "100 slices"
            assert run.split.subjects < names
        else:
            assert (len(trained), held_out) == (32, {f"FZMC{i:03}" for i in range(32, 36)})


def test_the_quick_size_is_small_and_as_long_for_every_arm(data: dict[str, Dataset]) -> None:
    runs = planned("quick", data)
    trainings = [run for run in runs if run.weights_of is None]
    assert len(runs) == len({run.name for run in runs}) == 19
    assert {(run.recipe.training.steps, run.recipe.training.epochs) for run in trainings} == {(120, None)}
    for run in trainings:
        half = "half-rate" in run.arm
        assert run.recipe.training.optimiser.learning_rate == (5e-4 if half else 1e-3)
        assert (len(run.split.training_of(run.fold)), len(run.split.held_out(run.fold))) == (10, 4)


def test_published_minutes_are_as_printed_and_their_means_right() -> None:
    for table, epochs in zip(STUDY.published, (5, 8), strict=True):
        for row in table.rows:
            numbers = [float(cell) for cell in row[1:]]
            assert numbers[-1] == pytest.approx(sum(numbers[:epochs]) / epochs, abs=0.005)
    [_, minutes] = STUDY.published
    assert [row[-2] for row in minutes.rows] == ["114.93", "114.28", "90.01"]
