from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from delineate.core.grid import Grid, permute_axes
from delineate.core.targets import Targets
from delineate.core.volume import LabelVolume, Volume
from delineate.errors import GridMismatch
from delineate.reporting.overlays import (
    COLOURS,
    Overlay,
    View,
    agreement,
    comparison_picture,
    picture,
    save_overlay,
    views_of,
    views_of_label,
)

TARGETS = Targets({"a": (1,), "b": (2,)}, ignore=(9,))


def test_agreement_by_hand() -> None:
    reference = np.array([0, 1, 1, 0, 1, 2, 9]).reshape(7, 1, 1)
    prediction = np.array([0, 1, 0, 1, 2, 2, 1]).reshape(7, 1, 1)
    assert agreement(prediction, reference, TARGETS).ravel().tolist() == [0, 1, 2, 3, 4, 1, 0]


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "ASR", "IPL"])
def test_the_patient_s_right_is_on_the_image_s_left(orientation, rng) -> None:
    """A mark on the right, to the front and low shows at the left, top and bottom, however the scan is stored."""
    ras = Grid.of_spacing((30, 30, 30), (2, 2, 2))
    voxels = np.zeros(ras.shape, np.uint8)
    voxels[10:20, 10:20, 10:20] = 1  # what is segmented
    scan = rng.random(ras.shape) * 0.01
    scan[22:26, 12:18, 6:24] = 1.0  # RAS: a bright mark at the right of it
    order, flip = ras.axes_to(orientation)
    grid = ras.permute(order, flip)
    label = LabelVolume(np.ascontiguousarray(permute_axes(voxels, order, flip)), grid)
    views = views_of(Volume(permute_axes(scan, order, flip)[None], grid), label, label, TARGETS, subject="s")
    axial = views[0].image.astype(float)
    left, right = np.array_split(axial, 2, axis=1)
    assert left.mean() > 5 * right.mean()
    assert views[0].edges[:2] == "RL"


def test_an_inner_target_is_shown_over_the_outer_one_however_they_are_listed(rng) -> None:
    grid = Grid.of_spacing((8, 8, 8))
    voxels = np.ones(grid.shape, np.uint8)
    voxels[2:6, 2:6] = 2
    scan = Volume(rng.random((1, *grid.shape)), grid)
    for values, shown in (({"liver": (1, 2), "tumour": (2,)}, [1, 2]), ({"tumour": (2,), "liver": (1, 2)}, [2, 1])):
        view, *_ = views_of_label(scan, LabelVolume(voxels, grid), Targets(values, "overlapping"))
        marks, pixels = np.unique(view.agreement, return_counts=True)
        assert dict(zip(marks.tolist(), pixels.tolist(), strict=True)) == dict(zip(shown, [48, 16], strict=True))


def test_another_grid_is_refused(rng) -> None:
    grid = Grid.of_spacing((8, 8, 8))
    label = LabelVolume(np.zeros((8, 8, 8), np.uint8), grid)
    moved = Volume(rng.random((1, 8, 8, 8)), grid.crop((1, 0, 0), (8, 8, 8)))
    with pytest.raises(GridMismatch):
        views_of(moved, label, label, TARGETS, subject="s")


def test_methods_may_be_called_as_the_panels_beside_theirs(rng) -> None:
    grid = Grid.of_spacing((16, 16, 8), (1, 1, 2))
    scan, voxels = Volume(rng.random((1, *grid.shape)), grid), np.zeros(grid.shape, np.uint8)
    voxels[4:9, 4:9, 2:6] = 1
    label = LabelVolume(voxels, grid)

    def drawn(*names: str) -> Image.Image:
        return Image.open(BytesIO(comparison_picture(scan, label, dict.fromkeys(names, label), TARGETS, "s")))

    assert drawn("scan", "reference").size == drawn("one", "other").size, "four panels, not two"
    moved = LabelVolume(voxels[1:], grid.crop((1, 0, 0), (15, 16, 8)))
    with pytest.raises(GridMismatch):
        comparison_picture(scan, moved, {"reference": label}, TARGETS, "s")


def test_an_overlay_is_saved_as_a_picture(tmp_path, rng) -> None:
    grid = Grid.of_spacing((16, 16, 8), (1, 1, 2))
    voxels = np.zeros(grid.shape, np.uint8)
    voxels[4:9, 4:9, 2:6] = 1
    label = LabelVolume(voxels, grid)
    views = views_of(Volume(rng.random((1, *grid.shape)), grid), label, label, TARGETS, subject="s")
    save_overlay(tmp_path / "overlay.png", Overlay("s", "best", 1.0, views))
    assert (tmp_path / "overlay.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("palette", ["distinct", "purple"])
def test_a_picture_is_to_scale_and_shows_marks_and_letters(palette) -> None:
    marks = np.zeros((10, 40), np.uint8)
    marks[:, 20:] = 1
    view = View("axial", np.zeros(marks.shape, np.uint8), marks, (60.0, 120.0), "RLAP", 0.0)
    shown = np.asarray(Image.open(BytesIO(picture(view, palette))).convert("RGB")).astype(int)
    assert shown.shape == (190, 380, 3)
    wanted = [0.55 * int(COLOURS[palette][1][i : i + 2], 16) for i in (1, 3, 5)]
    assert np.abs(shown[40:60, 250:340] - wanted).max() < 12
    assert shown[40:60, 40:130].max() < 12
    for x, y in ((0.04, 0.5), (0.96, 0.5), (0.5, 0.05), (0.5, 0.95)):
        place = slice(int(190 * y) - 7, int(190 * y) + 7), slice(int(380 * x) - 7, int(380 * x) + 7)
        assert shown[place].min(axis=2).max() > 180, "a white letter"
