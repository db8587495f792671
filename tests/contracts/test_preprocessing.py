"""Every preprocessing step keeps the laws of ``delineate.testing``, on any grid."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from delineate.core.grid import Grid
from delineate.core.volume import Volume
from delineate.errors import RecipeError
from delineate.preprocessing.intensity import ClipPercentiles, Denoise, Normalise
from delineate.preprocessing.pipeline import Pipeline
from delineate.preprocessing.spatial import (
    CropBackground,
    CropComposite,
    CropOrPad,
    Reorient,
    Resample,
    Resize,
    Transpose,
)
from delineate.preprocessing.step import Step, Undo, Unmoved, as_float
from delineate.testing import check_step
from delineate.testing.laws import Law
from delineate.testing.steps import (
    MOVING_LAWS,
    STEP_LAWS,
    STILL_LAWS,
    grid_of,
    labels_keep_their_millimetres,
    no_label_is_invented,
    scan,
    scores_return_class_by_class_as_they_return_together,
    undo_brings_voxels_back_to_where_they_were,
)

SPATIAL: list[Step | Pipeline] = [
    Reorient(),
    Reorient(to="PIL"),
    Resample(spacing_mm=1.3),
    Resample(spacing_mm=(None, 1.5, 0.9)),
    Resample(spacing_mm=(1.2, None, None)),
    Resample(spacing_mm=1.1, axes="in_plane"),
    Resample(spacing_mm=(1.3, None, 0.9), align="monai"),
    Resample(spacing_mm=(1.1, 0.8, 2.1), align="monai", back="nearest"),
    Transpose(order=("y", "z", "x")),
    Resize(shape=(14, 9, None)),
    Resize(shape=(None, None, 20)),
    CropBackground(threshold=0.5),
    CropBackground(threshold=0.5, margin=2),
    CropBackground(threshold="minimum"),
    CropComposite(box=((-4, 3), (-7, 8))),
    CropOrPad(shape=(6, 15, None)),
    CropOrPad(shape=14, fill="edge"),
    CropOrPad(multiple_of=(4, 8, 1), fill=-3),
    CropOrPad(at_least=(13, 2, 20), multiple_of=(1, 1, 4), fill=0),
    Pipeline(),
    Pipeline(steps=(Reorient(to="LPS"), CropBackground(threshold=0.5, margin=1), Resample(spacing_mm=1.2))),
    Pipeline(steps=(Resample(spacing_mm=1, axes="in_plane"), CropOrPad(multiple_of=8), Reorient())),
]
CUBIC = Resample(spacing_mm=1.3, order="cubic")
ROUGH: list[Step | Pipeline] = [  # not the values that linear interpolation gives
    CUBIC,
    Resample(spacing_mm=(0.9, 4, 1.1), across="nearest"),
    Resample(spacing_mm=(0.9, 4, 1.1), order="cubic", across="nearest"),
]
INTENSITY: list[Step | Pipeline] = [
    ClipPercentiles(),
    ClipPercentiles(lower=5, upper=80, within="nonzero"),
    ClipPercentiles(every_voxel=True),
    ClipPercentiles(scope="cohort", low=(-90,) * 4, high=(0.5,) * 4),
    *(
        Normalise(method=method, scope=scope, within=within)
        for method in ("minmax", "zscore", "max")
        for scope in ("slice", "patient")
        for within in ("all", "nonzero", "filled")
    ),
    Normalise(channels=(2, 0)),
    ClipPercentiles(channels=(1,), scope="cohort", low=(-90,), high=(0.5,)),
    Normalise(scope="slice", across="x"),
    Normalise(scope="cohort", shift=(1,) * 4, scale=(2,) * 4),
    Denoise(),
    Denoise(width=3, sigma=0.4),
    Pipeline(steps=(ClipPercentiles(), Normalise())),
]


def each(steps: list[Step | Pipeline]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("step", steps, ids=repr)


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    """Axes in any order and direction, turned by any small angle, spaced differently."""
    numbers = {"shape": st.integers(11, 13), "spacing_mm": st.floats(0.6, 3), "origin_mm": st.floats(-20, 20)}
    three = {name: [draw(of) for _ in range(3)] for name, of in numbers.items()}
    signs = [draw(st.sampled_from((-1, 1))) for _ in range(3)]
    angles = [draw(st.floats(-0.6, 0.6)) for _ in range(2)]
    return grid_of(**three, angles=angles, order=draw(st.permutations(range(3))), signs=signs)


def every(laws: tuple[Law, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("law", laws, ids=lambda law: law.__name__)


# What depends on no grid is tried on one.
OFTEN = (no_label_is_invented, scores_return_class_by_class_as_they_return_together)
ONCE = tuple(law for law in STEP_LAWS if law not in OFTEN)


@each(SPATIAL)
@every(MOVING_LAWS)
@settings(max_examples=15, deadline=None)
@given(grid=grids())
def test_a_step_that_moves_voxels_keeps(law: Law, step: Step, grid: Grid) -> None:
    law(step, grid)


@each([CUBIC])
@every((undo_brings_voxels_back_to_where_they_were, labels_keep_their_millimetres))
@settings(max_examples=15, deadline=None)
@given(grid=grids())
def test_cubic_resampling_keeps(law: Law, step: Step, grid: Grid) -> None:
    law(step, grid)


@each(INTENSITY)
@every(STILL_LAWS)
@settings(max_examples=15, deadline=None)
@given(grid=grids())
def test_a_step_that_leaves_voxels_where_they_are_keeps(law: Law, step: Step, grid: Grid) -> None:
    law(step, grid)


@each(SPATIAL + ROUGH + INTENSITY)
@every(OFTEN)
@settings(max_examples=15, deadline=None)
@given(grid=grids())
def test_every_step_keeps_on_every_grid(law: Law, step: Step, grid: Grid) -> None:
    law(step, grid)


@each(SPATIAL + ROUGH + INTENSITY)
@every(ONCE)
def test_every_step_keeps(law: Law, step: Step) -> None:
    law(step, Grid.of_spacing((11, 12, 13), (1, 0.8, 3)))


@each(SPATIAL + INTENSITY)
def test_counts_become_float32(step: Step) -> None:
    counts = Volume(np.arange(4 * 27, dtype=np.int16).reshape(4, 3, 3, 3), Grid.of_spacing((3, 3, 3)))
    assert step.apply(counts)[0].voxels.dtype == np.float32


class Shifted(Step):
    """Moves the scan by a voxel and says nothing of it."""

    kind: Literal["shifted"] = "shifted"

    def apply(self, volume: Volume) -> tuple[Volume, Undo]:
        return Volume(np.roll(as_float(volume), 1, axis=1), volume.grid.crop((1, 0, 0), volume.grid.shape)), (
            Unmoved.on(volume.grid)
        )


def test_a_step_that_breaks_a_promise_is_told_which() -> None:
    with pytest.raises(AssertionError, match=r"Shifted.*breaks the law '.*"):
        check_step(Shifted())
    check_step(Normalise(scope="cohort"))
    check_step(Resample(spacing_mm=1.3))


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
