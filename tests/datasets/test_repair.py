"""Mirrored labels are suspected by evidence, and repaired only on request, with nothing lost."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import nibabel
import numpy as np
import pytest
from scipy import ndimage

from delineate.core.grid import Grid
from delineate.core.volume import LabelVolume, Volume
from delineate.datasets.dataset import Dataset, load_scan, resample_onto
from delineate.datasets.inspection import inspect
from delineate.datasets.layouts import open_dataset
from delineate.datasets.mirroring import suspicion
from delineate.datasets.repair import repair
from delineate.errors import GridMismatch, OutputError
from delineate.io.formats import read_header, read_label, read_volume, write_label, write_volume

GRID = Grid((24, 20, 10), np.diag([-1.0, 1.0, 3.0, 1.0]))


def organ() -> np.ndarray:
    """Asymmetric along every axis."""
    mask = np.zeros(GRID.shape, bool)
    mask[3:11, 4:9, 1:4] = True
    mask[5:8, 9:12, 2:4] = True
    return mask


def scan(rng: np.random.Generator) -> np.ndarray:
    body = ndimage.gaussian_filter(rng.standard_normal(GRID.shape), 2)
    return (100 + 40 * body + 60 * organ() + 8 * rng.standard_normal(GRID.shape)).astype(np.float32)


def flipped(mask: np.ndarray, flip: tuple[bool, ...]) -> np.ndarray:
    return mask[tuple(slice(None, None, -1 if reverse else 1) for reverse in flip)]


@pytest.mark.parametrize("flip", list(product((False, True), repeat=3))[1:])
def test_every_mirrored_label_is_suspected_and_the_right_one_is_not(flip, rng: np.random.Generator) -> None:
    image = scan(rng)
    found = suspicion([image], GRID, flipped(organ(), flip), GRID)
    assert found is not None
    assert found.flip == flip
    assert suspicion([image], GRID, organ(), GRID) is None


def test_a_header_that_tells_of_the_flip_is_right(rng: np.random.Generator) -> None:
    order, flip = GRID.axes_to("RPS")
    assert suspicion([scan(rng)], GRID, flipped(organ(), flip), GRID.permute(order, flip)) is None


def test_where_nothing_speaks_for_a_flip_nothing_is_said(rng: np.random.Generator) -> None:
    noise = rng.standard_normal(GRID.shape)
    assert suspicion([noise], GRID, organ(), GRID) is None
    assert suspicion([noise], GRID, np.zeros(GRID.shape, bool), GRID) is None


@pytest.mark.parametrize("name", ["prostate", "sarcoma", "wmh", "brats"])
def test_no_sound_label_is_suspected(real_data: Path, name: str) -> None:
    problems = inspect(open_dataset(real_data / name)).problems
    assert not [p for p in problems if p.code == "W_MIRRORED"]


@pytest.mark.parametrize("mask", ["Vent_Mask", "abWMH_Mask"])
def test_the_real_mirrored_headers_are_found_and_mended(real_data: Path, tmp_path: Path, mask: str) -> None:
    patterns = {"images": "*_FLAIR.nii.gz", "labels": f"*_{mask}.nii.gz"}
    dataset = open_dataset(real_data / "dirty" / "mirrored_headers", **patterns)
    codes = {p.code for p in inspect(dataset).problems}
    assert codes == {"W_MIRRORED", "E_GRID_MISMATCH"}
    done = {r.file.split("_", 1)[1]: r for r in repair(dataset, tmp_path / "mended")}
    assert done["FLAIR.nii.gz"].done == "copied"
    assert done[f"{mask}.nii.gz"].done == "repaired"
    assert "flipped along x" in done[f"{mask}.nii.gz"].why
    assert not inspect(open_dataset(tmp_path / "mended", **patterns)).problems


def test_the_real_channels_on_different_grids_become_one(real_data: Path, tmp_path: Path) -> None:
    patterns = {"FLAIR": "*/FLAIR.nii.gz", "T1": "*/T1.nii.gz", "T2": "*/T2.nii.gz"}
    folder = tmp_path / "data" / "case"
    folder.parent.mkdir()
    folder.symlink_to(real_data / "dirty" / "channels_on_different_grids")
    dataset = open_dataset(folder.parent, images=patterns, labels="*/ROI.nii.gz")
    assert "E_GRID_MISMATCH" in {p.code for p in inspect(dataset).problems}
    done = {r.file: r for r in repair(dataset, tmp_path / "mended")}
    assert {name: r.done for name, r in done.items()} == {
        "case/FLAIR.nii.gz": "copied",
        "case/T1.nii.gz": "repaired",
        "case/T2.nii.gz": "repaired",
        "case/ROI.nii.gz": "copied",
    }
    assert "resampled linearly from 512 × 512 × 22" in done["case/T1.nii.gz"].why
    assert not inspect(open_dataset(tmp_path / "mended", images=patterns, labels="*/ROI.nii.gz")).errors


def test_the_real_mixed_orientations_are_turned(real_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data" / "case"
    folder.parent.mkdir()
    folder.symlink_to(real_data / "dirty" / "mixed_orientations")
    patterns = {"FLAIR": "*/105465_FLAIR.nii.gz", "T1": "*/105465_T1_to_FLAIR.nii.gz"}
    dataset = open_dataset(folder.parent, images=patterns, labels="*/105465_WMHmask.nii.gz")
    assert {p.code for p in inspect(dataset).errors} == {"E_GRID_MISMATCH"}
    done = {r.file: r.why for r in repair(dataset, tmp_path / "mended")}
    assert done["case/105465_T1_to_FLAIR.nii.gz"] == "reoriented from LPS to LAS"
    before = read_volume(folder / "105465_T1_to_FLAIR.nii.gz")
    after = read_volume(tmp_path / "mended/case/105465_T1_to_FLAIR.nii.gz")
    assert np.array_equal(after.voxels, before.voxels[:, :, ::-1])


@pytest.fixture
def data(tmp_path: Path, rng: np.random.Generator) -> Path:
    root = tmp_path / "data"
    for name in ("good", "nan", "torn", "foreign"):
        voxels = scan(rng)
        if name == "nan":
            voxels[0, 0, 0] = np.nan
        write_volume(root / f"{name}_image.nii.gz", Volume(voxels[None], GRID))
        write_label(root / f"{name}_label.nii.gz", LabelVolume(organ().astype(np.uint8), GRID))
    torn = root / "torn_image.nii.gz"
    torn.write_bytes(torn.read_bytes()[:-400])
    elsewhere = Grid.of_spacing((20, 18, 12), (1, 1, 4))  # to the right of the scan, which runs to the left
    write_label(root / "foreign_label.nii.gz", LabelVolume(np.ones(elsewhere.shape, np.uint8), elsewhere))
    return root


PATTERNS = {"images": "*_image.nii.gz", "labels": "*_label.nii.gz"}


def test_the_manifest_tells_what_became_of_every_file(data: Path, tmp_path: Path) -> None:
    before = {file.name: file.read_bytes() for file in data.iterdir()}
    repair(open_dataset(data, **PATTERNS), tmp_path / "mended")
    manifest = json.loads((tmp_path / "mended" / "repairs.json").read_text(encoding="utf-8"))
    told = {(row["file"], row["done"]): row["why"] for row in manifest}
    assert ("good_image.nii.gz", "copied") in told
    assert "E_NONFINITE" in told["nan_image.nii.gz", "repaired"]
    assert "E_TRUNCATED" in told["torn_image.nii.gz", "left out"]
    assert "another patient's" in told["foreign_label.nii.gz", "left out"]
    assert {file.name for file in (tmp_path / "mended").iterdir()} == {
        "good_image.nii.gz", "good_label.nii.gz", "nan_image.nii.gz", "nan_label.nii.gz", "repairs.json",
    }  # fmt: skip
    assert {file.name: file.read_bytes() for file in data.iterdir()} == before
    assert not inspect(open_dataset(tmp_path / "mended", **PATTERNS)).errors


def test_nothing_that_is_there_is_written_over(data: Path, tmp_path: Path) -> None:
    (tmp_path / "mended").mkdir()
    (tmp_path / "mended" / "mine.txt").write_text("keep", encoding="utf-8")
    with pytest.raises(OutputError, match="not empty"):
        repair(open_dataset(data, **PATTERNS), tmp_path / "mended")


def test_resampling_keeps_millimetres(rng: np.random.Generator) -> None:
    label = LabelVolume(organ().astype(np.uint8), GRID)
    finer = GRID.resample([n * 2 for n in GRID.shape])
    moved = resample_onto(label.voxels, GRID, finer, order=0)
    assert np.array_equal(moved, organ().repeat(2, 0).repeat(2, 1).repeat(2, 2))
    ramp = np.broadcast_to(np.arange(24, dtype=np.float32)[:, None, None], GRID.shape)
    back = resample_onto(ramp, GRID, GRID.crop((2, 3, 1), (5, 5, 5)), order=1)
    np.testing.assert_allclose(back, ramp[2:7, 3:8, 1:6])


@pytest.mark.parametrize("orientation", ["sform", "qform"])
def test_files_with_two_orientations_get_the_one_that_is_chosen(data: Path, tmp_path: Path, orientation) -> None:
    for name in ("good_image.nii.gz", "good_label.nii.gz"):
        image = nibabel.load(data / name)
        image.set_qform(np.diag([1.0, -1.0, 1.0, 1.0]) @ image.affine, 1)
        nibabel.save(image, data / name)
    dataset = open_dataset(data, **PATTERNS)
    assert "E_AMBIGUOUS_ORIENTATION" in {p.code for p in inspect(dataset).problems}
    done = {r.file: r.done for r in repair(dataset, tmp_path / "mended", orientation=orientation)}
    assert done["good_image.nii.gz"] == done["good_label.nii.gz"] == "repaired"
    for name in ("good_image.nii.gz", "good_label.nii.gz"):
        chosen = read_header(data / name, orientation=orientation).grid
        assert read_header(tmp_path / "mended" / name).grid.matches(chosen, 1e-4)
    assert not inspect(open_dataset(tmp_path / "mended", **PATTERNS)).errors


@pytest.mark.parametrize("order", [0, 1])
def test_a_scan_reaches_to_the_borders_of_its_outer_voxels_and_no_further(order: int) -> None:
    ones = np.ones(GRID.shape, np.float32)
    turn = np.eye(4)
    turn[:3, :3] = np.linalg.qr(np.array([[3.0, 1, 0.4], [-1, 3, 0.3], [0.2, -0.5, 2]]))[0]
    for grid in (GRID, Grid(GRID.shape, turn @ GRID.affine)):
        for shape in (grid.shape, [2 * n for n in grid.shape], [n // 2 for n in grid.shape], (7, 41, 13)):
            assert (resample_onto(ones, grid, grid.resample(shape), order=order) == 1).all()
        wider = resample_onto(ones, grid, grid.crop((-2, -1, -3), [n + 4 for n in grid.shape]), order=order)
        assert np.array_equal(wider, np.pad(ones, ((2, 2), (1, 3), (3, 1))))


def test_repairing_reads_back_labels_that_were_nearly_whole(data: Path, tmp_path: Path) -> None:
    near = organ().astype(np.float32) * 0.99999994
    write_volume(data / "good_label.nii.gz", Volume(near[None], GRID))
    repair(open_dataset(data, **PATTERNS), tmp_path / "mended")
    assert np.array_equal(read_label(tmp_path / "mended" / "good_label.nii.gz").voxels, organ())


def test_channels_on_different_grids_are_brought_together_where_the_recipe_says_so(real_data: Path) -> None:
    folder = real_data / "dirty"
    patterns = {name: f"*/{name}.nii.gz" for name in ("FLAIR", "T1", "T2")}
    [subject] = open_dataset(folder, images=patterns).subjects
    with pytest.raises(GridMismatch):
        load_scan(subject)
    asked = replace(subject, resample=True)
    scan = load_scan(asked)
    flair = read_volume(subject.scans["FLAIR"])
    assert scan.grid.matches(flair.grid, 0)
    assert np.array_equal(scan.voxels[0], flair.voxels[0])
    # The same head on all: what is tissue on one is tissue on the others.
    heads = [channel > np.percentile(channel, 70) for channel in scan.voxels]
    overlap = 2 * (heads[0] & heads[1]).sum() / (heads[0].sum() + heads[1].sum())
    assert overlap > 0.8
    dataset = Dataset("dirty", folder, "patterns", (asked,))
    assert not inspect(dataset, for_training=False).errors
