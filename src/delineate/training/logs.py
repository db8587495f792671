"""Curves of a training: CSV files that a resumed run continues."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

TRAINING_CURVE, VALIDATION_LOSS_CURVE, VALIDATION_CURVE = "training.csv", "validation_loss.csv", "validation.csv"


class CurveLogger(Logger):
    """Appends each step's numbers to ``training.csv``, each validation's to ``validation.csv``.

    ``validation_loss.csv`` has the loss on tiles of the validation subjects, every so many steps.

    Lightning's own CSV logger empties the folder when a run is resumed; this one drops only the
    rows after the step that training goes on from.
    """

    def __init__(self, folder: Path, resumed_from: int) -> None:
        super().__init__()
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        # Losses are numbered by the steps before them, validations by the steps behind them.
        _keep_until(folder / TRAINING_CURVE, resumed_from - 1)
        _keep_until(folder / VALIDATION_LOSS_CURVE, resumed_from - 1)
        _keep_until(folder / VALIDATION_CURVE, resumed_from)

    @property
    def name(self) -> str:
        return "curves"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The recipe is written beside; nothing to do."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        curve = {"loss": TRAINING_CURVE, "validation_loss": VALIDATION_LOSS_CURVE}
        path = self.folder / curve.get(next(iter(metrics)), VALIDATION_CURVE)
        row = {"step": step, **{name: f"{value:.6g}" for name, value in metrics.items()}}
        new = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(row))
            if new:
                writer.writeheader()
            writer.writerow(row)


def _keep_until(path: Path, step: int) -> None:
    """Keep the rows of ``path`` up to ``step``; a last row cut short by a crash goes too."""
    if not path.exists():
        return
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = list(csv.reader(file)) or [[]]
    kept = [row for row in rows if len(row) == len(header) and row[0].isdecimal() and int(row[0]) <= step]
    if not kept:
        path.unlink()
        return
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *kept])
