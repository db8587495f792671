"""Everything before the first step: inspection, split, preprocessing, the bundle without weights."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from delineate.bundle import Bundle, Provenance, hidden, versions
from delineate.compute import ComputePlan, convolution_gflops, plan_compute
from delineate.core.grid import AXES, Grid
from delineate.core.limits import available_memory_bytes
from delineate.core.subject import Subject
from delineate.core.targets import Targets
from delineate.datasets.dataset import Dataset, load_scan, read_numbered
from delineate.datasets.inspection import Inspection, inspect
from delineate.datasets.splits import (
    Split,
    drawn_over_sites,
    in_order,
    load_or_make_split,
    load_split,
    make_split,
    save_split,
)
from delineate.derivation import AutoSpec, derive_recipe, summarise
from delineate.errors import BadSplit, BrokenSubjects, DelineateError, RecipeError
from delineate.fingerprint import fingerprint_of
from delineate.io.files import home_folder, writing_beside
from delineate.io.pseudonyms import key_id
from delineate.preprocessing.cache import PreparedDataset, budget_in_memory, prepare
from delineate.preprocessing.spatial import Reorient
from delineate.preprocessing.step import Step
from delineate.recipe import DataSpec, Recipe, TrainingSpec, apply_changes, load_recipe, recipe_from, to_yaml
from delineate.sampling.samplers import ROUNDS, ChosenSlices
from delineate.sampling.tiles import Slices, geometry_for, with_slice_axis
from delineate.training.events import Warned
from delineate.training.options import Reporter, RunOptions
from delineate.training.subjects import RunSubjects


def budget_changes(minutes: float | None, steps: int | None, epochs: int | None = None) -> list[str]:
    """Changes that replace the recipe's budget; none if none is given."""
    wanted = {"minutes": minutes, "steps": steps, "epochs": epochs}
    if not any(wanted.values()):
        return []
    return [f"training.{unit}={number or 'null'}" for unit, number in wanted.items()]


@dataclass(frozen=True)
class Derived:
    """A recipe derived from data, the reason for each choice by dotted path, and what inspection found."""

    recipe: Recipe
    reasons: Mapping[str, str]
    inspection: Inspection


def derived_recipe(
    dataset: Dataset,
    options: RunOptions,
    report: Reporter,
    changes: Sequence[str] = (),
    inspection: Inspection | None = None,
) -> Derived:
    """The recipe derived from ``dataset`` and this machine, for the budget that ``changes`` name.

    Those to ``auto`` change what is derived, all others what comes of it; scans are read as those to ``data`` say. The
    data set is inspected if no ``inspection`` is given. Subjects that the split of ``options`` holds out decide
    nothing. Raises :class:`BrokenSubjects`, :class:`MissingFile` and :class:`BadSplit` as training does.
    """
    auto, changes = AutoSpec.of_changes(changes)
    budget = TrainingSpec.of_changes(changes)
    dataset, targets = as_read(dataset, DataSpec.of_changes(changes)), dataset.targets
    if targets is None:
        raise RecipeError(
            f"data set '{dataset.name}' does not name its targets",
            fix="name them, for example --targets liver=1, or in a study set: ['data.targets={values: {liver: 1}}']",
        )
    inspection = inspection or _inspection(dataset, targets, report)
    sound = [row for row in inspection.rows if row.subject not in inspection.broken]
    if inspection.broken and not options.leave_out_broken:
        raise BrokenSubjects(broken_message(inspection))
    _check_enough(len(sound), least=2)
    seen = _seen(budget, dataset, inspection, options)
    plan = plan_compute(device=options.device, precision=options.precision, threads=options.threads)
    memory = available_memory_bytes()
    if plan.device.type == "cuda":
        memory = torch.cuda.get_device_properties(plan.device).total_memory
    if options.memory_gb is not None and options.memory_gb < math.inf:
        memory = min(memory, int(1e9 * options.memory_gb))
    summary = summarise([row for row in sound if row.subject in seen], targets, dataset.modality)
    found, reasons = derive_recipe(
        summary,
        targets,
        device=plan.device.type,
        memory_bytes=memory,
        minutes=budget.minutes,
        steps=budget.steps,
        epochs=budget.epochs,
        gflops=None if budget.minutes is None else convolution_gflops(plan),
        auto=auto,
    )
    before = found.as_dict()
    recipe = recipe_from(apply_changes(before, changes))
    after = recipe.as_dict()
    # A value that was given has not been derived, for whatever reason.
    reasons = {
        path: why for path, why in reasons.items() if _value_at(after, _of(path)) == _value_at(before, _of(path))
    }
    for path, reason in reasons.items():
        report(f"auto: {path} = {_value_at(after, path)} ({reason})")
    return Derived(recipe, reasons, inspection)


def _seen(spec: TrainingSpec, dataset: Dataset, inspection: Inspection, options: RunOptions) -> set[str]:
    """The subjects that training may learn from: neither those of the held-out fold nor locked ones."""
    usable = replace(dataset, subjects=tuple(s for s in dataset.subjects if s.id not in inspection.broken))
    if options.split_file is not None and options.split_file.exists():
        split = load_split(options.split_file)
    else:
        split = new_split(spec, dataset, usable)
    seen = {subject.id for subject in usable.subjects}.intersection(split.training_of(options.fold))
    if not seen:
        raise BadSplit(
            "no subject is left to train on: the split holds all of them out",
            fix="use another --fold or --split, or more subjects",
        )
    return seen


def auto_recipe(
    dataset: Dataset, folder: Path, options: RunOptions, report: Reporter, changes: Sequence[str] = ()
) -> tuple[Recipe, Inspection | None]:
    """:func:`derived_recipe`, written to ``folder`` with its reasons.

    A run that was started there keeps its recipe. Also returns the inspection, if one was needed.
    """
    path = folder / "recipe.yaml"
    if path.exists():
        _, own = AutoSpec.of_changes(changes)
        return load_recipe(path, own), None
    derived = derived_recipe(dataset, replace(options, split_file=split_file(folder, options)), report, changes)
    with writing_beside(path) as temporary:
        temporary.write_text(to_yaml(derived.recipe.as_dict(), derived.reasons), encoding="utf-8")
    return derived.recipe, derived.inspection


def _of(path: str) -> str:
    """What the reason at a dotted path is of: beside the kind of a step of preprocessing, the whole step."""
    return path.removesuffix(".kind") if path.startswith("preprocessing.") else path


def _value_at(values: Any, path: str) -> Any:
    """The value at a dotted path; None if there is none."""
    for key in path.split("."):
        try:
            values = values[int(key)] if isinstance(values, list) else values[key]
        except (LookupError, TypeError):
            return None
    return values


def reached(recipe: Recipe, dataset: Dataset, split_file: Path | None = None) -> Dataset:
    """``dataset`` without the subjects that the sampler never reaches, because ``at_most`` slices come from others.

    Labels are read one by one until there are enough slices; an existing split decides instead. A label that cannot
    be read is ignored here: inspection will report what is wrong with it.
    """
    sampler, tiles = recipe.sampler, recipe.tiles
    targets = recipe.data.targets.targets() if recipe.data.targets else dataset.targets
    if not isinstance(sampler, ChosenSlices) or sampler.at_most is None:
        return dataset
    if not isinstance(tiles, Slices) or targets is None:
        return dataset  # refused later, with the reason
    if split_file is not None and split_file.exists():
        named = load_split(split_file).subjects
        return replace(dataset, subjects=tuple(s for s in in_order(dataset.subjects) if s.id in named))
    values = [value for numbers in targets.values.values() for value in numbers]
    kept: list[Subject] = []
    slices = 0
    for subject in in_order(dataset.subjects):
        kept.append(subject)
        with suppress(DelineateError):
            if subject.label is not None:
                label = read_numbered(subject.label, targets, subject.id)
                axis = _slice_axis(tiles, recipe.preprocessing, label.grid)
                holding = np.isin(label.voxels, values).any(axis=tuple(a for a in range(3) if a != axis))
                slices += sampler.count(int(holding.sum()), label.voxels.shape[axis])
        if slices >= sampler.at_most:
            break
    return replace(dataset, subjects=tuple(kept))


def _slice_axis(tiles: Slices, preprocessing: Sequence[Step], grid: Grid) -> int:
    """The axis of a stored grid that runs across the slices after preparation."""
    if tiles.axis == "thickest":
        return grid.slice_axis
    axis = AXES.index(tiles.axis)
    turned = [step for step in preprocessing if isinstance(step, Reorient)]
    return grid.axes_to(turned[-1].to)[0][axis] if turned else axis


def inspected(
    recipe: Recipe, dataset: Dataset, inspection: Inspection | None, options: RunOptions, report: Reporter
) -> tuple[Dataset, Targets, Inspection]:
    dataset = as_read(dataset, recipe.data)
    targets = recipe.data.targets.targets() if recipe.data.targets is not None else dataset.targets
    if targets is None:
        raise RecipeError(
            f"neither data set '{dataset.name}' nor the recipe names the targets",
            fix="name them, for example --set 'data.targets.values={liver: 1}'",
        )
    _warn_of_other_values(targets, dataset, report)
    if recipe.quantity is not None and recipe.quantity.channel not in dataset.channels:
        raise RecipeError(
            f"quantity '{recipe.quantity.channel}' is no channel of the scans; they have {', '.join(dataset.channels)}",
            fix="name one of them in quantity.channel and, where it is given, in data.channels",
        )
    inspection = inspection or _inspection(dataset, targets, report)
    if inspection.broken:
        if not options.leave_out_broken:
            raise BrokenSubjects(broken_message(inspection))
        report(f"left out because of broken files: {', '.join(inspection.broken)}")
        kept = tuple(s for s in dataset.subjects if s.id not in inspection.broken)
        dataset = replace(dataset, subjects=kept)
    _check_enough(len(dataset.subjects), least=1 if options.fold is None else 2)
    return dataset, targets, inspection


def _inspection(dataset: Dataset, targets: Targets, report: Reporter) -> Inspection:
    return inspect(dataset, targets=targets, progress=lambda done, n: report.progress("inspecting", done, n))


def _warn_of_other_values(targets: Targets, dataset: Dataset, report: Reporter) -> None:
    """Warn of targets that share a name with the data set's but not its label values, which in BraTS vary by year."""
    for name, values in (dataset.targets.values if dataset.targets and not dataset.by_name else {}).items():
        if name in targets.values and not set(values) & set(targets.values[name]):
            here, there = (", ".join(map(str, numbers)) for numbers in (targets.values[name], values))
            report.event(
                Warned(
                    message=f"'{name}' is label value {here} in the recipe, but {there} in the data set; "
                    "--set data.targets=null takes the data set's"
                )
            )


def _check_enough(usable: int, least: int) -> None:
    if usable < least:
        raise BrokenSubjects(
            f"{usable} usable {'subject is' if usable == 1 else 'subjects are'} left",
            fix=f"training needs at least {'one' if least == 1 else 'two'}",
        )


def broken_message(inspection: Inspection) -> str:
    """All errors of an inspection, one per line."""
    lines = [f"  {p.subject}: {p.code}: {p.message}; {p.fix}" for p in inspection.errors]
    return (
        f"{len(inspection.broken)} subjects cannot be used for training:\n" + "\n".join(lines) + "\n"
        "Fix them; or train on the others, with --leave-out-broken (`train`, `adapt`), or on the copy without them "
        "that `delineate data inspect … --repair NEW` writes"
    )


def expected_seconds(recipe: Recipe, subjects: int) -> float:
    """Rough duration of the run, to decide whether compiling pays off; for epochs, a lower bound."""
    training = recipe.training
    by_time = float("inf") if training.minutes is None else training.minutes * 60
    # A step of the packaged recipes takes about a second on two cores.
    by_steps = float("inf") if training.steps is None else float(training.steps)
    # The number of tiles in a pass is unknown before preparation; each subject gives at least one.
    an_epoch = max(1.0, subjects / training.batch_size)
    by_epochs = float("inf") if training.epochs is None else training.epochs * an_epoch
    shortest = min(by_time, by_steps, by_epochs)
    if shortest == float("inf"):
        raise RecipeError("the recipe has no budget", fix="give --minutes, --steps or --epochs, or training.minutes …")
    return shortest


def threads_of(plan: ComputePlan, options: RunOptions) -> int:
    """Threads per training process."""
    return max(1, plan.threads // (options.devices if plan.device.type == "cpu" else 1))


def conditions(plan: ComputePlan, options: RunOptions) -> dict[str, str | int]:
    """What determines the weights to the last bit, besides the recipe, the data and the versions.

    The number of threads and the instruction set change the order of summation.
    """
    return {
        "device": torch.cuda.get_device_name(plan.device) if plan.device.type == "cuda" else plan.device.type,
        "devices": options.devices,
        "threads": threads_of(plan, options),
        "precision": plan.precision,
        "compile": "on" if plan.compile else "off",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


@dataclass(frozen=True)
class Prepared:
    """Prepared subjects by role.

    ``at_a_time``: how many training subjects to go round before the next, where the disk may not hold all.
    """

    training: PreparedDataset
    validation: PreparedDataset
    at_a_time: int | None


def prepared_bundle(
    recipe: Recipe,
    dataset: Dataset,
    targets: Targets,
    inspection: Inspection,
    roles: Roles,
    options: RunOptions,
    plan: ComputePlan,
    report: Reporter,
) -> tuple[Bundle, Prepared]:
    """Fit the preprocessing to the training subjects, prepare them, and describe the future bundle."""
    pipeline = recipe.pipeline.fit(lambda: (load_scan(subject) for subject in roles.training))
    cache = cache_folder(options)
    validated = roles.held_out if recipe.training.validation.held_out else roles.validation
    both = prepare(
        [*roles.training, *validated],
        pipeline,
        targets,
        cache,
        threads=plan.threads,
        most_bytes=None if options.cache_gb is None else int(1e9 * options.cache_gb),
        progress=lambda done, total: report.progress("preparing", done, total),
    )
    # Each process keeps what it trains on.
    share = None if options.devices == 1 else budget_in_memory() // options.devices
    training = both[: len(roles.training)].in_memory(share)
    validation = both[len(roles.training) :].in_memory(share)
    drawn_from = training.repeated(roles.repeats)
    at_a_time = drawn_from.at_a_time(beside=validation)
    if at_a_time is not None:
        report(
            f"prepared subjects take {both.nbytes / 1e9:.3g} GB, more than the {options.cache_gb:g} GB that they may: "
            f"training goes round {at_a_time} of {len(drawn_from)} at a time, {ROUNDS} tiles of each"
        )
    spacing = np.median([grid.spacing_mm for grid in training.grids], axis=0)
    spacing_mm = (float(spacing[0]), float(spacing[1]), float(spacing[2]))
    largest = np.max([grid.shape for grid in training.grids], axis=0)
    # If scans were not reoriented, the first one decides which of several axes of equal spacing is which.
    typical = training.grids[0].affine.copy()
    typical[:3, :3] *= spacing / training.grids[0].spacing_mm
    tiles = with_slice_axis(recipe.tiles, Grid(largest, typical))
    geometry = geometry_for(tiles, largest, spacing_mm, recipe.network)
    rows = {row.subject: row for row in inspection.rows}
    bundle = Bundle(
        recipe=recipe,
        pipeline=pipeline,
        targets=targets,
        channels=roles.training[0].channels,
        geometry=geometry,
        spacing_mm=spacing_mm,
        fingerprint=fingerprint_of([rows[s.id] for s in roles.training]),
        provenance=Provenance(
            layout=dataset.layout,
            simulated=dataset.simulated,
            fold=options.fold,
            seed=recipe.training.seed,
            started=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            key=key_id(),
            training=hidden([s.id for s in roles.training]),
            validation=hidden([s.id for s in roles.validation]),
            held_out=hidden([s.id for s in roles.held_out]),
            left_out=hidden(sorted(inspection.broken)),
            versions=versions(),
            requires=recipe.requires,
            computed=conditions(plan, options) | {"subjects at a time": at_a_time or "all"},
        ),
    )
    return bundle, Prepared(drawn_from, validation, at_a_time)


def subjects_of(dataset: Dataset, inspection: Inspection, roles: Roles, options: RunOptions) -> RunSubjects:
    """The role of each subject, by name, for the run folder."""
    return RunSubjects(
        data_set=dataset.name,
        fold=options.fold,
        training=tuple(s.id for s in roles.training),
        validation=tuple(s.id for s in roles.validation),
        held_out=tuple(s.id for s in roles.held_out),
        left_out=tuple(sorted(inspection.broken)),
        file_hashes={row.subject: dict(row.hashes) for row in sorted(inspection.rows, key=lambda row: row.subject)},
    )


def as_read(dataset: Dataset, spec: DataSpec) -> Dataset:
    """``dataset`` with the channels that ``spec`` names, to be brought to the first one's grid if it says so.

    Raises :class:`MissingFile` for a subject that lacks one of them, and what :func:`without_descriptions` raises.
    """
    dataset, channels = without_descriptions(dataset), spec.channels
    if channels is not None:
        dataset = replace(dataset, subjects=tuple(s.with_channels(channels) for s in dataset.subjects))
    if spec.resample_channels:
        dataset = replace(dataset, subjects=tuple(replace(s, resample=True) for s in dataset.subjects))
    return dataset


def without_descriptions(dataset: Dataset) -> Dataset:
    """``dataset`` with channels that are not named after DICOM series descriptions.

    A description may name a person, and channel names are stored in the bundle, which is shared. A
    single channel is named after its modality. Raises :class:`RecipeError` if there are several.
    """
    if not dataset.described:
        return dataset
    if any(len(subject.scans) != 1 for subject in dataset.subjects):
        raise RecipeError(
            f"the channels of '{dataset.name}' have no names except the series descriptions "
            f"({', '.join(dataset.channels)}), which may name a person and would be shared with the bundle",
            fix="name each with a pattern, such as --set \"data.images={T1: '*t1*', FLAIR: '*flair*'}\"",
        )
    name = dataset.modality or "image"
    subjects = tuple(subject.with_channels((name,)) for subject in dataset.subjects)
    return replace(dataset, subjects=subjects, described=False)


@dataclass(frozen=True)
class Roles:
    """The role of each subject. ``validation`` selects weights; ``held_out`` is never used in training.

    ``repeats``: how many times each training subject occurs among those that a pass draws from.
    """

    training: tuple[Subject, ...]
    validation: tuple[Subject, ...]
    held_out: tuple[Subject, ...]
    repeats: tuple[int, ...]


def assign_roles(subjects: Sequence[Subject], split: Split, fold: int | None, recipe: Recipe) -> Roles:
    """Roles for a fold. Validation subjects are those in the split, or else whole patients from the other folds.

    Raises :class:`BadSplit` where nothing is left to train on.
    """
    present = {subject.id for subject in subjects}
    held = present.intersection(() if fold is None else split.held_out(fold))
    pool = present.intersection(split.training_of(fold))
    spec = recipe.training.validation
    chosen = present.intersection(() if spec.held_out else split.validation)
    if not chosen and len(pool) >= 3 and not spec.held_out:
        # With one of ten folds held out, a ninth of the rest is a tenth of all.
        wanted = min(spec.subjects, max(1, len(pool) // 9))
        drawable = [s for s in subjects if s.id in pool and s.id not in split.always_train]
        drawn = set(drawn_over_sites(drawable, wanted, np.random.default_rng((recipe.training.seed, 4))))
        chosen = drawn if 3 * len(drawn) <= len(pool) else set()  # few patients of many scans: training comes first
    training = tuple(s for s in subjects if s.id in pool - chosen)
    if not training:
        raise BadSplit(
            f"no subject is left to train on: {len(held)} are held out and {len(chosen)} are for validation",
            fix="use another --fold or --split, or more subjects",
        )
    always = [s.id in split.always_train for s in training]
    return Roles(
        training=training,
        validation=tuple(s for s in subjects if s.id in chosen),
        held_out=tuple(s for s in subjects if s.id in held),
        repeats=_repeats(always, recipe.training.always_train_share),
    )


def _repeats(always: Sequence[bool], share: float | None) -> tuple[int, ...]:
    """How often to repeat each subject so that those ``always`` trained on make up about ``share`` of all."""
    few, rest = sum(always), len(always) - sum(always)
    if share is None or not few or not rest:
        return (1,) * len(always)
    times = share / (1 - share) * rest / few
    repeated, others = (round(times), 1) if times >= 1 else (1, round(1 / times))
    return tuple(repeated if chosen else others for chosen in always)


def split_file(folder: Path, options: RunOptions) -> Path:
    """Path of a run's split, whether or not it exists yet."""
    return options.split_file or folder / "split.json"


def split_for(recipe: Recipe, whole: Dataset, usable: Dataset, folder: Path, options: RunOptions) -> Split:
    """The split of a run, made if there is none."""
    path = split_file(folder, options)
    if not path.exists():
        split = new_split(recipe.training, whole, usable)
        save_split(path, split)
        return split
    return load_or_make_split(path, whole)


def new_split(spec: TrainingSpec, whole: Dataset, usable: Dataset) -> Split:
    """The recipe's split: folds of the ``whole`` data set, which stay the same when a broken subject is fixed later.

    If the recipe tests on the last subjects, they are the last of the ``usable`` ones.
    """
    subjects = usable.subjects if spec.test_last else whole.subjects
    patients = len({subject.patient for subject in subjects})
    if patients < 2:
        raise BadSplit(f"data set '{whole.name}' has only one patient", fix="training and evaluation need at least two")
    return make_split(subjects, min(spec.folds, patients), seed=spec.seed, test_last=spec.test_last)


def cache_folder(options: RunOptions) -> Path:
    """The folder for prepared subjects: the one given, or else delineate's home folder."""
    return home_folder() if options.cache is None else options.cache
