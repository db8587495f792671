"""Single slices as PNG and TIFF."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from delineate.core.grid import Grid, permute_axes
from delineate.core.volume import LabelVolume, Volume
from delineate.datasets.layouts import open_dataset
from delineate.errors import BadFormat, BadShape, MissingFile, TooLarge, Truncated
from delineate.io.files import Limits
from delineate.io.formats import read_header, read_label, read_volume, write_label, write_volume

PIXELS = np.arange(6 * 4, dtype=np.uint16).reshape(6, 4, 1) * 1000
AXIAL = Grid(PIXELS.shape, np.diag([-1.0, -1, 1, 1]))  # LPS, as pictures are taken to lie


@pytest.mark.parametrize("suffix", [".png", ".tif", ".tiff"])
def test_pixels_read_back(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    write_volume(path, Volume(PIXELS[None], AXIAL))
    back = read_volume(path)
    assert np.array_equal(back.voxels[0], PIXELS)
    assert back.grid.matches(AXIAL)
    assert read_header(path).dtype == back.voxels.dtype == np.uint16
    write_label(path, LabelVolume((PIXELS > 9000).astype(np.uint8), AXIAL))
    assert np.array_equal(read_label(path).voxels, PIXELS > 9000)


@pytest.mark.parametrize("orientation", ["RAS", "LAS", "RPI", "PLS", "SLA"])
def test_an_axial_slice_lies_in_its_picture_as_in_the_patient(orientation: str, tmp_path: Path) -> None:
    """However it is stored: columns run to the patient's left, rows to the back."""
    order, flip = AXIAL.axes_to(orientation)
    stored = Volume(permute_axes(PIXELS[None], order, flip), AXIAL.permute(order, flip))
    write_volume(tmp_path / "a.png", stored)
    assert np.array_equal(read_volume(tmp_path / "a.png").voxels[0], PIXELS)


def test_a_slice_of_another_plane_is_a_picture_as_it_is_stored(tmp_path: Path) -> None:
    coronal = np.eye(4)
    coronal[:3, :3] = [[1, 0, 0], [0, 0, 1], [0, 1, 0]]
    write_volume(tmp_path / "a.png", Volume(PIXELS[None], Grid(PIXELS.shape, coronal)))
    assert np.array_equal(read_volume(tmp_path / "a.png").voxels[0], PIXELS)


def test_pictures_that_threads_read_leave_no_filter_of_warnings(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((600, 600), np.uint8)).save(tmp_path / "a.png")
    before = list(warnings.filters)  # type: ignore[attr-defined]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read_volume, [tmp_path / "a.png"] * 100))
    assert warnings.filters == before  # type: ignore[attr-defined]


def test_the_first_row_is_at_the_front(tmp_path: Path) -> None:
    plane = np.zeros((5, 3), np.uint8)  # rows, columns
    plane[0, 2] = 7
    Image.fromarray(plane).save(tmp_path / "a.png")
    volume = read_volume(tmp_path / "a.png")
    assert volume.voxels.shape == (1, 3, 5, 1)
    assert volume.voxels[0, 2, 0, 0] == 7


def test_tiff_may_know_its_spacing(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "a.tif", dpi=(254, 254))
    assert read_volume(tmp_path / "a.tif").grid.spacing_mm == pytest.approx((0.1, 0.1, 1))
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "b.tif", dpi=(72, 72))
    assert read_volume(tmp_path / "b.tif").grid.spacing_mm == (1, 1, 1)


def test_a_palette_is_numbers(tmp_path: Path) -> None:
    picture = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), mode=None).convert("P")
    picture.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0])
    picture.save(tmp_path / "a.png")
    assert set(np.unique(read_label(tmp_path / "a.png").voxels)) == {0, 1, 2}


def test_what_is_no_grey_slice_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "colour.png")
    Image.new("L", (4, 4)).save(tmp_path / "pages.tif", save_all=True, append_images=[Image.new("L", (4, 4))])
    for name in ("colour.png", "pages.tif"):
        with pytest.raises(BadShape):
            read_volume(tmp_path / name)
    whole = tmp_path / "whole.png"
    write_volume(whole, Volume(np.random.default_rng(0).integers(0, 255, (1, 50, 40, 1)).astype(np.uint8),
                               Grid.of_spacing((50, 40, 1))))  # fmt: skip
    with pytest.raises(TooLarge):
        read_volume(whole, limits=Limits(max_axis=4))
    data = whole.read_bytes()
    for length in (40, len(data) // 2, len(data) - 30):
        whole.write_bytes(data[:length])
        with pytest.raises((Truncated, BadFormat)):
            read_volume(whole)
    with pytest.raises(MissingFile):
        read_volume(tmp_path / "none.png")


def test_what_does_not_fit_a_picture_is_not_written(tmp_path: Path) -> None:
    grid = Grid.of_spacing((3, 3, 2))
    for voxels in (np.zeros((1, 3, 3, 2), np.uint8), np.zeros((1, 3, 3, 2), np.float32)):
        with pytest.raises(BadShape, match="no picture"):
            write_volume(tmp_path / "a.png", Volume(voxels, grid))
    with pytest.raises(BadShape, match="shift them"):
        write_volume(tmp_path / "a.png", Volume(np.full((1, 3, 3, 1), -5, np.int16), Grid.of_spacing((3, 3, 1))))
    assert not list(tmp_path.iterdir())


def test_slices_are_a_data_set_and_previews_are_not(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_volume(tmp_path / "images" / f"{name}.png", Volume(PIXELS[None], Grid.of_spacing(PIXELS.shape)))
        write_label(tmp_path / "labels" / f"{name}.png", LabelVolume(PIXELS // 1000, Grid.of_spacing(PIXELS.shape)))
    dataset = open_dataset(tmp_path, images="images/*.png", labels="labels/*.png")
    assert [subject.id for subject in dataset.subjects] == ["a", "b"]
    write_volume(tmp_path / "images" / "c.nii.gz", Volume(PIXELS[None], Grid.of_spacing(PIXELS.shape)))
    dataset = open_dataset(tmp_path, images="images/*.nii.gz")
    assert [subject.id for subject in dataset.subjects] == ["c"]
