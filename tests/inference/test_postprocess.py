from __future__ import annotations

import numpy as np
import pytest

from delineate.core.grid import Grid
from delineate.core.targets import Targets
from delineate.errors import RecipeError
from delineate.inference.postprocess import postprocess
from delineate.recipe import PostprocessingSpec

TARGETS = Targets({"liver": (1,), "tumour": (2,)})
GRID = Grid.of_spacing((12, 12, 12), (10, 10, 1))  # 0.1 ml a voxel


@pytest.fixture
def masks():
    masks = np.zeros((2, 12, 12, 12), dtype=bool)
    masks[:, 0:4, 0:4, 0:4] = True
    masks[:, 6:8, 6:8, 6:8] = True
    masks[:, 8, 8, 8] = True  # touches the second by its corner alone
    masks[:, 11, 0, 0] = True
    return masks


def test_only_the_named_target_keeps_its_largest_component(masks) -> None:
    result = postprocess(masks, TARGETS, GRID, PostprocessingSpec(largest_component=("liver",)))
    assert result[0].sum() == 64
    np.testing.assert_array_equal(result[1], masks[1])


def test_small_components_go_by_their_volume(masks) -> None:
    result = postprocess(masks, TARGETS, GRID, PostprocessingSpec(minimum_ml={"tumour": 0.85}))
    assert result[1].sum() == 64 + 9  # 0.9 ml stays, the single voxel of 0.1 ml goes
    np.testing.assert_array_equal(result[0], masks[0])


def test_nothing_stays_nothing(masks) -> None:
    spec = PostprocessingSpec(largest_component=("liver", "tumour"), minimum_ml={"liver": 1.0})
    assert not postprocess(np.zeros_like(masks), TARGETS, GRID, spec).any()


def test_an_unknown_target_is_named(masks) -> None:
    with pytest.raises(RecipeError, match="lever"):
        postprocess(masks, TARGETS, GRID, PostprocessingSpec(largest_component=("lever",)))
