"""What a training costs, from trial steps."""

from __future__ import annotations

from delineate.networks.cost import step_cost
from delineate.recipe import Recipe


def steps_for_gflop(recipe: Recipe, channels: int, gflop: float) -> int:
    """Training steps that this much compute allows, forwards and backwards; at least one."""
    tiles = recipe.tiles
    raise NotImplementedError(tiles, step_cost, channels, gflop)
