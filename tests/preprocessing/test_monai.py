"""What MONAI's transforms make of a scan, our steps make of it, too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from delineate.core.grid import Grid
from delineate.core.volume import Volume
from delineate.preprocessing.intensity import ClipPercentiles
from delineate.preprocessing.spatial import CropBackground, CropOrPad, Resample
from delineate.testing.steps import grids

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:monai")


def noise(grid: Grid, channels: int = 2) -> Volume:
    return Volume(np.random.default_rng(5).normal(1, 1, (channels, *grid.shape)).astype(np.float32), grid)


def theirs(volume: Volume) -> Any:
    from monai.data import MetaTensor

    return MetaTensor(torch.from_numpy(np.ascontiguousarray(volume.voxels)), affine=torch.tensor(volume.grid.affine))


GRIDS = [
    Grid.of_spacing((11, 12, 13), (1.5, 0.8, 3)),
    Grid.of_spacing((36, 52, 32)),  # with voxels half way between two, there and back
    *grids(np.random.default_rng(1), 6),  # oblique, with axes that rounding leaves at no right angles or at such
    *(Grid(g.shape, np.float32(g.affine)) for g in grids(np.random.default_rng(2), 12)),
]


@pytest.mark.parametrize("back", ["linear", "nearest"])
@pytest.mark.parametrize("spacing_mm", [(1.1, 1.3, 0.7), (1.5, None, 2.9), (1.5, 1.2, 2.5)])
def test_spacing_and_its_inverse(spacing_mm: Sequence[float | None], back: Any) -> None:
    from monai.transforms import Spacing
    from monai.transforms.utils import convert_applied_interp_mode

    for grid in GRIDS:
        volume = noise(grid)
        transform = Spacing(pixdim=[side or -1 for side in spacing_mm])
        expected = transform(theirs(volume))
        found, undo = Resample(spacing_mm=spacing_mm, align="monai", back=back).apply(volume)
        assert_allclose(found.voxels, expected.numpy(), atol=1e-4)
        assert_allclose(found.grid.affine, expected.affine.numpy(), atol=1e-4)
        if back == "nearest":
            expected.applied_operations = convert_applied_interp_mode(expected.applied_operations, mode="nearest")
        returned = transform.inverse(expected).numpy()
        # In oblique scans, rounding decides whether the middle lies nearer to the voxel before or after it.
        least = 0.95 if back == "nearest" and (grid.affine[:3, :3] != np.diag(grid.spacing_mm)).any() else 0.9999
        assert np.mean(np.abs(undo(found.voxels) - returned) < 1e-4) > least


def test_padding_cropping_and_percentiles() -> None:
    from monai import transforms

    volume = noise(Grid.of_spacing((9, 12, 7)), channels=1)
    volume.voxels[:, :2] = 0
    for step, transform in (
        (CropOrPad(at_least=(12, None, 10), fill=0), transforms.SpatialPad([12, -1, 10])),
        (CropOrPad(multiple_of=(4, 8, 4), fill="edge"), transforms.DivisiblePad((4, 8, 4), mode="edge")),
        (CropBackground(threshold=1.5), transforms.CropForeground(select_fn=lambda x: x > 1.5)),
        (
            ClipPercentiles(lower=3, upper=95, every_voxel=True),
            transforms.ClipIntensityPercentiles(lower=3, upper=95),
        ),
    ):
        prepared = step.apply(volume)[0]
        expected = transform(theirs(volume))
        assert_allclose(prepared.voxels, np.asarray(expected), atol=1e-6)


def test_every_voxel_counts_in_large_scans() -> None:
    """A lattice of at most a million voxels sees only the planes of ones, every other one."""
    voxels = np.zeros((1, 128, 128, 64), np.float32)
    voxels[:, ::2] = 1
    volume = Volume(voxels, Grid.of_spacing(voxels.shape[1:]))
    for every_voxel, lowest in ((False, 1), (True, 0)):
        clipped = ClipPercentiles(lower=40, upper=100, every_voxel=every_voxel).apply(volume)[0]
        assert clipped.voxels.min() == lowest
