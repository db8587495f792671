"""The packaged studies of the white matter and the prostate report run what these did: arms, splits, budgets."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from delineate.core.subject import Subject
from delineate.datasets.dataset import Dataset
from delineate.recipe import load_recipe
from delineate.studies.designs import PlannedRun
from delineate.studies.planning import plan_runs
from delineate.studies.specification import Study, load_study

LOSSES = {
    "dice": "wmh_dice", "tversky": "wmh_tversky", "gdl": "wmh_gdl", "siamese": "wmh_siamese",
    "siamese-trained": "wmh_siamese_trained",
}  # fmt: skip
NETWORKS = {
    "unet": "prostate_unet", "deeplab": "prostate_deeplab", "tiramisu-p4a": "prostate_tiramisu_p4a",
    "tiramisu-p3a": "prostate_tiramisu", "tiramisu-p3b": "prostate_tiramisu_p3b",
}  # fmt: skip
# "256x256x16" (sec. 4.1), "64x64x16" (4.1), V-Net's "128x128x64" and the best performing algorithm's "96x96x16" (2).
INPUTS = {"64x64x16": (64, 64, 16), "96x96x16": (96, 96, 16), "128x128x64": (128, 128, 64)}


def people(name: str, **sites: int) -> Dataset:
    return Dataset(
        name,
        Path(),
        "msd",
        tuple(
            Subject(f"{name}-{site}-{i:02}", {"MR": Path("x.nii")}, Path("y.nii"), site=site)
            for site, n in sites.items()
            for i in range(n)
        ),
    )


WMH = {"scans": people("scans", Utrecht=20, Singapore=20, Amsterdam=20), "external": people("external", CAIN=50)}
PROSTATES = {"scans": people("scans", many=50)}


def planned(study: Study, size: str, data: dict[str, Dataset]) -> dict[str, PlannedRun]:
    plan = plan_runs(study, study.sizes[size], data)  # type: ignore[index]
    assert not plan.pending
    return {run.label: run for run in plan.runs}


def settings(run: PlannedRun) -> dict[str, object]:
    """A recipe's values but for its seed, which is the study's."""
    values = run.recipe.as_dict()
    values["training"].pop("seed")
    return values


def alone(name: str, *changes: str) -> dict[str, object]:
    values = load_recipe(name, changes).as_dict()
    values["training"].pop("seed")
    return values


def test_every_loss_is_the_report_s_recipe_on_48_6_and_6_scans_and_tested_on_50_others() -> None:
    runs = planned(load_study("wmh-content-loss"), "paper", WMH)
    assert len(runs) == 5 + 5 + 5 + 5
    for arm, recipe in LOSSES.items():
        run = runs[f"losses/{arm}"]
        assert settings(run) == alone(recipe)
        assert (run.recipe.training.steps, run.recipe.training.batch_size) == (100 * 100, 8)
        held_out = run.split.held_out(run.fold)
        assert sorted(Counter(name.split("-")[1] for name in held_out).values()) == [2, 2, 2]
        assert len(run.split.training_of(run.fold)) == 48 + 6  # of which the recipe takes six for validation
        elsewhere = runs[f"external/{arm}"]
        assert (elsewhere.weights_of, elsewhere.changes, elsewhere.data) == (run.name, (), "external")
        assert len(elsewhere.split.held_out(elsewhere.fold)) == 50
        without = runs[f"without-ends/{arm}"]
        assert (without.weights_of, without.changes) == (run.name, ("postprocessing.drop_end_slices=0.1",))
        assert without.split.held_out(without.fold) == held_out


def test_the_content_loss_compares_one_to_five_pools_on_the_same_scans() -> None:
    runs = planned(load_study("wmh-content-loss"), "paper", WMH)
    for pools in (1, 3, 4, 5):
        assert settings(runs[f"pools/{pools}"]) == alone("wmh_siamese", f"loss.pools={pools}")
    assert runs["pools/2"].weights_of == runs["losses/siamese"].name
    assert runs["losses/siamese"].recipe.as_dict()["loss"]["pools"] == 2, "what the report found best"
    splits = {run.split.held_out(run.fold) for label, run in runs.items() if not label.startswith("external/")}
    assert len(splits) == 1


def test_every_network_is_the_report_s_recipe_at_half_stride_and_none() -> None:
    runs = planned(load_study("prostate-architectures"), "paper", PROSTATES)
    assert len(runs) == 5 + 5 + 4 + 2
    for arm, recipe in NETWORKS.items():
        run = runs[f"networks/{arm}"]
        assert settings(run) == alone(recipe)
        assert run.recipe.inference.overlap == 0.5
        assert (len(run.split.training_of(run.fold)), len(run.split.held_out(run.fold))) == (40, 10)
        without = runs[f"no-overlap/{arm}"]
        assert (without.weights_of, without.changes) == (run.name, ("inference.overlap=0",))
        assert without.split.held_out(0) == run.split.held_out(run.fold)


def test_the_u_net_reads_every_size_that_the_report_names() -> None:
    runs = planned(load_study("prostate-architectures"), "paper", PROSTATES)
    for arm, shape in INPUTS.items():
        assert settings(runs[f"input/{arm}"]) == alone("prostate_unet", f"tiles.shape={list(shape)}")
    assert runs["input/256x256x16"].weights_of == runs["networks/unet"].name
    assert runs["networks/unet"].recipe.as_dict()["tiles"]["shape"] == [256, 256, 16]
    assert runs["sampling/equal"].weights_of == runs["networks/tiramisu-p3a"].name
    assert settings(runs["sampling/anywhere"]) == alone("prostate_tiramisu", "sampler.kind=random")


@pytest.mark.parametrize(("name", "data"), [("wmh-content-loss", WMH), ("prostate-architectures", PROSTATES)])
def test_the_quick_size_has_every_arm_and_few_steps_without_weights_from_elsewhere(name, data) -> None:
    study = load_study(name)
    quick, paper = planned(study, "quick", data), planned(study, "paper", data)
    assert quick.keys() == paper.keys() == set(study.labels)
    trained = [run for run in quick.values() if run.weights_of is None]
    [steps] = {run.recipe.training.steps for run in trained}
    assert steps is not None
    assert steps <= 100
    assert all((run.recipe.training.minutes, run.recipe.training.epochs) == (None, None) for run in trained)
    for run in trained:
        values, original = run.recipe.as_dict(), paper[run.label].recipe.as_dict()
        assert values["loss"].get("weights") in (None, "random")
        assert {k: v for k, v in values["loss"].items() if k != "weights"} == {
            k: v for k, v in original["loss"].items() if k != "weights"
        }
        assert values["network"]["kind"] == original["network"]["kind"]
    shared = [run.split.held_out(run.fold) for run in quick.values() if run.data == "scans"]
    assert len(set(shared)) == 1
    assert 2 <= len(shared[0]) <= 6


def test_published_rows_stand_beside_the_arm_that_they_are_about() -> None:
    in_distribution, external = load_study("wmh-content-loss").published
    assert [row[0] for row in in_distribution.rows if row[0] not in in_distribution.arms] == ["Leaderboard"]
    assert [in_distribution.arms.get(row[0], "") for row in in_distribution.rows[:5]] == [f"losses/{a}" for a in LOSSES]
    assert [external.arms[row[0]] for row in external.rows] == [f"external/{a}" for a in LOSSES]
    [prostates] = load_study("prostate-architectures").published
    assert [prostates.arms[row[0]] for row in prostates.rows] == [f"networks/{arm}" for arm in NETWORKS]
