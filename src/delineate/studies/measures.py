"""What is measured of a run besides its predictions: time, memory, convergence, collapse, seams."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, nan, prod
from pathlib import Path
from re import fullmatch
from statistics import fmean, median
from typing import Literal

import numpy as np
import pandas as pd
from safetensors import safe_open

from delineate.io.tables import read_table
from delineate.training.events import Collapsed, Trained, read_events


@dataclass(frozen=True)
class Measure:
    """A number of each run. ``better``: which end is; None for those that are no merit."""

    name: str
    label: str
    unit: str = ""
    digits: int = 3
    better: Literal["lower"] | None = "lower"

    def shown(self, value: float) -> str:
        """The value as tables show it."""
        if np.isnan(value):
            return "–"
        if value == inf:
            return "never"
        text = f"{value:,.0f}" if self.digits == 0 else f"{value:.{self.digits}g}"
        return text.replace("-", "−")


MEASURES: dict[str, Measure] = {
    measure.name: measure
    for measure in (
        Measure("parameters", "trainable parameters", digits=0, better=None),
        Measure("steps", "training steps", digits=0, better=None),
        Measure("minutes_an_epoch", "training time per epoch", "min"),
        Measure("seconds_a_step", "training time per step", "s"),
        Measure("peak_gb", "peak memory", "GB"),
        Measure("final_loss", "training loss at the end"),
        Measure("final_test_loss", "validation loss at the end"),
        Measure("steps_to_loss", "steps until the common loss", digits=0),
        Measure("collapsed", "collapsed", digits=0),
        Measure("seam", "seam score"),
    )
}
"""``steps_to_loss``: steps until the smoothed training loss stays below the highest one that any comparable run ends
with (of the same stage, data set and loss), so that every one of them gets there. ``peak_gb``: of the GPU if it trained
on one, otherwise of the run's process."""

_TAIL = 0.1
"""Part of the training over which the loss at its end is averaged."""


@dataclass(frozen=True, eq=False)
class Curves:
    """A run's figures by step; empty where they were not measured.

    ``loss`` in training, ``test`` on validation tiles; mean ``dice`` and absolute ``volume_error_ml`` of the validation
    subjects, over all targets.
    """

    loss: pd.Series[float]
    test: pd.Series[float]
    dice: pd.Series[float]
    volume_error_ml: pd.Series[float]

    @property
    def smoothed(self) -> pd.Series[float]:
        """The training loss, averaged over a tenth of the training up to each step."""
        return self.loss.rolling(max(1, round(_TAIL * len(self.loss))), min_periods=1).mean()


def read_curves(run: Path) -> Curves:
    """The figures in a run's folder."""
    logs = run / "logs"
    return Curves(
        _series(logs / "training.csv", "loss"),
        _series(logs / "validation_loss.csv", "validation_loss"),
        _series(logs / "validation.csv", "dice"),
        _series(logs / "validation.csv", "volume_error_ml_.+"),
    )


def _series(path: Path, columns: str) -> pd.Series[float]:
    """The mean of the columns with matching names, by step."""
    rows = read_table(path) if path.is_file() else []
    names = [name for name in rows[0] if fullmatch(columns, name)] if rows else []
    if not names:
        return pd.Series(dtype=float)
    values = [fmean(float(row[name]) for name in names) for row in rows]
    return pd.Series(values, index=[int(row["step"]) for row in rows], dtype=float)


def measure_run(run: Path, curves: Curves, *, peak_gb: float) -> dict[str, float]:
    """A finished run's measures by name, except ``steps_to_loss``, which depends on the other runs."""
    events = read_events(run / "logs") if (run / "logs").is_dir() else []
    measured: dict[str, float] = {"peak_gb": peak_gb or nan, "seam": _seam(run)}
    weights = run / "bundle" / "weights.safetensors"
    if weights.is_file():
        measured["parameters"] = _parameters(weights)
    if trained := [event for event in events if isinstance(event, Trained)]:
        last = trained[-1]
        measured["steps"] = last.step
        if last.gpu_gb is not None:
            measured["peak_gb"] = last.gpu_gb
        measured["seconds_a_step"] = 60 * last.minutes / max(last.step, 1)
        if last.epochs:
            measured["minutes_an_epoch"] = last.minutes / last.epochs
        measured["collapsed"] = float(any(isinstance(event, Collapsed) for event in events))
    for name, losses in (("final_loss", curves.loss), ("final_test_loss", curves.test)):
        if len(losses):
            measured[name] = float(losses.iloc[-max(1, round(_TAIL * len(losses))) :].mean())
    return measured


def steps_to_common_loss(curves: Mapping[str, Curves]) -> dict[str, float]:
    """By run: the first step from which the smoothed loss never again exceeds the highest final one of all runs."""
    smoothed = {name: found.smoothed for name, found in curves.items() if len(found.loss)}
    if not smoothed:
        return {}
    common = max(float(losses.iloc[-1]) for losses in smoothed.values())
    steps = {}
    for name, losses in smoothed.items():
        above = np.flatnonzero(losses.to_numpy() > common)
        steps[name] = float(losses.index[above[-1] + 1]) if len(above) else float(losses.index[0])
    return steps


def _parameters(weights: Path) -> int:
    """Numbers in a file of weights, without BatchNorm's statistics."""
    with safe_open(weights, framework="np") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    return sum(prod(shape) for name, shape in shapes.items() if not name.endswith(statistics))


def _seam(run: Path) -> float:
    path = run / "evaluation" / "confidence.csv"
    values = [float(row["seam"]) for row in read_table(path) if row.get("seam")] if path.is_file() else []
    return median(values) if values else nan
