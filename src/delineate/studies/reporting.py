"""The page, the tables and the pictures of a study."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import isnan
from pathlib import Path
from urllib.parse import quote

import pandas as pd

from delineate.core.subject import Subject
from delineate.core.targets import Targets
from delineate.datasets.dataset import Dataset, load_label, load_scan
from delineate.errors import DelineateError
from delineate.evaluation.table import averaged
from delineate.io.files import writing_beside
from delineate.io.formats import read_label
from delineate.io.tables import write_table
from delineate.metrics.statistics import Estimate
from delineate.recipe import DataSpec
from delineate.reporting.cautions import trend
from delineate.reporting.html import StudyReport, StudySection, write_report
from delineate.reporting.overlays import comparison_picture
from delineate.studies.designs import PlannedRun
from delineate.studies.measures import MEASURES
from delineate.studies.results import StudyResults
from delineate.studies.running import FINAL, FinalTest, StudyFolder
from delineate.studies.specification import LearningCurve, Published

_UNEQUAL = 1.1
"""Ratio of steps from which runs are not on equal terms."""

_COLUMNS = (
    "runs", "target", "metric", "mean", "sd", "low", "high", "patients", "n", "failures", "undefined"
)  # fmt: skip


def write_study_report(results: StudyResults, folder: Path, *, size: str, data_sets: Mapping[str, str]) -> Path:
    """Write ``report.html`` and the tables ``results.csv``, ``differences.csv`` and ``runs.csv`` of what is done."""
    write_table(folder / "results.csv", _COLUMNS, _rows(results))
    found = [difference.as_dict() for difference in results.differences()]
    columns = ("metric", "first", "second", "verdict", "better", "sentence")
    write_table(folder / "differences.csv", columns, found)
    write_table(folder / "runs.csv", ("run", "arm", "seed", "fold", "state", *MEASURES), _run_rows(results))
    path = folder / "report.html"
    write_report(path, _page(results, folder, size, data_sets))
    return path


def draw_pictures(
    results: StudyResults, folder: StudyFolder, datasets: Mapping[str, Dataset], say: Callable[[str], None]
) -> None:
    """Draw one subject under every arm of each stage, if the arms have a held-out subject in common.

    ``say`` is told why a picture cannot be drawn: the report does without it.
    """
    for place, runs in _places(results).items():
        first, pictured = _first_runs(results, runs), _pictured(results, runs)
        subjects = {subject.id: subject for subject in datasets[place[1]].subjects}
        targets = datasets[place[1]].targets
        predictions = {arm: folder.run(run.name) / "predictions" / f"{pictured}.nii.gz" for arm, run in first.items()}
        if not pictured or targets is None or not all(path.exists() for path in predictions.values()):
            continue
        path, reading = _picture(folder.path, *place), next(iter(first.values())).recipe.data
        try:
            written = _drawn(subjects[pictured], reading, predictions, targets)
        except DelineateError as error:
            say(f"no picture of {pictured}: {error}")
            path.unlink(missing_ok=True)
            continue
        with writing_beside(path) as beside:
            beside.write_bytes(written)


def _drawn(subject: Subject, reading: DataSpec, predictions: Mapping[str, Path], targets: Targets) -> bytes:
    """The first channel that is read, on whose grid the reference and the predictions are."""
    channels = reading.channels or subject.channels
    scan = load_scan(subject.with_channels(channels), channels[:1])
    labels = {arm: read_label(path) for arm, path in predictions.items()}
    return comparison_picture(scan, load_label(subject, targets, scan.grid), labels, targets, subject.id)


def _picture(folder: Path, stage: str, data: str) -> Path:
    return folder / "pictures" / f"{stage or 'study'}-{data}.webp"


def _places(results: StudyResults) -> dict[tuple[str, str], list[PlannedRun]]:
    """Runs by stage and data set."""
    places: dict[tuple[str, str], list[PlannedRun]] = {}
    for run in results.runs:
        places.setdefault((run.stage, run.data), []).append(run)
    return places


def _first_runs(results: StudyResults, runs: Iterable[PlannedRun]) -> dict[str, PlannedRun]:
    """One run of each arm that has finished any."""
    first: dict[str, PlannedRun] = {}
    for run in runs:
        if run.name in results.curves:
            first.setdefault(run.arm, run)
    return first


def _pictured(results: StudyResults, runs: Iterable[PlannedRun]) -> str:
    """The subject that is shown under every arm: the first that all of :func:`_first_runs` held out; "" if none."""
    held_out = [set(run.split.held_out(run.fold)) for run in _first_runs(results, runs).values()]
    return min(set.intersection(*held_out), default="") if held_out else ""


def _rows(results: StudyResults) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for group, evaluation in results.pooled.items():
        for target, estimates in evaluation.summary().items():
            for metric, e in estimates.items():
                low, high = e.ci95
                rows.append(
                    {
                        "runs": group,
                        "target": target,
                        "metric": metric,
                        "mean": e.mean,
                        "sd": e.sd,
                        "low": low,
                        "high": high,
                        "patients": e.patients,
                        "n": e.count,
                        "failures": e.failures,
                        "undefined": e.undefined,
                    }
                )
    return rows


def _run_rows(results: StudyResults) -> list[dict[str, object]]:
    return [
        {
            "run": run.name,
            "arm": run.label,
            "seed": run.seed,
            "fold": run.fold,
            "state": results.statuses[run.name].state,
            **{name: results.measured.get(run.name, {}).get(name, "") for name in MEASURES},
        }
        for run in results.runs
    ]


def _page(results: StudyResults, folder: Path, size: str, data_sets: Mapping[str, str]) -> StudyReport:
    study = results.study
    return StudyReport(
        title=study.name,
        description=study.question,
        simulated=results.simulated,
        notes=[*_notes(results, size, data_sets), *_final(folder)],
        deviations=_deviations(results),
        metric=study.metric,
        sections=[_section(results, folder, *place, runs) for place, runs in _places(results).items()],
        claims=[(judged.claim.text, judged.ruling, judged.why) for judged in results.claims()],
        published=[_beside(results, table) for table in study.published],
        runs=[
            (
                name,
                quote(f"runs/{name}/report.html") if (folder / "runs" / name / "report.html").exists() else "",
                status.state,
                f"{status.seconds / 60:.1f}" if status.seconds else "",
                status.failure,
            )
            for name, status in results.statuses.items()
        ],
    )


def _section(results: StudyResults, folder: Path, stage: str, data: str, runs: list[PlannedRun]) -> StudySection:
    groups = dict.fromkeys(run.group for run in runs if run.group in results.pooled)
    several = len(results.study.data) > 1 and stage
    curves: dict[str, list[tuple[float, Estimate]]] = {}
    for point in results.points():
        if point.group in groups:
            curves.setdefault(point.curve, []).append((point.count, point.estimate))
    labels = dict.fromkeys(run.label for run in runs)
    picture = _picture(folder, stage, data)
    pictured = _pictured(results, runs)
    return StudySection(
        title=f"{stage}, {data}" if several else stage,
        evaluations={group: results.pooled[group] for group in groups},
        findings=results.findings[stage, data],
        curves=curves,
        axis=_axis(results, stage),
        learning={what: means for what, name in _LEARNING.items() if (means := _mean_curves(results, runs, name))},
        measures=_measures(results, list(labels)),
        picture=picture.read_bytes() if picture.exists() and pictured else None,
        pictured=pictured if picture.exists() else "",
    )


_LEARNING = {
    "training loss": "smoothed",
    "validation loss": "test",
    "Dice on validation subjects": "dice",
    "validation volume error, ml": "volume_error_ml",
}
"""What is drawn over training steps, and which of a run's :class:`Curves` it is."""


def _mean_curves(results: StudyResults, runs: Iterable[PlannedRun], which: str) -> dict[str, pd.Series]:
    """By arm: the mean of its runs at the steps that all of them logged."""
    by_arm: dict[str, list[pd.Series]] = {}
    for run in runs:
        if run.name in results.curves and len(values := getattr(results.curves[run.name], which)):
            by_arm.setdefault(run.arm, []).append(values)
    means = {arm: pd.concat(values, axis=1, join="inner").mean(axis=1) for arm, values in by_arm.items()}
    return {arm: values for arm, values in means.items() if len(values)}


def _measures(results: StudyResults, labels: list[str]) -> tuple[list[str], list[list[str]]]:
    """The measures that any of the arms has, as a table."""
    found = {name: {label: results.measure(label, name) for label in labels} for name in MEASURES}
    some = [name for name, values in found.items() if any(values.values())]
    heads = [f"{MEASURES[name].label}{f' ({unit})' if (unit := MEASURES[name].unit) else ''}" for name in some]
    rows = [
        [label, *(MEASURES[name].shown(e.mean) if (e := found[name][label]) else "–" for name in some)]
        for label in labels
        if any(found[name][label] for name in some)
    ]
    return ["arm", *heads], rows


def _beside(results: StudyResults, table: Published) -> tuple[str, list[str], list[list[str]]]:
    """A published table, with ours in a column beside each that we measure."""
    measures = table.measures or (None,) * (len(table.columns) - 1)
    columns = [table.columns[0]]
    for column, measure in zip(table.columns[1:], measures, strict=True):
        columns += [f"{column}, published", *([f"{column}, here"] if measure else [])]
    rows = []
    for name, *cells in table.rows:
        row = [name]
        for cell, measure in zip(cells, measures, strict=True):
            row += [cell, *([_ours(results, table.arms.get(name, name), measure)] if measure else [])]
        rows.append(row)
    return table.source, columns, rows


def _ours(results: StudyResults, arm: str, measure: str) -> str:
    estimate = results.estimate(arm, measure)
    if estimate is None or isnan(estimate.mean):
        return "–"
    if measure in MEASURES:
        return MEASURES[measure].shown(estimate.mean)
    return f"{averaged(measure.partition('@')[0], estimate)} (n = {estimate.patients})"


def _axis(results: StudyResults, stage: str) -> str:
    learning = any(isinstance(part.design, LearningCurve) for part in results.study.parts if part.name == stage)
    return "labelled subjects" if learning else "moved subjects"


def _notes(results: StudyResults, size: str, data_sets: Mapping[str, str]) -> list[str]:
    """What a reader should know before the numbers."""
    named = ", ".join(data_sets.values())
    sets = f"Data set {named}" if len(data_sets) == 1 else f"Data sets {named}"
    notes = [f"{sets}, size {size}: {results.done} of {len(results.runs)} runs are done."]
    if size == "quick":
        notes.append("Quick runs have small budgets: they show that the study works, not how good its arms can get.")
    if results.failed:
        counted = "1 run failed and is" if len(results.failed) == 1 else f"{len(results.failed)} runs failed and are"
        notes.append(f"{counted} missing from every number: see the table of runs.")
    fewest, most = min(results.steps.values(), default=0), max(results.steps.values(), default=0)
    if most > _UNEQUAL * fewest:
        notes.append(
            f"Runs trained between {fewest} and {most} steps, so part of any difference may be due to that alone. A "
            "budget of training.steps instead of minutes gives every run as many."
        )
    notes += _rising(results)
    if results.simulated:
        notes.append("The scans are simulated: nothing here reproduces, or contradicts, a published result.")
    return notes


def _rising(results: StudyResults) -> list[str]:
    """Whether runs were still learning when their training ended."""
    ends = [trend([(int(step), float(v)) for step, v in curves.dice.items()]) for curves in results.curves.values()]
    known = [found for found in ends if found is not None]
    if not known:
        return ["Whether validation was still rising cannot be told: no run was validated four times."] * bool(ends)
    rising = sum(found.rising for found in known)
    unsure = sum(not found.rising and not found.level for found in known)
    return [
        f"Validation was still rising at the end of {rising} of {len(known)} runs, and may have been in {unsure} more "
        "(by a straight line through the last third of its validations, at least four): an arm that learns slowly "
        "looks worse than it is."
    ]


def _final(folder: Path) -> list[str]:
    """When the locked subjects were looked at."""
    if not (folder / FINAL).exists():
        return []
    return [f"The locked test began on {FinalTest.read(folder / FINAL).began:%Y-%m-%d}; it is done once."]


def _deviations(results: StudyResults) -> list[str]:
    """Where the study and its recipes depart from what they are named after, each once."""
    found = list(results.study.deviates)
    arms: dict[str, list[str]] = {}
    for label, text in dict.fromkeys((run.label, text) for run in results.runs for text in run.recipe.deviates):
        arms.setdefault(text, []).append(label)
    every = len({run.label for run in results.runs})
    for text, labels in arms.items():
        some = "every arm" if len(labels) == every else ", ".join(labels)
        found.append(f"{some}: {text}")
    return found
