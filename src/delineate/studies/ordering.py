"""In which order unlabelled subjects are worth annotating: by distance from those with labels, or by uncertainty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite, log
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from delineate.datasets.dataset import Dataset, load_scan
from delineate.errors import StudyError
from delineate.fingerprint import measure_scan
from delineate.inference.outputs import REVIEW
from delineate.inference.review import read_confidences
from delineate.recipe import DataSpec


@dataclass(frozen=True)
class ScanComparison:
    """Scans of a data set to be compared: of subjects that are trained on anyway, and of candidates.

    ``reading`` says how they are read; ``name`` is that of the order in a plan.
    """

    name: str
    data: str
    reading: DataSpec
    trained: tuple[str, ...]
    candidates: tuple[str, ...]


def by_distance(comparison: ScanComparison, dataset: Dataset) -> tuple[str, ...]:
    """The candidates, each time the one whose scan is farthest from all before it and from those trained on.

    Scans are compared by what a bundle's fingerprint keeps of them and needs no label: spacing, field of view and
    contrast, on a logarithmic scale, each divided by its standard deviation over all scans. Taking the farthest next is
    the greedy solution of the k-centre problem (Sener and Savarese 2018), which leaves no scan far from all labelled
    ones. The most typical candidates would be like one another, and teach little after the first.
    """
    subjects = {subject.id: subject for subject in dataset.subjects}
    channels = comparison.reading.channels or dataset.channels
    rows = []
    for name in (*comparison.trained, *comparison.candidates):
        subject = replace(subjects[name].with_channels(channels), resample=comparison.reading.resample_channels)
        rows.append(measure_scan(load_scan(subject, channels), channels))
    features = np.array([[log(max(value, 1e-9)) for value in row.values()] for row in rows])
    spread = features.std(axis=0)
    features = features[:, spread > 1e-6] / spread[spread > 1e-6]
    known, others = np.split(features, [len(comparison.trained)])
    return tuple(comparison.candidates[i] for i in farthest_first(known, others))


def farthest_first(known: NDArray[np.float64], others: NDArray[np.float64]) -> list[int]:
    """Indices of ``others`` (N, F), each the farthest from ``known`` (M, F) and all before it; ties in their order."""
    nearest = np.full(len(others), np.inf)
    for point in known:
        nearest = np.minimum(nearest, np.linalg.norm(others - point, axis=1))
    order: list[int] = []
    while len(order) < len(others):
        left = np.array([-1.0 if i in order else distance for i, distance in enumerate(nearest)])
        order.append(int(left.argmax()))
        nearest = np.minimum(nearest, np.linalg.norm(others - others[order[-1]], axis=1))
    return order


def by_uncertainty(run: Path, candidates: Sequence[str]) -> tuple[str, ...]:
    """The candidates by the mean expected Dice of their predictions in a test run's folder, least certain first.

    A target that was not found counts as 0. Candidates without a prediction come last: their scans cannot be read.
    Expected Dice needs no labels; intervals come from errors on labelled subjects, and have no part in this. Raises
    :class:`StudyError` if no candidate has a prediction.
    """
    found = read_confidences(run / "predictions" / REVIEW)
    expected = {
        name: float(np.mean([c.expected_dice if isfinite(c.expected_dice) else 0.0 for c in found[name].values()]))
        for name in candidates
        if name in found
    }
    if not expected:
        raise StudyError(f"'{run.name}' has no predictions to order subjects by", fix="see its log, and run it again")
    return tuple(sorted(candidates, key=lambda name: (expected.get(name, np.inf), name)))
