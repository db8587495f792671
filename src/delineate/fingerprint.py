"""What the scans of a training, or a calibration, look like, and how far a new scan lies from them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf, log
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from delineate.core.volume import Volume
from delineate.datasets.inspection import SubjectRow
from delineate.specification import Text

Quantity = Literal["spacing", "field_of_view", "contrast", "volume"]
PATIENT_AXES = {"RL": "left to right", "AP": "back to front", "SI": "feet to head"}


@dataclass(frozen=True)
class Range:
    """Minimum, median and maximum of a quantity over the training scans.

    ``of`` is an axis of :data:`PATIENT_AXES` for spacing and field of view (mm), a channel for contrast,
    a target for volume (ml).
    """

    quantity: Quantity
    of: Text
    min: float
    median: float
    max: float


@dataclass(frozen=True)
class Fingerprint:
    """What the training scans look like: how many there are, and the range of each measured quantity."""

    subjects: Annotated[int, Field(ge=0)] = 0
    ranges: Annotated[tuple[Range, ...], Field(max_length=2**17)] = ()

    def range(self, quantity: Quantity, of: str) -> Range | None:
        """The range of one quantity; None where it was not measured."""
        return next((r for r in self.ranges if (r.quantity, r.of) == (quantity, of)), None)


TOLERATED: dict[Quantity, float] = {"spacing": 1.25, "field_of_view": 1.25, "contrast": 2.0}
"""Factor by which a value may lie beyond the range of the training scans before it counts as unusual."""

_SAMPLED = 10**6


_Measured = dict[tuple[Quantity, str], float]
"""Measurements of one scan, keyed by quantity and by the axis, channel or target measured."""


@dataclass(frozen=True)
class Oddity:
    """A property outside the range trained on; ``distance`` is the logarithm of the factor by which it lies outside."""

    text: str
    distance: float


def fingerprint_of(rows: Sequence[SubjectRow]) -> Fingerprint:
    """Minimum, median and maximum of each quantity that inspection measured on the training scans."""
    measured: dict[tuple[Quantity, str], list[float]] = defaultdict(list)
    for row in rows:
        of_row = _geometry(row.shape, row.spacing_mm, row.orientation)
        of_row |= {("volume", target): volume_ml for target, volume_ml in row.volume_ml.items()}
        of_row |= {("contrast", channel): _contrast(i.min, i.mean, i.p99_5) for channel, i in row.intensities.items()}
        for key, value in of_row.items():
            measured[key].append(value)
    ranges = (Range(*key, min(v), float(np.median(v)), max(v)) for key, v in measured.items())
    return Fingerprint(len(rows), tuple(ranges))


def merged(first: Fingerprint, second: Fingerprint) -> Fingerprint:
    """The fingerprint of both groups of scans together; a median is the larger group's."""
    larger, smaller = (first, second) if first.subjects >= second.subjects else (second, first)
    ranges = {(r.quantity, r.of): r for r in smaller.ranges}
    for r in larger.ranges:
        other = ranges.get((r.quantity, r.of), r)
        ranges[r.quantity, r.of] = replace(r, min=min(r.min, other.min), max=max(r.max, other.max))
    return Fingerprint(first.subjects + second.subjects, tuple(ranges.values()))


def oddities(
    fingerprint: Fingerprint, scan: Volume, channels: Sequence[str], known: str = "trained on"
) -> list[Oddity]:
    """Anything unusual about a scan's spacing, field of view or channel contrast, most unusual first.

    ``known`` is what was done with the scans that the fingerprint is of.
    Contrast is the 99.5th percentile divided by the mean, both measured from the minimum, so that it does not
    depend on the scanner's intensity scale.
    """
    measured = measure_scan(scan, channels)
    found = [
        _oddity(value, trained, known)
        for key, value in measured.items()
        if (trained := fingerprint.range(*key)) is not None
    ]
    for channel, voxels in zip(channels, scan.voxels, strict=True):
        contrast = fingerprint.range("contrast", channel)
        # A placeholder channel, where training had none.
        if contrast is not None and contrast.min > 1.0 and voxels.min() == voxels.max():
            found.append(Oddity(f"{channel} has the same value everywhere", log(1e6)))
    return sorted((oddity for oddity in found if oddity is not None), key=lambda oddity: -oddity.distance)


def measure_scan(scan: Volume, channels: Sequence[str]) -> dict[tuple[Quantity, str], float]:
    """A scan's spacing and field of view by patient axis, and the contrast of each channel (:func:`oddities`)."""
    measured = _geometry(scan.grid.shape, scan.grid.spacing_mm, scan.grid.orientation)
    for channel, voxels in zip(channels, scan.voxels, strict=True):
        some = voxels.ravel(order="K")[:: max(1, voxels.size // _SAMPLED)]
        measured["contrast", channel] = _contrast(
            float(some.min()), float(some.mean()), float(np.percentile(some, 99.5))
        )
    return measured


def _geometry(shape: Sequence[int], spacing_mm: Sequence[float], orientation: str) -> _Measured:
    """Spacing and field of view (mm) along the patient's axes, whatever the order of axes in the file."""
    geometry: _Measured = {}
    for letters in PATIENT_AXES:
        axis = next(i for i, letter in enumerate(orientation) if letter in letters)
        geometry["spacing", letters] = float(spacing_mm[axis])
        geometry["field_of_view", letters] = float(shape[axis] * spacing_mm[axis])
    return geometry


def _contrast(least: float, mean: float, high: float) -> float:
    return (high - least) / (mean - least) if mean > least else 1.0


def _oddity(value: float, trained: Range, known: str) -> Oddity | None:
    low, high = trained.min, trained.max
    factor = max(low / value if value > 0 else inf, value / high if high > 0 else inf)
    if factor <= TOLERATED[trained.quantity]:
        return None
    unit = "" if trained.quantity == "contrast" else " mm"
    usual = f"{low:.3g} to {high:.3g}" if f"{low:.3g}" != f"{high:.3g}" else f"{low:.3g}"
    return Oddity(f"{_in_words(trained)} {value:.3g}{unit} ({known} {usual}{unit})", log(min(factor, 1e6)))


def _in_words(trained: Range) -> str:
    if trained.quantity in ("spacing", "field_of_view"):
        return f"{trained.quantity.replace('_', ' ')} from {PATIENT_AXES[trained.of]}"
    return f"{trained.quantity} of {trained.of}"
