"""Results of a study so far: held-out subjects pooled over runs, compared, and set along curves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from math import isnan, nan
from typing import Literal

import pandas as pd

from delineate.errors import DatasetError
from delineate.evaluation.methods import MethodDifference, compare_methods
from delineate.evaluation.table import BACKGROUND, Evaluation
from delineate.metrics.catalogue import METRICS, formatted
from delineate.metrics.statistics import Difference, Estimate, estimate_means, paired_difference
from delineate.studies.designs import PlannedRun
from delineate.studies.measures import MEASURES, Curves, measure_run, read_curves, steps_to_common_loss
from delineate.studies.running import RunStatus, StudyFolder
from delineate.studies.specification import Arm, Claim, Stage, Study

Ruling = Literal["held", "did not hold", "too few to tell"]


_FAILED = 1e6
"""What a failed scan counts as where arms are ranked, such as by a distance in mm."""
_MOST_ARMS_COMPARED = 5
"""Of stages with more arms, pairs stand in the table of differences alone."""


@dataclass(frozen=True)
class Point:
    """A point of a curve: the mean of the study's metric at a ``count`` of labelled or moved subjects."""

    arm: str
    """The arm's name within the study."""
    direction: str
    count: int
    estimate: Estimate
    group: str
    """Name of the group of runs, as in :attr:`StudyResults.pooled`."""
    order: str = ""
    """The order in which subjects are moved, if not random."""

    @property
    def curve(self) -> str:
        """Name of the curve that the point lies on."""
        return " ".join(part for part in (self.arm, self.direction, self.order) if part)


@dataclass(frozen=True)
class Gain:
    """The gain from more subjects, on the same held-out ones: later count minus earlier, paired by patient."""

    curve: str
    earlier: int
    later: int
    metric: str
    difference: Difference

    def __str__(self) -> str:
        d, low, high = self.difference, *(formatted(self.metric, v) for v in self.difference.ci95)
        label = METRICS[self.metric].label
        return (
            f"{self.curve}: from {self.earlier} to {self.later} subjects, {label} changed by "
            f"{formatted(self.metric, d.mean)} ({low} to {high}, n = {d.n} patients)"
        )


@dataclass(frozen=True)
class OrderGain:
    """The gain from moving subjects in an order instead of at random: as many subjects, paired by patient."""

    curve: str
    order: str
    count: int
    metric: str
    difference: Difference

    def __str__(self) -> str:
        d, low, high = self.difference, *(formatted(self.metric, v) for v in self.difference.ci95)
        noun = "subject" if self.count == 1 else "subjects"
        return (
            f"{self.curve}: {self.order} instead of random order at {self.count} {noun} changed "
            f"{METRICS[self.metric].label} by {formatted(self.metric, d.mean)} ({low} to {high}, n = {d.n} patients)"
        )


@dataclass(frozen=True)
class Effect:
    """What a factor changes: the metric with it minus without, averaged over the other factors' combinations.

    Paired by patient. ``level`` against ``other``: of a factor that is made or not, its name against the base.
    """

    stage: str
    level: str
    other: str
    metric: str
    difference: Difference

    def __str__(self) -> str:
        d, low, high = self.difference, *(formatted(self.metric, v) for v in self.difference.ci95)
        where = f"{self.stage}: " if self.stage else ""
        return (
            f"{where}{self.level} instead of {self.other} changed {METRICS[self.metric].label} by "
            f"{formatted(self.metric, d.mean)} on average ({low} to {high}, n = {d.n} patients)"
        )


@dataclass(frozen=True)
class Judged:
    """A claim of a report, and what our figures say about it."""

    claim: Claim
    ruling: Ruling
    why: str


@dataclass(frozen=True)
class StudyResults:
    """``pooled`` maps each group that has finished runs to their held-out subjects."""

    study: Study
    runs: tuple[PlannedRun, ...]
    statuses: dict[str, RunStatus]
    pooled: dict[str, Evaluation]
    measured: dict[str, dict[str, float]] = field(default_factory=dict)
    """Measures of each finished run; see :data:`~delineate.studies.measures.MEASURES`."""
    curves: dict[str, Curves] = field(default_factory=dict)
    """Losses of each finished training."""

    @property
    def steps(self) -> dict[str, int]:
        """Training steps of each finished run."""
        return {name: int(found["steps"]) for name, found in self.measured.items() if "steps" in found}

    @property
    def done(self) -> int:
        """Number of finished runs."""
        return sum(status.state == "done" for status in self.statuses.values())

    @property
    def failed(self) -> dict[str, str]:
        """Runs that failed, with the last line that they printed."""
        return {name: status.failure for name, status in self.statuses.items() if status.state == "failed"}

    @property
    def simulated(self) -> bool:
        """Whether any scan is."""
        return any(evaluation.simulated for evaluation in self.pooled.values())

    def points(self) -> list[Point]:
        """The curve of each arm, direction and order, by count; none in cross-validation.

        All orders begin at the same point, without moved subjects.
        """
        groups = {run.group: run for run in self.runs if run.count is not None and run.group in self.pooled}
        found = []
        for group, run in groups.items():
            estimate = self.pooled[group].overall().get(self.study.metric)
            if estimate is not None and run.count is not None:
                found.append(Point(run.label, run.direction, run.count, estimate, group, run.order))
        ordered = {(point.arm, point.direction, point.order) for point in found if point.order}
        begin = [point for point in found if not point.count]
        found += [
            replace(point, order=order)
            for arm, direction, order in ordered
            for point in begin
            if (point.arm, point.direction) == (arm, direction)
        ]
        return sorted(found, key=lambda point: (point.curve, point.count))

    def gains(self) -> list[Gain]:
        """The gain of each count of a curve over the one before, on the subjects that both measured."""
        by_curve: dict[str, list[tuple[int, Evaluation]]] = {}
        for point in self.points():
            by_curve.setdefault(point.curve, []).append((point.count, self.pooled[point.group]))
        metric = self.study.metric
        gains = []
        for curve, counted in by_curve.items():
            for (earlier, before), (later, after) in pairwise(counted):
                if (difference := _paired(after, before, metric)) is not None:
                    gains.append(Gain(curve, earlier, later, metric, difference))
        return gains

    def order_gains(self) -> list[OrderGain]:
        """Each order in which subjects are moved against the random one, at every count, paired by patient."""
        points = {(point.arm, point.direction, point.order, point.count): point for point in self.points()}
        metric, gains = self.study.metric, []
        for (arm, direction, order, count), point in points.items():
            other = points.get((arm, direction, "", count))
            if order and count and other is not None:
                difference = _paired(self.pooled[point.group], self.pooled[other.group], metric)
                if difference is not None:
                    gains.append(OrderGain(other.curve, order, count, metric, difference))
        return gains

    def differences(self) -> list[MethodDifference]:
        """Arms of a stage against each other; along curves, at their largest count. Empty with fewer than two."""
        return [difference for found in self._compared.values() for difference in found]

    @cached_property
    def findings(self) -> dict[tuple[str, str], list[str]]:
        """What is found in words, by stage and data set: gains, effects of factors, differences between arms."""
        found: dict[tuple[str, str], list[str]] = {(run.stage, run.data): [] for run in self.runs}
        places = {run.group: (run.stage, run.data) for run in self.runs}
        curves = {point.curve: places[point.group] for point in self.points()}
        gained: list[Gain | OrderGain] = [*self.gains(), *self.order_gains()]
        for gain in gained:
            found[curves[gain.curve]].append(str(gain))
        for stage in self.study.parts:
            place = stage.name, self.study.data_of(stage, Arm())
            if place in found:
                found[place] += map(str, self.effects(stage))
        for place, differences in self._compared.items():
            arms = {name for one in differences for name in (one.first, one.second)}
            if differences and all(one.difference.too_few for one in differences):
                d = differences[0].difference
                found[place].append(
                    f"{d.n} patients are too few to tell these {len(arms)} arms apart, whatever the difference; "
                    f"at least {d.needed} are needed"
                )
            elif len(arms) <= _MOST_ARMS_COMPARED:
                found[place] += map(str, differences)
        return found

    @cached_property
    def _compared(self) -> dict[tuple[str, str], list[MethodDifference]]:
        """By stage and data set: every pair of arms. Many arms make many resamplings, so this is done once."""
        found: dict[tuple[str, str], list[MethodDifference]] = {}
        for place, arms in self._arms_at_most().items():
            try:
                many = len(arms) > 1
                found[place] = compare_methods(_on_common_targets(arms), [self.study.metric]) if many else []
            except DatasetError:  # the arms share no subjects so far, or no targets
                found[place] = []
        return found

    def effects(self, stage: Stage) -> list[Effect]:
        """What each factor of a stage with all combinations changes, once all of their runs are done."""
        metric, found = self.study.metric, []
        for one, other, pairs in stage.opposites():
            tables = [
                (self.pooled[stage.label(a)], self.pooled[stage.label(b)])
                for a, b in pairs
                if stage.label(a) in self.pooled and stage.label(b) in self.pooled
            ]
            if len(tables) < len(pairs):
                continue
            values = [
                pd.DataFrame({"a": a.mean_of_targets(metric), "b": b.mean_of_targets(metric)}).dropna()
                for a, b in tables
            ]
            whose = {name: patient for a, _ in tables for name, patient in a.patients.items()}
            both = pd.concat(values)
            if len(both):
                difference = paired_difference(both["a"], both["b"], [whose[name] for name in both.index])
                found.append(Effect(stage.name, one, other, metric, difference))
        return found

    def claims(self) -> list[Judged]:
        """Each claim, judged by the paired difference of its two arms."""
        arms = dict(self.pooled)
        for at_most in self._arms_at_most().values():
            arms |= at_most
        return [
            self._judge_runs(claim) if claim.metric in MEASURES else _judge(claim, arms) for claim in self.study.claims
        ]

    def _judge_runs(self, claim: Claim) -> Judged:
        """A claim on a measure of runs: paired by seed, fold and count."""
        measure = MEASURES[claim.metric]
        first, second = (self._values(arm, claim.metric) for arm in (claim.better, claim.worse))
        common = sorted(first.keys() & second.keys(), key=str)
        if not common:
            undefined = {claim.better, claim.worse} <= set(self.pooled)
            why = f"{measure.label}: undefined in its runs" if undefined else "not all of its runs are done"
            return Judged(claim, "too few to tell", why)
        d = paired_difference([first[key] for key in common], [second[key] for key in common])
        unit = f" {measure.unit}" if measure.unit else ""
        arms = f"{claim.better} minus {claim.worse}"
        label, pairs = measure.label[0].upper() + measure.label[1:], "pair" if d.n == 1 else "pairs"
        why = f"{label}: {arms} {measure.shown(d.mean)}{unit}, n = {d.n} {pairs} of runs"
        if not isnan(d.p):
            low, high = map(measure.shown, d.ci95)
            why += f" ({low} to {high}), p {d.p:.3f}"
        if d.too_few:
            return Judged(claim, "too few to tell", f"{why}; at least {d.needed} pairs are needed")
        if not d.distinguishable:
            return Judged(claim, "too few to tell", why)
        return Judged(claim, "held" if d.mean < 0 else "did not hold", why)

    def _values(self, arm: str, measure: str) -> dict[tuple[object, ...], float]:
        return {
            (run.seed, run.fold, run.count, run.direction, run.order): value
            for run in self.runs
            if arm in (run.label, run.group)
            and not isnan(value := self.measured.get(run.name, {}).get(measure, float("nan")))
        }

    def measure(self, arm: str, measure: str) -> Estimate | None:
        """The mean of a measure over an arm's runs; None where it was not measured."""
        values = list(self._values(arm, measure).values())
        return estimate_means(pd.DataFrame(values).to_numpy(float))[0] if values else None

    def estimate(self, arm: str, measure: str) -> Estimate | None:
        """An arm's figure for a published column: a metric, ``metric@target``, or a measure of runs.

        Besides the targets, there is ``background``, with precision, recall and Dice.
        """
        if measure in MEASURES:
            return self.measure(arm, measure)
        metric, _, target = measure.partition("@")
        evaluation = self.pooled.get(arm)
        if evaluation is None:
            return None
        if target == BACKGROUND:
            return evaluation.background.get(metric)
        if metric not in evaluation.metrics:
            return None
        summary = evaluation.summary().get(target) if target else evaluation.overall()
        return (summary or {}).get(metric)

    def scores(self, attempted: Collection[str]) -> dict[str, float | None]:
        """The study's metric of each arm all of whose runs have ended; None where one of them failed or measured none.

        A failed run counts as ended if it was ``attempted``.
        """
        by_label: dict[str, list[PlannedRun]] = defaultdict(list)
        for run in self.runs:
            by_label[run.label].append(run)
        found: dict[str, float | None] = {}
        for label, runs in by_label.items():
            states = {self.statuses[run.name].state for run in runs}
            failed = any(self.statuses[run.name].state == "failed" and run.name in attempted for run in runs)
            if states == {"done"}:
                groups = list(dict.fromkeys(run.group for run in runs if not run.ranks))
                scores = [_score(self.pooled[group], self.study.metric) for group in groups]
                found[label] = None if any(map(isnan, scores)) else sum(scores) / len(scores)
            elif failed and states <= {"done", "failed"}:
                found[label] = None
        return found

    def _arms_at_most(self) -> dict[tuple[str, str], dict[str, Evaluation]]:
        """By stage and data set: the evaluation of each arm, direction and order at its largest count."""
        last: dict[tuple[str, str], dict[str, PlannedRun]] = defaultdict(dict)
        for run in self.runs:
            name = " ".join(part for part in (run.label, run.direction, run.order) if part)
            among = last[run.stage, run.data]
            if run.group in self.pooled and (name not in among or (run.count or 0) > (among[name].count or 0)):
                among[name] = run
        return {place: {name: self.pooled[run.group] for name, run in among.items()} for place, among in last.items()}


def _score(evaluation: Evaluation, metric: str) -> float:
    """A mean in which a scan that failed is worse than any that did not: arms do not gain by what they miss.

    NaN where nothing was measured.
    """
    estimate = evaluation.overall().get(metric)
    if estimate is None or not estimate.n + estimate.failed:
        return nan
    failed = -_FAILED if METRICS[metric].better == "higher" else _FAILED
    measured = estimate.mean * estimate.n if estimate.n else 0.0
    return (measured + failed * estimate.failed) / (estimate.n + estimate.failed)


def collect(folder: StudyFolder, study: Study, runs: Sequence[PlannedRun]) -> StudyResults:
    """Read the results of the finished runs; works at any time."""
    statuses = {run.name: folder.status(run.name) for run in runs}
    found: dict[str, list[tuple[PlannedRun, Evaluation]]] = {}
    measured: dict[str, dict[str, float]] = {}
    curves: dict[str, Curves] = {}
    for run in runs:
        if statuses[run.name].state == "done":
            place = folder.run(run.name)
            own = curves[run.name] = read_curves(place)
            measured[run.name] = measure_run(place, own, peak_gb=statuses[run.name].peak_gb)
            if not run.ranks:
                found.setdefault(run.group, []).append((run, Evaluation.read(place / "evaluation")))
    for alike in _with_the_same_loss(runs):
        steps = steps_to_common_loss({run.name: curves[run.name] for run in alike if run.name in curves})
        for name, value in steps.items():
            measured[name]["steps_to_loss"] = value
    groups = {group: pooled(ones) for group, ones in found.items()}
    return StudyResults(study, tuple(runs), statuses, groups, measured, curves)


def _with_the_same_loss(runs: Sequence[PlannedRun]) -> Iterable[list[PlannedRun]]:
    """Trainings whose losses can be compared: of one stage, on one data set, with one loss."""
    alike: list[list[PlannedRun]] = []
    for run in runs:
        if run.weights_of is not None:
            continue
        for others in alike:
            first = others[0]
            if (run.stage, run.data, run.recipe.loss) == (first.stage, first.data, first.recipe.loss):
                others.append(run)
                break
        else:
            alike.append([run])
    return alike


def pooled(runs: Sequence[tuple[PlannedRun, Evaluation]]) -> Evaluation:
    """One table of several runs' held-out subjects.

    A subject's results under other seeds count as other scans of its patient, so that intervals take each
    patient once; and so do its tests by the networks of several folds, which are compared as one, by their mean.
    """
    several = len({run.seed for run, _ in runs}) > 1
    tables: dict[str, list[pd.DataFrame]] = defaultdict(list)
    for run, evaluation in runs:
        table = evaluation.table
        if "patient" not in table:
            table = table.assign(patient=table["subject"])
        for name, part in (("table", table), ("lesions", evaluation.lesions), ("confusion", evaluation.confusion)):
            tables[name].append(part.assign(subject=part["subject"] + f" (seed {run.seed})") if several else part)
        tables["reliability"].append(evaluation.reliability)
    joined = {
        name: pd.concat([part for part in parts if len(part)] or parts[:1], ignore_index=True)
        for name, parts in tables.items()
    }
    quantities = {evaluation.quantity for _, evaluation in runs}
    return Evaluation(
        **joined,
        quantity=quantities.pop() if len(quantities) == 1 else None,
        simulated=any(evaluation.simulated for _, evaluation in runs),
    )


def _paired(one: Evaluation, other: Evaluation, metric: str) -> Difference | None:
    """The difference of a metric on the subjects that both measured; None if there are none."""
    both = pd.DataFrame({"a": one.mean_of_targets(metric), "b": other.mean_of_targets(metric)}).dropna()
    whose = one.patients
    return paired_difference(both["a"], both["b"], [whose[name] for name in both.index]) if len(both) else None


def _on_common_targets(arms: Mapping[str, Evaluation]) -> dict[str, Evaluation]:
    """The arms' tables of the targets that all of them have; all targets if they share none."""
    shared = set.intersection(*(set(found.targets) for found in arms.values()))
    if not shared:
        return dict(arms)
    return {name: replace(found, table=found.table[found.table["target"].isin(shared)]) for name, found in arms.items()}


def _judge(claim: Claim, arms: dict[str, Evaluation]) -> Judged:
    if claim.better not in arms or claim.worse not in arms:
        return Judged(claim, "too few to tell", "not all of its runs are done")
    try:
        both = _on_common_targets({arm: arms[arm] for arm in (claim.better, claim.worse)})
        [found] = compare_methods(both, [claim.metric])
    except DatasetError as error:
        return Judged(claim, "too few to tell", error.message)
    if found.better is None:
        # The arms may still differ by less than this many patients can show; the sentence says by how much.
        return Judged(claim, "too few to tell", str(found))
    return Judged(claim, "held" if found.better == claim.better else "did not hold", str(found))
