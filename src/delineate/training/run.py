"""A training from a folder of scans to a run folder: inspect, split, prepare, train, evaluate.

::

    RUN/
        recipe.yaml  plan.json  split.json  data.json   what was decided, and on what data
        subjects.json                                   subjects by role: names stay here
        logs/        training.csv, validation.csv, validation_loss.csv, TensorBoard events, events.jsonl, messages.txt
        last/        the state from which a stopped run resumes; at the end, the last weights as a bundle
        bundle/      the best weights
        predictions/ evaluation/                        of the held-out subjects
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader

from delineate.bundle import Bundle, is_whole, replace_recipe, save_weights
from delineate.calibration import LEVEL, Calibration, Intervals, check_intervals
from delineate.compute import Choice, ComputePlan, plan_compute
from delineate.core.memory import keep_freed_memory
from delineate.core.subject import Subject
from delineate.core.targets import SharedTargets
from delineate.core.warning_filters import filtered_warnings
from delineate.datasets.dataset import Dataset
from delineate.datasets.inspection import Inspection
from delineate.errors import BundleError, OutputError, RecipeError, TrainingError
from delineate.evaluation.card import write_card
from delineate.evaluation.card_facts import ByRole, CardFacts, Effort, Result
from delineate.evaluation.held_out import calibration_cases, measure_outcomes, write_confidence
from delineate.evaluation.measure import Measuring, evaluate
from delineate.evaluation.table import Evaluation
from delineate.inference.batch import Outcome, predict_subjects
from delineate.inference.predictor import Predictor
from delineate.io.files import writing_beside
from delineate.losses.content import has_random_features
from delineate.metrics.catalogue import targets_of
from delineate.networks.cost import count_convolutions
from delineate.preprocessing.cache import PreparedDataset
from delineate.recipe import Recipe, TrainingSpec, load_recipe, to_yaml
from delineate.sampling.augmentation import AugmentationSpec
from delineate.sampling.batches import BatchSource
from delineate.sampling.samplers import Sampler
from delineate.training.callbacks import (
    CollapseWatch,
    EpochClock,
    Keeper,
    KeepThreads,
    StepProgress,
    Stopper,
    ValidationLoss,
    Validator,
)
from delineate.training.checkpoint import SafeCheckpointIO, steps_done
from delineate.training.events import (
    Finished,
    Planned,
    Resumed,
    Started,
    Stopped,
    Trained,
    Validated,
    Warned,
    read_events,
    without_undone,
)
from delineate.training.fitting import fitted, fitted_before
from delineate.training.lock import holding, launching, stop_file
from delineate.training.logs import CurveLogger, EventLogger, MlflowLogger
from delineate.training.module import BatchStream, Budget, Delineator
from delineate.training.options import Reporter, RunOptions, Stop
from delineate.training.preparation import (
    Prepared,
    Roles,
    assign_roles,
    expected_seconds,
    inspected,
    prepared_bundle,
    reached,
    split_file,
    split_for,
    subjects_of,
    threads_of,
)
from delineate.training.start import starting_network
from delineate.training.subjects import RunSubjects

_BUDGET = ("minutes", "steps", "epochs")

PREDICTING = "predicting held-out subjects"
"""The stage of a run in which it reports each held-out subject as progress."""


@dataclass(frozen=True)
class RunResult:
    """Where a run is, how far it got, and the evaluation of its held-out subjects.

    ``stopped`` is why it ended early; None if it is complete. ``helper`` is true in processes that only help
    the first one to train; only the first writes files and messages.
    """

    folder: Path
    steps: int
    stopped: Stop | None = None
    evaluation: Evaluation | None = None
    messages: tuple[str, ...] = ()
    helper: bool = False

    @property
    def finished(self) -> bool:
        return self.stopped is None


def train(
    recipe: Recipe,
    dataset: Dataset,
    folder: Path,
    options: RunOptions,
    report: Reporter,
    inspection: Inspection | None = None,
) -> RunResult:
    """Run ``recipe`` on ``dataset`` into ``folder``; a run that was stopped resumes.

    The data set is inspected if no ``inspection`` is given.

    Raises :class:`BrokenSubjects` if inspection finds errors, :class:`RecipeError` if
    ``folder`` holds the run of another recipe, :class:`RunInUse` if another training runs in it,
    :class:`OutputError` if something cannot be written, for example because the disk is full.
    """
    with holding(folder) as first:
        # Helper processes are started with the same command; they only train.
        own = report.of_run(folder, first=first)
        return _run(recipe, dataset, folder, options, own, inspection, first=first)


def _run(
    recipe: Recipe,
    dataset: Dataset,
    folder: Path,
    options: RunOptions,
    report: Reporter,
    inspection: Inspection | None,
    *,
    first: bool,
) -> RunResult:
    if options.fit:
        recipe = fitted_before(recipe, folder)
    _check_same_recipe(recipe, folder)
    whole = dataset = reached(recipe, dataset, split_file(folder, options))
    dataset, targets, inspection = inspected(recipe, dataset, inspection, options, report)
    # Refuse metrics that cannot be measured at the end before anything is trained.
    targets_of(",".join(recipe.metrics), targets)
    # Folds cover all subjects, so that they stay the same when a broken one is fixed later.
    split = split_for(recipe, whole, dataset, folder, options)
    roles = assign_roles(dataset.subjects, split, options.fold, recipe)
    report.event(Started(training=len(roles.training), validation=len(roles.validation), held_out=len(roles.held_out)))
    plan = plan_compute(
        device=options.device,
        precision=options.precision,
        compile=options.compile,
        threads=options.threads,
        expected_seconds=expected_seconds(recipe, len(roles.training)),
        convolutions=count_convolutions(recipe.network, len(dataset.channels), targets.outputs),
    )
    for choice in plan.choices:
        report(f"{choice.what}: {choice.choice} ({choice.why})")
    torch.set_num_threads(threads_of(plan, options))
    if plan.device.type == "cpu":
        keep_freed_memory()
    bundle, prepared = prepared_bundle(recipe, dataset, targets, inspection, roles, options, plan, report)
    if first and not (folder / "bundle" / "bundle.json").exists():
        largest = max((grid.shape for grid in prepared.training.grids), key=prod)
        recipe = fitted(bundle, plan, largest, options, report)
        if recipe != bundle.recipe:
            _write_recipe(folder, recipe)
            bundle, prepared = prepared_bundle(recipe, dataset, targets, inspection, roles, options, plan, report)
    subjects = subjects_of(dataset, inspection, roles, options)
    _check_same_subjects(subjects, folder, report)
    _compare_conditions(bundle, folder, report)
    sampler = Sampler(recipe.sampler, prepared.training, bundle.geometry, recipe.training.seed, prepared.at_a_time)
    source = BatchSource(sampler, recipe.augmentation, recipe.training.batch_size)
    planned = _planned(recipe, source.for_process(0, options.devices))
    report.event(planned)
    why = f"{planned.items} items, {planned.batch_size} per step"
    plan = replace(plan, choices=(*plan.choices, Choice("epoch", f"{planned.steps_an_epoch} steps", why)))
    if first:
        subjects.save(folder)
        _write_decisions(folder, recipe, bundle, plan, inspection)
    with launching(folder, options.devices):
        steps, stopped = _fit(bundle, prepared, source, planned, plan, folder, options, report, first=first)
    evaluation = None
    if stopped is None and first and options.evaluate and roles.held_out:
        evaluation = _evaluate_held_out(folder, roles.held_out, plan, report)
        stopped = Stop.FILE if evaluation is None else None
    if first:
        _write_card(folder, roles, steps, evaluation, report, finished=stopped is None)
    if stopped is None:
        report.event(Finished(step=steps, measured=0 if evaluation is None else len(evaluation.subjects)))
    return RunResult(folder, steps, stopped, evaluation, tuple(report.messages), helper=not first)


def _planned(recipe: Recipe, source: BatchSource) -> Planned:
    """The length of an epoch, and the number of steps after which training ends at the latest."""
    return Planned(
        items=source.sampler.pass_length,
        batch_size=source.batch_size * source.world,
        steps_an_epoch=source.steps_an_epoch,
        steps=Budget.of(recipe.training, source.steps_an_epoch).steps,
    )


def _check_same_recipe(recipe: Recipe, folder: Path) -> None:
    """A folder holds one run; only its budget may change, to train for longer."""
    path = folder / "recipe.yaml"
    if not path.exists():
        return
    before = load_recipe(path).as_dict()
    now = recipe.as_dict()
    for values in (before, now):
        values["training"] = {k: v for k, v in values["training"].items() if k not in _BUDGET}
    if before != now:
        differing = [key for key in now if before.get(key) != now[key]]
        raise RecipeError(
            f"'{folder}' holds a run of another recipe (they differ in {', '.join(differing)})",
            fix="use another --out, or resume it with the options it was started with",
        )


def _check_same_subjects(subjects: RunSubjects, folder: Path, report: Reporter) -> None:
    """A resumed run must train on the subjects it was started with; says whose files are others now."""
    if not (folder / "bundle" / "bundle.json").exists():
        return
    before = RunSubjects.load(folder)
    differing = subjects.differing(before or Bundle.load(folder / "bundle").provenance)
    if differing:
        raise RecipeError(
            f"'{folder}' holds a run on other subjects (they differ in {', '.join(differing)})",
            fix="use another --out, or resume it with the --fold, --split and data it was started with",
        )
    if before is not None and (changed := subjects.changed(before)):
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        message = (
            f"the files of {', '.join(changed[:5])}{more} have changed since this run was started: what it learnt and "
            "measured before is of the former ones; train into another --out to use these alone"
        )
        report.event(Warned(message=message))


def _compare_conditions(bundle: Bundle, folder: Path, report: Reporter) -> None:
    """Warn if a run is resumed under conditions other than those it was started under."""
    if not (folder / "bundle" / "bundle.json").exists():
        return
    before = Bundle.load(folder / "bundle").provenance.computed
    now = bundle.provenance.computed
    differing = [f"{what} {before[what]}, now {now[what]}" for what in now if before.get(what, now[what]) != now[what]]
    if differing:
        message = (
            f"this run was started with {'; '.join(differing)}: the weights will not equal "
            "those of an uninterrupted run bit for bit"
        )
        report.event(Warned(message=message))


def _write_decisions(folder: Path, recipe: Recipe, bundle: Bundle, plan: ComputePlan, inspection: Inspection) -> None:
    plan.file().write(folder / "plan.json")
    inspection.file().write(folder / "data.json")
    if not (folder / "recipe.yaml").exists():
        _write_recipe(folder, recipe)
    bundle.begin(folder / "bundle")


def _write_recipe(folder: Path, recipe: Recipe) -> None:
    """Write the recipe, with the comments of the one that was there beside what has not changed."""
    lines = to_yaml(recipe.as_dict()).splitlines(keepends=True)
    path = folder / "recipe.yaml"
    before = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    if len(before) == len(lines):
        lines = [
            old if old.partition("  # ")[0].rstrip() == new.rstrip() else new
            for old, new in zip(before, lines, strict=True)
        ]
    with writing_beside(path) as beside:
        beside.write_text("".join(lines), encoding="utf-8")


def _write_budget(folder: Path, recipe: Recipe) -> None:
    """Write a recipe whose budget is not the one that the run was started with."""
    if load_recipe(folder / "recipe.yaml") != recipe:
        _write_recipe(folder, recipe)
        replace_recipe(folder / "bundle", recipe)


def _fit(
    bundle: Bundle,
    prepared: Prepared,
    source: BatchSource,
    planned: Planned,
    plan: ComputePlan,
    folder: Path,
    options: RunOptions,
    report: Reporter,
    *,
    first: bool,
) -> tuple[int, Stop | None]:
    """Train until the budget is spent; returns the steps done and why the run should end here, if it should."""
    spec, state = bundle.recipe.training, folder / "last" / "state.safetensors"
    budget, resumed_from = Budget.of(spec, planned.steps_an_epoch), steps_done(state)
    ended = is_whole(folder / "last")
    if ended and (_ended_with(spec, folder / "last") or not _has_more(budget, state, folder / "last")):
        report(f"training is already complete, after {resumed_from} steps")
        return resumed_from, None
    if first:
        _write_budget(folder, bundle.recipe)
    network = starting_network(bundle, report, resumed=resumed_from > 0)
    module = Delineator(bundle, network, plan, source, budget, report)
    if has_random_features(module.loss):
        report.event(Warned(message="the content loss uses random features, not those of VGG19"))
    if resumed_from:
        report.event(Resumed(step=resumed_from))
    validator = Validator(prepared.validation, folder / "bundle", report, raised=ended)
    stopper = Stopper(stop_file(folder), report)
    callbacks: list[lightning.Callback] = [
        validator,
        CollapseWatch(spec.collapse_after, report),
        stopper,
        KeepThreads(threads_of(plan, options)),
        StepProgress(report, validator),
        EpochClock(),
        Keeper(state),
    ]
    hold_a_target = any(len(points) for subject in prepared.validation for points in subject.points.values())
    if len(prepared.validation) and not hold_a_target:
        report.event(Warned(message=_NOTHING_TO_JUDGE))
    for name in _never_marked(bundle, prepared.training):
        report.event(Warned(message=f"no training subject has '{name}': the network cannot learn it"))
    if hold_a_target and spec.validation.loss_every is not None:
        of_validation = Sampler(bundle.recipe.sampler, prepared.validation, bundle.geometry, spec.seed)
        unchanged = AugmentationSpec(spatial=None, intensity=None)
        unvaried = BatchSource(of_validation, unchanged, spec.batch_size)
        callbacks.append(ValidationLoss(unvaried, spec.validation.loss_every))
    trainer = _trainer(spec, budget, plan, folder, options, callbacks, resumed_from, report)
    if first:
        # Lightning may have read another rank from what a launcher left in the environment.
        rank_zero_only.rank = 0  # type: ignore[attr-defined]
    # Lightning warns about endless streams of batches and reading in the main process: both are intended.
    with filtered_warnings("ignore", module="lightning"), stopper:
        try:
            trainer.fit(
                module,
                DataLoader(BatchStream(module), batch_size=None),
                ckpt_path=str(state) if resumed_from else None,
            )
        except SIGTERMException:  # Lightning's, if the signal came while training was being set up
            stopper.asked, stopper.cut_short = stopper.asked or Stop.TERMINATE, True
    if not stopper.cut_short and trainer.is_global_zero:
        if resumed_from == trainer.global_step:
            # Only these weights were missing, and the hooks after the last step did not run again.
            module.refresh_statistics()
        weights = module.kept_network.state_dict()
        # The last validation may precede the last step if patience or the clock ended the run.
        if validator.best_step < 0 or (spec.keep == "last" and validator.last_step != trainer.global_step):
            save_weights(folder / "bundle", weights, {"step": trainer.global_step})
        bundle.save(folder / "last", weights, {"step": trainer.global_step})
        epochs = trainer.global_step / planned.steps_an_epoch
        on_gpu = plan.device.type == "cuda"
        gpu_gb = torch.cuda.max_memory_reserved(plan.device) / 1e9 if on_gpu else None
        minutes = budget.elapsed() / 60
        report.event(Trained(step=trainer.global_step, minutes=minutes, epochs=epochs, gpu_gb=gpu_gb))
    return trainer.global_step, stopper.asked


_NOTHING_TO_JUDGE = (
    "no validation subject has a target, so that they cannot tell good weights from bad: the last ones are kept; "
    "name others in a split, or raise training.validation.subjects"
)


def _never_marked(bundle: Bundle, training: PreparedDataset) -> list[str]:
    """The targets of which no training subject has a voxel."""
    marked = {target for counts in training.counts for target, count in counts.items() if count}
    return [name for number, name in enumerate(bundle.targets.names, 1) if number not in marked]


def _trainer(
    spec: Any,
    budget: Budget,
    plan: ComputePlan,
    folder: Path,
    options: RunOptions,
    callbacks: list[lightning.Callback],
    resumed_from: int,
    report: Reporter,
) -> lightning.Trainer:
    # The plan already reports devices and precision.
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logs = folder / "logs"
    loggers: list[Any] = [
        CurveLogger(logs, resumed_from),
        EventLogger(logs / "tensorboard"),
    ]
    if options.mlflow is not None:
        loggers.append(MlflowLogger(options.mlflow, folder.name, lambda message: report.event(Warned(message=message))))
    precision = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}[plan.precision]
    accelerator = {"cpu": "cpu", "cuda": "gpu", "mps": "mps"}[plan.device.type]
    devices: int | list[int] = options.devices
    if plan.device.index is not None and options.devices == 1:
        devices = [plan.device.index]
    return lightning.Trainer(
        default_root_dir=folder,
        accelerator=accelerator,
        devices=devices,
        strategy="ddp" if options.devices > 1 else "auto",
        precision=precision,  # type: ignore[arg-type]
        max_epochs=-1,
        max_steps=-1 if budget.steps is None else budget.steps,
        gradient_clip_val=spec.clip_norm,
        logger=loggers,
        callbacks=callbacks,
        # Helpers are started here, never detected from a scheduler: the tasks of a job array are separate runs.
        plugins=[SafeCheckpointIO(), LightningEnvironment()],
        log_every_n_steps=1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        inference_mode=True,
    )


def _ended_with(spec: TrainingSpec, last: Path) -> bool:
    """Whether the training that left its last weights ended with this budget: spent, or given up before."""
    before = Bundle.load(last).recipe.training
    return all(getattr(before, name) == getattr(spec, name) for name in _BUDGET)


def _has_more(budget: Budget, state: Path, last: Path) -> bool:
    """Whether the budget has been raised beyond what the finished training spent, or its new weights are not there."""
    saved = SafeCheckpointIO().load_checkpoint(state)
    if Bundle.load(last).metadata.get("step") != str(saved["global_step"]):
        return True  # it had been raised before, and was cut off between the last step and its weights
    spent = replace(budget, spent_seconds=float(saved["spent_seconds"]))
    return spent.progress(int(saved["global_step"])) < 1


def held_out_measuring(folder: Path, recipe: Recipe) -> Measuring:
    """What a run in ``folder`` measures in its predictions of the held-out subjects."""
    quantity = None if recipe.quantity is None else recipe.quantity.map()
    probabilities = folder / "predictions" / "probabilities"
    return Measuring(",".join(recipe.metrics), quantity=quantity, probabilities=probabilities)


class _Stopped(Exception):
    """The run's stop file was found between two predictions."""


def _evaluate_held_out(
    folder: Path, subjects: Sequence[Subject], plan: ComputePlan, report: Reporter
) -> Evaluation | None:
    """Predict the held-out subjects with the best weights, on their own grids, and measure; None if stopped."""
    bundle = Bundle.load(folder / "bundle")
    predictor = Predictor([bundle], replace(plan, compile=False), probabilities=True)
    chosen = [subject.with_channels(bundle.channels) for subject in subjects]
    measuring = held_out_measuring(folder, bundle.recipe)

    def watch(outcome: Outcome, done: int) -> None:
        if stop_file(folder).exists():
            raise _Stopped
        if isinstance(outcome.error, OutputError):
            raise outcome.error
        if outcome.error is not None:
            raise TrainingError(f"held-out subject '{outcome.subject.id}' could not be predicted: {outcome.error}")
        report.progress(PREDICTING, done, len(chosen))

    try:
        evaluation, pairs, outcomes = measure_outcomes(
            predict_subjects(predictor, chosen, folder / "predictions", probabilities=measuring.probabilities),
            chosen,
            SharedTargets.of(bundle.targets, bundle.targets),
            measuring,
            simulated=bundle.provenance.simulated,
            on_outcome=watch,
        )
    except _Stopped:
        report.event(Stopped(cause=Stop.FILE.cause))
        return None
    evaluation.write(folder / "evaluation")
    needed = ["dice", "reference_volume_ml"]
    has_them = set(needed) <= set(evaluation.metrics) and targets_of(measuring.wanted, bundle.targets) == bundle.targets
    known = evaluation if has_them else evaluate(pairs, bundle.targets, Measuring(",".join(needed)))
    confidences = {outcome.subject.id: outcome.confidence for outcome in outcomes}
    cases = calibration_cases([outcome.subject for outcome in outcomes], confidences, known)
    Calibration.of(cases).save(folder / "bundle")
    Intervals(level=LEVEL, rows=check_intervals(cases)).write(folder / "evaluation" / "intervals.json")
    write_confidence(folder / "evaluation", confidences)
    return evaluation


def _write_card(
    folder: Path, roles: Roles, steps: int, evaluation: Evaluation | None, report: Reporter, *, finished: bool
) -> None:
    """Write the bundle's card, or say why it cannot be: a card that somebody damaged ends no training."""
    bundle = Bundle.load(folder / "bundle")
    if bundle.weights is None:
        return
    groups = (roles.training, roles.validation, roles.held_out)
    sites = sorted({subject.site for group in groups for subject in group})
    by_site = [ByRole(*(sum(subject.site == site for subject in group) for group in groups)) for site in sites]
    timed = [e for e in without_undone(read_events(folder / "logs")) if isinstance(e, Trained | Validated)]
    facts = CardFacts.of(bundle).model_copy(
        update={
            "effort": Effort(bundle.weights_sha256, steps, timed[-1].minutes if timed else None, finished),
            "sites": tuple(by_site) if any(sites) else (),
            "patients": ByRole(*(len({subject.patient for subject in group}) for group in groups)),
        }
    )
    try:
        if evaluation is not None:
            facts = facts.with_result(Result.of("held out", bundle, evaluation, sites=sites))
        write_card(folder / "bundle", facts)
    except BundleError as error:
        report.event(Warned(message=f"the bundle's card was not written: {error}"))
