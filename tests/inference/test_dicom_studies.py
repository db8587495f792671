"""DICOM in, DICOM out: a study predicted into a segmentation that lies on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from delineate.bundle import Bundle
from delineate.compute import plan_compute
from delineate.core.targets import Targets
from delineate.errors import BadFormat, MissingFile
from delineate.inference.batch import find_subjects, predict_subjects
from delineate.inference.predictor import Predictor
from delineate.io.formats import read_header, read_label
from delineate.recipe import recipe_from
from delineate.sampling.tiles import TileGeometry

PATTERNS = {"FLAIR": "*flair*", "T1c": "*t1post*"}


@pytest.fixture
def predictor(tmp_path: Path) -> Predictor:
    """An untrained network of two channels and two targets; where things lie does not depend on what it learnt."""
    recipe = recipe_from(
        {
            "name": "study",
            "preprocessing": [{"kind": "reorient"}, {"kind": "resample", "spacing_mm": [3, 3, None]}],
            "tiles": {"kind": "slices", "shape": [64, 80]},
            "network": {"kind": "unet", "dimensions": 2, "widths": [4, 8]},
        }
    )
    targets = Targets({"tumour": (1,), "edema": (2,)})
    geometry = TileGeometry((64, 80, 1), slice_axis=2)
    bundle = Bundle(recipe, recipe.pipeline, targets, tuple(PATTERNS), geometry, (3.0, 3.0, 6.5))
    bundle.save(tmp_path / "bundle", bundle.network().state_dict(), {})
    return Predictor([Bundle.load(tmp_path / "bundle")], plan_compute(device="cpu", compile="off"))


def test_series_that_are_not_named_are_asked_for(predictor, real_data: Path) -> None:
    with pytest.raises(MissingFile, match=r"DICOM series by their description: --images FLAIR="):
        find_subjects([real_data / "dicom" / "PGBM-001"], predictor.channels)


@pytest.mark.parametrize("suffix", [".dcm", ".vtk", ".vti", ".nii.gz"])
def test_a_study_becomes_a_label_on_its_own_grid(predictor, real_data: Path, tmp_path: Path, suffix: str) -> None:
    [subject] = find_subjects([real_data / "dicom" / "PGBM-001"], predictor.channels, PATTERNS)
    [outcome] = predict_subjects(predictor, [subject], tmp_path / "out", suffix=suffix)
    assert outcome.error is None
    readable = outcome.path if suffix in (".dcm", ".nii.gz") else outcome.path.with_suffix(".nii.gz")
    if suffix == ".vti":
        assert outcome.path.with_suffix(".json").exists()
        return
    label = read_label(readable)
    assert label.grid.matches(read_header(subject.scans["FLAIR"]).grid, 0.01)
    assert set(np.unique(label.voxels)) <= {0, 1, 2}


def test_a_segmentation_of_no_series_fails_alone(predictor, real_data: Path, tmp_path: Path) -> None:
    case = next((real_data / "brats").iterdir())
    study = real_data / "dicom" / "PGBM-001"
    subjects = [*find_subjects([case], predictor.channels), *find_subjects([study], predictor.channels, PATTERNS)]
    file, series = predict_subjects(predictor, subjects, tmp_path / "out", suffix=".dcm")
    assert isinstance(file.error, BadFormat)
    assert "give the DICOM series" in str(file.error)
    assert not file.seconds, "said before the network ran"
    assert series.error is None
