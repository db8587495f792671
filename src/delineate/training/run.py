"""A training from a folder of scans to a run folder: inspect, split, prepare, train, evaluate.

::

    RUN/
        recipe.yaml  plan.json  split.json  data.json   what was decided, and on what data
        logs/        training.csv, validation.csv, TensorBoard events, messages.txt
        last/        the state that a stopped run goes on from; at the end, the last weights as a bundle
        bundle/      the best weights
        predictions/ evaluation/                        of the held-out subjects
"""

from __future__ import annotations

import json
import logging
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
import yaml
from torch.utils.data import DataLoader

from delineate.auto import derive_recipe, summarise
from delineate.bundle import Bundle, fingerprint_of, save_weights, versions
from delineate.compute import ComputePlan, available_memory_bytes, plan_compute
from delineate.core.subject import Subject
from delineate.core.targets import Targets
from delineate.datasets.dataset import Dataset, load_scan
from delineate.datasets.inspection import Inspection, inspect
from delineate.datasets.splits import Split, load_or_make_split
from delineate.errors import BrokenSubjects, RecipeError, TrainingError
from delineate.evaluation import Evaluation, Pair, evaluate
from delineate.inference.batch import predict_subjects, with_channels
from delineate.inference.predictor import Predictor
from delineate.io.files import writing_beside
from delineate.preprocessing.cache import PreparedDataset, prepare
from delineate.recipe import Recipe, apply_changes, recipe_from, to_yaml
from delineate.sampling.batches import BatchSource
from delineate.sampling.samplers import Sampler
from delineate.sampling.tiles import geometry_for
from delineate.training.callbacks import CollapseWatch, Keeper, StepProgress, Stopper, Validator
from delineate.training.checkpoint import SafeCheckpointIO, steps_done
from delineate.training.logs import CurveLogger
from delineate.training.module import BatchStream, Budget, Delineator

Say = Callable[[str], None]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class RunOptions:
    """How a recipe is run, apart from what it says itself.

    ``fold`` is held out and never seen in training; ``None`` trains on all but the locked test set.
    ``cache`` holds prepared subjects, shared by runs. ``split_file`` is reused by later runs.
    """

    fold: int | None = 0
    split_file: Path | None = None
    cache: Path | None = None
    leave_out_broken: bool = False
    evaluate: bool = True
    device: str = "auto"
    precision: str = "auto"
    compile: str = "auto"
    devices: int = 1
    threads: int | None = None
    mlflow: str | None = None


@dataclass(frozen=True)
class RunResult:
    """Where a run lies, how far it came, and what its held-out subjects gave."""

    folder: Path
    steps: int
    finished: bool
    evaluation: Evaluation | None = None
    messages: tuple[str, ...] = ()


@dataclass
class Reporter:
    """Where a run says what happens: to the terminal, and to ``logs/messages.txt``."""

    say: Say = lambda text: None
    progress: Progress = lambda what, done, total: None
    log: Path | None = None
    messages: list[str] = field(default_factory=list)
    silent: bool = False

    def __call__(self, text: str) -> None:
        if self.silent:
            return
        self.messages.append(text)
        self.say(text)
        if self.log is not None:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("a", encoding="utf-8") as file:
                file.write(time.strftime("%Y-%m-%d %H:%M:%S ") + text + "\n")


def auto_recipe(
    dataset: Dataset,
    folder: Path,
    options: RunOptions,
    report: Reporter,
    *,
    minutes: float | None = None,
    steps: int | None = None,
    changes: Sequence[str] = (),
) -> tuple[Recipe, Inspection | None]:
    """The recipe derived from ``dataset`` and this machine, written with its reasons into ``folder``.

    A run that was begun there keeps the recipe it was begun with. Returns the inspection too, where
    one was needed.
    """
    path = folder / "recipe.yaml"
    if path.exists():
        budget = {"minutes": minutes, "steps": steps} if minutes or steps else {}
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        values["training"] |= budget
        return recipe_from(apply_changes(values, changes)), None
    targets = dataset.targets
    if targets is None:
        raise RecipeError(f"data set '{dataset.name}' does not name its targets; add for example --targets liver=1")
    inspection = inspect(dataset, targets=targets, progress=lambda done, n: report.progress("inspecting", done, n))
    sound = [row for row in inspection.rows if row.subject not in inspection.broken]
    if len(sound) < 2:
        raise BrokenSubjects(broken_message(inspection))
    plan = plan_compute(device=options.device)
    memory = available_memory_bytes()
    if plan.device.type == "cuda":
        memory = torch.cuda.get_device_properties(plan.device).total_memory
    summary = summarise(sound, dataset.modality)
    recipe, reasons = derive_recipe(
        summary, targets, device=plan.device.type, memory_bytes=memory, minutes=minutes, steps=steps
    )
    recipe = recipe_from(apply_changes(recipe.as_dict(), changes))
    with writing_beside(path) as temporary:
        temporary.write_text(to_yaml(recipe.as_dict(), reasons), encoding="utf-8")
    for field_, reason in reasons.items():
        report(f"auto: {field_} = {_value_at(recipe.as_dict(), field_)} ({reason})")
    return recipe, inspection


def _value_at(values: Any, path: str) -> Any:
    for key in path.split("."):
        values = values[int(key)] if isinstance(values, list) else values[key]
    return values


def train(
    recipe: Recipe,
    dataset: Dataset,
    folder: Path,
    options: RunOptions,
    report: Reporter,
    inspection: Inspection | None = None,
) -> RunResult:
    """Run ``recipe`` on ``dataset`` into ``folder``; a run that was stopped goes on.

    ``inspection`` of the data set is made where it is not given.

    Raises :class:`BrokenSubjects` where inspection found errors, :class:`RecipeError` where
    ``folder`` holds another recipe's run.
    """
    # Processes beside the first are started with the same command; they only train.
    first = os.environ.get("LOCAL_RANK", "0") == "0" and os.environ.get("SLURM_PROCID", "0") == "0"
    report.silent = not first
    if not first:
        report.progress = lambda what, done, total: None
    report.log = folder / "logs" / "messages.txt"
    _check_same_recipe(recipe, folder)
    split = _split(recipe, dataset, folder, options)
    dataset, targets, inspection = _inspected(recipe, dataset, inspection, options, report)
    roles = assign_roles(dataset.subjects, split, options.fold, recipe)
    report(
        f"{len(roles.training)} subjects to train on, {len(roles.validation)} of the training folds to validate on, "
        f"{len(roles.held_out)} held out"
    )
    plan = plan_compute(
        device=options.device,
        precision=options.precision,  # type: ignore[arg-type]
        compile=options.compile,  # type: ignore[arg-type]
        threads=options.threads,
        expected_seconds=_expected_seconds(recipe),
    )
    for choice in plan.choices:
        report(f"{choice.what}: {choice.choice} ({choice.why})")
    torch.set_num_threads(max(1, plan.threads // (options.devices if plan.device.type == "cpu" else 1)))
    bundle, prepared = _prepared(recipe, dataset, targets, inspection, roles, options, plan, report)
    if first:
        _write_decisions(folder, recipe, bundle, plan, inspection, roles)
    steps, finished = _fit(bundle, prepared, plan, folder, options, report)
    evaluation = None
    if finished and first and options.evaluate and roles.held_out:
        evaluation = _evaluate_held_out(folder, roles.held_out, plan, report)
    return RunResult(folder, steps, finished, evaluation, tuple(report.messages))


@dataclass(frozen=True)
class Roles:
    """What each subject is for. ``validation`` chooses weights; ``held_out`` is never used in training."""

    training: tuple[Subject, ...]
    validation: tuple[Subject, ...]
    held_out: tuple[Subject, ...]


def assign_roles(subjects: Sequence[Subject], split: Split, fold: int | None, recipe: Recipe) -> Roles:
    """Roles for a fold. Validation subjects are whole patients of the training folds, at most a tenth of them."""
    held = () if fold is None else split.held_out(fold)
    trained = [name for part in split.folds for name in part] if fold is None else split.training_of(fold)
    pool = [s for s in subjects if s.id in trained]
    wanted = min(recipe.training.validation.subjects, max(1, round(len(pool) / 10)))
    if len(pool) < 3:
        wanted = 0
    patients = sorted({s.patient for s in pool})
    chosen: set[str] = set()
    for index in np.random.default_rng((recipe.training.seed, 4)).permutation(len(patients)):
        if sum(s.patient in chosen for s in pool) >= wanted:
            break
        chosen.add(patients[index])
    return Roles(
        training=tuple(s for s in pool if s.patient not in chosen),
        validation=tuple(s for s in pool if s.patient in chosen),
        held_out=tuple(s for s in subjects if s.id in held),
    )


def _split(recipe: Recipe, dataset: Dataset, folder: Path, options: RunOptions) -> Split:
    path = options.split_file or folder / "split.json"
    if path.exists():
        return load_or_make_split(path, dataset)
    patients = len({subject.patient for subject in dataset.subjects})
    return load_or_make_split(path, dataset, folds=min(recipe.training.folds, patients), seed=recipe.training.seed)


def cache_folder(options: RunOptions) -> Path:
    """Where prepared subjects lie: as asked, else the user's cache."""
    if options.cache is not None:
        return options.cache
    if named := os.environ.get("DELINEATE_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "delineate"


def _check_same_recipe(recipe: Recipe, folder: Path) -> None:
    """A folder holds one run; only its budget may change, to go on for longer."""
    path = folder / "recipe.yaml"
    if not path.exists():
        return
    before = recipe_from(yaml.safe_load(path.read_text(encoding="utf-8"))).as_dict()
    now = recipe.as_dict()
    for values in (before, now):
        values["training"] = {k: v for k, v in values["training"].items() if k not in ("minutes", "steps")}
    if before != now:
        differing = [key for key in now if before.get(key) != now[key]]
        raise RecipeError(
            f"'{folder}' holds a run of another recipe (they differ in {', '.join(differing)}); "
            "use another --out, or the options it was started with to go on"
        )


def _inspected(
    recipe: Recipe, dataset: Dataset, inspection: Inspection | None, options: RunOptions, report: Reporter
) -> tuple[Dataset, Targets, Inspection]:
    targets = recipe.data.targets.targets() if recipe.data.targets is not None else dataset.targets
    if targets is None:
        raise RecipeError(
            f"data set '{dataset.name}' does not name its targets, nor does the recipe; "
            "add for example --set 'data.targets.values={liver: 1}'"
        )
    if recipe.data.channels is not None:
        channels = recipe.data.channels
        dataset = replace(dataset, subjects=tuple(with_channels(s, channels) for s in dataset.subjects))
    if inspection is None:
        inspection = inspect(dataset, targets=targets, progress=lambda done, n: report.progress("inspecting", done, n))
    if inspection.broken:
        if not options.leave_out_broken:
            raise BrokenSubjects(broken_message(inspection))
        report(f"left out as broken: {', '.join(inspection.broken)}")
        kept = tuple(s for s in dataset.subjects if s.id not in inspection.broken)
        dataset = replace(dataset, subjects=kept)
    if len(dataset.subjects) < 2:
        raise BrokenSubjects(f"{len(dataset.subjects)} usable subjects are left; training needs two or more")
    return dataset, targets, inspection


def broken_message(inspection: Inspection) -> str:
    """All errors of an inspection, a line each."""
    lines = [f"  {p.subject}: {p.code}: {p.message}; {p.mend}" for p in inspection.errors]
    return (
        f"{len(inspection.broken)} subjects cannot be trained on:\n" + "\n".join(lines) + "\n"
        "Mend them, or add --leave-out-broken to train on the others"
    )


def _expected_seconds(recipe: Recipe) -> float:
    """About how long the run is, to judge whether compiling pays."""
    training = recipe.training
    by_time = float("inf") if training.minutes is None else training.minutes * 60
    # A step of the packaged recipes takes about a second on two cores.
    by_steps = float("inf") if training.steps is None else float(training.steps)
    shortest = min(by_time, by_steps)
    if shortest == float("inf"):
        raise RecipeError("the recipe has no budget; set training.minutes (or --minutes) or training.steps")
    return shortest


@dataclass(frozen=True)
class _Prepared:
    training: PreparedDataset
    validation: PreparedDataset


def _prepared(
    recipe: Recipe,
    dataset: Dataset,
    targets: Targets,
    inspection: Inspection,
    roles: Roles,
    options: RunOptions,
    plan: ComputePlan,
    report: Reporter,
) -> tuple[Bundle, _Prepared]:
    """Fit the preprocessing on the training subjects, prepare them, and describe the bundle to be."""
    pipeline = recipe.pipeline.fit(lambda: (load_scan(subject) for subject in roles.training))
    cache = cache_folder(options)
    both = prepare(
        [*roles.training, *roles.validation],
        pipeline,
        targets,
        cache,
        threads=plan.threads,
        progress=lambda done, total: report.progress("preparing", done, total),
    )
    training, validation = both[: len(roles.training)], both[len(roles.training) :]
    spacing = np.median([grid.spacing_mm for grid in training.grids], axis=0)
    spacing_mm = (float(spacing[0]), float(spacing[1]), float(spacing[2]))
    largest = np.max([grid.shape for grid in training.grids], axis=0)
    geometry = geometry_for(recipe.tiles, largest, spacing_mm, recipe.network.divisor, recipe.network.margin)
    rows = {row.subject: row for row in inspection.rows}
    bundle = Bundle(
        recipe=recipe,
        pipeline=pipeline,
        targets=targets,
        channels=roles.training[0].channels,
        geometry=geometry,
        spacing_mm=spacing_mm,
        fingerprint=fingerprint_of([rows[s.id] for s in roles.training]),
        provenance={
            "data_set": dataset.name,
            "layout": dataset.layout,
            "simulated": "simulated" in dataset.name.lower(),
            "fold": options.fold,
            "seed": recipe.training.seed,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "training": [s.id for s in roles.training],
            "validation": [s.id for s in roles.validation],
            "held_out": [s.id for s in roles.held_out],
            "left_out": sorted(inspection.broken),
            "file_hashes": {name: dict(rows[name].hashes) for name in sorted(rows)},
            "versions": versions(),
        },
    )
    return bundle, _Prepared(training.in_memory(), validation.in_memory())


def _write_decisions(
    folder: Path, recipe: Recipe, bundle: Bundle, plan: ComputePlan, inspection: Inspection, roles: Roles
) -> None:
    texts = {
        "plan.json": json.dumps(plan.rows(), indent=1),
        "data.json": json.dumps(inspection.as_dict(), indent=1),
    }
    if not (folder / "recipe.yaml").exists():
        texts["recipe.yaml"] = to_yaml(recipe.as_dict())
    for name, text in texts.items():
        with writing_beside(folder / name) as path:
            path.write_text(text, encoding="utf-8")
    if not (folder / "bundle" / "bundle.json").exists():
        bundle.save_description(folder / "bundle")


def _fit(
    bundle: Bundle, prepared: _Prepared, plan: ComputePlan, folder: Path, options: RunOptions, report: Reporter
) -> tuple[int, bool]:
    """Train until the budget is spent; returns the steps done and whether the training is complete."""
    spec, state = bundle.recipe.training, folder / "last" / "state.safetensors"
    resumed_from = steps_done(state)
    if (folder / "last" / "weights.safetensors").exists() and not _has_more_budget(spec, state):
        report(f"training was complete after {resumed_from} steps")
        return resumed_from, True
    sampler = Sampler(bundle.recipe.sampler, prepared.training, bundle.geometry, spec.seed)
    source = BatchSource(sampler, bundle.recipe.augmentation, spec.batch_size)
    budget = Budget(spec.steps, None if spec.minutes is None else spec.minutes * 60)
    module = Delineator(bundle, plan, source, budget)
    if resumed_from:
        report(f"going on from step {resumed_from}")
    validator = Validator(prepared.validation, folder / "bundle", report)
    stopper = Stopper(folder / "stop", report)
    callbacks = [
        validator,
        CollapseWatch(spec.collapse_after, report),
        stopper,
        StepProgress(report.progress, validator),
        Keeper(state),
    ]
    trainer = _trainer(spec, plan, folder, options, callbacks, resumed_from)
    with warnings.catch_warnings():
        # Said of every endless stream of batches, and of reading in the main process: both are on purpose.
        warnings.filterwarnings("ignore", module="lightning")
        trainer.fit(
            module,
            DataLoader(BatchStream(module), batch_size=None),
            ckpt_path=str(state) if resumed_from else None,
        )
    finished = not stopper.asked
    if finished and trainer.is_global_zero:
        weights = module.kept_network.state_dict()
        if validator.best_step < 0:
            save_weights(folder / "bundle", weights, {"step": trainer.global_step})
        bundle.save(folder / "last", weights, {"step": trainer.global_step})
        report(f"trained {trainer.global_step} steps in {budget.elapsed() / 60:.1f} min")
    return trainer.global_step, finished


def _trainer(
    spec: Any,
    plan: ComputePlan,
    folder: Path,
    options: RunOptions,
    callbacks: list[lightning.Callback],
    resumed_from: int,
) -> lightning.Trainer:
    from lightning.pytorch.loggers import TensorBoardLogger

    # What Lightning finds of devices and precision is said by the plan already.
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logs = folder / "logs"
    loggers: list[Any] = [
        CurveLogger(logs, resumed_from),
        TensorBoardLogger(str(logs), name="", version="tensorboard"),
    ]
    if options.mlflow is not None:
        from lightning.pytorch.loggers import MLFlowLogger

        try:
            loggers.append(MLFlowLogger(experiment_name=folder.name, tracking_uri=options.mlflow))
        except ModuleNotFoundError as error:
            raise RecipeError("logging to MLflow needs its package: pip install 'delineate[mlflow]'") from error
    precision = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}[plan.precision]
    accelerator = {"cpu": "cpu", "cuda": "gpu", "mps": "mps"}[plan.device.type]
    devices: int | list[int] = options.devices
    if plan.device.index is not None and options.devices == 1:
        devices = [plan.device.index]
    return lightning.Trainer(
        accelerator=accelerator,
        devices=devices,
        strategy="ddp" if options.devices > 1 else "auto",
        precision=precision,  # type: ignore[arg-type]
        max_epochs=-1,
        max_steps=-1 if spec.steps is None else spec.steps,
        gradient_clip_val=spec.clip_norm,
        logger=loggers,
        callbacks=callbacks,
        plugins=[SafeCheckpointIO()],
        log_every_n_steps=1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        inference_mode=True,
    )


def _has_more_budget(spec: Any, state: Path) -> bool:
    """Whether the budget was raised beyond what a complete training has spent."""
    saved = SafeCheckpointIO().load_checkpoint(state)
    budget = Budget(spec.steps, None if spec.minutes is None else spec.minutes * 60, float(saved["spent_seconds"]))
    return budget.progress(int(saved["global_step"])) < 0.99


def _evaluate_held_out(folder: Path, subjects: Sequence[Subject], plan: ComputePlan, report: Reporter) -> Evaluation:
    """Predict the held-out subjects with the kept weights, on their own grids, and measure."""
    bundle = Bundle.load(folder / "bundle")
    predictor = Predictor([bundle], replace(plan, compile=False))
    chosen = [with_channels(subject, bundle.channels) for subject in subjects]
    pairs = []
    for done, outcome in enumerate(predict_subjects(predictor, chosen, folder / "predictions"), start=1):
        if outcome.error is not None or outcome.path is None:
            raise TrainingError(f"held-out subject '{outcome.subject.id}' could not be predicted: {outcome.error}")
        assert outcome.subject.label is not None  # inspection refuses subjects without one
        pairs.append(Pair(outcome.subject.id, outcome.path, outcome.subject.label, outcome.subject.site))
        report.progress("predicting held-out subjects", done, len(chosen))
    evaluation = evaluate(pairs, bundle.targets)
    evaluation.write(folder / "evaluation")
    return evaluation
