"""Clipping and normalising: ranges, scopes, constants and outliers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from pydantic import ValidationError

from delineate.core.grid import Grid
from delineate.core.volume import Volume
from delineate.errors import RecipeError
from delineate.preprocessing.intensity import ClipPercentiles, Denoise, Moments, Normalise, lattice
from delineate.preprocessing.pipeline import Pipeline
from delineate.preprocessing.step import Step


def volume_of(voxels: np.ndarray, spacing_mm: tuple[float, float, float] = (1, 1, 1)) -> Volume:
    return Volume(voxels, Grid.of_spacing(voxels.shape[1:], spacing_mm))


@pytest.fixture
def volume(rng: np.random.Generator) -> Volume:
    """Two channels of different ranges, a third of each zero."""
    voxels = rng.normal(50, 20, (2, 9, 10, 11)) * [[[[1]]], [[[1000]]]]
    voxels[:, :3] = 0
    return volume_of(voxels.astype(np.float32), (1, 1, 3))


class TestNormalise:
    def test_zscore_has_mean_0_and_deviation_1_in_each_channel(self, volume: Volume) -> None:
        voxels = Normalise().apply(volume)[0].voxels
        assert_allclose(voxels.mean(axis=(1, 2, 3)), 0, atol=1e-5)
        assert_allclose(voxels.std(axis=(1, 2, 3)), 1, rtol=1e-5)

    def test_minmax_runs_from_0_to_1_and_max_keeps_zero(self, volume: Volume) -> None:
        minmax = Normalise(method="minmax").apply(volume)[0].voxels
        assert_allclose([minmax.min(axis=(1, 2, 3)), minmax.max(axis=(1, 2, 3))], [[0, 0], [1, 1]], atol=1e-6)
        by_max = Normalise(method="max").apply(volume)[0].voxels
        assert_allclose(abs(by_max).max(axis=(1, 2, 3)), 1, rtol=1e-6)
        assert_array_equal(by_max == 0, volume.voxels == 0)

    def test_nonzero_measures_and_changes_what_is_not_zero(self, volume: Volume) -> None:
        voxels = Normalise(within="nonzero").apply(volume)[0].voxels
        zero = volume.voxels == 0
        assert_array_equal(voxels[zero], 0)
        assert_allclose(voxels[0][~zero[0]].mean(), 0, atol=1e-5)
        assert_allclose(voxels[0][~zero[0]].std(), 1, rtol=1e-5)

    def test_filled_measures_what_is_not_zero_in_any_channel_and_the_holes_between(self) -> None:
        voxels = np.zeros((2, 5, 5, 5), np.float32)
        voxels[0, 1:4, 1:4, 1:4] = 6
        voxels[:, 2, 2, 2] = 0  # a hole, in both channels
        voxels[1, 0, 0, 0] = 5  # shown by one channel
        normalised = Normalise(within="filled").apply(volume_of(voxels))[0].voxels
        inside = voxels[0] > 0
        inside[2, 2, 2] = inside[0, 0, 0] = True
        for channel, was in zip(normalised, voxels, strict=True):
            assert_allclose(channel[inside], (was[inside] - was[inside].mean()) / was[inside].std(), rtol=1e-5)
            assert_array_equal(channel[~inside], 0)

    def test_only_the_chosen_channels_change(self, volume: Volume) -> None:
        prepared = Normalise(channels=(1,)).apply(volume)[0].voxels
        assert_array_equal(prepared[0], volume.voxels[0])
        assert_array_equal(prepared[1], Normalise().apply(volume)[0].voxels[1])
        fitted = Normalise(scope="cohort", channels=(1,)).fit([volume])
        assert (len(fitted.shift), fitted.channels) == (1, (1,))
        assert_allclose(fitted.apply(volume)[0].voxels, prepared, rtol=1e-5, atol=1e-6)
        with pytest.raises(RecipeError, match="for channel 2, but the scan has 2"):
            Normalise(channels=(2,)).apply(volume)

    @pytest.mark.parametrize(("across", "axis"), [("thickest", 2), ("z", 2), ("x", 0), ("y", 1)])
    def test_each_slice_is_normalised_as_if_it_were_alone(self, volume: Volume, across: str, axis: int) -> None:
        step = Normalise.model_validate({"scope": "slice", "across": across, "method": "minmax"})
        slices = np.moveaxis(step.apply(volume)[0].voxels, axis + 1, 0)
        for alone, normalised in zip(np.moveaxis(volume.voxels, axis + 1, 0), slices, strict=True):
            expected = Normalise(method="minmax").apply(volume_of(np.expand_dims(alone, axis + 1)))[0].voxels
            assert_array_equal(normalised, np.squeeze(expected, axis + 1))

    @pytest.mark.parametrize("value", [0, 7, -1000.1, 3e5])
    @pytest.mark.parametrize("scope", ["slice", "patient"])
    @pytest.mark.parametrize("method", ["minmax", "zscore"])
    def test_a_constant_image_becomes_zero(self, method: str, scope: str, value: float) -> None:
        step = Normalise.model_validate({"method": method, "scope": scope})
        voxels = step.apply(volume_of(np.full((1, 30, 40, 3), value, np.float32)))[0].voxels
        assert_array_equal(voxels, 0)

    def test_a_zero_image_divided_by_its_maximum_stays_zero(self) -> None:
        assert_array_equal(Normalise(method="max").apply(volume_of(np.zeros((1, 3, 3, 3))))[0].voxels, 0)

    def test_survives_outliers_after_clipping(self, rng: np.random.Generator) -> None:
        voxels = rng.normal(100, 10, (1, 40, 50, 35)).astype(np.float32)
        plain = Normalise().apply(volume_of(voxels))[0].voxels
        voxels[0, 0, 0, :20] = 3e5
        steps = Pipeline(steps=(ClipPercentiles(), Normalise()))
        robust = steps.apply(volume_of(voxels))[0].voxels
        assert np.abs(robust).max() < 4
        assert_allclose(robust[0, 1:], np.clip(plain[0, 1:], -2.6, 2.6), atol=0.1)

    def test_a_cohort_is_measured_as_one_volume(self, rng: np.random.Generator) -> None:
        scans = [rng.normal(mean, 5, (1, 4, 5, 6)).astype(np.float32) for mean in (100, 400, 900)]
        together = volume_of(np.concatenate(scans, axis=1))
        for method in ("zscore", "minmax", "max"):
            step = Normalise.model_validate({"method": method, "scope": "cohort"}).fit(map(volume_of, scans))
            alone = Normalise.model_validate({"method": method}).apply(together)[0].voxels
            assert_allclose(step.apply(together)[0].voxels, alone, rtol=1e-4, atol=1e-5)


class TestClipPercentiles:
    def test_clips_to_the_percentiles_of_each_channel(self, volume: Volume) -> None:
        voxels = ClipPercentiles(lower=10, upper=80).apply(volume)[0].voxels
        for channel, clipped in zip(volume.voxels, voxels, strict=True):
            assert_allclose(clipped, np.clip(channel, *np.percentile(channel, (10, 80))), rtol=1e-6)

    def test_nonzero_leaves_zeros_alone(self, volume: Volume) -> None:
        voxels = ClipPercentiles(lower=10, upper=80, within="nonzero").apply(volume)[0].voxels
        bright = volume.voxels[1][volume.voxels[1] != 0]
        assert_array_equal(voxels[:, :3], 0)
        assert voxels[1, 3:].min() == pytest.approx(np.percentile(bright, 10), rel=1e-6)

    def test_only_the_chosen_channels_are_clipped(self, volume: Volume) -> None:
        step = ClipPercentiles(channels=(1,))
        prepared = step.apply(volume)[0].voxels
        assert_array_equal(prepared[0], volume.voxels[0])
        assert_array_equal(prepared[1], ClipPercentiles().apply(volume)[0].voxels[1])
        assert len(step.model_copy(update={"scope": "cohort"}).fit([volume]).low) == 1

    def test_a_zero_image_stays_zero(self) -> None:
        empty = volume_of(np.zeros((1, 3, 3, 3)))
        assert_array_equal(ClipPercentiles(within="nonzero").apply(empty)[0].voxels, 0)

    def test_a_large_volume_is_sampled_closely_enough(self, rng: np.random.Generator) -> None:
        voxels = rng.normal(0, 1, (1, 110, 110, 100)).astype(np.float32)
        clipped = ClipPercentiles().apply(volume_of(voxels))[0].voxels
        assert_allclose([clipped.min(), clipped.max()], np.percentile(voxels, (0.5, 99.5)), atol=0.03)

    def test_a_cohort_shares_one_window(self, rng: np.random.Generator) -> None:
        scans = [volume_of(rng.normal(mean, 5, (1, 20, 20, 20)).astype(np.float32)) for mean in (0, 100)]
        step = ClipPercentiles(scope="cohort").fit(scans)
        values = np.concatenate([scan.voxels.ravel() for scan in scans])
        assert_allclose([*step.low, *step.high], np.percentile(values, (0.5, 99.5)), rtol=1e-6)
        windows = {(float(v.min()), float(v.max())) for v in (step.apply(s)[0].voxels for s in scans)}
        assert len(windows) == 2  # each scan keeps its own range inside the window

    def test_given_bounds_are_a_window(self) -> None:
        window = ClipPercentiles(scope="cohort", low=(-100,), high=(250,))
        voxels = np.array([-1000, 0, 3000], dtype=np.int16)[None, :, None, None]
        assert window.apply(volume_of(voxels))[0].voxels.ravel().tolist() == [-100, 0, 250]


@pytest.mark.parametrize("step", [ClipPercentiles(scope="cohort"), Normalise(scope="cohort")], ids=repr)
class TestCohort:
    def test_fitting_returns_another_step(self, step: Step, volume: Volume) -> None:
        fitted = step.fit([volume])
        assert step.needs_fit
        assert not fitted.needs_fit
        assert type(step).model_validate_json(fitted.model_dump_json()) == fitted
        assert fitted.fit(iter(())) is fitted  # what is known is not learnt again

    def test_refuses_a_cohort_of_none_or_of_different_channels(self, step: Step, volume: Volume) -> None:
        with pytest.raises(RecipeError, match="no training subject"):
            step.fit([])
        with pytest.raises(RecipeError, match=r"\[1, 2\] channels"):
            step.fit([volume, volume_of(volume.voxels[:1])])

    def test_refuses_a_scan_of_other_channels(self, step: Step, volume: Volume) -> None:
        with pytest.raises(RecipeError, match="fitted on 2 channels, but this scan has 1"):
            step.fit([volume]).apply(volume_of(volume.voxels[:1]))


@pytest.mark.parametrize(
    ("step", "fields", "reason"),
    [
        (ClipPercentiles, {"lower": 60, "upper": 40}, "give lower < upper"),
        (ClipPercentiles, {"low": (1,), "high": (2,)}, "scope is patient"),
        (ClipPercentiles, {"scope": "cohort", "low": (1,)}, "belong together"),
        (Normalise, {"scope": "cohort", "shift": (1,), "scale": (1, 2)}, "belong together"),
        (Normalise, {"scope": "cohort", "shift": (1,), "scale": (0,)}, "divide by zero"),
        (Normalise, {"methd": "zscore"}, "methd"),
    ],
)
def test_refuses_settings_that_contradict_each_other(step: type[Step], fields: dict, reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        step.model_validate(fields)


@settings(max_examples=50)
@given(st.lists(st.lists(st.floats(-1e4, 1e4, width=32), max_size=9), min_size=1, max_size=5))
def test_moments_of_parts_join_to_those_of_the_whole(parts: list[list[float]]) -> None:
    values = np.concatenate([np.array(part, dtype=np.float32) for part in parts])
    joined = sum((Moments.of(np.array(part, dtype=np.float32)) for part in parts), Moments())
    assert joined.count == values.size
    if values.size:
        assert joined.mean == pytest.approx(values.mean(dtype=np.float64), abs=1e-3)
        assert joined.squares == pytest.approx(values.var(dtype=np.float64) * values.size, rel=1e-3, abs=1)
        assert (joined.least, joined.largest) == (values.min(), values.max())


@pytest.mark.parametrize("shape", [(1, 1, 1), (10, 10, 10), (100, 3, 7), (5, 64, 64)])
def test_a_lattice_is_a_copy_of_at_most_as_many_voxels(shape: tuple[int, int, int]) -> None:
    channel = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    for at_most in (1, 50, 500, 10**6):
        sample = lattice(channel, at_most)
        assert 0 < sample.size <= at_most
        assert sample.size >= min(channel.size, at_most) / 4
        assert not np.shares_memory(sample, channel)


class TestDenoise:
    """A bright square in air, with Rician noise."""

    TRUTH = np.zeros((40, 40, 6))
    TRUTH[10:30, 8:32] = 100

    def noisy(self, sigma: float, rng: np.random.Generator) -> Volume:
        real, imaginary = sigma * rng.standard_normal((2, *self.TRUTH.shape))
        voxels = np.hypot(self.TRUTH + real, imaginary).astype(np.float32)
        return Volume(voxels[None], Grid.of_spacing(self.TRUTH.shape, (1, 1, 5)))

    def test_noise_shrinks_and_edges_stay(self, rng: np.random.Generator) -> None:
        scan = self.noisy(8, rng)
        found = Denoise().apply(scan)[0].voxels[0]
        inside = np.s_[14:26, 12:28]
        assert found[inside].std() < 0.5 * scan.voxels[0][inside].std()
        assert found[10, 8:32].mean() - found[9, 8:32].mean() > 80  # of 100

    def test_the_floor_that_magnitudes_add_is_taken_off(self, rng: np.random.Generator) -> None:
        scan = self.noisy(8, rng)
        air = np.s_[:8, :6]
        assert scan.voxels[0][air].mean() > 9  # sigma √(π/2)
        assert Denoise().apply(scan)[0].voxels[0][air].mean() < 5

    def test_a_scan_without_noise_is_left_alone(self) -> None:
        scan = Volume(self.TRUTH.astype(np.float32)[None], Grid.of_spacing(self.TRUTH.shape, (1, 1, 5)))
        np.testing.assert_allclose(Denoise().apply(scan)[0].voxels, scan.voxels, atol=1e-3)
