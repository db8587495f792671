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

from delineate.errors import BundleError
from delineate.io.files import writing_beside
from delineate.metrics.conformal import Conformal
from delineate.metrics.overlap import Overlap

LEVEL = 0.9
"""Share of new subjects that an interval is to cover."""

_FILE = "calibration.json"


@dataclass(frozen=True)
class Confidence:
    """Of one target of one scan.

    ``expected_dice`` is the Dice that the probabilities promise if they mean what they say, 2 Σpm /
    (Σp + Σm) of probabilities p and mask m; undefined where nothing is found. ``agreement`` is the
    mean Dice of the variants that were averaged (bundles, or the scan and its mirror image) with
    each other; undefined of a single one.
    """

    volume_ml: float
    expected_dice: float
    agreement: float = nan


def expected_dice(sum_probability: float, sum_within: float, voxels: int) -> float:
    """From the sum of probabilities, that within the mask, and the mask's voxels."""
    return 2 * sum_within / (sum_probability + voxels) if voxels else nan


def mutual_dice(masks: Sequence[NDArray[np.bool_]]) -> float:
    """Mean Dice of every two masks; undefined of fewer than two."""
    found = [Overlap.of(a, b).dice for a, b in combinations(masks, 2)]
    return float(np.mean(found)) if found else nan


@dataclass(frozen=True)
class Calibration:
    """Errors on subjects that the bundle never saw: of expected Dice, and of volume as a logarithm of the ratio."""

    dice: Mapping[str, Conformal]
    log_volume: Mapping[str, Conformal]

    @classmethod
    def of(cls, rows: Sequence[tuple[str, Confidence, float, float]]) -> Calibration:
        """From target, confidence, true Dice and reference volume of every subject and target."""
        dice: dict[str, list[float]] = {}
        volume: dict[str, list[float]] = {}
        for target, confidence, true_dice, reference_ml in rows:
            dice.setdefault(target, []).append(true_dice - confidence.expected_dice)
            found = confidence.volume_ml > 0 and reference_ml > 0
            volume.setdefault(target, []).append(log(reference_ml / confidence.volume_ml) if found else nan)
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

    def coverage(self, level: float = LEVEL) -> dict[str, dict[str, float]]:
        """By target, the share of subjects whose Dice and volume the others' intervals cover, and n.

        Only of targets that were found, and are there, in more subjects than the level needs.
        """
        return {
            target: {"dice": dice.coverage(level), "volume": volume.coverage(level), "n": len(dice.errors)}
            for (target, dice), volume in zip(self.dice.items(), self.log_volume.values(), strict=True)
            if all(Conformal(c.errors[1:]).best_level >= level for c in (dice, volume))
        }

    def save(self, folder: Path) -> None:
        """Write it into a bundle."""
        contents = {
            name: {target: conformal.errors for target, conformal in group.items()}
            for name, group in (("dice_errors", self.dice), ("log_volume_errors", self.log_volume))
        }
        with writing_beside(folder / _FILE) as path:
            path.write_text(json.dumps(contents, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Calibration | None:
        """A bundle's, or None where it has none. Raises :class:`BundleError` for a damaged one."""
        path = folder / _FILE
        if not path.exists():
            return None
        try:
            contents = json.loads(path.read_text(encoding="utf-8"))
            groups = (
                {target: Conformal(tuple(map(float, errors))) for target, errors in contents[name].items()}
                for name in ("dice_errors", "log_volume_errors")
            )
            return cls(*groups)
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise BundleError(f"{path} is damaged ({error}); copy the bundle again") from error
