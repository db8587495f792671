"""What may fit where a recipe does not: smaller variants of it, and how far their networks see."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from delineate.core.grid import AXES, Grid
from delineate.errors import RecipeError
from delineate.networks.receptive_field import receptive_field
from delineate.networks.unet import UNetSpec
from delineate.recipe import Recipe, apply_changes, recipe_from
from delineate.sampling.tiles import Patches, Slices, Whole, geometry_for

LEAST_SIDE = 32
"""Tiles are not made smaller than this: a network that sees less delineates textures, not organs."""

_SMALLER = 0.75


@dataclass(frozen=True)
class Variant:
    """A recipe with ``changes`` (as ``--set`` takes them) that needs less memory, and what they are in words."""

    what: str
    changes: tuple[str, ...]
    recipe: Recipe


def smaller_variants(recipe: Recipe, volume_shape: Sequence[int], spacing_mm: Sequence[float]) -> list[Variant]:
    """Variants of a recipe that need less memory, from those that change least to those that change most.

    ``volume_shape`` and ``spacing_mm`` are those of the prepared scans. Half the batch; tiles of three quarters of
    each side; both; and for a 3D U-Net 2.5D (a slice with its neighbours) and 2D.
    """
    found: dict[str, Sequence[str]] = {}
    half = _half_the_batch(recipe)
    tiles = _smaller_tiles(recipe, volume_shape, spacing_mm)
    if half:
        found["half the batch"] = half
    if tiles:
        found["smaller tiles"] = tiles
    if half and tiles:
        found["half the batch, smaller tiles"] = [*half, *tiles]
    if recipe.network.dimensions == 3 and isinstance(recipe.network, UNetSpec):
        found["2.5D: slices with their neighbours"] = _in_slices(recipe, recipe.network, spacing_mm, 1)
        found["2D: single slices"] = _in_slices(recipe, recipe.network, spacing_mm, 0)
    return list(_valid(recipe, found))


def _valid(recipe: Recipe, found: dict[str, Sequence[str]]) -> Iterator[Variant]:
    """The variants that are valid recipes: a loss or sampler may be for 3D networks only."""
    for what, changes in found.items():
        with suppress(RecipeError):
            yield Variant(what, tuple(changes), recipe_from(apply_changes(recipe.as_dict(), changes)))


def _half_the_batch(recipe: Recipe) -> list[str]:
    batch = recipe.training.batch_size
    return [f"training.batch_size={batch // 2}"] if batch > 1 else []


def _smaller_tiles(recipe: Recipe, volume_shape: Sequence[int], spacing_mm: Sequence[float]) -> list[str]:
    """The tiles' sides shortened as the network's divisor and smallest input allow; empty if they cannot be."""
    rules = recipe.network
    tiles: Patches | Slices | Whole = recipe.tiles
    geometry = geometry_for(tiles, volume_shape, spacing_mm, rules)
    across = [axis for axis in range(3) if axis != geometry.slice_axis]
    sides = [geometry.shape[axis] for axis in across]
    shorter = [
        max(LEAST_SIDE, int(_SMALLER * side + 2 * margin) // step * step - 2 * margin, least - 2 * margin)
        if side > LEAST_SIDE
        else side
        for side, step, margin, least in zip(sides, rules.divisor, rules.margin, rules.smallest, strict=True)
    ]
    if np.prod(shorter) >= np.prod(sides):
        return []
    if isinstance(tiles, Whole):
        return [f"tiles={{kind: patches, shape: {shorter}}}"]
    return [f"tiles.shape={shorter}"]


def _in_slices(recipe: Recipe, network: UNetSpec, spacing_mm: Sequence[float], neighbours: int) -> list[str]:
    """A 3D U-Net as one for slices across the axis with the widest spacing, with a batch of as many slices."""
    thick = Grid.of_spacing((1, 1, 1), spacing_mm).slice_axis
    keep = [axis for axis in range(3) if axis != thick]
    changes = ["network.dimensions=2"]
    for name, steps in (("strides", network.strides), ("kernels", network.kernels)):
        if steps is not None:
            changes.append(f"network.{name}={[[step[axis] for axis in keep] for step in steps]}")
    shape: list[Any] = [None, None]
    if isinstance(recipe.tiles, Patches):
        shape = [recipe.tiles.shape[axis] for axis in keep]
    text = ", ".join("null" if side is None else str(side) for side in shape)
    batch = max(8, recipe.training.batch_size)
    tiles = f"tiles={{kind: slices, axis: {AXES[thick]}, shape: [{text}], neighbours: {neighbours}}}"
    return [*changes, tiles, f"training.batch_size={batch}"]


def sees_mm(recipe: Recipe, volume_shape: Sequence[int], spacing_mm: Sequence[float]) -> list[float] | None:
    """Along x, y and z, how many millimetres of a scan a voxel of the output depends on: a tile's width at most.

    None if the network's layers are unknown.
    """
    network, geometry = recipe.network, geometry_for(recipe.tiles, volume_shape, spacing_mm, recipe.network)
    try:
        with torch.device("meta"):
            widths = receptive_field(network.build(geometry.slices, 2), geometry.slices, network.divisor)
    except NotImplementedError:
        return None
    along = iter(most for _, most in widths)
    voxels = [
        side if axis == geometry.slice_axis else min(side, next(along))
        for axis, side in enumerate(geometry.input_shape)
    ]
    return [n * mm for n, mm in zip(voxels, spacing_mm, strict=True)]
