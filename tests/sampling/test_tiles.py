from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from delineate.errors import RecipeError
from delineate.sampling.tiles import Patches, Slices, Tile, TileGeometry, Whole, geometry_for, read_box


class Rules(NamedTuple):
    """What a network might ask of its input."""

    divisor: tuple[int, ...]
    margin: tuple[int, ...] = (0, 0, 0)
    smallest: tuple[int, ...] = (1, 1, 1)


def flat(divisor: int) -> Rules:
    return Rules((divisor, divisor), (0, 0), (1, 1))


SHAPES = st.tuples(*[st.integers(1, 23)] * 3)


@given(volume=SHAPES, tile=st.tuples(*[st.integers(1, 9)] * 3), overlap=st.sampled_from([0.0, 0.25, 0.5, 0.75]))
def test_tiles_cover_every_voxel(volume, tile, overlap) -> None:
    covered = np.zeros(volume, dtype=int)
    for start, shape in TileGeometry(tile).tiles(volume, overlap):
        box = tuple(slice(max(s, 0), s + n) for s, n in zip(start, shape, strict=True))
        covered[box] += 1
    assert covered.min() >= 1


@given(volume=SHAPES, tile=st.tuples(*[st.integers(1, 9)] * 3), overlap=st.sampled_from([0.0, 0.25, 0.5]))
def test_borders_are_where_the_tiles_that_cover_change(volume, tile, overlap) -> None:
    geometry = TileGeometry(tile)
    tiles = geometry.tiles(volume, overlap)
    for axis, borders in enumerate(geometry.borders(volume, overlap)):
        covering = [
            {t.start[axis] for t in tiles if t.start[axis] <= p < t.start[axis] + tile[axis]}
            for p in range(volume[axis])
        ]
        assert borders == [p for p in range(1, volume[axis]) if covering[p] != covering[p - 1]]


@given(volume=SHAPES, start=st.tuples(*[st.integers(-30, 30)] * 3), shape=st.tuples(*[st.integers(1, 20)] * 3))
def test_reading_beyond_the_volume_repeats_its_border(volume, start, shape) -> None:
    voxels = np.random.default_rng(0).random((2, *volume))
    nearest = [np.clip(np.arange(s, s + n), 0, size - 1) for s, n, size in zip(start, shape, volume, strict=True)]
    np.testing.assert_array_equal(read_box(voxels, start, shape), voxels[(slice(None), *np.ix_(*nearest))])


@given(volume=SHAPES, start=st.tuples(*[st.integers(-30, 30)] * 3), shape=st.tuples(*[st.integers(1, 20)] * 3))
def test_or_reads_zeros(volume, start, shape) -> None:
    voxels = np.random.default_rng(0).random((2, *volume))
    within = [
        (np.arange(s, s + n) >= 0) & (np.arange(s, s + n) < size)
        for s, n, size in zip(start, shape, volume, strict=True)
    ]
    wanted = read_box(voxels, start, shape) * np.einsum("x,y,z->xyz", *within)
    np.testing.assert_array_equal(read_box(voxels, start, shape, "zero"), wanted)


def test_tiles_are_never_smaller_than_the_network_takes() -> None:
    rules = Rules((8, 8, 8), smallest=(24, 24, 24))
    assert geometry_for(Patches(shape=(16, 32, 8)), (90, 90, 90), (1, 1, 1), rules).shape == (24, 32, 24)


def test_what_is_read_is_a_copy() -> None:
    voxels = np.zeros((1, 4, 4, 4))
    read_box(voxels, (0, 0, 0), (4, 4, 4))[...] = 1
    assert voxels.sum() == 0


def test_neighbouring_slices_become_channels_in_order() -> None:
    volume = np.arange(5, dtype=float)[None, None, None, :] + np.array([0, 100]).reshape(2, 1, 1, 1)
    volume = np.broadcast_to(volume, (2, 4, 4, 5))
    geometry = geometry_for(Slices(neighbours=1), volume.shape[1:], (1, 1, 5), flat(2))
    tiles = geometry.tiles(volume.shape[1:])
    boxes = [geometry.to_network(geometry.read(volume, tile)) for tile in tiles]
    assert boxes[0][:, 0, 0].tolist() == [0, 0, 1, 100, 100, 101]  # edge slices repeat
    assert boxes[2][:, 0, 0].tolist() == [1, 2, 3, 101, 102, 103]
    assert geometry.slices == 3


def test_the_thickest_axis_is_sliced() -> None:
    geometry = geometry_for(Slices(axis="thickest"), (20, 8, 30), (1.0, 5.0, 1.0), flat(4))
    assert geometry.slice_axis == 1
    assert geometry.shape == (20, 1, 32)
    assert geometry_for(Slices(axis="thickest"), (20, 8, 1), (1.0, 5.0, 1.0), flat(4)).slice_axis == 2


def test_shapes_are_rounded_up_to_what_the_network_divides() -> None:
    assert geometry_for(Whole(), (17, 16, 5), (1, 1, 1), Rules((8, 8, 4))).shape == (24, 16, 8)
    valid = geometry_for(
        Patches(shape=(80, 96, 96)), (200, 200, 200), (1, 1, 1), Rules((4, 4, 4), (10, 10, 10), (24, 24, 24))
    )
    assert valid.shape == (80, 96, 96)
    assert valid.input_shape == (100, 116, 116)


def test_what_the_recipe_says_of_reading_stands_in_the_geometry() -> None:
    geometry = geometry_for(Slices(neighbours=1, standardise="together", outside="zero"), (8, 8, 9), (1, 1, 1), flat(2))
    assert (geometry.standardise, geometry.outside) == ("together", "zero")
    whole = geometry_for(Whole(), (8, 8, 8), (1, 1, 1), Rules((8, 8, 8)))
    assert (whole.standardise, whole.outside) == (False, "edge")


def test_dimensions_must_agree() -> None:
    with pytest.raises(RecipeError, match="kind: slices with 2D"):
        geometry_for(Patches(shape=(8, 8, 8)), (8, 8, 8), (1, 1, 1), flat(2))


def test_a_fractional_advance_rounds_places_only() -> None:
    """nnU-Net's own example, and tiles of an odd side, between which whole voxels leave less room."""

    def starts(size: int, tile: int, advance: str) -> list[int]:
        return [found.start[0] for found in TileGeometry((tile, 1, 1)).tiles((size, 1, 1), 0.5, advance)]

    assert starts(110, 64, "fractional") == starts(110, 64, "whole") == [0, 23, 46]
    assert starts(21, 7, "fractional") == [0, 4, 7, 10, 14]
    assert starts(21, 7, "whole") == [0, 3, 6, 8, 11, 14]
    assert starts(5, 7, "fractional") == [-1]


@pytest.mark.parametrize("shape", [(8, 10, 7), (1, 12, 9)])
def test_nnunet_s_weights_are_a_blurred_voxel_at_half_of_each_side(shape) -> None:
    weights = TileGeometry(shape).weights("nnunet")
    one = np.zeros(shape)
    one[tuple(n // 2 for n in shape)] = 1
    blurred = gaussian_filter(one, [n / 8 for n in shape], mode="constant")
    np.testing.assert_allclose(weights, 10 * blurred / blurred.max(), rtol=1e-3, atol=1e-6)
    assert weights.min() > 0


@pytest.mark.parametrize("kind", ["uniform", "gaussian"])
def test_weights_are_positive_and_symmetric(kind) -> None:
    weights = TileGeometry((8, 7, 1)).weights(kind)
    assert weights.shape == (8, 7, 1)
    assert weights.min() > 0
    np.testing.assert_allclose(weights, weights[::-1, ::-1], rtol=1e-6)


class TestAsMonai:
    """Its sliding windows: a fixed advance, and a Gaussian whose floor is that of the whole tile."""

    @pytest.mark.parametrize("overlap", [0, 0.25, 0.5, 0.7])
    def test_tiles_lie_where_its_windows_lie(self, overlap) -> None:
        from monai.data.utils import dense_patch_slices

        geometry = TileGeometry((16, 10, 4))
        for shape in ((16, 23, 4), (40, 10, 9), (33, 41, 17)):
            pairs = zip(shape, geometry.shape, strict=True)
            step = [n if n == tile else max(1, int(tile * (1 - overlap))) for n, tile in pairs]
            expected = {
                tuple(side.start for side in place) for place in dense_patch_slices(shape, geometry.shape, step)
            }
            assert {tile.start for tile in geometry.tiles(shape, overlap, "fixed")} == expected

    def test_a_scan_smaller_than_a_tile_lies_in_its_middle(self) -> None:
        assert TileGeometry((16, 10, 4)).tiles((11, 10, 3), 0.5, "fixed") == [Tile((-2, 0, 0), (16, 10, 4))]

    def test_weights_are_its_importance_map(self) -> None:
        from monai.data.utils import compute_importance_map

        for shape in ((16, 16, 16), (24, 7, 1)):
            expected = compute_importance_map(shape, mode="gaussian").numpy()
            np.testing.assert_allclose(TileGeometry(shape).weights("monai"), expected, rtol=1e-5)
