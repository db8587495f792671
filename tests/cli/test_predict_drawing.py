"""``delineate predict --surfaces --preview``: what other programs show, beside each label."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import vtk
from PIL import Image
from typer.testing import CliRunner, Result

import delineate
from delineate.bundle import Bundle
from delineate.cli.app import app
from delineate.core.grid import Grid
from delineate.core.targets import Targets
from delineate.core.volume import LabelVolume, Volume
from delineate.datasets.layouts import open_dataset
from delineate.errors import DelineateError, RecipeError, UnknownLayout
from delineate.evaluation.pairs import labels_in, pair_files
from delineate.io.formats import read_label, suffix_of, write_label, write_volume
from delineate.recipe import recipe_from
from delineate.reporting.overlays import picture_of_label
from delineate.sampling.tiles import TileGeometry

GRID = Grid((12, 10, 8), np.diag([-2.0, -2, 5, 1]))
TARGETS = Targets({"liver": (1, 2), "tumour": (2,)}, "overlapping")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained network of two targets that overlap; what it finds is as good as anything."""
    folder = tmp_path_factory.mktemp("bundle")
    recipe = recipe_from(
        {
            "name": "small",
            "data": {"colours": {"tumour": "#c0392b"}},
            "tiles": {"kind": "patches", "shape": [8, 8, 4]},
            "network": {"kind": "unet", "dimensions": 3, "widths": [4, 8]},
        }
    )
    made = Bundle(recipe, recipe.pipeline, TARGETS, ("MR",), TileGeometry((8, 8, 4)), (2.0, 2.0, 5.0))
    torch.manual_seed(1)
    made.save(folder, made.network().state_dict(), {})
    return folder


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    rng = np.random.default_rng(3)
    for name in ("a", "b"):
        voxels = rng.random((1, *GRID.shape), dtype=np.float32)
        write_volume(tmp_path / f"scans/{name}.nii.gz", Volume(voxels, GRID))
    return tmp_path / "scans"


def predict(bundle: Path, *arguments: object, code: int = 0) -> Result:
    words = ["predict", str(bundle), *map(str, arguments), "--device", "cpu", "--compile", "off"]
    done = CliRunner().invoke(app, words)
    if isinstance(done.exception, DelineateError):
        assert code == 1, done.exception
    else:
        assert done.exit_code == code, done.output
    return done


def volume_ml(path: Path) -> float:
    reader, properties = vtk.vtkSTLReader(), vtk.vtkMassProperties()
    reader.SetFileName(str(path))
    properties.SetInputConnection(reader.GetOutputPort())
    properties.Update()
    return properties.GetVolume() / 1000


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


DRAWN = {"a.preview.png", "b.preview.png"} | {
    f"surfaces/{subject}/{target}.stl" for subject in "ab" for target in ("liver", "tumour")
}


def test_surfaces_and_pictures_are_the_label_s(bundle: Path, scans: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    predict(bundle, scans, "-o", out, "--surfaces", "stl", "--preview")
    assert files(out) >= DRAWN
    legend = Bundle.load(bundle).recipe.data.legend
    for subject in "ab":
        label = read_label(out / f"{subject}.nii.gz")
        for name, mask in TARGETS.masks(label.voxels).items():
            wanted = mask.sum() * GRID.voxel_ml
            assert volume_ml(out / f"surfaces/{subject}/{name}.stl") == pytest.approx(wanted, rel=0.02, abs=1e-3)
        scan = delineate.read(scans / f"{subject}.nii.gz")
        shown = (out / f"{subject}.preview.png").read_bytes()
        assert shown == picture_of_label(scan, label, TARGETS, legend)
        with Image.open(out / f"{subject}.preview.png") as picture:
            assert picture.width > picture.height > 200


def test_labels_that_are_there_are_drawn_as_they_are_without_predicting(
    monkeypatch, bundle: Path, scans: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    predict(bundle, scans, "-o", out)
    assert not files(out) & DRAWN
    corrected = np.zeros(GRID.shape, np.uint8)
    corrected[2:9, 2:8, 1:6] = 1
    write_label(out / "a.nii.gz", LabelVolume(corrected, GRID))
    with monkeypatch.context() as patch:
        patch.setattr(Bundle, "trained_network", None)  # it is not loaded
        predict(bundle, scans, "-o", out, "--surfaces", "stl", "--preview")
        assert files(out) >= DRAWN
        liver = out / "surfaces/a/liver.stl"
        assert volume_ml(liver) == pytest.approx(np.count_nonzero(corrected) * GRID.voxel_ml, rel=0.01)
        before = {name: (out / name).stat().st_mtime_ns for name in DRAWN}
        predict(bundle, scans, "-o", out, "--surfaces", "stl", "--preview")
        assert {name: (out / name).stat().st_mtime_ns for name in DRAWN} == before
        corrected[5:] = 0
        write_label(out / "a.nii.gz", LabelVolume(corrected, GRID))
        os.utime(out / "a.nii.gz", ns=(before["a.preview.png"] + 10**9,) * 2)
        predict(bundle, scans, "-o", out, "--surfaces", "stl", "--preview")
    assert volume_ml(liver) == pytest.approx(np.count_nonzero(corrected) * GRID.voxel_ml, rel=0.01)
    assert (out / "b.preview.png").stat().st_mtime_ns == before["b.preview.png"]


def test_pictures_are_no_scans_and_no_labels(bundle: Path, scans: Path, tmp_path: Path) -> None:
    """Neither beside labels, nor where nothing else could be a scan."""
    out = tmp_path / "out"
    predict(bundle, scans, "-o", out, "--surfaces", "glb", "--preview")
    assert {"surfaces/a.glb", "surfaces/b.glb"} <= files(out)
    assert {path.name for path in labels_in(out).values()} == {"a.nii.gz", "b.nii.gz"}
    assert [pair.prediction.name for pair in pair_files(out, out).pairs] == ["a.nii.gz", "b.nii.gz"]
    assert suffix_of(Path("a.preview.png")) == ""
    for path in out.glob("*.nii.gz"):
        path.unlink()
    with pytest.raises(UnknownLayout):
        open_dataset(out)
    # In the folder of the scans themselves, the next prediction finds the same subjects.
    predict(bundle, scans, "-o", scans / "predicted", "--preview")
    assert [subject.id for subject in open_dataset(scans).subjects if subject.scans] == ["a", "b"]


def test_what_others_made_is_not_drawn_over(bundle: Path, scans: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "surfaces/a").mkdir(parents=True)
    (out / "surfaces/a/liver.stl").write_text("mine", encoding="utf-8")
    done = predict(bundle, scans, "-o", out, "--surfaces", "stl", code=1)
    assert "E_OUTPUT" in str(done.exception)
    assert files(out) == {"surfaces/a/liver.stl"}


def test_one_prediction_saves_its_surfaces(bundle: Path, scans: Path, tmp_path: Path) -> None:
    prediction = delineate.load(bundle, device="cpu").predict(scans / "a.nii.gz")
    assert prediction.save(tmp_path / "case.glb") == [tmp_path / "case.glb"]
    assert prediction.save(tmp_path / "case.stl") == [tmp_path / "case/liver.stl", tmp_path / "case/tumour.stl"]
    assert volume_ml(tmp_path / "case/liver.stl") == pytest.approx(prediction.volume_ml["liver"], rel=0.02, abs=1e-3)
    with pytest.raises(RecipeError, match="save the prediction"):
        delineate.predict(bundle, scans / "a.nii.gz", surfaces="stl")
