"""What can be said of a prediction without a truth: how sure it is, and how far off it may be."""

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
"""Share of new subjects that an interval is to cover."""


@dataclass(frozen=True)
class Confidence:
    """Of one target of one scan.

    ``expected_dice`` is the Dice that the probabilities promise if they mean what they say, 2 Σpm /
    (Σp + Σm) of probabilities p and mask m; undefined where nothing is found. ``mutual_dice`` is
    the mean Dice with each other of the variants that were averaged (bundles, or the scan and its
    mirror image); undefined of a single one. ``seam`` is how much more the probabilities change across
    tiles' borders than beside them; undefined of a single tile.
    """

    volume_ml: float
    expected_dice: float
    mutual_dice: float = nan
    seam: float = nan


def expected_dice(sum_probability: float, sum_within: float, voxels: int) -> float:
    """From the sum of probabilities, that within the mask, and the mask's voxels."""
    return 2 * sum_within / (sum_probability + voxels) if voxels else nan


def mutual_dice(masks: Sequence[NDArray[np.bool_]]) -> float:
    """Mean Dice of every two masks; undefined of fewer than two."""
    found = [Overlap.of(a, b).dice for a, b in combinations(masks, 2)]
    return float(np.mean(found)) if found else nan


@dataclass(frozen=True)
class Case:
    """One target of one subject of a ``patient`` whose truth is known."""

    target: str
    site: str
    patient: str
    confidence: Confidence
    dice: float
    reference_ml: float

    @property
    def dice_error(self) -> float:
        """True less expected Dice; undefined where nothing was found."""
        return self.dice - self.confidence.expected_dice

    @property
    def log_volume_error(self) -> float:
        """Logarithm of true over predicted volume: −∞ where there is nothing, undefined where nothing was found."""
        if not self.confidence.volume_ml > 0:
            return nan
        return log(self.reference_ml / self.confidence.volume_ml) if self.reference_ml > 0 else -inf


@dataclass(frozen=True)
class Calibration:
    """Errors on patients that the bundle never saw: of expected Dice, and of volume as a logarithm of the ratio."""

    dice: Mapping[str, Conformal]
    log_volume: Mapping[str, Conformal]

    @classmethod
    def of(cls, cases: Sequence[Case]) -> Calibration:
        """From cases whose truth is known."""
        by_target: dict[str, list[Case]] = {}
        for case in cases:
            by_target.setdefault(case.target, []).append(case)
        patients = {name: [case.patient for case in known] for name, known in by_target.items()}
        return cls(
            {n: Conformal.of([c.dice_error for c in known], patients[n]) for n, known in by_target.items()},
            {n: Conformal.of([c.log_volume_error for c in known], patients[n]) for n, known in by_target.items()},
        )

    def dice_interval(self, target: str, confidence: Confidence, level: float = LEVEL) -> tuple[float, float]:
        """What the Dice will be, within 0 and 1; undefined where nothing was found or too few patients are known."""
        low, high = self._errors(self.dice, target, level)
        if not isfinite(confidence.expected_dice) or isnan(low):
            return nan, nan
        low, high = (min(max(confidence.expected_dice + error, 0.0), 1.0) for error in (low, high))
        return low, high

    def volume_interval(self, target: str, confidence: Confidence, level: float = LEVEL) -> tuple[float, float]:
        """What the true volume in ml is; undefined where nothing was found or too few patients are known.

        It begins at 0 ml where what was found has been nothing too often.
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
        """Write it into a bundle: errors by patient, without names."""
        errors = {
            name: {target: conformal.errors for target, conformal in group.items()}
            for name, group in (("dice_errors", self.dice), ("log_volume_errors", self.log_volume))
        }
        text = to_json(CalibrationFile(**errors))
        replace_file(folder, CALIBRATION, lambda path: path.write_text(text, encoding="utf-8"))

    @classmethod
    def load(cls, folder: Path) -> Calibration | None:
        """A bundle's, or None where it has none. Raises :class:`BundleError` for a damaged one."""
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
    """Earlier bundles list the errors of scans: each counts as one of a patient of its own."""
    return [e if isinstance(e, list | tuple) else [e] for e in errors] if isinstance(errors, list) else errors


_Errors = Annotated[tuple[tuple[float, ...], ...], BeforeValidator(_by_patient)]


class CalibrationFile(Document):
    """A bundle's ``calibration.json``: errors by target and patient, true minus predicted."""

    error: ClassVar[type[DelineateError]] = BundleError

    dice_errors: Mapping[str, _Errors]
    log_volume_errors: Mapping[str, _Errors]


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's, of pairs that are defined; undefined of fewer than three, or where either is all the same."""
    from scipy.stats import rankdata  # slow to import, and no prediction needs it

    a, b = np.asarray(one, float), np.asarray(other, float)
    use = np.isfinite(a) & np.isfinite(b)
    if use.sum() < 3 or not np.ptp(a[use]) or not np.ptp(b[use]):
        return nan
    return float(np.corrcoef(rankdata(a[use]), rankdata(b[use]))[0, 1])


@dataclass(frozen=True)
class IntervalCheck:
    """How intervals of a target do on a site's subjects; the site ``""`` has all subjects.

    ``dice_width`` is the median width of the Dice interval, ``volume_width`` that of the volume interval as a share
    of the volume; ``rank`` the rank correlation (Spearman's) of expected and true Dice; ``dice_held`` and
    ``volume_held`` the shares of the site's subjects (means over patients) whose truth lies in an interval made
    without the site. None is undefined; all subjects have no shares, which would be the level by construction.
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
    """How wide intervals are, and whether those made without a site's subjects hold that site's truth.

    Checks for each target and site; sites and targets with too few patients for the level are left out. A
    patient seen at several sites is no stranger to any: intervals that judge a site's scans are made without
    its patients.
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
