"""Smaller variants of a recipe are valid recipes that need less, and say how far their networks see."""

from __future__ import annotations

import numpy as np
import pytest

from delineate.fitting import sees_mm, smaller_variants
from delineate.networks.cost import step_cost
from delineate.recipe import Recipe, load_recipe, packaged_recipes
from delineate.sampling.tiles import geometry_for

SHAPE, SPACING_MM = (160, 128, 96), (1.0, 1.0, 2.5)


def memory_gb(recipe: Recipe) -> float:
    geometry = geometry_for(recipe.tiles, SHAPE, SPACING_MM, recipe.network)
    sides = [side for axis, side in enumerate(geometry.input_shape) if axis != geometry.slice_axis]
    return step_cost(recipe.network, geometry.slices, 2, sides, recipe.training.batch_size).memory_gb


@pytest.mark.parametrize("name", ["demo", "generic_3d", "generic_2.5d", "hippocampus", "prostate"])
def test_every_variant_needs_less_memory(name: str) -> None:
    recipe = load_recipe(name)
    variants = smaller_variants(recipe, SHAPE, SPACING_MM)
    assert variants
    for variant in variants:
        assert memory_gb(variant.recipe) < memory_gb(recipe), variant.what
        assert load_recipe(name, variant.changes) == variant.recipe


@pytest.mark.parametrize("name", sorted(packaged_recipes()))
def test_the_variants_of_every_packaged_recipe_are_valid_and_their_tiles_are_accepted(name: str) -> None:
    for variant in smaller_variants(load_recipe(name), SHAPE, SPACING_MM):
        tiles, network = variant.recipe.tiles, variant.recipe.network
        geometry_for(tiles, SHAPE, SPACING_MM, network)
        seen = sees_mm(variant.recipe, SHAPE, SPACING_MM)
        assert seen is None or min(seen) > 0


def test_a_3d_unet_becomes_slices_across_the_thickest_axis() -> None:
    recipe = load_recipe("generic_3d")
    *_, two_and_a_half, two = smaller_variants(recipe, SHAPE, SPACING_MM)
    assert (two_and_a_half.recipe.tiles.axis, two_and_a_half.recipe.tiles.neighbours) == ("z", 1)
    assert two.recipe.tiles.neighbours == 0
    assert two.recipe.network.widths == recipe.network.widths


def test_a_network_sees_at_most_its_tile_and_across_slices_only_its_neighbours() -> None:
    recipe = load_recipe("generic_3d", ["tiles.shape=[32, 32, 32]"])
    assert np.allclose(sees_mm(recipe, SHAPE, SPACING_MM), [32, 32, 80])
    sliced = smaller_variants(recipe, SHAPE, SPACING_MM)[-2].recipe
    assert sees_mm(sliced, SHAPE, SPACING_MM)[2] == 3 * 2.5
