"""What a person should look at first among many predictions."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from math import inf, isfinite, nan
from pathlib import Path
from typing import Any

from delineate.calibration import Calibration, Confidence
from delineate.core.text import cell, from_cell, printable
from delineate.errors import DelineateError, OutputError
from delineate.fingerprint import Oddity
from delineate.io.files import writing_beside

COLUMNS = (
    "subject", "target", "need", "volume_ml", "expected_dice", "mutual_dice", "seam", "volume_low_ml", "volume_high_ml",
    "dice_low", "dice_high", "no_interval", "unusual", "error", "made_by",
)  # fmt: skip

UNUSUAL = "unlike the training scans"
UNCALIBRATED = "no calibration"
NOTHING_FOUND = "nothing found"
TOO_FEW = "too few calibration subjects"


@dataclass(frozen=True)
class Review:
    """One prediction's place in the queue, or that of a subject that has none because of ``error``.

    ``need`` is how much worse than perfect it may be, 0 to 1, and more where the scan is unlike
    those that were trained on. ``targets`` has the numbers of each target by name, ``no_interval`` why
    a target has no calibrated intervals. ``made_by`` is a digest of what the prediction depends on.
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
        """A subject without a prediction needs a look before all others."""
        return cls(subject, inf, error=str(error))

    def rows(self) -> list[dict[str, Any]]:
        """One for each target; one without a target where there is no prediction."""
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
    """How urgently a prediction should be looked at.

    Of each target the doubt is 1 less the lower end of its Dice's interval, or where the bundle has
    no calibration 1 less the least of expected Dice and mutual Dice; a target that was not found is
    in doubt altogether. The largest counts, and the oddest thing about the scan is added.

    Intervals come from errors on scans like those of the training: none is given for a scan that is
    unlike them, though what it would have been counts for the order.
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
    """Put reviews into a CSV with a row for each subject and target, the neediest first; undefined is left empty.

    Rows of the same subjects are replaced; others, and columns that somebody added, stay as they are.
    The file is whole at any moment, whoever else writes into the folder. Raises :class:`OutputError`.
    """
    if not reviews:
        return
    now = {printable(one.subject) for one in reviews}
    with _alone_in(path.parent):
        there = read_queue(path)
        rows = [row for row in there if from_cell(row["subject"]) not in now]
        rows += [{key: _as_cell(value) for key, value in row.items()} for one in reviews for row in one.rows()]
        columns = dict.fromkeys((*COLUMNS, *(there[0] if there else ())))
        with writing_beside(path) as beside, beside.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(sorted(rows, key=_most_urgent))


def read_queue(path: Path) -> list[dict[str, str]]:
    """The rows of :func:`write_queue`'s file as they stand in it; none where there is no file.

    Raises :class:`OutputError` for a file that is something else.
    """
    if not path.exists():
        return []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file, restkey="", restval="")
            rows = [{key: value for key, value in row.items() if key} for row in table]
            known = {"subject", "target", "need"} <= set(table.fieldnames or ())
    except (OSError, ValueError, csv.Error) as error:
        raise OutputError(f"'{path}' cannot be read ({error})", fix="move it away, or choose another folder") from error
    if not known:
        raise OutputError(f"'{path}' is not a list that predict wrote", fix="move it away, or choose another folder")
    return rows


def queue(reviews: Sequence[Review]) -> list[Review]:
    """The neediest first."""
    return sorted(reviews, key=lambda one: (-one.need, one.subject))


def _most_urgent(row: Mapping[str, str]) -> tuple[bool, float, str]:
    try:
        need = float(row["need"])
    except ValueError:
        need = inf
    return not row.get("error"), -need, row["subject"]


def _as_cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if value != value else str(round(value, 4))
    return cell(str(value))


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Hold the folder against other processes that add to the same file, where the system can lock."""
    try:
        import fcntl
    except ModuleNotFoundError:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise OutputError(f"'{folder}' cannot be written to: {error.strerror}", fix="choose another folder") from error
    try:
        with suppress(OSError):  # not every network's disk can
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
