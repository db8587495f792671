"""What a person should look at first among many predictions."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, nan
from pathlib import Path
from typing import Any

from delineate.inference.confidence import Calibration, Confidence
from delineate.inference.fingerprint import Oddity
from delineate.io.files import writing_beside


@dataclass(frozen=True)
class Review:
    """One prediction's place in the queue.

    ``need`` is how much worse than perfect it may be, 0 to 1, and more where the scan is unlike
    those that were trained on. ``targets`` has the numbers of each target by name.
    """

    subject: str
    need: float
    oddities: tuple[str, ...]
    targets: Mapping[str, Mapping[str, float]]

    def rows(self) -> list[dict[str, Any]]:
        """One for each target."""
        first = {"subject": self.subject, "need": round(self.need, 4)}
        return [
            {**first, "target": target, **values, "unusual": "; ".join(self.oddities)}
            for target, values in self.targets.items()
        ]


def review(
    subject: str,
    confidences: Mapping[str, Confidence],
    oddities: Sequence[Oddity],
    calibration: Calibration | None,
) -> Review:
    """How urgently a prediction should be looked at.

    Of each target the doubt is 1 less the lower end of its Dice's interval, or where the bundle has
    no calibration 1 less the least of expected Dice and agreement; a target that was not found is
    in doubt altogether. The largest counts, and the oddest thing about the scan is added.
    """
    targets, doubts = {}, []
    for name, confidence in confidences.items():
        dice, volume = (nan, nan), (nan, nan)
        if calibration is not None:
            dice, volume = (calibration.dice_interval(name, confidence), calibration.volume_interval(name, confidence))
        targets[name] = {
            "volume_ml": confidence.volume_ml,
            "volume_low_ml": volume[0],
            "volume_high_ml": volume[1],
            "expected_dice": confidence.expected_dice,
            "dice_low": dice[0],
            "dice_high": dice[1],
            "agreement": confidence.agreement,
            "seam": confidence.seam,
        }
        known = [v for v in (dice[0], confidence.agreement) if isfinite(v)] or [confidence.expected_dice]
        doubts.append(1 - min(v if isfinite(v) else 0.0 for v in known))
    need = max(doubts, default=1.0) + max((oddity.distance for oddity in oddities), default=0.0)
    return Review(subject, need, tuple(oddity.text for oddity in oddities), targets)


def write_queue(path: Path, reviews: Sequence[Review]) -> None:
    """A CSV with a row for each subject and target, the neediest first; undefined is left empty."""
    rows = [row for one in queue(reviews) for row in one.rows()]
    if not rows:
        return
    with writing_beside(path) as beside, beside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {
                key: "" if isinstance(v, float) and v != v else round(v, 4) if isinstance(v, float) else v
                for key, v in row.items()
            }
            for row in rows
        )


def queue(reviews: Sequence[Review]) -> list[Review]:
    """The neediest first."""
    return sorted(reviews, key=lambda one: (-one.need, one.subject))
