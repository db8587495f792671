"""Volumes in millilitres and their errors."""

from __future__ import annotations

from math import isnan

import numpy as np
import pytest

from delineate.core.grid import Grid
from delineate.metrics.quantities import error_percent, volume_ml, within

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
    mean, median = within(values, mask, steps_mm, margin_mm)
    if expected.size:
        assert (mean, median) == (pytest.approx(expected.mean()), pytest.approx(np.median(expected)))
    else:
        assert isnan(mean)
