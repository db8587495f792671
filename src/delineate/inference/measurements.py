"""Measurements of predicted targets, volumes and a quantity within them, as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from delineate.core.targets import Targets
from delineate.core.text import from_cell
from delineate.core.volume import LabelVolume
from delineate.errors import OutputError
from delineate.io.files import writing_beside
from delineate.io.tables import growing_rows, put_rows
from delineate.metrics.quantities import Measurement, QuantityMap, measure_target

DEFINITIONS = {
    "subject": "whose scan it is",
    "target": "what was delineated",
    "volume_ml": "volume of the label as written, in ml",
    "quantity": "channel or map that was measured within the target",
    "unit": "unit of the quantity, if known",
    "quantity_mean": "mean over the measured voxels",
    "quantity_median": "median over the measured voxels",
    "quantity_sd": "standard deviation over the measured voxels",
    "threshold": "threshold of the quantity, in its unit",
    "above_threshold_percent": "share of the measured voxels at or above the threshold, in percent",
    "margin_mm": "voxels were measured this far or farther inside the target's surface, in mm",
    "measured_ml": "volume of the measured voxels, in ml",
    "made_from": "a digest of the label, the map and the settings, by which a measurement is recognised",
}
"""Columns of the table. Empty: undefined, as the mean of an empty target is."""

_NUMBERS = {
    "volume_ml", "quantity_mean", "quantity_median", "quantity_sd", "threshold", "above_threshold_percent",
    "margin_mm", "measured_ml",
}  # fmt: skip


def measure_label(
    label: LabelVolume, targets: Targets, values: NDArray, quantity: QuantityMap
) -> dict[str, Measurement]:
    """Measure every target of a label with a map (X, Y, Z) of the quantity on its grid."""
    masks = targets.masks(label.voxels)
    return {name: measure_target(np.asarray(mask), values, label.grid, quantity) for name, mask in masks.items()}


def rows_of(
    subject: str, measured: Mapping[str, Measurement], quantity: QuantityMap, **more: str
) -> list[dict[str, Any]]:
    """A row for each target, with the columns of :data:`DEFINITIONS`; ``made_from`` if given."""
    rows = []
    for target, found in measured.items():
        values = asdict(found)
        read = {f"quantity_{name}": values.pop(name) for name in ("mean", "median", "sd")}
        about = {
            "subject": subject,
            "target": target,
            "quantity": quantity.channel,
            "unit": quantity.unit,
            "threshold": float("nan") if quantity.threshold is None else float(quantity.threshold),
            "margin_mm": float(quantity.margin_mm),
        }
        row = about | values | read | more
        rows.append({column: row[column] for column in DEFINITIONS if column in row})
    return rows


def write_measurements(path: Path, rows: list[dict[str, Any]]) -> None:
    """Put rows into ``path``, a CSV by subject, and all of its rows into the JSON next to it.

    Raises :class:`OutputError`.
    """

    def as_json(everything: list[dict[str, str]]) -> None:
        found = [{column: _value(column, row.get(column, "")) for column in DEFINITIONS} for row in everything]
        with writing_beside(beside_as_json(path)) as file:
            text = json.dumps({"measurements": found, "definitions": DEFINITIONS}, indent=2, allow_nan=False)
            file.write_text(text + "\n", encoding="utf-8")

    if rows:
        put_rows(path, tuple(DEFINITIONS), rows, lambda row: row["subject"], as_json)


def read_measurements(path: Path) -> list[dict[str, str]]:
    """The rows of the table that :func:`write_measurements` wrote, unparsed; none if there is no file.

    Raises :class:`OutputError` if the table, or the JSON next to it, is something else.
    """
    rows, other = growing_rows(path, tuple(DEFINITIONS)[:3]), beside_as_json(path)
    if other.exists():
        try:
            ours = "measurements" in json.loads(other.read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError):
            ours = False
        if not ours:
            raise OutputError(f"'{other}' is not a list from predict", fix="move it away, or select another folder")
    return rows


def beside_as_json(path: Path) -> Path:
    """The path of the JSON next to a table."""
    return path.with_suffix(".json")


def _value(column: str, text: str) -> Any:
    if column not in _NUMBERS:
        return from_cell(text)
    try:
        value = float(text)
    except ValueError:
        return None  # undefined, or edited by a person
    return value if isfinite(value) else None
