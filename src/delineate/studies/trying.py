"""A trial's own process: a shortened run of a few subjects, and what the whole run will take by it."""

from __future__ import annotations

import os
import pickle
import resource
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, prod
from pathlib import Path

import numpy as np
import torch

from delineate.bundle import Bundle
from delineate.compute import ComputePlan, plan_compute
from delineate.core.memory import peak_memory_bytes
from delineate.core.subject import Subject
from delineate.datasets.dataset import Dataset
from delineate.datasets.inspection import Inspection
from delineate.datasets.splits import Split, check_split, save_split
from delineate.errors import DelineateError, OutOfMemory
from delineate.evaluation.measure import evaluate
from delineate.evaluation.table import Evaluation
from delineate.inference.sliding import Abridged
from delineate.io.files import writing_beside
from delineate.io.formats import read_header
from delineate.networks.cost import count_convolutions, count_parameters
from delineate.preprocessing.cache import PreparedDataset, budget_in_memory
from delineate.recipe import Recipe
from delineate.reporting.overlays import MOST_PICTURES, picture
from delineate.reporting.run import held_out_overlays, held_out_pairs, write_run_report
from delineate.sampling.samplers import ChosenSlices
from delineate.sampling.tiles import TileGeometry
from delineate.studies.trials import ANSWER, REQUEST, Request, Trial
from delineate.training.events import Divided, Event, Planned, Started, Trained, read_events
from delineate.training.module import Budget
from delineate.training.options import Reporter, RunOptions, check_possible
from delineate.training.preparation import Roles, assign_roles, expected_seconds, inspected
from delineate.training.run import PREDICTING, held_out_measuring, train

_PREDICTING_SECONDS = 10.0
"""The network runs for so long in each volume that a trial predicts; the rest takes as long in proportion."""

_FIRST_USE_S = 5.0
"""More than the first use of the libraries that measure takes."""


def answer() -> None:
    """Answer the request in the folder that the command line names: all that a trial's process does."""
    folder = Path(sys.argv[1])
    threading.Thread(target=_end_with_the_asker, args=(folder,), daemon=True).start()
    request: Request = pickle.loads((folder / REQUEST).read_bytes())
    found: Trial | DelineateError
    try:
        if request.memory_gb is not None:
            _take_no_more_than(request.memory_gb, plan_compute(device=request.device).device)
        found = tried(request, folder)
    except DelineateError as error:
        found = error
    with writing_beside(folder / ANSWER) as beside:
        beside.write_bytes(pickle.dumps(found))


_SLACK_GB = 1.0


def _take_no_more_than(memory_gb: float, device: torch.device) -> None:
    """Let allocations far beyond a limit fail, where that is possible, so that a trial does not take the machine down.

    The limit is of the device's own memory. The system counts what is allocated, used or not, so there is some slack:
    what was used is known afterwards.
    """
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory_gb * 1e9 / total), device.index or 0)
    elif sys.platform == "linux":  # elsewhere, the limit does not count what is allocated in large pieces
        most = int((memory_gb + _SLACK_GB) * 1e9)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def _end_with_the_asker(folder: Path) -> None:
    """Wait until the asking process ends, however it does, then leave nothing behind."""
    os.read(0, 1)  # its end of the pipe is closed
    shutil.rmtree(folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


def tried(request: Request, folder: Path) -> Trial:
    """Try a recipe in this process; the run is left in ``folder/run``, its prepared subjects in ``folder/cache``."""
    recipe, program = request.recipe, peak_memory_bytes()
    dataset = recipe.data.open(request.data)
    check_split(request.split, dataset)
    roles = assign_roles(dataset.subjects, request.split, request.fold, recipe)
    starting = time.time() - request.asked
    sizes = {subject.id: _voxels(subject) for subject in dataset.subjects}
    few = _few_of(roles, sizes)
    split = Split((_names(few.held_out), _names(few.training)), validation=_names(few.validation))
    save_split(folder / "split.json", split)
    plan = plan_compute(
        device=request.device,
        precision=request.precision,
        threads=request.threads,
        expected_seconds=expected_seconds(recipe, len(roles.training)),
        convolutions=count_convolutions(recipe.network, len(recipe.data.channels or dataset.channels), 1),
    )
    options = RunOptions(
        split_file=folder / "split.json",
        cache=folder / "cache",
        device=request.device,
        precision=request.precision,
        compile="on" if plan.compile else "off",
        threads=request.threads,
        memory_gb=inf,  # a trial is there to see what it takes
    )
    check_possible(options)
    chosen = [subject for subject in dataset.subjects if subject.id in split.subjects]
    some = replace(dataset, subjects=tuple(sorted(chosen, key=lambda subject: sizes[subject.id])))
    first_use, inspecting, inspection = _inspection(recipe, some, sizes, options)
    watch, began = _Watch(plan.device), time.time()
    short, report = _shortened(recipe, request.steps), Reporter(progress=watch.progress)
    with Abridged(_PREDICTING_SECONDS) as abridged:
        result = train(short, some, folder / "run", options, report, inspection)
    if result.stopped is not None:
        sys.exit(result.stopped)
    if divided := [event for event in read_events(folder / "run" / "logs") if isinstance(event, Divided)]:
        raise OutOfMemory(
            f"a step of recipe '{recipe.name}' does not fit into the GPU's memory in one piece",
            fix=f"add --set training.accumulate={divided[-1].parts}",
        )
    measured = time.time()
    write_run_report(folder / "run", some)
    reporting = time.time() - measured
    again = _Again.of(folder / "run", some, measured - watch.predicted[-1] if watch.predicted else 0.0)
    events = read_events(folder / "run" / "logs")
    at = {type(event): event.at.timestamp() for event in events}
    once = starting + first_use + at[Started] - began + max(0.0, reporting - again.drawing)
    tested = [sizes[subject.id] for subject in few.held_out]
    took = _Took.of(at, watch, once, inspecting, measured, tested, abridged, again)
    return _expected(recipe, roles, few, sizes, took, plan, folder, program)


def _inspection(
    recipe: Recipe, some: Dataset, sizes: Mapping[str, int], options: RunOptions
) -> tuple[float, float, Inspection]:
    """Seconds that the libraries' first use takes in inspecting, and that inspecting these subjects takes then.

    Also what it found.
    """
    first = some.subjects[:1]
    moments = [time.time()]
    inspected(recipe, replace(some, subjects=first), None, replace(options, fold=None), Reporter())
    moments.append(time.time())
    *_, found = inspected(recipe, some, None, options, Reporter())
    moments.append(time.time())
    alone, together = np.diff(moments)
    share = sizes[first[0].id] / max(1, sum(sizes[subject.id] for subject in some.subjects))
    return max(0.0, alone - share * together), together, found


@dataclass(frozen=True)
class _Again:
    """Seconds that measuring and drawing the held-out subjects of a run take once the libraries have been used.

    Measuring that took much longer at first than their first use does is not repeated.
    """

    measuring: float = 0.0
    drawing: float = 0.0

    @classmethod
    def of(cls, run: Path, some: Dataset, measuring: float) -> _Again:
        if not (run / "evaluation" / "metrics.csv").exists():
            return cls()
        bundle, evaluation = Bundle.load(run / "bundle"), Evaluation.read(run / "evaluation")
        if measuring < _FIRST_USE_S:
            began = time.time()
            pairs = held_out_pairs(run, some, evaluation)
            evaluate(pairs, bundle.targets, held_out_measuring(run, bundle.recipe))
            measuring = time.time() - began
        began = time.time()
        for overlay in held_out_overlays(run, bundle, some, evaluation):
            for view in overlay.views:
                picture(view)
        return cls(measuring, time.time() - began)


def _voxels(subject: Subject) -> int:
    """The size of a scan, as its header states it; 0 if there is none, which inspection refuses."""
    first = next(iter(subject.scans.values()), None)
    return 0 if first is None else prod(read_header(first).grid.shape)


def _few_of(roles: Roles, sizes: Mapping[str, int]) -> Roles:
    """The smallest and the largest subject of those for training and of those held out, and the largest to validate."""
    training, validation, held_out = (
        tuple(sorted(part, key=lambda subject: sizes[subject.id]))
        for part in (roles.training, roles.validation, roles.held_out)
    )
    few, tested = ((*part[:1], *part[1:][-1:]) for part in (training, held_out))
    return Roles(few, validation[-1:], tested, repeats=(1,) * len(few))


def _names(subjects: Sequence[Subject]) -> tuple[str, ...]:
    return tuple(subject.id for subject in subjects)


def _shortened(recipe: Recipe, steps: int) -> Recipe:
    """The recipe with a budget of a few steps, validated after the last."""
    validation = recipe.training.validation.model_copy(update={"times": 1, "patience": None})
    budget = {"steps": steps, "minutes": None, "epochs": None, "validation": validation}
    return recipe.model_copy(update={"training": recipe.training.model_copy(update=budget)})


class _Watch:
    """Notes when each training step ended, and when each held-out subject's prediction had been written.

    The next one is being predicted meanwhile, so what lies between two of these moments is not what one takes.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.steps: list[float] = []
        self.predicted: list[float] = []

    def progress(self, stage: str, done: int, total: int) -> None:
        if stage == "training":
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # the step has only been queued
            self.steps.append(time.time())
        elif stage == PREDICTING:
            self.predicted.append(time.time())


@dataclass(frozen=True)
class _Took:
    """Seconds that the parts of a shortened run took.

    ``once``: what comes once however many subjects there are, besides the rest. ``first_step`` includes building the
    network. ``keeping``: statistics and files of weights to keep, once; ``validating`` includes it, too.
    ``predicting``: the largest held-out subject. ``measuring`` and ``drawing``: those that the trial held out.
    """

    steps: int
    once: float
    inspecting: float
    preparing: float
    first_step: float
    step: float
    validating: float
    keeping: float
    predicting: float
    measuring: float
    drawing: float

    @classmethod
    def of(
        cls,
        at: Mapping[type[Event], float],
        watch: _Watch,
        once: float,
        inspecting: float,
        measured: float,
        held_out: Sequence[int],
        abridged: Abridged,
        again: _Again,
    ) -> _Took:
        """From the moments of a run's events, of its steps and predictions, and when the subjects ``held_out`` (their
        sizes, the largest last) were ``measured``. Tiles that were skipped in predictions count.
        """

        def between(start: float, end: float) -> float:
            """Seconds, as if nothing had been skipped."""
            return end - start + sum(seconds for when, seconds in abridged.skipped if start < when <= end)

        steps = watch.steps
        step = (steps[-2] - steps[0]) / (len(steps) - 2)
        in_training = between(0, at[Trained]) - at[Trained]
        predicting = 0.0
        if held_out:
            # A subject is one volume or, in an ensemble or mirrored, several.
            volumes = [moment for moment in abridged.began if moment > at[Trained]]
            largest, last = volumes[len(volumes) * (len(held_out) - 1) // len(held_out)], watch.predicted[-1]
            predicting = between(largest, last)
            others = predicting * sum(held_out[:-1]) / max(1, held_out[-1])
            once += max(0.0, between(at[Trained], largest) - others) + max(0.0, measured - last - again.measuring)
        return cls(
            steps=len(steps),
            once=once,
            inspecting=inspecting,
            preparing=at[Planned] - at[Started],
            first_step=steps[0] - at[Planned],
            step=step,
            validating=max(0.0, steps[-1] - steps[-2] - step) + in_training,
            keeping=at[Trained] - steps[-1],
            predicting=predicting,
            measuring=again.measuring,
            drawing=again.drawing,
        )


@dataclass(frozen=True)
class _Part:
    """Sizes (voxels) of all subjects that something is done with, and of the few that the trial does it with."""

    all: tuple[int, ...]
    few: tuple[int, ...]

    def __add__(self, other: _Part) -> _Part:
        return _Part(self.all + other.all, self.few + other.few)

    def times(self, threads: int = 1) -> float:
        """How many times as long all take if each thread takes one at a time; so few may leave some idle."""
        busy = min(threads, len(self.few)) / max(1, min(threads, len(self.all)))
        return busy * sum(self.all) / max(1, sum(self.few))

    def summed(self, known: Sequence[float]) -> float:
        """The sum over all of what is ``known`` of the few; between two of them, it is on a line by size."""
        if len(set(self.few)) < 2:
            return len(self.all) * sum(known) / max(1, len(known))
        return float(np.interp(self.all, self.few, known).sum())


def _expected(
    recipe: Recipe,
    whole: Roles,
    few: Roles,
    sizes: Mapping[str, int],
    took: _Took,
    plan: ComputePlan,
    folder: Path,
    program: int,
) -> Trial:
    """What the whole run will take, from what the run of a few subjects in ``folder`` took."""

    def part(of: Callable[[Roles], Sequence[Subject]]) -> _Part:
        all_sizes, few_sizes = (tuple(sizes[name] for name in _names(of(roles))) for roles in (whole, few))
        return _Part(all_sizes, few_sizes)

    def validated(roles: Roles) -> tuple[Subject, ...]:
        return roles.held_out if spec.validation.held_out else roles.validation

    spec = recipe.training
    training, validation, held_out = part(lambda r: r.training), part(validated), part(lambda r: r.held_out)
    everybody = _Part(tuple(sizes.values()), training.few + part(lambda r: r.validation).few + held_out.few)
    preparing = took.inspecting * everybody.times() + took.preparing * (training + validation).times(plan.threads)
    keeping = min(took.keeping, took.validating)
    validating = keeping + (took.validating - keeping) * validation.times() if validation.all else 0.0
    trained_on, validated_on = (_prepared(folder / "cache", part) for part in (few.training, validated(few)))
    items = _items(recipe, Bundle.load(folder / "run" / "bundle").geometry, trained_on, training)
    total_steps = Budget.of(spec, -(-items // spec.batch_size)).steps
    limits = [] if spec.minutes is None else [60 * spec.minutes + validating]
    if total_steps is not None:
        limits.append(total_steps * took.step + min(spec.validation.times, total_steps) * validating)
    others = took.once + max(0.0, took.first_step - took.step) + took.keeping
    predicting = took.predicting * sum(held_out.all) / max((1, *held_out.few)) + took.measuring * held_out.times()
    drawn = min(1.0, MOST_PICTURES / max(1, len(held_out.all)))
    seconds = preparing + min(limits) + predicting + drawn * took.drawing * held_out.times() + others
    prepared = [(trained_on, training), (validated_on, validation)]
    more = sum(_more_in_memory(some, part) for some, part in prepared)
    with torch.device("meta"):
        parameters, _ = count_parameters(Bundle.load(folder / "run" / "bundle").network())
    copies = 4 + (spec.ema > 0)  # weights, gradients, two moments, and averaged weights
    return Trial(
        steps=took.steps,
        seconds_a_step=took.step,
        preparing_seconds=preparing,
        validating_seconds=validating,
        predicting_seconds=predicting / max(1, len(held_out.all)),
        peak_gb=(peak_memory_bytes() + more) / 1e9,
        program_gb=program / 1e9,
        data_gb=(sum(some.nbytes for some, _ in prepared) + more) / 1e9,
        network_gb=copies * 4 * parameters / 1e9,
        device_gb=torch.cuda.max_memory_reserved(plan.device) / 1e9 if plan.device.type == "cuda" else None,
        prepared_gb=sum(_all_bytes(some, part) for some, part in prepared) / 1e9,
        compiled=plan.compile,
        total_steps=total_steps,
        expected_minutes=seconds / 60,
    )


def _prepared(cache: Path, subjects: Sequence[Subject]) -> PreparedDataset:
    """What a run has prepared of these subjects."""
    places = [meta.parent for meta in cache.glob("*/meta.json")]
    by_name = dict(zip(PreparedDataset(places).ids, places, strict=True))
    return PreparedDataset([by_name[name] for name in _names(subjects)])


def _items(recipe: Recipe, geometry: TileGeometry, prepared: PreparedDataset, training: _Part) -> int:
    """Items in a pass over all training subjects, from the few that are prepared.

    Exact if every subject has the same number, or a number in proportion to its size, as of slices.
    """
    tiles = recipe.sampler.listed(prepared, geometry)
    listed = Counter(subject for subject, _ in tiles)
    items = round(training.summed([listed[i] if tiles else 1 for i in range(len(prepared))]))
    most = recipe.sampler.at_most if isinstance(recipe.sampler, ChosenSlices) else None
    return items if most is None else min(items, most)


def _more_in_memory(prepared: PreparedDataset, part: _Part) -> float:
    """Bytes of all subjects of a part that a run keeps in memory, beyond those of the few that are prepared."""
    everything = _all_bytes(prepared, part)
    return max(0.0, everything - prepared.nbytes) if everything <= budget_in_memory() else 0.0


def _all_bytes(prepared: PreparedDataset, part: _Part) -> float:
    """Bytes of all subjects of a part, from the few that are prepared."""
    return part.summed([prepared[i : i + 1].nbytes for i in range(len(prepared))])
