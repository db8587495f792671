"""What can be said of a prediction without a truth: how sure it is, and how far off it may be."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import exp, inf, isfinite, log, nan
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from delineate.bundle import CALIBRATION
from delineate.errors import BundleError
from delineate.io.sealed import read_json, read_small, replace_file
from delineate.metrics.conformal import Conformal
from delineate.metrics.overlap import Overlap

LEVEL = 0.9
"""Share of new subjects that an interval is to cover."""


@dataclass(frozen=True)
class Confidence:
    """Of one target of one scan.

    ``expected_dice`` is the Dice that the probabilities promise if they mean what they say, 2 Σpm /
    (Σp + Σm) of probabilities p and mask m; undefined where nothing is found. ``agreement`` is the
    mean Dice of the variants that were averaged (bundles, or the scan and its mirror image) with
    each other; undefined of a single one. ``seam`` is how much more the probabilities change across
    tiles' borders than beside them; undefined of a single tile.
    """

    volume_ml: float
    expected_dice: float
    agreement: float = nan
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
    """One target of one subject whose truth is known."""

    target: str
    site: str
    confidence: Confidence
    dice: float
    reference_ml: float

    @property
    def dice_error(self) -> float:
        """True less expected Dice; undefined where nothing was found."""
        return self.dice - self.confidence.expected_dice

    @property
    def log_volume_error(self) -> float:
        """Logarithm of true over predicted volume; undefined where either is nothing."""
        found = self.confidence.volume_ml > 0 and self.reference_ml > 0
        return log(self.reference_ml / self.confidence.volume_ml) if found else nan


@dataclass(frozen=True)
class Calibration:
    """Errors on subjects that the bundle never saw: of expected Dice, and of volume as a logarithm of the ratio."""

    dice: Mapping[str, Conformal]
    log_volume: Mapping[str, Conformal]

    @classmethod
    def of(cls, cases: Sequence[Case]) -> Calibration:
        """From cases whose truth is known."""
        dice: dict[str, list[float]] = {}
        volume: dict[str, list[float]] = {}
        for case in cases:
            dice.setdefault(case.target, []).append(case.dice_error)
            volume.setdefault(case.target, []).append(case.log_volume_error)
        return cls(
            {name: Conformal(tuple(errors)) for name, errors in dice.items()},
            {name: Conformal(tuple(errors)) for name, errors in volume.items()},
        )

    def dice_interval(self, target: str, confidence: Confidence, level: float = LEVEL) -> tuple[float, float]:
        """What the Dice will be, within 0 and 1; undefined where nothing was found or too few are known."""
        low, high = self._errors(self.dice, target, level)
        if not isfinite(confidence.expected_dice) or not isfinite(low + high):
            return nan, nan
        low, high = (min(max(confidence.expected_dice + error, 0.0), 1.0) for error in (low, high))
        return low, high

    def volume_interval(self, target: str, confidence: Confidence, level: float = LEVEL) -> tuple[float, float]:
        """What the true volume in ml is; undefined where nothing was found or too few are known."""
        low, high = self._errors(self.log_volume, target, level)
        if not confidence.volume_ml > 0 or not isfinite(low + high):
            return nan, nan
        return confidence.volume_ml * exp(low), confidence.volume_ml * exp(high)

    @staticmethod
    def _errors(conformal: Mapping[str, Conformal], target: str, level: float) -> tuple[float, float]:
        return conformal[target].interval(level) if target in conformal else (-inf, inf)

    def save(self, folder: Path) -> None:
        """Write it into a bundle."""
        contents = {
            name: {target: conformal.errors for target, conformal in group.items()}
            for name, group in (("dice_errors", self.dice), ("log_volume_errors", self.log_volume))
        }
        text = json.dumps(contents, indent=1, allow_nan=False)
        replace_file(folder, CALIBRATION, lambda path: path.write_text(text, encoding="utf-8"))

    @classmethod
    def load(cls, folder: Path) -> Calibration | None:
        """A bundle's, or None where it has none. Raises :class:`BundleError` for a damaged one."""
        path = folder / CALIBRATION
        if not path.exists():
            return None
        try:
            contents = read_json(read_small(path), path)
            groups = (
                {target: Conformal(tuple(map(float, errors))) for target, errors in contents[name].items()}
                for name in ("dice_errors", "log_volume_errors")
            )
            return cls(*groups)
        except (ValueError, KeyError, AttributeError, TypeError, OverflowError) as error:
            raise BundleError(f"{path} is damaged ({error}); copy the bundle again") from error


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's, of pairs that are defined; undefined of fewer than three, or where either is all the same."""
    from scipy.stats import rankdata  # slow to import, and no prediction needs it

    a, b = np.asarray(one, float), np.asarray(other, float)
    use = np.isfinite(a) & np.isfinite(b)
    if use.sum() < 3 or not np.ptp(a[use]) or not np.ptp(b[use]):
        return nan
    return float(np.corrcoef(rankdata(a[use]), rankdata(b[use]))[0, 1])


def check_intervals(cases: Sequence[Case], level: float = LEVEL) -> list[dict[str, str | float]]:
    """How wide intervals are, and whether those made without a site's subjects hold that site's truth.

    A row for each target and site: the median width of the Dice interval, that of the volume interval
    as a share of the volume, the rank correlation (Spearman's) of expected and true Dice, the shares of
    the site's subjects that both intervals hold, and n; the site ``""`` has all subjects and no shares,
    which would be the level by construction. Sites and targets without subjects enough for the level
    are left out.
    """
    rows: list[dict[str, str | float]] = []
    sites = sorted({case.site for case in cases})
    for target in dict.fromkeys(case.target for case in cases):
        of_target = [case for case in cases if case.target == target]
        for site in ["", *(sites if len(sites) > 1 else [])]:
            known = [case for case in of_target if not site or case.site != site]
            judged = [case for case in of_target if not site or case.site == site]
            made = Calibration.of(known)
            if not known or min(made.dice[target].best_level, made.log_volume[target].best_level) < level:
                continue
            dice = [made.dice_interval(target, case.confidence, level) for case in judged]
            volume = [made.volume_interval(target, case.confidence, level) for case in judged]
            shares = [
                (high - low) / (case.confidence.volume_ml or nan)
                for (low, high), case in zip(volume, judged, strict=True)
            ]
            row: dict[str, str | float] = {
                "target": target,
                "site": site,
                "dice_width": float(np.nanmedian([high - low for low, high in dice])),
                "volume_width": float(np.nanmedian(shares)),
                "rank": rank_correlation([c.confidence.expected_dice for c in judged], [c.dice for c in judged]),
                "n": len(judged),
            }
            if site:
                row["dice_held"] = made.dice[target].coverage([case.dice_error for case in judged], level)
                row["volume_held"] = made.log_volume[target].coverage([c.log_volume_error for c in judged], level)
            rows.append(row)
    return rows
