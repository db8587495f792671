"""Orientation, spacing and field of view: what the contract for every step does not say."""

from __future__ import annotations

import numpy as np
import pytest
import scipy
import SimpleITK
from numpy.testing import assert_allclose, assert_array_equal
from pydantic import ValidationError

from delineate.core.grid import Grid
from delineate.core.targets import IGNORED
from delineate.core.volume import Volume
from delineate.errors import RecipeError
from delineate.preprocessing.spatial import (
    CropBackground,
    CropComposite,
    CropOrPad,
    Reorient,
    Resample,
    Resize,
    Transpose,
    box_of,
    resample_cubic,
    resample_label,
    resample_linear,
    take_box,
    thick_axis,
)


def volume_of(voxels: np.ndarray, spacing_mm: tuple[float, float, float] = (1, 1, 1)) -> Volume:
    return Volume(voxels, Grid.of_spacing(voxels.shape[1:], spacing_mm))


class TestReorient:
    @pytest.mark.parametrize("to", ["RAS", "LPS", "SAR", "IRP"])
    def test_reaches_the_orientation(self, to: str, rng: np.random.Generator) -> None:
        prepared, _ = Reorient(to=to).apply(volume_of(rng.random((1, 3, 4, 5))))
        assert prepared.grid.orientation == to

    @pytest.mark.parametrize("to", ["RAL", "RA", "ras", "XYZ"])
    def test_refuses_what_is_no_orientation(self, to: str) -> None:
        with pytest.raises(ValidationError, match="is not an orientation"):
            Reorient(to=to)


class TestResample:
    @pytest.mark.parametrize("shape", [(7, 9, 11), (13, 6, 8), (10, 9, 8), (10, 6, 11), (7, 9, 8), (1, 1, 1)])
    def test_agrees_with_simpleitk(self, shape: tuple[int, int, int], rng: np.random.Generator) -> None:
        voxels = rng.random((2, 10, 9, 8)).astype(np.float32)
        spacing = [10 / shape[0], 9 / shape[1], 8 / shape[2]]
        for channel, resampled in zip(voxels, resample_linear(voxels, shape), strict=True):
            origin = [(s - 1) / 2 for s in spacing]
            padded = np.pad(channel, 1, mode="edge")  # it knows nothing beyond the outermost centres
            image = SimpleITK.GetImageFromArray(padded.T)
            image.SetOrigin((-1.0, -1.0, -1.0))
            oracle = SimpleITK.Resample(
                image, shape, SimpleITK.Transform(), SimpleITK.sitkLinear, origin, spacing, np.eye(3).ravel().tolist()
            )
            assert_allclose(resampled, SimpleITK.GetArrayFromImage(oracle).T, atol=1e-5)

    @pytest.mark.parametrize("order", ["C", "F"])
    def test_does_not_depend_on_the_order_in_memory(self, order: str, rng: np.random.Generator) -> None:
        voxels = rng.random((2, 6, 7, 8), dtype=np.float32)
        flipped = np.array(voxels[:, ::-1], order=order)[:, ::-1]
        assert_array_equal(resample_linear(flipped, (5, 7, 9)), resample_linear(voxels, (5, 7, 9)))

    def test_an_axis_without_a_spacing_is_kept_exactly(self, rng: np.random.Generator) -> None:
        volume = volume_of(rng.random((1, 8, 8, 3), dtype=np.float32), (1, 1, 6))
        prepared, _ = Resample(spacing_mm=(2, 2, None)).apply(volume)
        assert prepared.grid.shape == (4, 4, 3)
        for z in range(3):
            alone, _ = Resample(spacing_mm=(2, 2, None)).apply(volume_of(volume.voxels[..., z : z + 1]))
            assert_array_equal(prepared.voxels[..., z], alone.voxels[..., 0])

    @pytest.mark.parametrize(
        ("spacing_mm", "across"), [((1, 1, 6), 2), ((6, 1, 1), 0), ((1, 1, 1), 2), ((1.001, 1, 1), 2), ((1, 3, 2), 1)]
    )
    def test_in_plane_keeps_the_axis_across_the_slices(
        self, spacing_mm: tuple[float, float, float], across: int
    ) -> None:
        volume = volume_of(np.zeros((1, 8, 8, 8)), spacing_mm)
        prepared, undo = Resample(spacing_mm=0.5, axes="in_plane").apply(volume)
        assert volume.grid.slice_axis == across
        for axis in range(3):
            expected = spacing_mm[axis] if axis == across else 0.5
            assert prepared.grid.spacing_mm[axis] == pytest.approx(expected, rel=0.01)
        assert undo.interpolates

    def test_the_extent_stays_and_the_spacing_comes_as_near_as_whole_voxels_allow(self) -> None:
        volume = volume_of(np.zeros((1, 10, 10, 10)), (1, 1, 1))
        grid = Resample(spacing_mm=(3, 0.7, 50)).shape_for(volume.grid)
        assert grid == (3, 14, 1)
        prepared, _ = Resample(spacing_mm=(3, 0.7, 50)).apply(volume)
        assert_allclose(np.multiply(prepared.grid.shape, prepared.grid.spacing_mm), 10)

    def test_the_same_spacing_changes_nothing(self, rng: np.random.Generator) -> None:
        volume = volume_of(rng.random((1, 5, 6, 7), dtype=np.float32), (0.7, 0.7, 3))
        prepared, undo = Resample(spacing_mm=(0.7, 0.7, 3)).apply(volume)
        assert not undo.interpolates
        assert_array_equal(prepared.voxels, volume.voxels)

    @pytest.mark.parametrize("spacing_mm", [0, -1, float("inf"), (1, 1)])
    def test_refuses_impossible_spacings(self, spacing_mm: object) -> None:
        with pytest.raises(ValidationError):
            Resample.model_validate({"spacing_mm": spacing_mm})


class TestCubic:
    def test_is_the_spline_of_all_three_axes_within_the_range_of_the_scan(self, rng: np.random.Generator) -> None:
        """As skimage's ``resize`` with ``order=3, mode="edge"``, which nnU-Net calls."""
        voxels = rng.random((2, 9, 10, 8)).astype(np.float32)
        shape = (13, 6, 8)
        found = resample_cubic(voxels, shape)
        for channel, resampled in zip(voxels.astype(np.float64), found, strict=True):
            factors = np.divide(shape, channel.shape)
            spline = scipy.ndimage.zoom(channel, factors, order=3, mode="nearest", grid_mode=True)
            assert_allclose(resampled, np.clip(spline, channel.min(), channel.max()), atol=1e-5)
        assert_array_equal(resample_cubic(voxels, (9, 10, 8)), voxels)

    def test_slices_are_interpolated_one_by_one_and_the_nearest_is_taken_across_them(
        self, rng: np.random.Generator
    ) -> None:
        volume = volume_of(rng.random((1, 8, 8, 5), dtype=np.float32), (1, 1, 4))
        step = Resample(spacing_mm=(0.8, 1.6, 2), order="cubic", across="nearest")
        prepared, undo = step.apply(volume)
        assert prepared.grid.shape == (10, 5, 10)
        for z in range(10):
            alone = resample_cubic(volume.voxels[..., z // 2 : z // 2 + 1], (10, 5, 1))
            # A BLAS may add up a slice among others in another order than one alone, so not to the last bit.
            assert_allclose(prepared.voxels[..., z], alone[..., 0], rtol=5e-7)
            others = volume.voxels.copy()
            others[..., np.arange(5) != z // 2] = 7
            assert_array_equal(step.apply(Volume(others, volume.grid))[0].voxels[..., z], prepared.voxels[..., z])
        # Nothing is thick in the target, so the scan decides on the way back, too.
        ramp = np.arange(10, dtype=np.float32)[None, None] + np.zeros((10, 5, 1), np.float32)
        assert_array_equal(undo.scores(ramp)[0, 0], [1, 3, 5, 7, 9])

    @pytest.mark.parametrize(
        ("own", "wanted", "axis"),
        [
            ((1, 1, 3), (1, 1, 1), None),  # three times is not more than three times
            ((1, 1, 3.0000001), (1, 1, 1), None),
            ((1, 1, 3.1), (9, 1, 1), 2),
            ((1, 1, 2), (9, 1, 1), 0),
            ((0.24, 1.25, 1.25), (9, 1, 1), None),
            ((0.24, 1.2500001, 1.25), (1, 1, 1), None),
            ((0.24, 1.26, 1.25), (1, 1, 1), 1),
        ],
    )
    def test_the_thick_axis_is_that_of_nnunet(self, own, wanted, axis) -> None:
        assert thick_axis(own, wanted) == axis


class TestTranspose:
    def test_reorders_axes_and_the_grid_with_them(self, rng: np.random.Generator) -> None:
        volume = volume_of(rng.random((1, 3, 4, 5), dtype=np.float32), (1, 2, 3))
        prepared, undo = Transpose(order=("z", "x", "y")).apply(volume)
        assert_array_equal(prepared.voxels[0], volume.voxels[0].transpose(2, 0, 1))
        assert prepared.grid.spacing_mm == (3, 1, 2)
        assert_array_equal(undo(prepared.voxels), volume.voxels)

    @pytest.mark.parametrize("order", [("x", "x", "y"), ("x", "y")])
    def test_refuses_what_is_no_order(self, order) -> None:
        with pytest.raises(ValidationError, match="order"):
            Transpose(order=order)


class TestLabels:
    def test_a_binary_label_is_where_at_least_half_of_it_is(self, rng: np.random.Generator) -> None:
        mask = (rng.random((1, 9, 8, 7)) > 0.5).astype(np.uint8)
        for shape in [(5, 8, 7), (12, 11, 4), (9, 4, 7)]:
            assert_array_equal(resample_label(mask, shape), resample_linear(mask.astype(np.float32), shape) >= 0.5)

    def test_the_largest_share_wins_even_below_half(self) -> None:
        column = np.array([1, 1, 2, 2, 2, 0, 0], dtype=np.uint8)
        encoded = np.broadcast_to(column[:, None, None], (7, 2, 2))[None]
        assert resample_label(encoded, (1, 2, 2))[0, :, 0, 0].tolist() == [2]  # the middle of seven
        three = np.array([[1, 2], [2, 3]], dtype=np.uint8)[None, :, :, None]
        assert resample_label(three, (1, 1, 1)).tolist() == [[[[2]]]]  # 2 has half, 1 and 3 a quarter

    def test_classes_between_which_there_is_no_background_get_none(self) -> None:
        halves = np.repeat(np.array([1, 3], dtype=np.uint8), 5)[None, :, None, None]
        assert set(np.unique(resample_label(halves, (7, 1, 1)))) == {1, 3}

    @pytest.mark.parametrize(("pair", "winner"), [((0, 1), 1), ((2, 1), 1), ((IGNORED, 2), 2), ((IGNORED, 0), IGNORED)])
    def test_ties_go_to_a_target_then_to_ignored(self, pair: tuple[int, int], winner: int) -> None:
        encoded = np.array(pair, dtype=np.uint8)[None, :, None, None]
        assert resample_label(encoded, (1, 1, 1)).item() == winner

    def test_overlapping_targets_do_not_push_each_other_aside(self) -> None:
        liver = np.zeros((12, 12, 12), dtype=np.uint8)
        liver[2:10, 2:10, 2:10] = 1
        tumour = np.zeros_like(liver)
        tumour[4:8, 4:8, 4:8] = 1
        moved = resample_label(np.stack([liver, tumour]), (6, 6, 6))
        assert moved.sum(axis=(1, 2, 3)).tolist() == [4**3, 2**3]

    def test_unknown_for_one_target_is_unknown_for_all(self, rng: np.random.Generator) -> None:
        encoded = rng.integers(0, 2, (3, 9, 9, 9)).astype(np.uint8)
        encoded[:, rng.random((9, 9, 9)) > 0.5] = IGNORED
        ignored = resample_label(encoded, (7, 8, 9)) == IGNORED
        assert ignored.any()
        assert_array_equal(ignored.all(axis=0), ignored.any(axis=0))

    def test_padding_is_background(self) -> None:
        _, undo = CropOrPad(shape=5, fill="edge").apply(volume_of(np.ones((1, 3, 3, 3))))
        moved = undo.forward_label(np.full((1, 3, 3, 3), 2, np.uint8))[0]
        assert np.count_nonzero(moved) == 27
        assert_array_equal(moved[1:4, 1:4, 1:4], 2)


class TestResize:
    @pytest.mark.parametrize("shape", [(240, 240), (132, 256), (232, 256), (512, 512)])
    def test_slices_of_any_size_become_one_size_and_return(self, shape: tuple[int, int]) -> None:
        """The sizes of WMH 2017's three scanners and a larger one; what is in the middle stays there and returns."""
        volume = volume_of(np.zeros((1, *shape, 3), np.float32), (1, 0.9, 3))
        volume.voxels[:, shape[0] // 4 : 3 * shape[0] // 4, shape[1] // 4 : 3 * shape[1] // 4] = 1
        prepared, undo = Resize(shape=(224, 224, None)).apply(volume)
        assert prepared.grid.shape == (224, 224, 3)
        extent = [n * s for n, s in zip(prepared.grid.shape, prepared.grid.spacing_mm, strict=True)]
        assert extent == pytest.approx([shape[0], 0.9 * shape[1], 9])
        assert prepared.voxels[0, 57:167, 57:167].min() > 0.999
        returned = undo(prepared.voxels)
        assert returned.shape == volume.voxels.shape
        assert_array_equal(returned > 0.5, volume.voxels > 0.5)

    @pytest.mark.parametrize("shape", [(240, 256), (250, 230)])
    def test_is_scikit_image_s_resize_inside(self, shape: tuple[int, int], rng: np.random.Generator) -> None:
        """Which reads linearly between voxel centres; beyond the outermost it mirrors, here they repeat."""
        from scipy.ndimage import zoom

        image = rng.random(shape, dtype=np.float32)
        factors = [224 / n for n in shape]
        theirs = zoom(image, factors, order=1, mode="mirror", grid_mode=True)
        ours, _ = Resize(shape=(224, 224, None)).apply(volume_of(image[None, ..., None]))
        assert_allclose(ours.voxels[0, 1:-1, 1:-1, 0], theirs[1:-1, 1:-1], atol=5e-5)


class TestCropBackground:
    @pytest.fixture
    def volume(self) -> Volume:
        voxels = np.full((2, 10, 10, 10), -5, dtype=np.int16)
        voxels[0, 3:5, 4:8, 5] = 7
        voxels[1, 3, 9, 5] = 0
        return volume_of(voxels)

    def test_keeps_the_foreground_of_all_channels(self, volume: Volume) -> None:
        prepared, undo = CropBackground(threshold="minimum").apply(volume)
        assert prepared.grid.shape == (2, 6, 1)
        assert_array_equal(undo(prepared.voxels, outside=-5), volume.voxels)

    def test_a_margin_stops_at_the_border(self, volume: Volume) -> None:
        prepared, _ = CropBackground(threshold="minimum", margin=2).apply(volume)
        assert prepared.grid.shape == (6, 8, 5)

    def test_nonzero_and_a_number(self, volume: Volume) -> None:
        assert CropBackground().apply(volume)[0].grid.shape == (10, 10, 10)
        assert CropBackground(threshold=2).apply(volume)[0].grid.shape == (2, 4, 1)

    def test_a_scan_without_foreground_is_left_whole(self) -> None:
        empty = volume_of(np.zeros((1, 3, 4, 5)))
        assert CropBackground().apply(empty)[0].grid.shape == (3, 4, 5)

    def test_box_of_is_the_smallest_that_holds_all(self, rng: np.random.Generator) -> None:
        mask = rng.random((8, 9, 10)) > 0.99
        mask[4, 5, 6] = True
        box = box_of(mask)
        assert mask[box].sum() == mask.sum()
        for axis in range(3):
            faces = mask[box].any(axis=tuple({0, 1, 2} - {axis}))
            assert faces[0]
            assert faces[-1]


class TestCropOrPad:
    @pytest.mark.parametrize("size", [3, 4, 7, 8])
    @pytest.mark.parametrize("wanted", [4, 5, 8])
    def test_is_centred_with_the_odd_voxel_at_the_end(self, size: int, wanted: int) -> None:
        voxels = np.arange(1, size + 1, dtype=np.float32)[None, :, None, None]
        line = CropOrPad(shape=(wanted, None, None), fill=0).apply(volume_of(voxels))[0].voxels[0, :, 0, 0]
        kept = line[line > 0]
        missing_before, missing_after = kept[0] - 1, size - kept[-1]
        padded_before, padded_after = np.argmax(line > 0), np.argmax(line[::-1] > 0)
        assert missing_after - missing_before in (0, 1)
        assert padded_after - padded_before in (0, 1)

    @pytest.mark.parametrize(
        ("step", "shape"),
        [
            (CropOrPad(shape=(4, None, 8)), (4, 6, 8)),
            (CropOrPad(multiple_of=4), (8, 8, 8)),
            (CropOrPad(multiple_of=(8, 2, 1)), (8, 6, 7)),
            (CropOrPad(shape=(5, None, None), multiple_of=4), (8, 8, 8)),
        ],
        ids=repr,
    )
    def test_reaches_the_shape(self, step: CropOrPad, shape: tuple[int, int, int]) -> None:
        assert step.apply(volume_of(np.zeros((2, 5, 6, 7))))[0].grid.shape == shape

    @pytest.mark.parametrize(("fill", "expected"), [("minimum", [2, -3]), ("edge", [2, 9]), (0.5, [0.5, 0.5])])
    def test_fills_each_channel(self, fill: str | float, expected: list[float]) -> None:
        voxels = np.stack([np.full((2, 2, 2), 2), np.full((2, 2, 2), 9)]).astype(np.float32)
        voxels[1, 1, 1, 1] = -3
        prepared, _ = CropOrPad(shape=6, fill=fill).apply(volume_of(voxels))
        assert prepared.voxels[:, 0, 0, 0].tolist() == expected
        assert_array_equal(prepared.voxels[:, 2:4, 2:4, 2:4], voxels)

    def test_needs_a_size(self) -> None:
        with pytest.raises(ValidationError, match="none of shape, multiple_of and at_least"):
            CropOrPad()

    def test_edge_repeats_the_nearest_voxel(self, rng: np.random.Generator) -> None:
        voxels = rng.random((2, 3, 4, 5))
        box = take_box(voxels, (-2, 1, -1), (6, 2, 7), "edge")
        assert_array_equal(box, np.pad(voxels, [(0, 0), (2, 1), (0, 0), (1, 1)], mode="edge")[:, :, 1:3])


class TestCropComposite:
    GRID = Grid.of_spacing((20, 16, 6), (1, 1, 5))

    def scan(self, *spots: tuple[int, int, int], grid: Grid = GRID) -> Volume:
        voxels = np.zeros((1, *grid.shape), np.float32)
        for spot in spots:
            voxels[(0, *spot)] = 1
        voxels[0, 9:12, 7:9, :] = 1
        return Volume(voxels, grid)

    def test_one_box_holds_what_any_scan_shows(self) -> None:
        step = CropComposite(threshold=0.5).fit([self.scan((3, 7, 2)), self.scan((10, 12, 5))])
        assert step.box == ((3 - 10, 11 - 10), (7 - 8, 12 - 8))
        for scan in (self.scan((3, 7, 2)), self.scan((1, 1, 1))):
            cropped, undo = step.apply(scan)
            assert cropped.grid.shape == (9, 6, 6)
            assert_array_equal(cropped.voxels, scan.voxels[:, 3:12, 7:13])
            assert cropped.grid.matches(scan.grid.crop((3, 7, 0), (9, 6, 6)))
            assert_array_equal(undo(cropped.voxels)[:, 3:12, 7:13], cropped.voxels)

    def test_a_margin_stops_at_the_border(self) -> None:
        fitted = CropComposite(threshold=0.5, margin=4).fit([self.scan((3, 7, 2))])
        assert fitted.apply(self.scan())[0].grid.shape == (16, 10, 6)

    def test_slices_may_lie_along_any_axis(self) -> None:
        grid = Grid.of_spacing((6, 20, 16), (5, 1, 1))
        voxels = self.scan((3, 7, 2)).voxels.transpose(0, 3, 1, 2)
        step = CropComposite(threshold=0.5).fit([Volume(voxels, grid)])
        assert step.apply(Volume(voxels, grid))[0].grid.shape == (6, 9, 2)

    def test_a_scan_of_another_size_is_met_at_its_middle_and_padded(self) -> None:
        step = CropComposite(threshold=0.5).fit([self.scan((1, 7, 2))])
        small = Grid.of_spacing((10, 6, 4), (1, 1, 5))
        scan = Volume(np.arange(240, dtype=np.float32).reshape(1, *small.shape) - 7, small)
        cropped, undo = step.apply(scan)
        assert cropped.grid.shape == (11, 2, 4)
        assert_array_equal(cropped.voxels[:, 4:], scan.voxels[:, :7, 2:4])
        assert (cropped.voxels[:, :4] == -7).all()
        assert_array_equal(undo(cropped.voxels)[:, :7, 2:4], scan.voxels[:, :7, 2:4])

    def test_it_refuses_to_work_unfitted_and_to_be_fitted_on_nothing(self) -> None:
        with pytest.raises(RecipeError, match="not fitted"):
            CropComposite().apply(self.scan())
        with pytest.raises(RecipeError, match="at least one"):
            CropComposite().fit([])
