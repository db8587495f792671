"""What a data set holds and what is wrong with it: every subject, all problems at once.

Errors make a subject unusable for training; their codes are those of :mod:`delineate.errors`. Warnings
are worth a look:

==================  ================================================================
W_EMPTY_LABEL       a label marks nothing
W_CONSTANT          one channel of several has the same value everywhere
W_LABEL_OFF_IMAGE   more than half of a label lies where the image shows nothing
W_MIRRORED          a label's border follows the image flipped, not where its header places it
W_OUTLIER_SPACING   voxels 2.5 × larger or smaller than the data set's median
W_OUTLIER_SHAPE     2.5 × more or fewer voxels along an axis than the data set's median
W_DUPLICATE_SCAN    the same voxels under two subjects
W_EXTREME_MAXIMUM   a few voxels far above all others: clip percentiles
W_INTENSITY_SCALE   intensities that differ by more than 10 × between scans: normalise each scan
W_STRAY             a file in the folder that belongs to no subject
==================  ================================================================
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import numpy as np

from delineate.core.grid import Shape3
from delineate.core.tables import html_table
from delineate.core.targets import Targets
from delineate.datasets.dataset import Dataset, NonFinite, Orientation
from delineate.datasets.examination import Examination, Problem, Rules, SubjectRow, named_by_value
from delineate.datasets.measuring import Intensity
from delineate.io.documents import Document

__all__ = ["Inspection", "Intensity", "Problem", "SubjectRow", "inspect"]

OUTLIER_RATIO = 2.5
OUTLIER_SUBJECTS = 5
"""With fewer subjects than this, none is called an outlier."""
EXTREME_MAXIMUM = 5.0
"""A far maximum lies this many times as far above the median as the 99.5th percentile does."""
SCALE_RATIO = 10.0


class InspectionFile(Document):
    """What inspection found, as written to a run's ``data.json`` and by ``delineate data inspect --json``."""

    data_set: str
    layout: str
    reason: str
    targets: Targets | None
    label_voxels: Mapping[int, int]
    class_fractions: Mapping[str, float]
    broken: tuple[str, ...]
    problems: tuple[Problem, ...]
    subjects: tuple[SubjectRow, ...]


@dataclass(frozen=True)
class Inspection:
    """A row for each subject that could be read, in the data set's order, and all problems."""

    dataset: str
    rows: tuple[SubjectRow, ...]
    problems: tuple[Problem, ...]
    targets: Targets | None = None
    layout: str = ""
    reason: str = ""
    """How the folder's layout was recognised."""

    @property
    def errors(self) -> tuple[Problem, ...]:
        return tuple(problem for problem in self.problems if problem.severity == "error")

    @property
    def warnings(self) -> tuple[Problem, ...]:
        return tuple(problem for problem in self.problems if problem.severity == "warning")

    @property
    def broken(self) -> tuple[str, ...]:
        """Subjects with errors."""
        return tuple(dict.fromkeys(problem.subject for problem in self.errors))

    @property
    def label_voxels(self) -> dict[int, int]:
        """Voxels by label value, over all subjects."""
        counts: Counter[int] = Counter()
        for row in self.rows:
            counts.update(row.label_voxels)
        return dict(sorted(counts.items()))

    @property
    def found_targets(self) -> Targets | None:
        """A target for each value in the labels, for a data set that names none."""
        return Targets(named_by_value(self.label_voxels)) if set(self.label_voxels) - {0} else None

    @property
    def class_fractions(self) -> dict[str, float]:
        """Fraction of all labelled subjects' voxels, by target (by value if no targets are known)."""
        counts = self.label_voxels
        total = sum(counts.values())
        if self.targets:
            by_name = self.targets.class_voxels(counts)
        else:
            values = named_by_value(counts)
            by_name = {"background": counts.get(0, 0), **{n: sum(counts[v] for v in vs) for n, vs in values.items()}}
        return {name: n / total for name, n in by_name.items()} if total else {}

    def file(self) -> InspectionFile:
        """The document to write to a run's folder and for other programs."""
        return InspectionFile(
            data_set=self.dataset,
            layout=self.layout,
            reason=self.reason,
            targets=self.targets,
            label_voxels=self.label_voxels,
            class_fractions=self.class_fractions,
            broken=self.broken,
            problems=self.problems,
            subjects=self.rows,
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return self.file().model_dump(mode="json")

    def _repr_html_(self) -> str:
        told = any(row.acquisition for row in self.rows)
        subjects = [
            (
                row.subject,
                row.site,
                " × ".join(map(str, row.shape)),
                _times(row.spacing_mm),
                row.orientation,
                ", ".join(f"{channel} {i.min:.4g} to {i.max:.4g}" for channel, i in row.intensities.items()),
                ", ".join(f"{name} {ml:.3g}" for name, ml in row.volume_ml.items()),
                *([row.scanned_with] if told else []),
            )
            for row in self.rows
        ]
        columns = ["subject", "site", "voxels", "spacing, mm", "axes", "intensities", "targets, ml"]
        columns += ["scanned with"] if told else []
        problems = [(p.severity, p.code, p.subject, p.message, p.fix) for p in self.problems]
        found = f"{len(self.errors)} errors, {len(self.warnings)} warnings"
        return html_table(f"{self.dataset}: {len(self.rows)} subjects", columns, subjects) + html_table(
            found, ("severity", "code", "subject", "problem", "what to do"), problems
        )


def inspect(
    dataset: Dataset,
    *,
    targets: Targets | None = None,
    for_training: bool = True,
    nan: NonFinite = "refuse",
    orientation: Orientation = "refuse",
    threads: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> Inspection:
    """Read every subject and report what it holds and what is wrong; a bad subject never raises.

    ``targets`` replace the data set's own. With ``for_training`` a missing label is an error.
    ``nan`` and ``orientation`` are as for :func:`~delineate.datasets.dataset.load_scan`: what training
    accepts is not an error here (voxels to be filled are a warning). ``progress(done, total)``
    is called after each subject. Each thread holds one file in memory.
    """
    targets = targets or dataset.targets
    rules = Rules(dataset.channels, targets, for_training, nan, orientation)
    examinations = [Examination(subject, rules) for subject in dataset.subjects]
    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(examination.run) for examination in examinations]
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                future.result()
                if progress is not None:
                    progress(done, len(futures))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    rows = tuple(row for examination in examinations if (row := examination.row()) is not None)
    problems = [problem for examination in examinations for problem in examination.problems]
    return Inspection(
        dataset.name, rows, (*problems, *_compare(dataset, rows)), targets, dataset.layout, dataset.reason
    )


def _compare(dataset: Dataset, rows: Sequence[SubjectRow]) -> Iterator[Problem]:
    """Problems that show only when subjects are compared."""
    for subject, times in Counter(subject.id for subject in dataset.subjects).items():
        if times > 1:
            yield Problem("E_DUPLICATE", "error", subject, f"{times} subjects share this name", "rename all but one")
    yield from _outliers(rows, "W_OUTLIER_SPACING", "spacing", "mm", lambda row: row.spacing_mm)
    yield from _outliers(rows, "W_OUTLIER_SHAPE", "shape", "voxels", lambda row: row.shape)
    yield from _duplicates(rows)
    yield from _unlike_intensities(rows)
    for note in dataset.notes:
        yield Problem("W_STRAY", "warning", "", note, "list it, or ignore this")


def _outliers(
    rows: Sequence[SubjectRow],
    code: str,
    what: str,
    unit: str,
    numbers: Callable[[SubjectRow], Sequence[float]],
) -> Iterator[Problem]:
    if len(rows) < OUTLIER_SUBJECTS:
        return
    # Along the patient's axes, so that a scan stored in another orientation is not an outlier.
    values = np.array([np.array(numbers(row), dtype=float)[_patient_axes(row.orientation)] for row in rows])
    median = np.median(values, axis=0)
    for row, value in zip(rows, values, strict=True):
        if np.maximum(value / median, median / value).max() > OUTLIER_RATIO:
            message = f"{what} {_times(value)} {unit}, the data set's median is {_times(median)}"
            yield Problem(code, "warning", row.subject, message, "check that the scan belongs here")


def _duplicates(rows: Sequence[SubjectRow]) -> Iterator[Problem]:
    """Statistics equal to the last digit mean the same voxels, even if the file was recompressed."""
    seen: dict[tuple[Shape3, Intensity], list[str]] = defaultdict(list)
    for row in rows:
        for intensity in row.intensities.values():
            if not intensity.constant and row.subject not in seen[row.shape, intensity]:
                seen[row.shape, intensity].append(row.subject)
    for subjects in dict.fromkeys(tuple(subjects) for subjects in seen.values() if len(subjects) > 1):
        message = f"holds the same scan as {', '.join(subjects[:-1])}"
        fix = "leave one out, or give both the same patient in sites.csv"
        yield Problem("W_DUPLICATE_SCAN", "warning", subjects[-1], message, fix)


def _unlike_intensities(rows: Sequence[SubjectRow]) -> Iterator[Problem]:
    far = [row.subject for row in rows if any(map(_far_maximum, row.intensities.values()))]
    if far:
        message = f"a few voxels lie far above all others in {len(far)} of {len(rows)} scans, such as {far[0]}"
        yield Problem("W_EXTREME_MAXIMUM", "warning", "", message, "clip percentiles before normalising")
    ranges: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        for name, intensity in row.intensities.items():
            if not intensity.constant:
                ranges[name].append(max(abs(intensity.p0_5), abs(intensity.p99_5)))
    for name, found in ranges.items():
        if max(found) > SCALE_RATIO * min(found):
            message = f"99.5th percentiles of {name} range from {min(found):.4g} to {max(found):.4g}"
            yield Problem("W_INTENSITY_SCALE", "warning", "", message, "normalise each scan separately")


def _far_maximum(intensity: Intensity) -> bool:
    return intensity.max - intensity.p50 > EXTREME_MAXIMUM * max(intensity.p99_5 - intensity.p50, 0) > 0


def _patient_axes(orientation: str) -> list[int]:
    """The scan's own axes that run right–left, front–back and up–down."""
    return [next(i for i, letter in enumerate(orientation) if letter in pair) for pair in ("RL", "AP", "SI")]


def _times(values: Sequence[float]) -> str:
    return " × ".join(f"{value:.4g}" for value in values)
