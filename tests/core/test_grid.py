from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from delineate.core.grid import Grid, box_around, orthogonal, permute_axes, permute_axes_back

ORIENTATIONS = ["".join(letters) for axes in permutations(("RL", "AP", "SI")) for letters in product(*axes)]


@pytest.fixture
def oblique() -> Grid:
    """Anisotropic, turned by 20° about x, with an origin."""
    angle = np.deg2rad(20)
    turn = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([0.7, 0.9, 5.0])
    affine[:3, 3] = (-30, 12, 4)
    return Grid((5, 6, 7), affine)


def test_there_are_48_orientations() -> None:
    assert len(set(ORIENTATIONS)) == 48


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_view_in_any_orientation_keeps_every_voxel_in_its_place(oblique: Grid, orientation: str) -> None:
    voxels = np.arange(5 * 6 * 7).reshape(5, 6, 7)
    order, flip = oblique.axes_to(orientation)
    view, grid = permute_axes(voxels, order, flip), oblique.permute(order, flip)
    assert grid.orientation == orientation
    assert view.shape == grid.shape
    index = np.argwhere(view == 123).astype(float)
    before = np.argwhere(voxels == 123).astype(float)
    np.testing.assert_allclose(grid.world(index), oblique.world(before), atol=1e-9)
    np.testing.assert_array_equal(permute_axes_back(view, order, flip), voxels)


def test_spacing_and_volume(oblique: Grid) -> None:
    np.testing.assert_allclose(oblique.spacing_mm, (0.7, 0.9, 5.0))
    assert oblique.voxel_ml == pytest.approx(0.7 * 0.9 * 5.0 / 1000)


def test_resampling_keeps_the_outer_borders(oblique: Grid) -> None:
    finer = oblique.resample((10, 6, 21))
    np.testing.assert_allclose(finer.spacing_mm, (0.35, 0.9, 5 / 3))
    borders = [grid.world(np.array([[-0.5] * 3, np.array(grid.shape) - 0.5])) for grid in (oblique, finer)]
    np.testing.assert_allclose(borders[0], borders[1], atol=1e-9)


def test_a_crop_starts_where_its_first_voxel_was(oblique: Grid) -> None:
    crop = oblique.crop((-1, 2, 3), (4, 4, 4))
    np.testing.assert_allclose(crop.world(np.zeros((1, 3))), oblique.world(np.array([[-1.0, 2.0, 3.0]])))


def test_grids_are_compared_in_millimetres(oblique: Grid) -> None:
    moved = oblique.affine.copy()
    moved[0, 3] += 0.05
    shifted = Grid(oblique.shape, moved)
    assert oblique.corner_distance_mm(shifted) == pytest.approx(0.05)
    assert oblique.matches(shifted, tolerance_mm=0.1)
    assert not oblique.matches(shifted, tolerance_mm=0.01)
    assert oblique.corner_distance_mm(oblique.crop((0, 0, 0), (5, 6, 6))) == float("inf")


def rotation(axis: int, degrees: float) -> np.ndarray:
    a, b = (i for i in range(3) if i != axis)
    turn, angle = np.eye(3), np.deg2rad(degrees)
    turn[a, a] = turn[b, b] = np.cos(angle)
    turn[a, b], turn[b, a] = -np.sin(angle), np.sin(angle)
    return turn


SPACINGS = [
    (1.0, 1.0, 1.0),
    (1.0, 1.0, 5.0),
    (0.9375, 0.9375, 1.2),
    (3.0, 1.0, 3.0),
    (1.0, 1.004, 1.0),
    (2.0, 1.0, 1.5),
]


@given(
    st.sampled_from(SPACINGS),
    st.sampled_from(ORIENTATIONS),
    st.sampled_from([0, 1, 2]),
    st.sampled_from([0.0, 20.0, 45.0]),
    st.integers(0, 2**32 - 1),
)
def test_rounding_and_the_order_of_axes_do_not_choose_the_slice_axis(
    spacing_mm: tuple[float, float, float], orientation: str, about: int, degrees: float, seed: int
) -> None:
    affine = np.eye(4)
    affine[:3, :3] = rotation(about, degrees) @ np.diag(spacing_mm)
    grid = Grid((5, 6, 7), affine)
    order, flip = grid.axes_to(orientation)
    turned = grid.permute(order, flip)
    if degrees != 45:  # two axes as near to the body's: then the array's last
        assert order[turned.slice_axis] == grid.slice_axis
    noise = 1 + 1e-6 * np.random.default_rng(seed).uniform(-1, 1, (4, 4))
    shaken = Grid(turned.shape, turned.affine * noise)
    assert shaken.slice_axis == turned.slice_axis
    assert shaken.orientation == turned.orientation


@pytest.mark.parametrize(
    ("spacing_mm", "axis"), [((1, 1, 5), 2), ((5, 1, 1), 0), ((1, 1, 1), 2), ((1.009, 1, 1), 2), ((1.02, 1, 1), 0)]
)
def test_slices_lie_across_the_largest_spacing_or_the_body(spacing_mm: tuple[float, ...], axis: int) -> None:
    assert Grid.of_spacing((4, 4, 4), spacing_mm).slice_axis == axis


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_slices_of_cubic_voxels_are_axial(orientation: str) -> None:
    grid = Grid.of_spacing((4, 5, 6))
    turned = grid.permute(*grid.axes_to(orientation))
    assert turned.orientation[turned.slice_axis] in "SI"


def test_right_angles(oblique: Grid) -> None:
    steps = oblique.affine[:3, :3].copy()
    assert orthogonal(steps * (-1, 1, 1))
    steps[0, 2] += 0.01
    assert not orthogonal(steps)


@given(mask=arrays(bool, st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6))), margin=st.integers(0, 2))
def test_a_box_holds_all_that_is_true_and_no_more(mask: np.ndarray, margin: int) -> None:
    box = box_around(mask)
    if box is None:
        assert not mask.any()
        return
    assert mask[box].sum() == mask.sum()
    for axis in range(3):  # every side touches something
        assert mask[box].take([0, -1], axis=axis).any(axis=tuple({0, 1, 2} - {axis})).all()
    wide = box_around(mask, margin)
    assert wide == tuple(
        slice(max(0, part.start - margin), min(n, part.stop + margin)) for part, n in zip(box, mask.shape, strict=True)
    )


def test_a_box_in_a_plane() -> None:
    mask = np.zeros((5, 6), dtype=bool)
    mask[2, 1:4] = True
    assert box_around(mask) == (slice(2, 3), slice(1, 4))
