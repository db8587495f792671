"""A training from a folder of masks, nested ones among them, to its report and to a test on other masks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from typer.testing import CliRunner

from delineate.bundle import Bundle
from delineate.cli.app import app
from delineate.core.grid import Grid
from delineate.core.targets import Targets
from delineate.core.volume import LabelVolume, Volume
from delineate.datasets.dataset import load_label
from delineate.datasets.layouts import open_dataset
from delineate.inference.batch import find_subjects
from delineate.io.formats import write_label, write_volume
from delineate.preprocessing.cache import prepare
from delineate.preprocessing.pipeline import Pipeline
from delineate.reporting.run import write_run_report
from delineate.training.fine_tuning import parts_of
from delineate.training.options import Reporter, RunOptions
from delineate.training.run import train

NESTED = Targets({"ball": (1, 2), "core": (2,)}, mode="overlapping")
GRID = Grid.of_spacing((16, 16, 12), (1, 1, 1.5))


def write_masks(root: Path, names: list[str]) -> None:
    """A ball with a core in noise, and a mask that is never asked for, which nothing can read."""
    for i, name in enumerate(names):
        ball, core = np.zeros((2, *GRID.shape), np.uint8)
        ball[3 + i % 3 : 11, 4:12, 3:9], core[6:8, 6:9, 5:7] = 1, 1
        noise = np.random.default_rng(i).standard_normal(GRID.shape)
        voxels = (3 * ball + 3 * core + noise).astype(np.float32)
        write_volume(root / name / "ct.nii.gz", Volume(voxels[None], GRID))
        for target, mask in (("ball", ball), ("core", core)):
            write_label(root / name / "segmentations" / f"{target}.nii.gz", LabelVolume(mask, GRID))
        (root / name / "segmentations" / "other.nii.gz").write_bytes(b"not an image")


def test_a_folder_of_masks_is_trained_on_reported_and_tested(recipe, tmp_path: Path) -> None:
    write_masks(tmp_path / "data", [f"s{i}" for i in range(6)])
    write_masks(tmp_path / "more", ["t0", "t1"])
    dataset = open_dataset(tmp_path / "data", targets=NESTED)
    assert dataset.layout == "masks"
    options = RunOptions(cache=tmp_path / "cache", device="cpu", precision="fp32", compile="off", threads=1)
    short = recipe.model_copy(update={"training": recipe.training.model_copy(update={"steps": 6})})
    result = train(short, dataset, tmp_path / "run", options, Reporter())
    assert result.finished
    assert result.evaluation.targets == ("ball", "core")
    assert len(result.evaluation.subjects) == 2
    assert set(result.evaluation.table["reference_volume_ml"] > 0) == {True}
    page = write_run_report(tmp_path / "run", dataset).read_text(encoding="utf-8")
    assert "core" in page
    for subject in find_subjects([tmp_path / "data"], ["ct"]):
        assert [path.name for path in subject.files if path in subject.scans.values()] == ["ct.nii.gz"]
    # Masks have the bundle's values, whatever their names' places in the alphabet.
    bundle, more = Bundle.load(tmp_path / "run" / "bundle"), open_dataset(tmp_path / "more")
    assert more.targets.values["ball"] == (1,)
    assert parts_of(bundle, more, None).dataset.targets == NESTED
    # The bundle's targets read masks of another folder, which says nothing of their overlap.
    arguments = ["test", str(tmp_path / "run"), "--data", str(tmp_path / "more"), "-o", str(tmp_path / "tested")]
    tested = CliRunner().invoke(app, [*arguments, "--json", "--device", "cpu"])
    assert tested.exit_code == 0, tested.output
    assert set(json.loads(tested.stdout)["summary"]) >= {"ball", "core"}


def test_a_changed_mask_is_prepared_again_and_another_is_not_looked_at(tmp_path: Path) -> None:
    write_masks(tmp_path / "data", ["a"])
    [subject] = open_dataset(tmp_path / "data", targets=NESTED).subjects
    pipeline = Pipeline(steps=())

    def folder() -> Path:
        return prepare([subject], pipeline, NESTED, tmp_path / "cache").folders[0]

    first = folder()
    subject.label.files["other"].write_bytes(b"still not an image")
    assert folder() == first
    write_label(subject.label.files["core"], LabelVolume(np.zeros(GRID.shape, np.uint8), GRID))
    assert folder() != first
    assert load_label(subject, NESTED, GRID).voxels.max() == 1
