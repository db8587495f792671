"""Results of a study so far: held-out subjects pooled over runs, compared, and set along curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import pandas as pd

from delineate.errors import DatasetError
from delineate.evaluation.methods import MethodDifference, compare_methods
from delineate.evaluation.table import Evaluation
from delineate.metrics.catalogue import METRICS, formatted
from delineate.metrics.statistics import Difference, Estimate, paired_difference
from delineate.studies.planning import PlannedRun
from delineate.studies.running import RunStatus, StudyFolder
from delineate.studies.specification import Claim, Study
from delineate.training.events import Trained, read_events

Ruling = Literal["held", "did not hold", "too few to tell"]


@dataclass(frozen=True)
class Point:
    """A point of a curve: the mean of the study's metric at a ``count`` of labelled or moved subjects."""

    arm: str
    direction: str
    count: int
    estimate: Estimate
    group: str
    """Name of the group of runs, as in :attr:`StudyResults.pooled`."""

    @property
    def curve(self) -> str:
        """Name of the curve that the point lies on."""
        return " ".join(part for part in (self.arm, self.direction) if part)


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
    steps: dict[str, int] = field(default_factory=dict)
    """Training steps of each finished run."""

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
        """The curve of each arm and direction, by count; none in cross-validation."""
        groups = {run.group: run for run in self.runs if run.count is not None and run.group in self.pooled}
        found = []
        for group, run in groups.items():
            estimate = self.pooled[group].overall().get(self.study.metric)
            if estimate is not None and run.count is not None:
                found.append(Point(run.arm, run.direction, run.count, estimate, group))
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
                both = pd.DataFrame({"a": after.mean_of_targets(metric), "b": before.mean_of_targets(metric)}).dropna()
                whose = after.patients
                if len(both):
                    difference = paired_difference(both["a"], both["b"], [whose[name] for name in both.index])
                    gains.append(Gain(curve, earlier, later, metric, difference))
        return gains

    def differences(self) -> list[MethodDifference]:
        """Arms against each other; along curves, at their largest count. Empty with fewer than two."""
        arms = self._arms_at_most()
        if len(arms) < 2:
            return []
        try:
            return compare_methods(arms, [self.study.metric])
        except DatasetError:  # so far the arms share no subjects
            return []

    def claims(self) -> list[Judged]:
        """Each claim, judged by the paired difference of its two arms."""
        arms = self._arms_at_most()
        return [_judge(claim, arms) for claim in self.study.claims]

    def _arms_at_most(self) -> dict[str, Evaluation]:
        """The evaluation of each arm and direction at its largest count."""
        last: dict[str, PlannedRun] = {}
        for run in self.runs:
            name = " ".join(part for part in (run.arm, run.direction) if part)
            if run.group in self.pooled and (name not in last or (run.count or 0) > (last[name].count or 0)):
                last[name] = run
        return {name: self.pooled[run.group] for name, run in last.items()}


def collect(folder: StudyFolder, study: Study, runs: Sequence[PlannedRun]) -> StudyResults:
    """Read the results of the finished runs; works at any time."""
    statuses = {run.name: folder.status(run.name) for run in runs}
    found: dict[str, list[tuple[PlannedRun, Evaluation]]] = {}
    steps: dict[str, int] = {}
    for run in runs:
        if statuses[run.name].state == "done":
            trained = [e.step for e in read_events(folder.run(run.name) / "logs") if isinstance(e, Trained)]
            steps |= {run.name: trained[-1]} if trained else {}
            evaluation = Evaluation.read(folder.run(run.name) / "evaluation")
            found.setdefault(run.group, []).append((run, evaluation))
    return StudyResults(study, tuple(runs), statuses, {group: pooled(ones) for group, ones in found.items()}, steps)


def pooled(runs: Sequence[tuple[PlannedRun, Evaluation]]) -> Evaluation:
    """One table of several runs' held-out subjects.

    A subject's results under other seeds count as other scans of its patient, so that intervals take each
    patient once.
    """
    several = len({run.seed for run, _ in runs}) > 1
    tables = []
    for run, evaluation in runs:
        table = evaluation.table
        if "patient" not in table:
            table = table.assign(patient=table["subject"])
        if several:
            table = table.assign(subject=table["subject"] + f" (seed {run.seed})")
        tables.append(table)
    return Evaluation(
        pd.concat(tables, ignore_index=True), simulated=any(evaluation.simulated for _, evaluation in runs)
    )


def _judge(claim: Claim, arms: dict[str, Evaluation]) -> Judged:
    if claim.better not in arms or claim.worse not in arms:
        return Judged(claim, "too few to tell", "not all of its runs are done")
    try:
        [found] = compare_methods({arm: arms[arm] for arm in (claim.better, claim.worse)}, [claim.metric])
    except DatasetError as error:
        return Judged(claim, "too few to tell", error.message)
    if found.better is None:
        # The arms may still differ by less than this many patients can show; the sentence says by how much.
        return Judged(claim, "too few to tell", str(found))
    return Judged(claim, "held" if found.better == claim.better else "did not hold", str(found))
