"""The slice axis is one: whatever works slice by slice takes the grid's, and rounding does not move it."""

from __future__ import annotations

import numpy as np
import pytest

from delineate.core.grid import Grid
from delineate.core.targets import Targets
from delineate.core.volume import Volume
from delineate.derivation import DataSummary, derive_recipe
from delineate.metrics.comparison import Comparison
from delineate.metrics.surface import surface_distances
from delineate.preprocessing.intensity import Normalise
from delineate.preprocessing.spatial import CropComposite, Resample
from delineate.sampling.tiles import AXES, Slices, with_slice_axis

SPACINGS = [(1, 1, 1), (1, 1, 6), (6, 1, 1), (1, 6, 1), (1, 1.004, 1), (1.009, 1, 1)]


@pytest.mark.parametrize("shape", [(10, 12, 14), (10, 12, 1), (1, 12, 14)])
@pytest.mark.parametrize("orientation", ["RAS", "SAR", "LSP"])
@pytest.mark.parametrize("spacing_mm", SPACINGS)
def test_every_part_slices_across_the_same_axis(
    rng: np.random.Generator, spacing_mm: tuple[float, float, float], orientation: str, shape: tuple[int, int, int]
) -> None:
    plain = Grid.of_spacing(shape, spacing_mm)
    plain = plain.permute(*plain.axes_to(orientation))
    for sign in (0, -1, 1):
        grid = Grid(plain.shape, plain.affine * (1 + sign * 1e-6 * rng.random((4, 4))))
        axis = grid.slice_axis
        assert axis == plain.slice_axis
        assert 1 not in shape or grid.shape[axis] == 1, "a single slice lies across itself, however thin it is"
        volume = Volume(rng.random((1, *grid.shape), dtype=np.float32), grid)

        finer = Resample(spacing_mm=0.5, axes="in_plane").apply(volume)[0].grid
        assert [a for a in range(3) if finer.shape[a] == grid.shape[a]] == [axis]

        normalised = Normalise(scope="slice").apply(volume)[0].voxels[0]
        others = tuple(a for a in range(3) if a != axis)
        np.testing.assert_allclose(normalised.mean(axis=others), 0, atol=1e-5)

        cropped = CropComposite(box=((-2, 2), (-2, 2))).apply(volume)[0].grid
        assert [a for a in range(3) if cropped.shape[a] == grid.shape[a]] == [axis]

        tiles = with_slice_axis(Slices(axis="thickest"), grid)
        assert isinstance(tiles, Slices)
        assert tiles.axis == AXES[axis]

        reference, prediction = (volume.voxels[0] > level for level in (0.6, 0.5))
        outlines = surface_distances(reference, prediction, grid.affine[:3, :3], edge="outlines", slice_axis=axis)
        assert Comparison.of(reference, prediction, grid).outlines.mean_mm == pytest.approx(outlines.mean_mm)


@pytest.mark.parametrize("spacing_mm", SPACINGS)
def test_a_derived_recipe_keeps_the_spacing_across_slices(spacing_mm: tuple[float, float, float]) -> None:
    summary = DataSummary(
        np.array([[64.0, 64, 64]]), np.array([spacing_mm]), 1.0, 1.0, 0.0, 2.0, 0.1, modality="MR", subjects=1
    )
    recipe, _ = derive_recipe(summary, Targets({"a": (1,)}), device="cpu", memory_bytes=2**33, steps=2)
    resample = next(step for step in recipe.preprocessing if isinstance(step, Resample))
    axis = Grid.of_spacing((64, 64, 64), spacing_mm).slice_axis
    thick = spacing_mm[axis] > 3
    assert [a for a, mm in enumerate(resample.spacing_mm) if mm is None] == ([axis] if thick else [])
