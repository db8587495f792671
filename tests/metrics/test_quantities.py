"""Volumes in millilitres and their errors."""

from __future__ import annotations

from itertools import product
from math import isnan

import numpy as np
import pytest

from delineate.core.grid import Grid
from delineate.errors import DatasetError
from delineate.metrics.quantities import Measurement, QuantityMap, error_percent, measure_target, volume_ml

MASK = np.zeros((20, 20, 20), bool)
MASK[:10, :10, :10] = True


def test_a_litre_has_a_thousand_millilitres() -> None:
    voxel_ml = Grid.of_spacing((20, 20, 20), (10, 10, 10)).voxel_ml
    assert volume_ml(MASK, voxel_ml) == pytest.approx(1000)


def test_unknown_voxels_have_no_volume() -> None:
    known = np.ones_like(MASK)
    known[:5] = False
    assert volume_ml(MASK, 0.001, known) == pytest.approx(0.5)


def test_error_has_the_sign_of_the_difference() -> None:
    assert error_percent(12.0, 10.0) == pytest.approx(20)
    assert error_percent(8.0, 10.0) == pytest.approx(-20)
    assert error_percent(0.0, 10.0) == -100


def test_error_against_nothing_is_undefined() -> None:
    assert isnan(error_percent(3.0, 0.0))
    assert isnan(error_percent(0.0, 0.0))


@pytest.mark.parametrize("margin_mm", [0.5, 1.0, 2.2, 4.0, 1e6])
@pytest.mark.parametrize("lean", [0.0, 0.6, -1.4])
def test_a_margin_is_measured_in_the_world_under_any_affine(
    rng: np.random.Generator, lean: float, margin_mm: float
) -> None:
    steps_mm = np.linalg.qr(rng.standard_normal((3, 3)))[0] @ np.array([[1, 0, lean], [0, -1.2, 0], [0, 0.5 * lean, 2]])
    mask = rng.random((9, 8, 6)) < 0.97
    values = rng.random(mask.shape)
    padded = np.pad(mask, 6)  # what leaves the scan ends there
    outside = np.argwhere(~padded) @ steps_mm.T
    inside = np.argwhere(padded)
    deep = np.array(
        [np.linalg.norm(outside - point, axis=1).min() > margin_mm * (1 + 1e-6) for point in inside @ steps_mm.T]
    )
    expected = values[tuple((inside - 6)[deep].T)]
    affine = np.eye(4)
    affine[:3, :3] = steps_mm
    grid = Grid(mask.shape, affine)
    found = measure_target(mask, values, grid, QuantityMap("water", margin_mm, 0.3))
    assert found.volume_ml == pytest.approx(mask.sum() * grid.voxel_ml)
    assert found.measured_ml == pytest.approx(expected.size * grid.voxel_ml)
    if expected.size:
        numbers = expected.mean(), np.median(expected), expected.std(), 100 * (expected >= 0.3).mean()
        assert (found.mean, found.median, found.sd, found.above_threshold_percent) == pytest.approx(numbers)
    else:
        assert isnan(found.mean)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("lean", [0.0, 0.6])
def test_a_margin_in_a_single_slice_is_measured_in_the_slice(rng: np.random.Generator, lean: float, axis: int) -> None:
    figure = rng.random((14, 12)) < 0.97
    values = rng.random(figure.shape)
    plane_mm = np.array([[1.0, lean], [0.0, 1.3]])
    affine = np.eye(4)
    plane = [a for a in range(3) if a != axis]
    affine[np.ix_(plane, plane)] = plane_mm
    grid = Grid(np.expand_dims(figure, axis).shape, affine)
    padded = np.pad(figure, 4)
    outside, inside = (np.argwhere(mask) @ plane_mm.T for mask in (~padded, padded))
    for margin_mm in (1.0, 2.2):  # of a slice thickness and more
        deep = np.array([np.linalg.norm(outside - point, axis=1).min() > margin_mm * (1 + 1e-6) for point in inside])
        expected = values[tuple((np.argwhere(padded) - 4)[deep].T)]
        quantity = QuantityMap("water", margin_mm)
        found = measure_target(np.expand_dims(figure, axis), np.expand_dims(values, axis), grid, quantity)
        assert expected.size
        assert (found.measured_ml, found.mean) == pytest.approx((expected.size * grid.voxel_ml, expected.mean()))


def test_a_measurement_of_a_few_voxels() -> None:
    values = np.full(MASK.shape, 90.0)
    values[:4, 0, 0] = 2, 4, 5.56, 12
    mask = np.zeros_like(MASK)
    mask[:4, 0, 0] = True
    grid = Grid.of_spacing(mask.shape, (10, 10, 5))
    assert measure_target(mask, values, grid, QuantityMap("fat_fraction")) == Measurement(
        pytest.approx(2),
        pytest.approx(2),
        pytest.approx(5.89),
        pytest.approx(4.78),
        pytest.approx(np.std([2, 4, 5.56, 12])),
        50.0,
        (-5, -5, -2.5),
        (35, 5, 2.5),
    )
    assert isnan(measure_target(mask, values, grid, QuantityMap("water")).above_threshold_percent), "no threshold"


@pytest.mark.parametrize("lean", [0.0, 0.6])
def test_a_box_holds_every_corner_of_every_voxel_and_no_more(rng: np.random.Generator, lean: float) -> None:
    """Of single voxels, of hollow shapes, and on grids that are turned and sheared."""
    for share in (0.002, 0.05, 0.9):
        mask = rng.random((9, 8, 6)) < share
        mask[4, 5, 2] = True
        affine = np.eye(4)
        affine[:3, :3] = np.linalg.qr(rng.standard_normal((3, 3)))[0] @ [[1, 0, lean], [0, -1.2, 0], [0, 0.5 * lean, 2]]
        affine[:3, 3] = -31.5, 12.25, 88
        grid = Grid(mask.shape, affine)
        halves = np.array(list(product((-0.5, 0.5), repeat=3)))
        corners = grid.world((np.argwhere(mask)[:, None] + halves).reshape(-1, 3))
        found = measure_target(mask, np.ones(mask.shape), grid, QuantityMap("water"))
        assert found.low_ras_mm == pytest.approx(corners.min(axis=0))
        assert found.high_ras_mm == pytest.approx(corners.max(axis=0))


def test_an_empty_target_has_no_volume_and_no_quantity() -> None:
    grid = Grid.of_spacing(MASK.shape)
    for mask, margin_mm, ml in ((np.zeros_like(MASK), 0.0, 0.0), (MASK, 50.0, 1.0)):
        found = measure_target(mask, np.ones(MASK.shape), grid, QuantityMap("fat_fraction", margin_mm))
        assert (found.volume_ml, found.measured_ml) == (ml, 0)
        assert all(map(isnan, (found.mean, found.median, found.sd, found.above_threshold_percent)))
        assert np.isnan([found.low_ras_mm, found.high_ras_mm]).all() == (ml == 0)


def test_a_fat_fraction_is_in_percent() -> None:
    fat = QuantityMap("Fat-Fraction", 5)
    assert (fat.title, fat.unit, fat.threshold) == ("fat fraction", "%", 5.56)
    assert str(fat) == "fat fraction (channel Fat-Fraction, %), 5 mm or more inside the surface; threshold 5.56 %"
    assert str(QuantityMap("T2*")) == "T2*, within the target"
    assert QuantityMap("fat_fraction", threshold=6.5).threshold == 6.5
    for fine in (np.array([0.0, 96.0]), np.zeros(3)):
        fat.check(fine, "a")
    for share in (np.array([0.1, 0.98]), np.array([np.nan, 0.98])):  # in air, there is neither fat nor water
        with pytest.raises(DatasetError, match=r"'a' has values up to 0\.98: fractions of 1"):
            fat.check(share, "a")
    QuantityMap("T2*").check(np.array([0.1, 0.98]), "a")
    assert fat.as_it_is(np.array([0.0, 96.0])) is fat
    plain = fat.as_it_is(np.array([0.1, 0.98]))
    assert (plain.channel, plain.margin_mm, plain.unit, plain.threshold) == ("Fat-Fraction", 5, "", None)
