"""Every sampler keeps the laws of ``delineate.testing``."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest

from delineate.sampling.samplers import (
    AllTiles,
    ChosenSlices,
    ClassBalancedTiles,
    ClassCentredTiles,
    RandomTiles,
    SamplerSpecification,
)
from delineate.sampling.tiles import Tile
from delineate.testing import check_sampler
from delineate.testing.samplers import CUBES, SLICES


@pytest.mark.parametrize(
    ("spec", "geometry"),
    [
        (AllTiles(), CUBES),
        (AllTiles(overlap=0.5), CUBES),
        (AllTiles(by_subject=True), CUBES),
        (RandomTiles(), CUBES),
        (ClassBalancedTiles(), CUBES),
        (ClassBalancedTiles(foreground_fraction=1.0), CUBES),
        (ClassCentredTiles(), CUBES),
        (ClassCentredTiles(), SLICES),
        (ChosenSlices(with_target=2, adjacent=1), SLICES),
    ],
    ids=repr,
)
def test_it_keeps_the_laws(spec, geometry) -> None:
    check_sampler(spec, geometry=geometry)


class Forgetful(SamplerSpecification):
    """Draws from numbers of its own, or outside of volumes."""

    kind: Literal["forgetful"] = "forgetful"
    outside: bool = False

    def draw(self, subject, geometry, rng):
        return Tile((-1 if self.outside else int(np.random.default_rng().integers(6)), 0, 0), geometry.shape)


@pytest.mark.parametrize(
    ("outside", "law"), [(False, "a_draw_depends_on_seed"), (True, "tiles_lie_within_volumes_that_hold_them")]
)
def test_a_sampler_that_breaks_a_promise_is_told_which(outside, law) -> None:
    with pytest.raises(AssertionError, match=law):
        check_sampler(Forgetful(outside=outside))
