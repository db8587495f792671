"""Whether a training fits into memory and how long it takes; and if it does not fit, which smaller variants do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

from delineate.compute import Precision, plan_compute
from delineate.core.subject import Subject
from delineate.datasets.dataset import load_scan
from delineate.datasets.splits import Split
from delineate.errors import DelineateError, OutOfMemory, RecipeError
from delineate.estimation import GPU, estimate_step, seconds_on
from delineate.fitting import Variant, sees_mm, smaller_variants
from delineate.io.formats import read_header
from delineate.recipe import Recipe
from delineate.sampling.tiles import geometry_for
from delineate.studies.trials import Trial, try_recipe
from delineate.training.preparation import as_read


@dataclass(frozen=True)
class Guess:
    """What a step takes on a GPU that is not there: an estimate from published figures, not a measurement.

    ``device_gb`` is the memory, with the libraries' own; ``seconds_a_step`` from how many to how many seconds.
    """

    device_gb: float
    seconds_a_step: tuple[float, float]


CUDA_GB = 0.5
"""What the driver and its libraries take of a GPU's memory before anything is computed."""


@dataclass(frozen=True)
class Sized:
    """A recipe (``what`` it changes, in words and as ``--set`` takes it) with its trial, or why that failed.

    ``sees_mm``: along x, y and z, how wide a region the network sees around a voxel; None if that is unknown.
    ``precision``: what it has to be trained in; None: whatever the machine does best. On a GPU that is not there, the
    trial is a guess.
    """

    what: str
    changes: tuple[str, ...]
    trial: Trial | Guess | DelineateError
    sees_mm: list[float] | None
    precision: Precision | None = None

    def fits(self, memory_gb: float) -> bool:
        """Whether a run takes no more than ``memory_gb``: of the GPU's memory, if the trial was on one."""
        if isinstance(self.trial, Guess):
            return self.trial.device_gb <= memory_gb
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
    precision: Precision = "auto",
    progress: Callable[[str], None] = lambda what: None,
) -> Sizes:
    """Try a recipe for a few steps within ``memory_gb``; if that is not enough, try smaller variants until one fits.

    ``progress`` is told what is tried next. The recipe's trial may fail for want of memory alone: raises what else
    :func:`~delineate.studies.trials.try_recipe` raises.
    """

    def tried(one: Variant) -> Trial | DelineateError:
        progress(one.what or "the recipe")
        try:
            return try_recipe(
                one.recipe,
                data,
                split,
                fold,
                device=device,
                threads=threads,
                precision=one.precision or precision,
                memory_gb=memory_gb,
            )
        except DelineateError as error:
            if not one.what and not isinstance(error, OutOfMemory):
                raise
            return error

    chosen = plan_compute(device=device, precision=precision).precision
    return _sizes(recipe, _largest_prepared(recipe, data), memory_gb, chosen, tried)


def guess_training(recipe: Recipe, data: Path, gpu: GPU, memory_gb: float) -> Sizes:
    """What a training would take on a GPU that is not there, in 16 bits, and smaller variants if it does not fit.

    Raises :class:`RecipeError` if the network's or loss's operations depend on values.
    """
    dataset = recipe.data.open(data)
    targets = recipe.data.targets.targets() if recipe.data.targets is not None else dataset.targets
    if targets is None:
        raise RecipeError(
            f"data set '{dataset.name}' does not name its targets", fix="name them with --targets liver=1"
        )
    channels = len(recipe.data.channels or dataset.channels)
    shape, spacing_mm = _largest_prepared(recipe, data)

    def guessed(one: Variant) -> Guess:
        geometry = geometry_for(one.recipe.tiles, shape, spacing_mm, one.recipe.network)
        try:
            step = estimate_step(one.recipe, channels, targets, geometry, "bf16")
        except NotImplementedError as error:
            raise RecipeError(str(error), fix="plan on the machine itself, which tries it") from error
        return Guess(step.memory_gb + CUDA_GB, seconds_on(gpu, step))

    return _sizes(recipe, (shape, spacing_mm), memory_gb, "bf16", guessed)


def _sizes(
    recipe: Recipe,
    largest: tuple[tuple[int, ...], tuple[float, ...]],
    memory_gb: float,
    precision: Precision,
    found: Callable[[Variant], Trial | Guess | DelineateError],
) -> Sizes:
    """What is ``found`` of a recipe and, if it does not fit, of its variants; ``largest`` is the largest scan."""

    def sized(one: Variant) -> Sized:
        return Sized(one.what, one.changes, found(one), sees_mm(one.recipe, *largest), one.precision)

    whole = sized(Variant("", (), recipe))
    variants = [] if whole.fits(memory_gb) else smaller_variants(recipe, *largest, precision=precision)
    return Sizes(whole, tuple(sized(variant) for variant in variants), memory_gb)


def _largest_prepared(recipe: Recipe, data: Path) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Shape and spacing (mm) of the largest scan after preparation, fitted to it alone."""

    def voxels(subject: Subject) -> int:
        return prod(read_header(next(iter(subject.scans.values()))).grid.shape)

    dataset = as_read(recipe.data.open(data), recipe.data)
    scan = load_scan(max((s for s in dataset.subjects if s.scans), key=voxels))
    prepared, _ = recipe.pipeline.fit(lambda: [scan]).apply(scan)
    return prepared.grid.shape, prepared.grid.spacing_mm
