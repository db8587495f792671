"""Voxels of each class in training, validation and test."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from delineate.core.targets import Targets
from delineate.datasets.inspection import SubjectRow


@dataclass(frozen=True)
class ClassRow:
    """Voxels of one class in the labels of some subjects, and their share of all that are not ignored."""

    subjects: str
    name: str
    voxels: int
    share: float


def class_rows(
    inspected: Sequence[SubjectRow], targets: Targets, parts: Mapping[str, Collection[str]]
) -> list[ClassRow]:
    """A row for the background and each target in each of the ``parts``, named sets of subjects.

    Voxels are those of the scans' own grids, as ``inspected``. A part without labelled voxels has no rows.
    """
    rows = []
    for name, subjects in parts.items():
        by_value: Counter[int] = Counter()
        for row in inspected:
            if row.subject in subjects:
                by_value.update(row.label_voxels)
        counts = targets.class_voxels(by_value)
        total = sum(n for value, n in by_value.items() if value not in targets.ignore)
        rows += [ClassRow(name, target, n, n / total) for target, n in counts.items() if total]
    return rows
