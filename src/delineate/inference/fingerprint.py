"""What the training scans look like, and how far from them a new one is, told before it is segmented."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, log

import numpy as np

from delineate.bundle import Fingerprint, Range
from delineate.core.volume import Volume
from delineate.datasets.inspection import SubjectRow

TOLERATED = {"spacing": 1.25, "field of view": 1.25, "contrast": 2.0}
"""By which factor beyond the training scans' range something may lie before it is unusual."""

_AXES = {"left to right": "RL", "back to front": "AP", "feet to head": "SI"}
_SAMPLED = 10**6


@dataclass(frozen=True)
class Oddity:
    """Something beyond what was trained on; ``distance`` is the logarithm of the factor beyond its range."""

    text: str
    distance: float


def fingerprint_of(rows: Sequence[SubjectRow]) -> Fingerprint:
    """Least, median and largest of what inspection measured of the training scans."""
    measured: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        for name, value in _geometry(row.shape, row.spacing_mm, row.orientation).items():
            measured[name].append(value)
        for target, volume_ml in row.volume_ml.items():
            measured[f"volume of {target}"].append(volume_ml)
        for channel, i in row.intensities.items():
            measured[f"contrast of {channel}"].append(_contrast(i.min, i.mean, i.p99_5))
    return Fingerprint(len(rows), {name: Range(min(v), float(np.median(v)), max(v)) for name, v in measured.items()})


def oddities(fingerprint: Fingerprint, scan: Volume, channels: Sequence[str]) -> list[Oddity]:
    """What is unusual of a scan: spacing, field of view and the contrast of its channels; the oddest first.

    Contrast is the 99.5th percentile over the mean, both above the least value: the same whatever
    numbers a scanner stores.
    """
    ranges = fingerprint.ranges
    measured = _geometry(scan.grid.shape, scan.grid.spacing_mm, scan.grid.orientation)
    for channel, voxels in zip(channels, scan.voxels, strict=True):
        some = voxels.ravel(order="K")[:: max(1, voxels.size // _SAMPLED)]
        measured[f"contrast of {channel}"] = _contrast(
            float(some.min()), float(some.mean()), float(np.percentile(some, 99.5))
        )
    found = [_oddity(name, value, ranges[name]) for name, value in measured.items() if name in ranges]
    return sorted((oddity for oddity in found if oddity is not None), key=lambda oddity: -oddity.distance)


def _geometry(shape: Sequence[int], spacing_mm: Sequence[float], orientation: str) -> dict[str, float]:
    """Spacing and field of view along the patient's axes, however the file is stored."""
    geometry = {}
    for name, letters in _AXES.items():
        axis = next(i for i, letter in enumerate(orientation) if letter in letters)
        geometry[f"spacing from {name}"] = float(spacing_mm[axis])
        geometry[f"field of view from {name}"] = float(shape[axis] * spacing_mm[axis])
    return geometry


def _contrast(least: float, mean: float, high: float) -> float:
    return (high - least) / (mean - least) if mean > least else 1.0


def _oddity(name: str, value: float, trained: Range) -> Oddity | None:
    low, high = trained.min, trained.max
    factor = max(low / value if value > 0 else inf, value / high if high > 0 else inf)
    kind = next(kind for kind in TOLERATED if name.startswith(kind))
    if factor <= TOLERATED[kind]:
        return None
    unit = "" if kind == "contrast" else " mm"
    usual = f"{low:.3g} to {high:.3g}" if f"{low:.3g}" != f"{high:.3g}" else f"{low:.3g}"
    return Oddity(f"{name} {value:.3g}{unit} (trained on {usual}{unit})", log(min(factor, 1e6)))
