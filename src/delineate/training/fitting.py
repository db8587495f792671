"""Whether a training's steps fit into memory, before the first is taken; and a variant of the recipe that does."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from pathlib import Path

import torch

from delineate.bundle import Bundle
from delineate.compute import ComputePlan
from delineate.core.limits import available_memory_bytes
from delineate.core.memory import memory_bytes
from delineate.errors import OutOfMemory
from delineate.estimation import estimate_step
from delineate.fitting import Variant, smaller_variants
from delineate.recipe import Recipe, apply_changes, recipe_from
from delineate.sampling.tiles import geometry_for
from delineate.training.events import Fitted, Warned, read_events
from delineate.training.options import Reporter, RunOptions

_CERTAINLY = 0.7
"""What is estimated is refused only if this share of it does not fit either."""


@dataclass(frozen=True)
class _Memory:
    """What a training may take, and what it takes already; in GB."""

    limit: float
    taken: float
    processes: int

    @classmethod
    def of(cls, plan: ComputePlan, options: RunOptions) -> _Memory:
        if plan.device.type == "cuda":
            whole = torch.cuda.get_device_properties(plan.device).total_memory / 1e9
            return cls(options.memory_gb or whole, 0.0, 1)
        taken = memory_bytes() / 1e9
        free = available_memory_bytes() / 1e9
        return cls(taken + free if options.memory_gb is None else options.memory_gb, taken, options.devices)

    def needed(self, recipe: Recipe, bundle: Bundle, plan: ComputePlan, shape: tuple[int, ...]) -> float:
        """What the training of a recipe is estimated to take."""
        geometry = geometry_for(recipe.tiles, shape, bundle.spacing_mm, recipe.network)
        step = estimate_step(recipe, len(bundle.channels), bundle.targets, geometry, plan.precision)
        if plan.device.type == "cuda":
            return step.memory_gb
        return self.processes * (self.taken + step.taken_gb(compiled=plan.compile))


def fitted_before(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe as an earlier start of the run in ``folder`` has changed it to fit; as it is if none has."""
    found = [event for event in read_events(folder / "logs") if isinstance(event, Fitted)]
    return recipe_from(apply_changes(recipe.as_dict(), found[-1].changes)) if found else recipe


def fitted(bundle: Bundle, plan: ComputePlan, shape: tuple[int, ...], options: RunOptions, report: Reporter) -> Recipe:
    """The bundle's recipe, or the variant that changes least of those that fit, if the options ask for one that does.

    ``shape`` is that of the largest prepared scan. Raises :class:`OutOfMemory` if the steps certainly do not fit.
    """
    recipe, memory = bundle.recipe, _Memory.of(plan, options)
    if memory.limit == inf:
        return recipe
    try:
        needed = memory.needed(recipe, bundle, plan, shape)
    except NotImplementedError:
        return recipe  # nothing is known beforehand
    if needed <= memory.limit:
        return recipe
    found = _first_fitting(bundle, plan, shape, memory)
    about = f"training takes about {needed:.1f} GB of memory, and {memory.limit:.1f} GB are there"
    if options.fit and found is not None:
        report.event(Fitted(what=found.what, changes=found.changes, needed_gb=needed, memory_gb=memory.limit))
        return found.recipe
    if _CERTAINLY * needed > memory.limit:
        raise OutOfMemory(about, fix=_advice(found))
    report.event(Warned(message=f"{about}, by an estimate; {_advice(found)}"))
    return recipe


def _first_fitting(bundle: Bundle, plan: ComputePlan, shape: tuple[int, ...], memory: _Memory) -> Variant | None:
    for variant in smaller_variants(bundle.recipe, shape, bundle.spacing_mm, precision=plan.precision):
        if variant.precision is None and memory.needed(variant.recipe, bundle, plan, shape) <= memory.limit:
            return variant
    return None


def _advice(found: Variant | None) -> str:
    if found is None:
        return "no smaller variant of this recipe fits: use a machine with more memory, or a smaller network"
    settings = " ".join(f"--set '{change}'" for change in found.changes)
    return f"add --fit, or {settings}, for {found.what}; `delineate plan` measures what fits"
