"""What every preprocessing step promises, over odd shapes, orientations, anisotropic and oblique grids."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray

from delineate.core.grid import Grid
from delineate.core.targets import IGNORED
from delineate.core.volume import Volume
from delineate.errors import CannotUndo, RecipeError
from delineate.preprocessing.intensity import ClipPercentiles, Denoise, Normalise
from delineate.preprocessing.pipeline import Pipeline
from delineate.preprocessing.spatial import CropBackground, CropComposite, CropOrPad, Reorient, Resample
from delineate.preprocessing.step import Composed, Step, Undo

SPATIAL: list[Step | Pipeline] = [
    Reorient(),
    Reorient(to="PIL"),
    Resample(spacing_mm=1.3),
    Resample(spacing_mm=(None, 1.5, 0.9)),
    Resample(spacing_mm=(1.2, None, None)),
    Resample(spacing_mm=1.1, axes="in_plane"),
    CropBackground(threshold=0.5),
    CropBackground(threshold=0.5, margin=2),
    CropBackground(threshold="minimum"),
    CropComposite(box=((-4, 3), (-7, 8))),
    CropOrPad(shape=(6, 15, None)),
    CropOrPad(shape=14, fill="edge"),
    CropOrPad(multiple_of=(4, 8, 1), fill=-3),
    Pipeline(),
    Pipeline(steps=(Reorient(to="LPS"), CropBackground(threshold=0.5, margin=1), Resample(spacing_mm=1.2))),
    Pipeline(steps=(Resample(spacing_mm=1, axes="in_plane"), CropOrPad(multiple_of=8), Reorient())),
]
INTENSITY: list[Step | Pipeline] = [
    ClipPercentiles(),
    ClipPercentiles(lower=5, upper=80, within="nonzero"),
    ClipPercentiles(scope="cohort", low=(-90,) * 4, high=(0.5,) * 4),
    *(
        Normalise(method=method, scope=scope, within=within)
        for method in ("minmax", "zscore", "max")
        for scope in ("slice", "patient")
        for within in ("all", "nonzero")
    ),
    Normalise(scope="slice", across="x"),
    Normalise(scope="cohort", shift=(1,) * 4, scale=(2,) * 4),
    Denoise(),
    Denoise(width=3, sigma=0.4),
    Pipeline(steps=(ClipPercentiles(), Normalise())),
]
OFFSET_MM = 100  # makes every coordinate negative, so that only the fourth channel is foreground


def each(steps: list[Step | Pipeline]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("step", steps, ids=repr)


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    """Axes in any order and direction, turned by any small angle, spaced differently."""
    size, spacing = st.integers(11, 13), st.floats(0.6, 3)
    angle = st.floats(-0.6, 0.6)
    (a, b), order = (draw(angle), draw(angle)), draw(st.permutations(range(3)))
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    signs = [draw(st.sampled_from((-1, 1))) for _ in range(3)]
    affine = np.eye(4)
    affine[:3, :3] = (about_z @ about_x)[:, order] * signs * [draw(spacing) for _ in range(3)]
    affine[:3, 3] = [draw(st.floats(-20, 20)) for _ in range(3)]
    return Grid((draw(size), draw(size), draw(size)), affine)


def over_grids(law):
    return settings(max_examples=15, deadline=None)(given(grid=grids())(law))


def positions(grid: Grid) -> NDArray[np.float64]:
    """World millimetres (3, X, Y, Z) of every voxel."""
    index = np.indices(grid.shape).reshape(3, -1).T.astype(np.float64)
    return grid.world(index).T.reshape(3, *grid.shape)


def between_centres(of: Grid, grid: Grid) -> NDArray[np.bool_]:
    """Which voxels of ``grid`` lie between the outermost voxel centres of ``of``."""
    inverse = np.linalg.inv(of.affine)
    index = np.tensordot(inverse[:3, :3], positions(grid), axes=1) + inverse[:3, 3, None, None, None]
    last = np.array(of.shape)[:, None, None, None] - 1
    return ((index >= -1e-6) & (index <= last + 1e-6)).all(axis=0)


def block(grid: Grid) -> NDArray[np.uint8]:
    """A label (X, Y, Z): five voxels along each axis, about the centre."""
    label = np.zeros(grid.shape, dtype=np.uint8)
    label[tuple(slice(n // 2 - 2, n // 2 + 3) for n in grid.shape)] = 1
    return label


def scan(grid: Grid) -> Volume:
    """Four channels: where each voxel lies, and the block."""
    voxels = np.concatenate([positions(grid) - OFFSET_MM, block(grid)[None]]).astype(np.float32)
    voxels.flags.writeable = False
    return Volume(voxels, grid)


def centroid_mm(label: NDArray, grid: Grid) -> NDArray[np.float64]:
    return grid.world(np.argwhere(label).mean(axis=0)[None])[0]


def voxel_radius_mm(*of: Grid) -> float:
    """Half the diagonal of the largest voxel."""
    return float(np.linalg.norm(np.max([grid.spacing_mm for grid in of], axis=0)) / 2)


@each(SPATIAL)
@over_grids
def test_voxels_lie_where_the_returned_grid_says(step: Step, grid: Grid) -> None:
    prepared, undo = step.apply(scan(grid))
    stages = (undo, *undo.undos) if isinstance(undo, Composed) else (undo,)
    # Beyond the outermost centres of any stage, the outermost voxel is repeated.
    inside = np.logical_and.reduce([between_centres(at.before, prepared.grid) for at in stages])
    assert inside.any()
    assert_allclose(prepared.voxels[:3, inside] + OFFSET_MM, positions(prepared.grid)[:, inside], atol=1e-3)


@each(SPATIAL)
@over_grids
def test_undo_brings_voxels_back_to_where_they_were(step: Step, grid: Grid) -> None:
    volume = scan(grid)
    prepared, undo = step.apply(volume)
    returned = undo(prepared.voxels[:3], outside=np.nan)
    assert undo.before.matches(grid, tolerance_mm=1e-9)
    assert undo.after.matches(prepared.grid, tolerance_mm=1e-9)
    assert returned.shape[1:] == grid.shape
    kept = ~np.isnan(returned[0])
    assert kept[block(grid) > 0].all()
    moved_mm = np.linalg.norm(returned - volume.voxels[:3], axis=0)[kept].max()
    assert moved_mm <= (voxel_radius_mm(grid, prepared.grid) if undo.interpolates else 0)


@each(SPATIAL)
@over_grids
def test_labels_keep_their_millimetres(step: Step, grid: Grid) -> None:
    _, undo = step.apply(scan(grid))
    moved = undo.forward_label(block(grid)[None])[0]
    distance_mm = np.linalg.norm(centroid_mm(moved, undo.after) - centroid_mm(block(grid), grid))
    assert distance_mm <= (voxel_radius_mm(undo.after) if undo.interpolates else 1e-6)


@each(SPATIAL)
@over_grids
def test_labels_go_where_the_scan_goes(step: Step, grid: Grid) -> None:
    prepared, undo = step.apply(scan(grid))
    moved = undo.forward_label(block(grid)[None])
    assert_array_equal(moved[0], prepared.voxels[3] >= 0.5)


@each(SPATIAL)
@over_grids
def test_no_label_is_invented(step: Step, grid: Grid) -> None:
    _, undo = step.apply(scan(grid))
    values = np.array([0, 2, 7, IGNORED], dtype=np.uint8)
    encoded = values[np.random.default_rng(7).integers(0, 4, (2, *grid.shape))]
    assert set(np.unique(undo.forward_label(encoded))) <= set(values)


@each(SPATIAL + INTENSITY)
@over_grids
def test_scores_return_class_by_class_as_they_return_together(step: Step, grid: Grid) -> None:
    prepared, undo = step.apply(scan(grid))
    together = undo(prepared.voxels, outside=(1, 0, 0, 0))
    one_by_one = [undo.scores(plane, float(k == 0)) for k, plane in enumerate(prepared.voxels)]
    assert_array_equal(together, np.stack(one_by_one))


@each(INTENSITY)
@over_grids
def test_intensity_steps_leave_voxels_where_they_are(step: Step, grid: Grid) -> None:
    volume = scan(grid)
    prepared, undo = step.apply(volume)
    assert prepared.grid.matches(grid, tolerance_mm=0)
    assert_array_equal(undo(volume.voxels), volume.voxels)
    assert_array_equal(undo.forward_label(block(grid)[None])[0], block(grid))


@each(SPATIAL + INTENSITY)
class TestEveryStep:
    grid = Grid.of_spacing((11, 12, 13), (1, 0.8, 3))

    def test_returns_float32(self, step: Step) -> None:
        counts = Volume(np.arange(2 * 27, dtype=np.int16).reshape(2, 3, 3, 3), Grid.of_spacing((3, 3, 3)))
        if "cohort" not in repr(step):  # fitted on four channels
            assert step.apply(counts)[0].voxels.dtype == np.float32
        assert step.apply(scan(self.grid))[0].voxels.dtype == np.float32

    def test_is_plain_text_and_back(self, step: Step) -> None:
        assert type(step).model_validate_json(step.model_dump_json()) == step

    def test_is_fitted_or_needs_no_fit(self, step: Step) -> None:
        assert not step.needs_fit

    def test_refuses_what_lies_on_another_grid(self, step: Step) -> None:
        _, undo = step.apply(scan(self.grid))
        with pytest.raises(CannotUndo, match="prepared grid"):
            undo.scores(np.zeros((1, 2, 3), np.float32))
        with pytest.raises(CannotUndo, match="scan's grid"):
            undo.forward_label(np.zeros((1, 1, 2, 3), np.uint8))


@each([ClipPercentiles(scope="cohort"), Normalise(scope="cohort"), Pipeline(steps=(Normalise(scope="cohort"),))])
def test_what_is_not_fitted_is_not_applied(step: Step) -> None:
    assert step.needs_fit
    with pytest.raises(RecipeError, match="fit it on training subjects"):
        step.apply(scan(Grid.of_spacing((11, 12, 13))))


def test_undo_is_a_value() -> None:
    _, undo = Pipeline(steps=(Reorient(), Resample(spacing_mm=1))).apply(scan(Grid.of_spacing((11, 12, 13), (2, 1, 1))))
    assert isinstance(undo, Undo)
    with pytest.raises(AttributeError):
        undo.before = undo.after  # type: ignore[misc]
