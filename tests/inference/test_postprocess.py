from __future__ import annotations

import numpy as np
import pytest

from delineate.core.grid import Grid
from delineate.core.targets import Targets
from delineate.errors import RecipeError
from delineate.inference.postprocess import postprocess
from delineate.recipe import PostprocessingSpec

TARGETS = Targets({"liver": (1, 2), "tumour": (2,)}, "overlapping")
EXCLUSIVE = Targets({"liver": (1,), "tumour": (2,)})
GRID = Grid.of_spacing((12, 12, 12), (10, 10, 1))  # 0.1 ml a voxel


@pytest.fixture
def masks():
    masks = np.zeros((2, 12, 12, 12), np.uint8)
    masks[:, 0:4, 0:4, 0:4] = 1
    masks[:, 6:8, 6:8, 6:8] = 1
    masks[:, 8, 8, 8] = 1  # touches the second by its corner alone
    masks[:, 11, 0, 0] = 1
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


@pytest.mark.parametrize(("share", "dropped"), [(0.0, 0), (0.1, 1), (0.2, 2), (0.49, 5)])
def test_end_slices_are_dropped_rounded_down(masks, share, dropped) -> None:
    """12 slices of the thickest axis, which is x here; the largest component is that of what is left."""
    grid = Grid.of_spacing((12, 12, 12), (4, 1, 1))
    result = postprocess(np.ones_like(masks), TARGETS, grid, PostprocessingSpec(drop_end_slices=share))
    assert result.any(axis=(0, 2, 3)).tolist() == [dropped <= x < 12 - dropped for x in range(12)]
    assert result.all(axis=(0, 2, 3)).tolist() == [dropped <= x < 12 - dropped for x in range(12)]


def test_components_are_chosen_among_what_the_dropped_slices_leave(masks) -> None:
    spec = PostprocessingSpec(drop_end_slices=0.34, largest_component=("liver",))  # the large cube ends at 4
    result = postprocess(masks, TARGETS, Grid.of_spacing((12, 12, 12), (4, 1, 1)), spec)
    assert result[0].sum() == 8
    assert result[0, 6:8, 6:8, 6:8].all()


def test_a_target_is_cut_to_what_is_left_of_another(masks) -> None:
    """The smaller cubes of the liver go, and with them the tumour there; then the tumour's specks go by volume."""
    masks[1, 2:] = 0  # of the large cube, the tumour has half
    masks[1, 6:8, 6:8, 6:8] = masks[1, 11, 11, 11] = 1
    spec = PostprocessingSpec(within={"tumour": "liver"}, largest_component=("liver",))
    result = postprocess(masks, TARGETS, GRID, spec)
    np.testing.assert_array_equal(result[1], masks[1] & result[0])
    assert (result[0].sum(), result[1].sum()) == (64, 32)
    small = PostprocessingSpec(within={"tumour": "liver"}, largest_component=("liver",), minimum_ml={"tumour": 3.3})
    assert not postprocess(masks, TARGETS, GRID, small)[1].any()


def test_only_overlapping_targets_are_cut_and_not_in_a_chain(masks) -> None:
    with pytest.raises(RecipeError, match="exclude each other"):
        postprocess(masks, EXCLUSIVE, GRID, PostprocessingSpec(within={"tumour": "liver"}))
    with pytest.raises(ValueError, match="'liver' cannot be cut itself"):
        PostprocessingSpec(within={"tumour": "liver", "liver": "tumour"})


@pytest.mark.parametrize(
    "spec",
    [
        PostprocessingSpec(largest_component=("liver", "tumour")),
        PostprocessingSpec(minimum_ml={"liver": 0.5, "tumour": 0.3}, drop_end_slices=0.1),
    ],
)
def test_targets_that_exclude_each_other_are_cleaned_up_one_by_one(rng, spec: PostprocessingSpec) -> None:
    """As if each had a mask of its own; what one loses is background, and not the other's."""
    label = rng.choice([0, 1, 2], (12, 12, 12), p=[0.8, 0.1, 0.1])
    found = postprocess(EXCLUSIVE.encode(label), EXCLUSIVE, GRID, spec)
    alone = postprocess(np.stack([label == 1, label == 2]).astype(np.uint8), TARGETS, GRID, spec)
    assert 0 < alone.sum() < (label > 0).sum()
    np.testing.assert_array_equal(found[0], alone[0] + 2 * alone[1])
