from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from delineate.core.grid import Grid
from delineate.core.subject import Subject
from delineate.core.targets import Targets
from delineate.datasets.dataset import SAME_GRID_MM, Dataset, load_label, load_scan
from delineate.datasets.inspection import inspect
from delineate.errors import BadLabelValue, BadShape, GridMismatch, MissingFile


def moved(grid: Grid, by_mm: float) -> Grid:
    affine = grid.affine.copy()
    affine[0, 3] += by_mm
    return Grid(grid.shape, affine)


@pytest.fixture
def two_files(save_scan) -> Subject:
    first = np.arange(120, dtype=np.int16).reshape(6, 5, 4)
    return Subject("a", {"T1": save_scan("t1.nii", first), "T2": save_scan("t2.nii", -first)})


@pytest.fixture
def one_file(save_scan) -> Subject:
    path = save_scan("all.nii.gz", np.stack([np.full((6, 5, 4), i, dtype=np.int16) for i in range(3)]))
    channels = ("FLAIR", "T1", "T2")
    return Subject("a", dict.fromkeys(channels, path), file_channels=channels)


def test_files_become_channels_in_order(two_files: Subject) -> None:
    scan = load_scan(two_files)
    assert scan.voxels.dtype == np.int16
    np.testing.assert_array_equal(scan.voxels[0], np.arange(120).reshape(6, 5, 4))
    np.testing.assert_array_equal(scan.voxels[1], -scan.voxels[0])


@pytest.mark.parametrize("asked", [("FLAIR", "T1", "T2"), ("T2", "FLAIR"), ("T1",)])
def test_channels_of_one_file_are_found_by_name(one_file: Subject, asked: tuple[str, ...]) -> None:
    scan = load_scan(one_file, asked)
    assert [int(channel.max()) for channel in scan.voxels] == [("FLAIR", "T1", "T2").index(name) for name in asked]


def test_channels_of_one_file_keep_their_place_when_a_subject_takes_others(one_file: Subject) -> None:
    path = one_file.scans["T1"]
    taken = replace(one_file, scans={"T2": path, "T1": path})
    assert [int(channel.max()) for channel in load_scan(taken).voxels] == [2, 1]
    assert tuple(inspect(Dataset("x", Path(), "msd", (taken,)), for_training=False).rows[0].intensities) == ("T1", "T2")


def test_the_only_channel_of_a_file_may_be_renamed(save_scan) -> None:
    subject = Subject("a", {"MRI": save_scan("a.nii")}, file_channels=("MRI",))
    renamed = replace(subject, scans={"T1": subject.scans["MRI"]})
    np.testing.assert_array_equal(load_scan(renamed).voxels, load_scan(subject).voxels)


def test_channels_of_several_types_become_float32(save_scan) -> None:
    whole = save_scan("a.nii", np.full((6, 5, 4), 7, dtype=np.int16))
    real = save_scan("b.nii", np.full((6, 5, 4), 0.5, dtype=np.float32))
    scan = load_scan(Subject("a", {"A": whole, "B": real}))
    assert scan.voxels.dtype == np.float32
    assert scan.voxels[:, 0, 0, 0].tolist() == [7, 0.5]


def test_channels_on_different_grids_are_refused_with_both_named(save_scan) -> None:
    grid = Grid.of_spacing((6, 5, 4))
    subject = Subject("a", {"A": save_scan("a.nii"), "B": save_scan("b.nii", grid=Grid.of_spacing((6, 5, 5)))})
    with pytest.raises(GridMismatch, match=r"6 × 5 × 5 voxels.*6 × 5 × 4 voxels"):
        load_scan(subject)
    tilted = grid.permute((0, 1, 2), (True, False, False))
    turned = Subject("a", {"A": save_scan("c.nii"), "B": save_scan("d.nii", grid=tilted)})
    with pytest.raises(GridMismatch, match=r"the same grid in two orientations: save 'd\.nii' again as RAS"):
        load_scan(turned)


def test_a_file_with_another_number_of_channels_than_named_is_refused(one_file: Subject) -> None:
    with pytest.raises(BadShape, match="holds 3 channels, but the data set names 1"):
        load_scan(Subject("a", {"image": one_file.scans["T1"]}))


def test_missing_channels_and_labels_are_named(two_files: Subject) -> None:
    with pytest.raises(MissingFile, match="lacks FLAIR"):
        load_scan(two_files, ("T1", "FLAIR"))
    with pytest.raises(MissingFile, match="no scan"):
        load_scan(Subject("a", {}))
    with pytest.raises(MissingFile, match="no label"):
        load_label(two_files, None, None)


@pytest.mark.parametrize("off_mm", [0.0, SAME_GRID_MM / 2])
def test_a_label_within_the_tolerance_is_put_on_the_images_grid(save_label, off_mm: float) -> None:
    grid = Grid.of_spacing((6, 5, 4))
    label = load_label(Subject("a", {}, save_label("a.nii", grid=moved(grid, off_mm))), None, grid)
    assert label.grid is grid


def test_a_label_on_another_grid_is_refused(save_label) -> None:
    grid = Grid.of_spacing((6, 5, 4))
    subject = Subject("a", {}, save_label("a.nii", grid=moved(grid, 2 * SAME_GRID_MM)))
    with pytest.raises(GridMismatch, match=r"corners up to 0.2 mm apart"):
        load_label(subject, None, grid)


def test_a_label_value_that_no_target_knows_is_refused(save_label) -> None:
    subject = Subject("a", {}, save_label("a.nii"))
    assert load_label(subject, Targets({"organ": (1,)}), None).voxels.max() == 1
    with pytest.raises(BadLabelValue, match=r"1 \(8 voxels\)"):
        load_label(subject, Targets({"organ": (2,)}), None)


def test_channels_are_those_of_the_fullest_subject_first() -> None:
    files = {name: Path(name) for name in ("FLAIR", "T1", "T2")}
    subjects = (Subject("a", {"T2": files["T2"]}), Subject("b", files), Subject("c", {"ADC": Path("ADC")}))
    assert Dataset("x", Path(), "scans", subjects).channels == ("FLAIR", "T1", "T2", "ADC")
