"""The page of an evaluation: tables and figures, and pictures if the scans are available."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from delineate.core.targets import Targets
from delineate.core.volume import Volume
from delineate.datasets.dataset import Dataset, load_scan
from delineate.evaluation.pairs import Pair, pair_files
from delineate.evaluation.table import Evaluation
from delineate.reporting.html import EvaluationReport, write_report
from delineate.reporting.overlays import Overlay, Palette, overlays_of


def write_evaluation_report(
    path: Path,
    evaluation: Evaluation,
    predictions: Path,
    references: Path | Dataset,
    targets: Targets | None = None,
    *,
    band_percent: float | None = None,
    palette: Palette = "distinct",
) -> None:
    """Write a page about the evaluation of a folder of predictions to ``path``.

    Pictures are drawn if ``references`` is a data set, which includes the scans, and ``targets``
    are given or named by it. A band of ±``band_percent`` is drawn around zero where volumes are compared.
    """
    place = references.root if isinstance(references, Dataset) else references
    report = EvaluationReport(
        title=f"{predictions.resolve().name} against {place.resolve().name}",
        description=_description(evaluation, "subjects"),
        evaluation=evaluation,
        overlays=_overlays(evaluation, predictions, references, targets) if isinstance(references, Dataset) else [],
        band_percent=band_percent,
        palette=palette,
    )
    write_report(path, report)


def write_held_out_report(
    path: Path,
    evaluation: Evaluation,
    pairs: Sequence[Pair],
    targets: Targets,
    *,
    title: str,
    channels: Sequence[str],
    notes: Sequence[str] = (),
) -> None:
    """Write a page about subjects that a bundle had not seen to ``path``.

    The pairs' sources have the scans. The pictures show the first of ``channels``, which are the bundle's. ``notes``
    are shown before the numbers.
    """
    sources = {pair.subject: pair.source for pair in pairs if pair.source is not None}

    def scan(name: str) -> Volume:
        return load_scan(sources[name].with_channels(channels), channels[:1])

    report = EvaluationReport(
        title=title,
        description=_description(evaluation, "subjects that were not seen in training"),
        evaluation=evaluation,
        overlays=overlays_of(evaluation, scan, pairs, targets) if "dice" in evaluation.metrics else [],
        notes=notes,
    )
    write_report(path, report)


def _description(evaluation: Evaluation, subjects: str) -> str:
    read_within = "" if evaluation.quantity is None else f"; {evaluation.quantity}"
    return f"{len(evaluation.subjects)} {subjects}, {', '.join(evaluation.targets)}{read_within}."


def _overlays(evaluation: Evaluation, predictions: Path, dataset: Dataset, targets: Targets | None) -> list[Overlay]:
    targets = targets or dataset.targets
    if "dice" not in evaluation.metrics or targets is None:
        return []
    subjects = {subject.id: subject for subject in dataset.subjects}

    def scan(name: str) -> Volume:
        # The pictures show the first channel.
        return load_scan(subjects[name], subjects[name].channels[:1])

    return overlays_of(evaluation, scan, pair_files(predictions, dataset).pairs, targets)
