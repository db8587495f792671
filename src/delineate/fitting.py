"""What may fit where a recipe does not: smaller variants of it, and how far their networks see."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from delineate.compute import Precision
from delineate.core.grid import AXES, Grid
from delineate.errors import RecipeError
from delineate.networks.base import Unfilled
from delineate.networks.minicube import ContextUNetSpec
from delineate.networks.receptive_field import receptive_field
from delineate.networks.transfer import NORMS
from delineate.networks.unet import UNetSpec
from delineate.recipe import Recipe, apply_changes, recipe_from
from delineate.sampling.tiles import Patches, Slices, Whole, geometry_for

LEAST_SIDE = 32
"""Tiles are not made smaller than this: a network that sees less delineates textures, not organs."""

MINICUBE_SIDE = 32
"""Voxels along each side that a minicube segments; it reads its context, too."""

_SMALLER = 0.75


@dataclass(frozen=True)
class Variant:
    """A recipe with ``changes`` (as ``--set`` takes them) that needs less memory, and what they are in words.

    ``precision``: what it has to be trained in; None: whatever the run asks for.
    """

    what: str
    changes: tuple[str, ...]
    recipe: Recipe
    precision: Precision | None = None


def smaller_variants(
    recipe: Recipe, volume_shape: Sequence[int], spacing_mm: Sequence[float], *, precision: Precision = "fp32"
) -> list[Variant]:
    """Variants of a recipe that need less memory, from those that change least to those that change most.

    ``volume_shape`` and ``spacing_mm`` are those of the prepared scans, ``precision`` is what the recipe is trained in.

    The batch in parts and activations computed again, which change nothing but time (first whichever changes no
    result), and both; bfloat16; half the batch; tiles of three quarters of each side; both; and for a 3D U-Net
    minicubes with context, 2.5D (a slice with its neighbours) and 2D.
    """
    found: dict[str, Sequence[str]] = {}
    in_parts, again = _in_parts(recipe), _computed_again(recipe)
    found |= {**again, **in_parts} if judged_in_parts(recipe) else {**in_parts, **again}
    if in_parts and again:
        most = list(in_parts)[-1]
        [computed] = again
        found[f"{most}, {computed}"] = [*in_parts[most], *again[computed]]
    variants = list(_valid(recipe, found))
    if precision == "fp32":
        variants.append(Variant("bfloat16", (), recipe, "bf16"))
    half = _half_the_batch(recipe)
    tiles = _smaller_tiles(recipe, volume_shape, spacing_mm)
    found = {}
    if half:
        found["half the batch"] = half
    if tiles:
        found["smaller tiles"] = tiles
    if half and tiles:
        found["half the batch, smaller tiles"] = [*half, *tiles]
    if recipe.network.dimensions == 3 and isinstance(recipe.network, UNetSpec):
        across = Grid.of_spacing(volume_shape, spacing_mm).slice_axis
        cubes = _in_minicubes(recipe, recipe.network, volume_shape, spacing_mm)
        if cubes:
            found["minicubes with context"] = cubes
        found["2.5D: slices with their neighbours"] = _in_slices(recipe, recipe.network, across, 1)
        found["2D: single slices"] = _in_slices(recipe, recipe.network, across, 0)
    return [*variants, *_valid(recipe, found)]


def more_parts(recipe: Recipe, parts: int) -> int | None:
    """The next larger number of parts that a batch can be divided into, beyond ``parts``; None if there is none."""
    batch = recipe.training.batch_size
    most = batch // recipe.network.least_batch
    return next((n for n in range(parts + 1, most + 1) if batch % n == 0 and n >= min(2 * parts, most)), None)


def judged_in_parts(recipe: Recipe) -> tuple[str, ...]:
    """What sees a part at a time if gradients are accumulated over parts of a batch, and so gives other results."""
    with torch.device("meta"), Unfilled():
        network = recipe.network.build(1, 2)
    by_batch = [] if recipe.loss.mean_over_samples else ["the loss"]
    if any(isinstance(module, NORMS) for module in network.modules()):
        by_batch.append("BatchNorms")
    return tuple(by_batch)


def _valid(recipe: Recipe, found: dict[str, Sequence[str]]) -> Iterator[Variant]:
    """The variants that are valid recipes: a loss or sampler may be for 3D networks only."""
    for what, changes in found.items():
        with suppress(RecipeError):
            yield Variant(what, tuple(changes), recipe_from(apply_changes(recipe.as_dict(), changes)))


def _in_parts(recipe: Recipe) -> dict[str, Sequence[str]]:
    """The batch in the next larger number of parts, and in the largest."""
    differing = judged_in_parts(recipe)
    said = f" ({' and '.join(differing)} see{'s' if differing == ('the loss',) else ''} a part)" if differing else ""
    numbers: list[int] = []
    parts = more_parts(recipe, recipe.training.accumulate)
    while parts is not None:
        numbers.append(parts)
        parts = more_parts(recipe, parts)
    few_and_many = dict.fromkeys([*numbers[:1], *numbers[-1:]])
    return {f"the batch in {n} parts{said}": [f"training.accumulate={n}"] for n in few_and_many}


def _computed_again(recipe: Recipe) -> dict[str, Sequence[str]]:
    if recipe.training.checkpoint_activations or not recipe.network.recomputes:
        return {}
    return {"activations computed again": ["training.checkpoint_activations=true"]}


def _half_the_batch(recipe: Recipe) -> list[str]:
    batch, parts = recipe.training.batch_size, recipe.training.accumulate
    if batch == 1:
        return []
    fewer = [f"training.accumulate={batch // 2}"] if (batch // 2) % parts else []
    return [*fewer, f"training.batch_size={batch // 2}"]


def _in_minicubes(
    recipe: Recipe, network: UNetSpec, volume_shape: Sequence[int], spacing_mm: Sequence[float]
) -> list[str]:
    """The 3D network of valid convolutions on small cubes; empty if these, with their context, are not smaller."""
    cubes = ContextUNetSpec(first_filters=network.widths[0])
    side = MINICUBE_SIDE + 2 * cubes.margin[0]
    tile = geometry_for(recipe.tiles, volume_shape, spacing_mm, network).input_shape
    if side**3 >= np.prod(tile):
        return []
    keeping = ["training.checkpoint_activations=false"] if recipe.training.checkpoint_activations else []
    return [
        f"network={{kind: context_unet, first_filters: {cubes.first_filters}}}",
        f"tiles={{kind: patches, shape: {[MINICUBE_SIDE] * 3}{_read_alike(recipe.tiles)}}}",
        *keeping,
    ]


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


def _in_slices(recipe: Recipe, network: UNetSpec, across: int, neighbours: int) -> list[str]:
    """A 3D U-Net as one for slices ``across`` an axis, with a batch of as many slices."""
    keep = [axis for axis in range(3) if axis != across]
    changes = ["network.dimensions=2"]
    for name, steps in (("strides", network.strides), ("kernels", network.kernels)):
        if steps is not None:
            changes.append(f"network.{name}={[[step[axis] for axis in keep] for step in steps]}")
    shape: list[Any] = [None, None]
    if isinstance(recipe.tiles, Patches):
        shape = [recipe.tiles.shape[axis] for axis in keep]
    text = ", ".join("null" if side is None else str(side) for side in shape)
    batch = max(8, recipe.training.batch_size)
    if recipe.training.accumulate > 1:
        changes.append("training.accumulate=1")
    tiles = f"kind: slices, axis: {AXES[across]}, shape: [{text}], neighbours: {neighbours}{_read_alike(recipe.tiles)}"
    return [*changes, f"tiles={{{tiles}}}", f"training.batch_size={batch}"]


def _read_alike(tiles: Patches | Slices | Whole) -> str:
    """How tiles are read, if not in the usual way, to be added to the settings of others."""
    how = tiles.model_dump(include={"standardise", "outside"}, exclude_defaults=True)
    return "".join(f", {name}: {json.dumps(value)}" for name, value in how.items())


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
