"""The page and the tables of a study."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from delineate.io.tables import write_table
from delineate.metrics.statistics import Estimate
from delineate.reporting.html import StudyReport, write_report
from delineate.studies.results import StudyResults
from delineate.studies.specification import LearningCurve

_UNEQUAL = 1.1
"""Ratio of steps from which runs are not on equal terms."""

_COLUMNS = (
    "runs", "target", "metric", "mean", "sd", "low", "high", "patients", "n", "failures", "undefined"
)  # fmt: skip


def write_study_report(results: StudyResults, folder: Path, *, size: str, data_sets: Mapping[str, str]) -> Path:
    """Write ``report.html``, ``results.csv`` and ``differences.csv`` of what is done so far."""
    write_table(folder / "results.csv", _COLUMNS, _rows(results))
    found = [difference.as_dict() for difference in results.differences()]
    columns = ("metric", "first", "second", "verdict", "better", "sentence")
    write_table(folder / "differences.csv", columns, found)
    path = folder / "report.html"
    write_report(path, _page(results, size, data_sets))
    return path


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


def _page(results: StudyResults, size: str, data_sets: Mapping[str, str]) -> StudyReport:
    study = results.study
    curves: dict[str, list[tuple[float, Estimate]]] = {}
    for point in results.points():
        curves.setdefault(point.curve, []).append((point.count, point.estimate))
    return StudyReport(
        title=study.name,
        description=study.question,
        simulated=results.simulated,
        notes=_notes(results, size, data_sets),
        metric=study.metric,
        evaluations=results.pooled,
        differences=[str(difference) for difference in results.differences()],
        curves=curves,
        axis=_axis(results),
        gains=[str(gain) for gain in (*results.gains(), *results.effects())],
        claims=[(judged.claim.text, judged.ruling, judged.why) for judged in results.claims()],
        published=[(table.source, table.columns, table.rows) for table in study.published],
        runs=[
            (name, status.state, f"{status.seconds / 60:.1f}" if status.seconds else "", status.failure)
            for name, status in results.statuses.items()
        ],
    )


def _axis(results: StudyResults) -> str:
    learning = any(isinstance(stage.design, LearningCurve) for stage in results.study.parts)
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
    if results.simulated:
        notes.append("The scans are simulated: nothing here reproduces, or contradicts, a published result.")
    recipes = {run.arm: run.recipe for run in results.runs}
    for arm, recipe in recipes.items():
        notes += [f"{arm} deviates from the report: {text}" for text in getattr(recipe, "deviates", ())]
    return notes
