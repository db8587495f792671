"""Which of many predictions a person should check first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from math import inf, isfinite, nan
from pathlib import Path
from typing import Any

from delineate.calibration import Calibration, Confidence
from delineate.core.text import from_cell, printable
from delineate.errors import DelineateError, OutputError
from delineate.fingerprint import Oddity
from delineate.io.tables import growing_rows, put_rows

COLUMNS = (
    "subject", "target", "need", "volume_ml", "expected_dice", "mutual_dice", "seam", "volume_low_ml", "volume_high_ml",
    "dice_low", "dice_high", "no_interval", "unusual", "error", "made_by",
)  # fmt: skip

UNUSUAL = "unlike the scans it is meant for"
UNCALIBRATED = "no calibration"
NOTHING_FOUND = "nothing found"
TOO_FEW = "too few calibration subjects"


@dataclass(frozen=True)
class Review:
    """An entry in the review queue: a prediction, or a subject without one because of ``error``.

    ``need`` is how far the prediction may fall short of perfect, 0 to 1, or more if the scan is unlike the training
    scans. ``targets`` holds the figures for each target by name; ``no_interval`` says why a target has no
    calibrated intervals. ``made_by`` is a digest of everything the prediction depends on.
    """

    subject: str
    need: float
    oddities: tuple[str, ...] = ()
    targets: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    no_interval: Mapping[str, str] = field(default_factory=dict)
    error: str = ""
    made_by: str = ""

    @classmethod
    def of_failure(cls, subject: str, error: DelineateError) -> Review:
        """A subject without a prediction, which comes before all others."""
        return cls(subject, inf, error=str(error))

    def rows(self) -> list[dict[str, Any]]:
        """One row per target; a single row without a target if there is no prediction."""
        about = {
            "subject": self.subject,
            "need": round(self.need, 4) if isfinite(self.need) else nan,
            "unusual": "; ".join(self.oddities),
            "error": self.error,
            "made_by": self.made_by,
        }
        return [
            {**about, "target": target, **values, "no_interval": self.no_interval.get(target, "")}
            for target, values in (self.targets or {"": {}}).items()
        ]


def review(
    subject: str,
    confidences: Mapping[str, Confidence],
    oddities: Sequence[Oddity],
    calibration: Calibration | None,
    made_by: str = "",
) -> Review:
    """How urgently a prediction should be checked.

    The doubt about a target is 1 minus the lower of two values: the lower end of its Dice interval and its mutual
    Dice. Without either, it is 1 minus the expected Dice; a target that was not found has a doubt of 1. ``need`` is
    the largest doubt plus the distance of the most unusual thing about the scan.

    Intervals hold for scans like those that a bundle was trained or calibrated on. A scan unlike them gets none,
    although the interval it would have had still counts towards the order.
    """
    targets, why, doubts = {}, {}, []
    for name, confidence in confidences.items():
        dice, volume = (nan, nan), (nan, nan)
        if calibration is not None:
            dice, volume = (calibration.dice_interval(name, confidence), calibration.volume_interval(name, confidence))
        known = [v for v in (dice[0], confidence.mutual_dice) if isfinite(v)] or [confidence.expected_dice]
        doubts.append(1 - min(v if isfinite(v) else 0.0 for v in known))
        if oddities:
            dice, volume = (nan, nan), (nan, nan)
            why[name] = UNUSUAL
        elif calibration is None:
            why[name] = UNCALIBRATED
        elif not isfinite(dice[0]):
            why[name] = TOO_FEW if isfinite(confidence.expected_dice) else NOTHING_FOUND
        targets[name] = {
            "volume_ml": confidence.volume_ml,
            "volume_low_ml": volume[0],
            "volume_high_ml": volume[1],
            "expected_dice": confidence.expected_dice,
            "dice_low": dice[0],
            "dice_high": dice[1],
            "mutual_dice": confidence.mutual_dice,
            "seam": confidence.seam,
        }
    need = max(doubts, default=1.0) + max((oddity.distance for oddity in oddities), default=0.0)
    return Review(subject, need, tuple(oddity.text for oddity in oddities), targets, why, made_by=made_by)


def write_queue(path: Path, reviews: Sequence[Review]) -> None:
    """Enter reviews in a CSV with a row per subject and target, most urgent first (:func:`put_rows`)."""
    if reviews:
        put_rows(path, COLUMNS, [row for one in reviews for row in one.rows()], _most_urgent)


def read_queue(path: Path) -> list[dict[str, str]]:
    """The rows of a file that :func:`write_queue` wrote, as text; none if there is no file.

    Raises :class:`OutputError` for any other kind of file.
    """
    return growing_rows(path, COLUMNS[:3])


def read_confidences(path: Path) -> dict[str, dict[str, Confidence]]:
    """What the predictions in such a file said of themselves, by subject and target.

    Raises as :func:`read_queue`, and :class:`OutputError` for a figure that somebody has made none.
    """
    names = [field.name for field in fields(Confidence)]
    found: dict[str, dict[str, Confidence]] = {}
    for row in read_queue(path):
        if row["target"]:
            values = {name: _figure(path, row, name) for name in names}
            found.setdefault(from_cell(row["subject"]), {})[from_cell(row["target"])] = Confidence(**values)
    return found


def _figure(path: Path, row: Mapping[str, str], column: str) -> float:
    text = row.get(column) or "nan"
    try:
        return float(text)
    except ValueError as error:
        raise OutputError(
            f"'{path}' has {column} '{printable(text[:40])}' for '{printable(from_cell(row['subject']))}'",
            fix="write a number, such as 0.93, or leave it empty",
        ) from error


def queue(reviews: Sequence[Review]) -> list[Review]:
    """Reviews, most urgent first."""
    return sorted(reviews, key=lambda one: (-one.need, one.subject))


def _most_urgent(row: Mapping[str, str]) -> tuple[bool, float, str]:
    try:
        need = float(row["need"])
    except ValueError:
        need = inf
    return not row.get("error"), -need, row["subject"]
