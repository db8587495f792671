"""What can be said about a prediction without a reference: how confident it is, and how far off it may be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import exp, inf, isfinite, isnan, log, nan
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator

from delineate.errors import BundleError, DelineateError
from delineate.io.documents import Document
from delineate.io.files import parsing
from delineate.io.sealed import AGAIN, read_small, replace_file
from delineate.metrics.conformal import Conformal
from delineate.metrics.overlap import Overlap
from delineate.specification import to_json

CALIBRATION = "calibration.json"

LEVEL = 0.9
"""Share of new subjects that an interval should cover."""


@dataclass(frozen=True)
class Confidence:
    """Confidence in one target of one scan.

    ``expected_dice`` is the Dice to expect if the probabilities are calibrated, 2 Σpm / (Σp + Σm) for
    probabilities p and mask m; undefined where nothing was found. ``mutual_dice`` is the mean pairwise Dice
    between the variants that were averaged (bundles, or the scan and its mirror image); undefined for a single
    variant. ``seam`` is how much more the probabilities change across tile borders than next to them; undefined
    for a single tile.
    """

    volume_ml: float
    expected_dice: float
    mutual_dice: float = nan
    seam: float = nan


def expected_dice(sum_probability: float, sum_within: float, voxels: int) -> float:
    """Expected Dice from the sum of all probabilities, their sum within the mask, and the mask's voxel count."""
    return 2 * sum_within / (sum_probability + voxels) if voxels else nan


def mutual_dice(masks: Sequence[NDArray[np.bool_]]) -> float:
    """Mean Dice over all pairs of masks; undefined for fewer than two masks."""
    found = [Overlap.of(a, b).dice for a, b in combinations(masks, 2)]
    return float(np.mean(found)) if found else nan


@dataclass(frozen=True)
class Case:
    """One target of one subject whose reference is known; ``patient`` is who was scanned."""

    target: str
    site: str
    patient: str
    confidence: Confidence
    dice: float
    reference_ml: float

    @property
    def dice_error(self) -> float:
        """Actual minus expected Dice; undefined where nothing was found."""
        return self.dice - self.confidence.expected_dice

    @property
    def log_volume_error(self) -> float:
        """Log of true over predicted volume: −∞ where the target is absent, undefined where nothing was found."""
        if not self.confidence.volume_ml > 0:
            return nan
        return log(self.reference_ml / self.confidence.volume_ml) if self.reference_ml > 0 else -inf


@dataclass(frozen=True)
class Calibration:
    """Errors of expected Dice and of volume (as a log ratio) on patients that the bundle never saw."""

    dice: Mapping[str, Conformal]
    log_volume: Mapping[str, Conformal]

    @classmethod
    def of(cls, cases: Sequence[Case]) -> Calibration:
        """Calibration from cases whose reference is known."""
        by_target: dict[str, list[Case]] = {}
        for case in cases:
            by_target.setdefault(case.target, []).append(case)
        patients = {name: [case.patient for case in known] for name, known in by_target.items()}
        return cls(
            {n: Conformal.of([c.dice_error for c in known], patients[n]) for n, known in by_target.items()},
            {n: Conformal.of([c.log_volume_error for c in known], patients[n]) for n, known in by_target.items()},
        )

    def dice_interval(self, target: str, confidence: Confidence, level: float = LEVEL) -> tuple[float, float]:
        """Interval for the Dice, within 0 and 1; undefined if nothing was found or calibration had too few patients."""
        low, high = self._errors(self.dice, target, level)
        if not isfinite(confidence.expected_dice) or isnan(low):
            return nan, nan
        low, high = (min(max(confidence.expected_dice + error, 0.0), 1.0) for error in (low, high))
        return low, high

    def volume_interval(self, target: str, confidence: Confidence, level: float = LEVEL) -> tuple[float, float]:
        """Interval for the true volume in ml; undefined if nothing was found or calibration had too few patients.

        It starts at 0 ml if too many of the calibration predictions found a target that was not there.
        """
        low, high = self._errors(self.log_volume, target, level)
        if not confidence.volume_ml > 0 or isnan(low):
            return nan, nan
        return confidence.volume_ml * exp(low), confidence.volume_ml * exp(high)

    @staticmethod
    def _errors(conformal: Mapping[str, Conformal], target: str, level: float) -> tuple[float, float]:
        known = conformal.get(target)
        return known.interval(level) if known is not None and known.best_level >= level else (nan, nan)

    def save(self, folder: Path) -> None:
        """Write the calibration into a bundle: errors grouped by patient, without names."""
        errors = {
            name: {target: conformal.errors for target, conformal in group.items()}
            for name, group in (("dice_errors", self.dice), ("log_volume_errors", self.log_volume))
        }
        text = to_json(CalibrationFile(**errors))
        replace_file(folder, CALIBRATION, lambda path: path.write_text(text, encoding="utf-8"))

    @classmethod
    def load(cls, folder: Path) -> Calibration | None:
        """A bundle's calibration, or None where it has none. Raises :class:`BundleError` for a damaged file."""
        path = folder / CALIBRATION
        if not path.exists():
            return None
        with parsing(path, BundleError, fix=AGAIN):
            found = CalibrationFile.of_bytes(read_small(path), path)
        return cls(
            {target: Conformal(errors) for target, errors in found.dice_errors.items()},
            {target: Conformal(errors) for target, errors in found.log_volume_errors.items()},
        )


def _by_patient(errors: object) -> object:
    """Earlier bundles list errors by scan: each scan then counts as a patient of its own."""
    return [e if isinstance(e, list | tuple) else [e] for e in errors] if isinstance(errors, list) else errors


_Errors = Annotated[tuple[tuple[float, ...], ...], BeforeValidator(_by_patient)]


class CalibrationFile(Document):
    """A bundle's ``calibration.json``: errors by target and patient, true minus predicted."""

    error: ClassVar[type[DelineateError]] = BundleError

    dice_errors: Mapping[str, _Errors]
    log_volume_errors: Mapping[str, _Errors]


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's rank correlation over the defined pairs; undefined for fewer than three, or if either is constant."""
    from scipy.stats import rankdata  # slow to import, and no prediction needs it

    a, b = np.asarray(one, float), np.asarray(other, float)
    use = np.isfinite(a) & np.isfinite(b)
    if use.sum() < 3 or not np.ptp(a[use]) or not np.ptp(b[use]):
        return nan
    return float(np.corrcoef(rankdata(a[use]), rankdata(b[use]))[0, 1])


@dataclass(frozen=True)
class IntervalCheck:
    """How the intervals of a target perform on one site's subjects; site ``""`` stands for all subjects.

    ``dice_width`` is the median width of the Dice interval, ``volume_width`` that of the volume interval relative to
    the volume, ``rank`` Spearman's correlation between expected and actual Dice. ``dice_held`` and ``volume_held``
    are the share of the site's subjects (averaged over patients) whose true value lies in an interval made without
    the site. None is undefined. The shares are also None for all subjects, where they would equal the level by
    construction.
    """

    target: str
    site: str
    dice_width: float | None
    volume_width: float | None
    rank: float | None
    n: int
    patients: int
    dice_held: float | None = None
    volume_held: float | None = None


class Intervals(Document):
    """A run's ``intervals.json``."""

    level: float
    rows: tuple[IntervalCheck, ...]


def check_intervals(cases: Sequence[Case], level: float = LEVEL) -> tuple[IntervalCheck, ...]:
    """How wide intervals are, and whether those made without a site cover that site's true values.

    One check for each target and site; those with too few patients for the level are left out. Intervals that
    are judged on a site's scans are made without any of its patients, including their scans at other sites.
    """
    checks: list[IntervalCheck] = []
    sites = sorted({case.site for case in cases})
    for target in dict.fromkeys(case.target for case in cases):
        of_target = [case for case in cases if case.target == target]
        for site in ["", *(sites if len(sites) > 1 else [])]:
            judged = [case for case in of_target if not site or case.site == site]
            whose = [case.patient for case in judged]
            known = [case for case in of_target if not site or case.patient not in whose]
            made = Calibration.of(known)
            if not known or min(made.dice[target].best_level, made.log_volume[target].best_level) < level:
                continue
            dice = [made.dice_interval(target, case.confidence, level) for case in judged]
            volume = [made.volume_interval(target, case.confidence, level) for case in judged]
            shares = [
                (high - low) / (case.confidence.volume_ml or nan)
                for (low, high), case in zip(volume, judged, strict=True)
            ]
            dice_held = made.dice[target].coverage([c.dice_error for c in judged], level, whose)
            volume_held = made.log_volume[target].coverage([c.log_volume_error for c in judged], level, whose)
            rank = rank_correlation([c.confidence.expected_dice for c in judged], [c.dice for c in judged])
            checks.append(
                IntervalCheck(
                    target=target,
                    site=site,
                    dice_width=_defined(np.nanmedian([high - low for low, high in dice])),
                    volume_width=_defined(np.nanmedian(shares)),
                    rank=_defined(rank),
                    n=len(judged),
                    patients=len(set(whose)),
                    dice_held=_defined(dice_held) if site else None,
                    volume_held=_defined(volume_held) if site else None,
                )
            )
    return tuple(checks)


def _defined(value: float) -> float | None:
    return None if isnan(value) else float(value)
