"""Images of other libraries come in and go out with every voxel where it was."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK
import torch

from delineate import LabelVolume, Volume, interop
from delineate.core.grid import Grid, permute_axes
from delineate.errors import BadFormat, BadGeometry, BadLabelValue, BadShape, BadVoxels

SHAPE = (4, 5, 6)


def grids() -> dict[str, Grid]:
    """Axis-aligned, flipped, permuted, oblique, and sheared as a tilted gantry leaves it."""
    straight = np.diag([0.7, 0.9, 3.0, 1.0])
    straight[:3, 3] = (-11.3, 20.1, 1 / 3)
    a, b = np.deg2rad(20), np.deg2rad(-35)
    turn_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    turn_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    oblique, sheared = straight.copy(), straight.copy()
    oblique[:3, :3] = turn_z @ turn_x @ straight[:3, :3]
    sheared[1, 2] = 0.8
    plain = Grid(SHAPE, straight)
    return {
        "straight": plain,
        "flipped": plain.permute((0, 1, 2), (True, True, False)),
        "permuted": plain.permute((2, 0, 1), (False, True, True)),
        "oblique": Grid(SHAPE, oblique),
        "oblique and permuted": Grid(SHAPE, oblique).permute((1, 2, 0), (True, False, False)),
        "sheared": Grid(SHAPE, sheared),
    }


GRIDS = grids()
there_and_back: dict[str, Any] = {
    "numpy": lambda volume: interop.from_numpy(*interop.to_numpy(volume)),
    "nibabel": lambda volume: interop.from_nibabel(interop.to_nibabel(volume)),
    "simpleitk": lambda volume: interop.from_simpleitk(interop.to_simpleitk(volume)),
}


@pytest.mark.parametrize("library", there_and_back)
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float32, np.float64])
def test_a_round_trip_keeps_voxels_and_world_coordinates(library, grid, channels, dtype, rng) -> None:
    volume = Volume((100 * rng.random((channels, *grid.shape))).astype(dtype), grid)
    again = there_and_back[library](volume)
    np.testing.assert_array_equal(again.voxels, volume.voxels)
    assert again.voxels.dtype == dtype
    np.testing.assert_allclose(again.grid.affine, grid.affine, rtol=0, atol=1e-12)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_simpleitk_agrees_where_a_voxel_lies(grid, rng) -> None:
    """The library's own transform from index to physical point, left and posterior, is the judge."""
    image = interop.to_simpleitk(Volume(rng.random((1, *grid.shape)), grid))
    assert image.GetSize() == grid.shape
    for index in [(0, 0, 0), (3, 1, 2), (1, 3, 3)]:
        lps = np.array(image.TransformIndexToPhysicalPoint(index))
        np.testing.assert_allclose(lps * (-1, -1, 1), grid.world(np.array([index], float))[0], atol=1e-9)


@pytest.mark.parametrize("name", [name for name in GRIDS if name != "sheared"])
def test_both_libraries_read_one_file_alike(name, rng, tmp_path) -> None:
    grid, path = GRIDS[name], tmp_path / "scan.nii"
    nibabel.save(interop.to_nibabel(Volume(rng.random((1, *grid.shape), np.float32), grid)), path)
    a, b = interop.from_nibabel(nibabel.load(path)), interop.from_simpleitk(SimpleITK.ReadImage(str(path)))
    np.testing.assert_array_equal(a.voxels, b.voxels)
    assert a.grid.matches(b.grid, 1e-4)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_labels_go_out_as_labels(grid, rng) -> None:
    label = LabelVolume(rng.integers(0, 3, grid.shape).astype(np.uint8), grid)
    for volume in (
        interop.from_nibabel(interop.to_nibabel(label)),
        interop.from_simpleitk(interop.to_simpleitk(label)),
    ):
        again = interop.as_label(volume)
        np.testing.assert_array_equal(again.voxels, label.voxels)
        np.testing.assert_allclose(again.grid.affine, grid.affine, rtol=0, atol=1e-12)


@dataclass
class ImageLikeTorchIO:
    """As ``torchio.ScalarImage`` shows itself: a tensor (C, X, Y, Z), and an affine to RAS."""

    data: torch.Tensor
    affine: np.ndarray


def test_torchio_s_images_come_in(rng) -> None:
    grid = GRIDS["oblique"]
    voxels = rng.random((2, *grid.shape), np.float32)
    volume = interop.volume_of(ImageLikeTorchIO(torch.from_numpy(voxels), grid.affine))
    np.testing.assert_array_equal(volume.voxels, voxels)
    np.testing.assert_array_equal(volume.grid.affine, grid.affine)


def test_torchio_s_own_round_trip(rng) -> None:
    grid = GRIDS["oblique"]
    volume = Volume(rng.random((2, *grid.shape), np.float32), grid)
    again = interop.volume_of(interop.to_torchio(volume))
    np.testing.assert_array_equal(again.voxels, volume.voxels)
    np.testing.assert_allclose(again.grid.affine, grid.affine, rtol=0, atol=1e-12)


def test_a_missing_library_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torchio", None)
    with pytest.raises(BadFormat, match="pip install torchio"):
        interop.to_torchio(Volume(np.zeros((1, *SHAPE)), GRIDS["straight"]))


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image, nibabel.MGHImage])
def test_every_spatial_image_of_nibabel_comes_in(kind, rng) -> None:
    image = kind(rng.random(SHAPE, np.float32), GRIDS["oblique"].affine)
    volume = interop.volume_of(image)
    np.testing.assert_array_equal(volume.voxels[0], image.get_fdata())
    np.testing.assert_array_equal(volume.grid.affine, image.affine)


def test_views_of_arrays_come_in_as_they_are_seen(rng) -> None:
    grid = GRIDS["straight"]
    order, flip = (2, 0, 1), (True, False, True)
    seen = permute_axes(rng.random((1, *SHAPE)), order, flip)
    volume = interop.from_simpleitk(interop.to_simpleitk(Volume(seen, grid.permute(order, flip))))
    np.testing.assert_array_equal(volume.voxels, seen)


def in_metres() -> nibabel.Nifti1Image:
    image = nibabel.Nifti1Image(np.zeros(SHAPE, np.uint8), np.eye(4))
    image.header.set_xyzt_units("meter")
    return image


BAD = {
    "no affine": (lambda: interop.from_nibabel(nibabel.Nifti1Image(np.zeros(SHAPE), None)), BadFormat),
    "metres": (lambda: interop.from_nibabel(in_metres()), BadGeometry),
    "five axes": (lambda: interop.from_nibabel(nibabel.Nifti1Image(np.zeros((2, 2, 2, 1, 3)), np.eye(4))), BadShape),
    "two axes": (lambda: interop.from_simpleitk(SimpleITK.Image(4, 5, SimpleITK.sitkUInt8)), BadShape),
    "an array alone": (lambda: interop.volume_of(np.zeros(SHAPE)), BadFormat),
    "a singular affine": (lambda: interop.from_numpy(np.zeros(SHAPE), np.diag([1, 0, 1, 1])), BadGeometry),
    "an affine that is none": (lambda: interop.from_numpy(np.zeros(SHAPE), np.eye(3)), BadShape),
    "no number": (lambda: interop.from_numpy(np.zeros(SHAPE), np.full((4, 4), np.nan)), BadShape),
    "nothing": (lambda: interop.from_numpy(np.zeros((0, 5, 6)), np.eye(4)), BadShape),
    "complex": (lambda: interop.from_numpy(np.zeros(SHAPE, complex), np.eye(4)), BadVoxels),
    "text": (lambda: interop.from_numpy(np.full(SHAPE, "a"), np.eye(4)), BadVoxels),
    "no label": (lambda: interop.as_label(interop.from_numpy(np.full(SHAPE, 0.5), np.eye(4))), BadLabelValue),
    "beyond 32 bits": (lambda: interop.as_label(interop.from_numpy(np.full(SHAPE, 2.0**31), np.eye(4))), BadLabelValue),
    "several labels": (lambda: interop.as_label(interop.from_numpy(np.zeros((2, *SHAPE)), np.eye(4))), BadShape),
}


@pytest.mark.parametrize(("make", "error"), BAD.values(), ids=BAD)
def test_what_is_no_scan_is_refused(make, error) -> None:
    with pytest.raises(error):
        make()
