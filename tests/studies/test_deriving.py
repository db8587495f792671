"""Arms whose recipe is ``auto``: derived from what may be seen, once for each budget, and kept with the study."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from delineate.cli.app import app
from delineate.core.grid import Grid
from delineate.core.volume import LabelVolume, Volume
from delineate.datasets.dataset import Dataset
from delineate.errors import RecipeError
from delineate.io.formats import write_label, write_volume
from delineate.recipe import DataSpec, load_recipe
from delineate.studies.deriving import AutoRecipes
from delineate.studies.planning import plan_runs
from delineate.studies.specification import Size, Study

READ = ['data.images="*_image.nii.gz"', 'data.labels="*_label.nii.gz"', "data.targets={values: {ball: 1}}"]
STUDY = {
    "name": "s",
    "question": "Does a network of our own beat the derived one?",
    "recipe": "auto",
    "set": READ,
    "data": {"scans": {"locked": 0.25}},
    "arms": {"derived": {}, "slower": {"set": ["training.optimiser.learning_rate=0.0001"]}},
    "design": {"kind": "cross_validation", "folds": 2},
    "sizes": {"quick": {"set": ["training.steps=2", "training.validation.subjects=0"], "folds": [0]}},
}


@pytest.fixture
def scans(tmp_path: Path, rng: np.random.Generator) -> Path:
    """Eight scans of rising size with a bright ball each."""
    for i in range(8):
        grid = Grid.of_spacing((8 + 4 * i, 8, 8), (1, 1, 1.5))
        ball = np.zeros(grid.shape, np.uint8)
        ball[2:6, 2:6, 2:6] = 1
        voxels = (ball * 3 + rng.standard_normal(grid.shape)).astype(np.float32)
        write_volume(tmp_path / "scans" / f"case{i}_image.nii.gz", Volume(voxels[None], grid))
        write_label(tmp_path / "scans" / f"case{i}_label.nii.gz", LabelVolume(ball, grid))
    return tmp_path / "scans"


@pytest.fixture
def dataset(scans: Path) -> Dataset:
    return DataSpec.of_changes(READ).open(scans)


def test_locked_subjects_do_not_shape_the_recipe_that_all_arms_and_folds_start_from(dataset: Dataset) -> None:
    study = Study.model_validate(STUDY)
    derive = AutoRecipes(device="cpu")
    runs = plan_runs(study, Size(set=("training.steps=2",)), {"scans": dataset}, derive=derive).runs
    assert len(derive.known) == 1
    [split] = {run.split for run in runs}
    seen = replace(dataset, subjects=tuple(one for one in dataset.subjects if one.id in split.subjects))
    assert len(seen.subjects) == 6
    expected = AutoRecipes(device="cpu")("scans", seen, [*READ, "training.steps=2"])
    assert [run.recipe for run in runs if run.arm == "derived"] == [expected] * 2
    slower = expected.training.optimiser.model_copy(update={"learning_rate": 1e-4})
    assert [run.recipe.training.optimiser for run in runs if run.arm == "slower"] == [slower] * 2
    assert {run.recipe.tiles for run in runs} == {expected.tiles}


def test_each_budget_is_derived_once_and_what_is_kept_is_what_a_resumed_study_uses(
    dataset: Dataset, tmp_path: Path
) -> None:
    derive = AutoRecipes(tmp_path, "cpu")
    for changes in (
        ["training.steps=5"],
        ["training.epochs=3", "training.batch_size=1"],
        ["training.epochs=3"],
        [],
        ["training.steps=5", "auto.widths=2"],
    ):
        derive("scans", dataset, [*READ, *changes])
    kept = {path.name: path for path in (tmp_path / "auto").iterdir()}
    assert sorted(kept) == ["scans-3-epochs.yaml", "scans-5-steps-2-widths.yaml", "scans-5-steps.yaml", "scans.yaml"]
    text = kept["scans-5-steps.yaml"].read_text(encoding="utf-8")
    assert "high, since short budgets need large steps" in text
    assert load_recipe(kept["scans-5-steps.yaml"]).training.batch_size == 2
    # As another machine would have derived it.
    kept["scans-5-steps.yaml"].write_text(text.replace("batch_size: 2", "batch_size: 7"), encoding="utf-8")
    later = AutoRecipes(tmp_path, "cpu")
    assert later("scans", dataset, [*READ, "training.steps=5"]).training.batch_size == 7
    assert later("scans", dataset, [*READ, "training.steps=5", "training.batch_size=4"]).training.batch_size == 4


def test_what_is_read_otherwise_is_inspected_and_derived_from_anew(dataset: Dataset, tmp_path: Path) -> None:
    derive = AutoRecipes(tmp_path, "cpu")
    for changes in ([], ["data.channels=[T1/T2]"], ["data.channels=[T1/T2]", "auto.widths=2"]):
        made = derive("scans", dataset, [*READ, "training.steps=5", *changes])
        assert made.data.channels == (("T1/T2",) if changes else None)
    assert len(list((tmp_path / "auto").iterdir())) == 3
    channels = [{row.channels for row in found.rows} for found in derive.inspected.values()]
    assert channels == [{("image",)}, {("T1/T2",)}]


def test_a_budget_that_is_none_is_refused_before_anything_is_read(dataset: Dataset) -> None:
    with pytest.raises(RecipeError, match="training"):
        AutoRecipes(device="cpu")("scans", dataset, ["training.minutes=soon"])


def test_a_study_of_auto_is_planned_without_a_trace_and_run(scans: Path, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(json.dumps(STUDY), encoding="utf-8")
    common = [str(tmp_path / "s.yaml"), "--data", str(scans), "--device", "cpu"]
    before = sorted(tmp_path.rglob("*"))
    planned = CliRunner().invoke(app, ["study", "plan", *common, "--json"])
    assert planned.exit_code == 0, planned.output
    assert [run["arm"] for run in json.loads(planned.stdout)["runs"]] == ["derived", "slower"]
    assert sorted(tmp_path.rglob("*")) == before
    done = CliRunner().invoke(app, ["study", "run", *common, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    derived = load_recipe(tmp_path / "out" / "auto" / "scans-2-steps.yaml")
    trained = load_recipe(tmp_path / "out" / "runs" / "derived-fold0-seed0" / "recipe.yaml")
    assert trained.network == derived.network
    assert trained.training.steps == 2
