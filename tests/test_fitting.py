"""Smaller variants of a recipe are valid recipes that need less, and say how far their networks see."""

from __future__ import annotations

import numpy as np
import pytest

from delineate.compute import Precision
from delineate.core.targets import Targets
from delineate.estimation import estimate_step
from delineate.fitting import sees_mm, smaller_variants
from delineate.recipe import Recipe, load_recipe, packaged_recipes
from delineate.sampling.tiles import geometry_for

SHAPE, SPACING_MM = (160, 128, 96), (1.0, 1.0, 2.5)


def memory_gb(recipe: Recipe, precision: Precision | None = None) -> float:
    geometry = geometry_for(recipe.tiles, SHAPE, SPACING_MM, recipe.network)
    return estimate_step(recipe, 1, Targets({"organ": (1,)}), geometry, precision or "fp32").memory_gb


@pytest.mark.parametrize("name", ["demo", "generic_3d", "generic_2.5d"])
def test_every_variant_needs_less_memory(name: str) -> None:
    recipe = load_recipe(name)
    variants = smaller_variants(recipe, SHAPE, SPACING_MM)
    assert variants
    for variant in variants:
        assert memory_gb(variant.recipe, variant.precision) < memory_gb(recipe), variant.what
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
    assert smaller_variants(recipe, (160, 128, 1), (1.0, 2.5, 1.0))[-1].recipe.tiles.axis == "z"


def test_variants_read_their_tiles_as_the_recipe_does() -> None:
    recipe = load_recipe("generic_3d", ["tiles.standardise=together", "tiles.outside=zero"])
    variants = smaller_variants(recipe, SHAPE, SPACING_MM)
    assert {"smaller tiles", "minicubes with context", "2D: single slices"} <= {variant.what for variant in variants}
    for variant in variants:
        tiles = variant.recipe.tiles
        assert (tiles.standardise, tiles.outside) == ("together", "zero"), variant.what


def test_a_network_sees_at_most_its_tile_and_across_slices_only_its_neighbours() -> None:
    recipe = load_recipe("generic_3d", ["tiles.shape=[32, 32, 32]"])
    assert np.allclose(sees_mm(recipe, SHAPE, SPACING_MM), [32, 32, 80])
    sliced = smaller_variants(recipe, SHAPE, SPACING_MM)[-2].recipe
    assert sees_mm(sliced, SHAPE, SPACING_MM)[2] == 3 * 2.5


def test_what_changes_no_result_comes_first_and_what_sees_a_part_of_the_batch_says_so() -> None:
    def first(*changes: str) -> str:
        return smaller_variants(load_recipe("generic_3d", changes), SHAPE, SPACING_MM)[0].what

    assert first("training.batch_size=4") == "activations computed again"  # Dice over the batch
    assert first("training.batch_size=4", "loss={kind: cross_entropy}") == "the batch in 2 parts"
    whats = [variant.what for variant in smaller_variants(load_recipe("generic_3d"), SHAPE, SPACING_MM)]
    assert "the batch in 2 parts (the loss sees a part)" in whats
    assert "the batch in 2 parts (the loss sees a part), activations computed again" in whats
    assert {"bfloat16", "minicubes with context"} <= set(whats)


def test_what_a_recipe_does_already_is_not_proposed_again() -> None:
    changes = ["training.batch_size=2", "training.accumulate=2", "training.checkpoint_activations=true"]
    variants = smaller_variants(load_recipe("generic_3d", changes), SHAPE, SPACING_MM, precision="bf16")
    whats = [variant.what for variant in variants]
    assert not [what for what in whats if "parts" in what or "again" in what or "bfloat16" in what]
    assert "half the batch" in whats
    assert "2D: single slices" in whats
