"""Whether a training fits into memory and how long it takes; and if it does not fit, which smaller variants do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from delineate.core.subject import Subject
from delineate.datasets.dataset import load_scan
from delineate.datasets.splits import Split
from delineate.errors import DelineateError, OutOfMemory
from delineate.fitting import Variant, sees_mm, smaller_variants
from delineate.io.formats import read_header
from delineate.recipe import Recipe
from delineate.studies.trials import Trial, try_recipe


@dataclass(frozen=True)
class Sized:
    """A recipe (``what`` it changes, in words and as ``--set`` takes it) with its trial, or why that failed.

    ``sees_mm``: along x, y and z, how wide a region the network sees around a voxel; None if that is unknown.
    """

    what: str
    changes: tuple[str, ...]
    trial: Trial | DelineateError
    sees_mm: list[float] | None

    def fits(self, memory_gb: float) -> bool:
        """Whether a run takes no more than ``memory_gb``: of the GPU's memory, if the trial was on one."""
        if not isinstance(self.trial, Trial):
            return False
        taken = self.trial.peak_gb if self.trial.device_gb is None else self.trial.device_gb
        return taken <= memory_gb


@dataclass(frozen=True)
class Sizes:
    """A recipe on its data, and smaller variants, tried only if it does not fit into ``memory_gb``."""

    recipe: Sized
    variants: tuple[Sized, ...]
    memory_gb: float

    @property
    def first_fitting(self) -> Sized | None:
        """What fits and changes least: the recipe itself, or a variant."""
        return next((one for one in (self.recipe, *self.variants) if one.fits(self.memory_gb)), None)


def size_training(
    recipe: Recipe,
    data: Path,
    split: Split,
    fold: int,
    memory_gb: float,
    *,
    device: str = "auto",
    threads: int | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> Sizes:
    """Try a recipe for a few steps within ``memory_gb``; if that is not enough, try smaller variants until one fits.

    ``progress`` is told what is tried next. The recipe's trial may fail for want of memory alone: raises what else
    :func:`~delineate.studies.trials.try_recipe` raises.
    """

    def tried(what: str, changes: tuple[str, ...], one: Recipe, seen: list[float] | None) -> Sized:
        progress(what or "the recipe")
        try:
            trial: Trial | DelineateError = try_recipe(
                one, data, split, fold, device=device, threads=threads, memory_gb=memory_gb
            )
        except DelineateError as error:
            if not what and not isinstance(error, OutOfMemory):
                raise
            trial = error
        return Sized(what, changes, trial, seen)

    shape, spacing_mm = _largest_prepared(recipe, data)
    whole = tried("", (), recipe, sees_mm(recipe, shape, spacing_mm))
    variants: list[Sized] = []
    waiting: Sequence[Variant] = [] if whole.fits(memory_gb) else smaller_variants(recipe, shape, spacing_mm)
    for variant in waiting:
        seen = sees_mm(variant.recipe, shape, spacing_mm)
        variants.append(tried(variant.what, variant.changes, variant.recipe, seen))
    return Sizes(whole, tuple(variants), memory_gb)


def _largest_prepared(recipe: Recipe, data: Path) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Shape and spacing (mm) of the largest scan after preparation, fitted to it alone."""

    def voxels(subject: Subject) -> int:
        return prod(read_header(next(iter(subject.scans.values()))).grid.shape)

    dataset = recipe.data.open(data)
    subject = max((s for s in dataset.subjects if s.scans), key=voxels)
    scan = load_scan(replace(subject, resample=recipe.data.resample_channels), recipe.data.channels)
    prepared, _ = recipe.pipeline.fit(lambda: [scan]).apply(scan)
    return prepared.grid.shape, prepared.grid.spacing_mm
