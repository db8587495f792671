"""Volumes in millilitres and their errors."""

from __future__ import annotations

from math import isnan

import numpy as np
import pytest

from delineate.core.grid import Grid
from delineate.metrics.quantities import error_percent, volume_ml

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
