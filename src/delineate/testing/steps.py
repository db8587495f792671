"""What every preprocessing step promises, over odd shapes, orientations, anisotropic and oblique grids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray

from delineate.core.grid import Grid
from delineate.core.targets import IGNORED
from delineate.core.volume import Volume
from delineate.errors import CannotUndo
from delineate.preprocessing.pipeline import STEPS, Pipeline
from delineate.preprocessing.step import Composed, Step
from delineate.testing.laws import Law, hold, require, require_own_name, survives_writing

OFFSET_MM = 100  # makes every coordinate negative, so that only the fourth channel is foreground
_GRIDS = 8


def check_step(step: Step, *, skip: Iterable[str] = ()) -> None:
    """Hold a step to :data:`STEP_LAWS` and, depending on whether it moves voxels, :data:`MOVING_LAWS` or
    :data:`STILL_LAWS`.

    A step that needs fitting is fitted first. One that moves voxels must not change their intensities.
    """
    skip = tuple(skip)
    upright = Grid.of_spacing((11, 12, 13), (1, 0.8, 3))
    if step.needs_fit:
        step = step.fit([scan(upright)])
    every = STEP_LAWS + MOVING_LAWS + STILL_LAWS
    for grid in [upright, *grids(np.random.default_rng(7), _GRIDS)]:
        moves = not step.apply(scan(grid))[0].grid.matches(grid, tolerance_mm=0)
        laws = STEP_LAWS + (MOVING_LAWS if moves else STILL_LAWS)
        others = {law.__name__ for law in every if law not in laws}
        hold(repr(step), every, {*skip, *others}, step, grid)


def grids(rng: np.random.Generator, n: int) -> Iterator[Grid]:
    """Grids with axes in any order and direction, rotated by small angles, with different spacings."""
    for _ in range(n):
        yield grid_of(
            rng.integers(11, 14, 3).tolist(),
            rng.uniform(0.6, 3, 3).tolist(),
            rng.uniform(-0.6, 0.6, 2).tolist(),
            rng.permutation(3).tolist(),
            rng.choice([-1, 1], 3).tolist(),
            rng.uniform(-20, 20, 3).tolist(),
        )


def grid_of(
    shape: Sequence[int],
    spacing_mm: Sequence[float],
    angles: Sequence[float],
    order: Sequence[int],
    signs: Sequence[int],
    origin_mm: Sequence[float],
) -> Grid:
    """A grid whose axes, in a given order and direction, are rotated about z and x."""
    (a, b), (x, y, z) = angles, shape
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = (about_z @ about_x)[:, list(order)] * list(signs) * np.array(spacing_mm)
    affine[:3, 3] = origin_mm
    return Grid((x, y, z), affine)


def positions(grid: Grid) -> NDArray[np.float64]:
    """World millimetres (3, X, Y, Z) of every voxel."""
    index = np.indices(grid.shape).reshape(3, -1).T.astype(np.float64)
    world: NDArray[np.float64] = grid.world(index).T.reshape(3, *grid.shape)
    return world


def between_centres(of: Grid, grid: Grid) -> NDArray[np.bool_]:
    """Which voxels of ``grid`` lie between the outermost voxel centres of ``of``."""
    inverse = np.linalg.inv(of.affine)
    index = np.tensordot(inverse[:3, :3], positions(grid), axes=1) + inverse[:3, 3, None, None, None]
    last = np.array(of.shape)[:, None, None, None] - 1
    inside: NDArray[np.bool_] = ((index >= -1e-6) & (index <= last + 1e-6)).all(axis=0)
    return inside


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


def centroid_mm(label: NDArray[Any], grid: Grid) -> NDArray[np.float64]:
    centre: NDArray[np.float64] = grid.world(np.argwhere(label).mean(axis=0)[None])[0]
    return centre


def voxel_radius_mm(*of: Grid) -> float:
    """Half the diagonal of the largest voxel."""
    return float(np.linalg.norm(np.max([grid.spacing_mm for grid in of], axis=0)) / 2)


Stepping = Step | Pipeline


def fields_are_plain_and_the_kind_its_own(step: Stepping, grid: Grid) -> None:
    if isinstance(step, Step):
        require_own_name(STEPS, step.kind, type(step))
    survives_writing(step)


def it_is_fitted_or_needs_no_fit(step: Stepping, grid: Grid) -> None:
    require(not step.needs_fit, "it needs fitting, and fitting did not change that")


def what_is_prepared_is_float32(step: Stepping, grid: Grid) -> None:
    found = step.apply(scan(grid))[0].voxels.dtype
    require(found == np.float32, f"voxels are {found}, not float32")


def what_it_is_given_stays_as_it_is(step: Stepping, grid: Grid) -> None:
    volume = scan(grid)
    writeable = Volume(volume.voxels.copy(), grid)
    step.apply(writeable)
    assert_array_equal(writeable.voxels, volume.voxels)


def scores_return_class_by_class_as_they_return_together(step: Stepping, grid: Grid) -> None:
    prepared, undo = step.apply(scan(grid))
    together = undo(prepared.voxels, outside=(1, 0, 0, 0))
    one_by_one = [undo.scores(plane, float(k == 0)) for k, plane in enumerate(prepared.voxels)]
    assert_array_equal(together, np.stack(one_by_one))


def what_lies_on_another_grid_is_refused(step: Stepping, grid: Grid) -> None:
    _, undo = step.apply(scan(grid))
    for what, call in (
        ("scores", lambda: undo.scores(np.zeros((1, 2, 3), np.float32))),
        ("a label", lambda: undo.forward_label(np.zeros((1, 1, 2, 3), np.uint8))),
    ):
        try:
            call()
        except CannotUndo:
            continue
        raise AssertionError(f"{what} of another shape are accepted; raise CannotUndo")


def no_label_is_invented(step: Stepping, grid: Grid) -> None:
    _, undo = step.apply(scan(grid))
    values = np.array([0, 2, 7, IGNORED], dtype=np.uint8)
    encoded = values[np.random.default_rng(7).integers(0, 4, (2, *grid.shape))]
    new = set(np.unique(undo.forward_label(encoded)).tolist()) - set(values.tolist())
    require(not new, f"new values appear in the label: {new}")


def voxels_lie_where_the_returned_grid_says(step: Stepping, grid: Grid) -> None:
    prepared, undo = step.apply(scan(grid))
    stages = (undo, *undo.undos) if isinstance(undo, Composed) else (undo,)
    # Beyond the outermost centres of any stage, the outermost voxel is repeated.
    inside = np.logical_and.reduce([between_centres(at.before, prepared.grid) for at in stages])
    require(inside.any(), "nothing of the scan is left")
    assert_allclose(prepared.voxels[:3, inside] + OFFSET_MM, positions(prepared.grid)[:, inside], atol=1e-3)


def undo_brings_voxels_back_to_where_they_were(step: Stepping, grid: Grid) -> None:
    volume = scan(grid)
    prepared, undo = step.apply(volume)
    returned = undo(prepared.voxels[:3], outside=np.nan)
    require(undo.before.matches(grid, tolerance_mm=1e-9), "the undo's grid before is not the scan's")
    require(undo.after.matches(prepared.grid, tolerance_mm=1e-9), "the undo's grid after is not the prepared one")
    require(returned.shape[1:] == grid.shape, f"{returned.shape[1:]} voxels return, not {grid.shape}")
    kept = ~np.isnan(returned[0])
    require(kept[block(grid) > 0].all(), "some of the block at the centre is lost")
    moved_mm = np.linalg.norm(returned - volume.voxels[:3], axis=0)[kept].max()
    most_mm = voxel_radius_mm(grid, prepared.grid) if undo.interpolates else 0.0
    require(
        moved_mm <= most_mm, f"voxels return {moved_mm:.3f} mm from where they were; at most {most_mm:.3f} is allowed"
    )


def labels_keep_their_millimetres(step: Stepping, grid: Grid) -> None:
    _, undo = step.apply(scan(grid))
    moved = undo.forward_label(block(grid)[None])[0]
    distance_mm = np.linalg.norm(centroid_mm(moved, undo.after) - centroid_mm(block(grid), grid))
    most_mm = voxel_radius_mm(undo.after) if undo.interpolates else 1e-6
    require(
        distance_mm <= most_mm, f"the label's centre moves by {distance_mm:.3f} mm; at most {most_mm:.3f} is allowed"
    )


def labels_go_where_the_scan_goes(step: Stepping, grid: Grid) -> None:
    prepared, undo = step.apply(scan(grid))
    moved = undo.forward_label(block(grid)[None])
    assert_array_equal(moved[0], prepared.voxels[3] >= 0.5)


def voxels_stay_where_they_are(step: Stepping, grid: Grid) -> None:
    volume = scan(grid)
    prepared, undo = step.apply(volume)
    require(prepared.grid.matches(grid, tolerance_mm=0), "the grid changes")
    assert_array_equal(undo(volume.voxels), volume.voxels)
    assert_array_equal(undo.forward_label(block(grid)[None])[0], block(grid))


STEP_LAWS: tuple[Law, ...] = (
    fields_are_plain_and_the_kind_its_own,
    it_is_fitted_or_needs_no_fit,
    what_is_prepared_is_float32,
    what_it_is_given_stays_as_it_is,
    scores_return_class_by_class_as_they_return_together,
    what_lies_on_another_grid_is_refused,
    no_label_is_invented,
)
MOVING_LAWS: tuple[Law, ...] = (
    voxels_lie_where_the_returned_grid_says,
    undo_brings_voxels_back_to_where_they_were,
    labels_keep_their_millimetres,
    labels_go_where_the_scan_goes,
)
STILL_LAWS: tuple[Law, ...] = (voxels_stay_where_they_are,)
