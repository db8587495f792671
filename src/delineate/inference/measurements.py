"""Measurements of predicted targets, volumes, boxes and quantities within them, as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from numpy.typing import NDArray

from delineate.core.grid import AXES, box_around
from delineate.core.targets import Targets
from delineate.core.text import from_cell
from delineate.core.volume import LabelVolume
from delineate.errors import OutputError
from delineate.io.files import writing_beside
from delineate.io.tables import growing_rows, put_rows
from delineate.metrics.quantities import Measurement, QuantityMap, measure_box

if TYPE_CHECKING:
    from delineate.io.dicom_sr import Readings

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
    **{
        f"{end}_{axis}_ras_mm": f"{which} {axis} of the target in the patient, in mm; {axis} grows to the {towards}"
        for axis, towards in zip(AXES, ("right", "front", "head"), strict=True)
        for end, which in (("low", "lowest"), ("high", "highest"))
    },
    "made_from": "a digest of the label, the map and the settings, by which a measurement is recognised",
}
"""Columns of the table, which has a row for each subject, target and quantity. Empty: undefined, as the mean of an
empty target is."""

_TEXT = {"subject", "target", "quantity", "unit", "made_from"}


class Measured(NamedTuple):
    """A target of a scan, and what was found by measuring a quantity within it."""

    target: str
    quantity: QuantityMap
    found: Measurement


def measure_label(label: LabelVolume, targets: Targets, maps: Mapping[QuantityMap, NDArray]) -> list[Measured]:
    """Measure every target of a label with each map (X, Y, Z) of a quantity on its grid."""
    # Everything that follows is looked at only around what there is.
    box = box_around(label.voxels != 0) or (slice(0, 0),) * 3
    foreground = label.voxels[box]
    measured = []
    for name, values in targets.values.items():
        mask = Targets({name: values}).masks(foreground)[name]
        if (there := box_around(mask)) is None:
            found = measure_box(None, None, maps, label.grid)
        else:
            within = tuple(
                slice(whole.start + part.start, whole.start + part.stop) for whole, part in zip(box, there, strict=True)
            )
            found = measure_box(mask[there], within, maps, label.grid)
        measured += [Measured(name, quantity, one) for quantity, one in zip(maps, found, strict=True)]
    return measured


def by_segment(measured: Sequence[Measured], channels: Sequence[str]) -> dict[str, Readings]:
    """What was measured by target, as a report in DICOM has it. ``channels`` are those of the scan itself."""
    from delineate.io.dicom_sr import Reading, Readings  # needs the libraries for DICOM

    volumes = {target: found.volume_ml for target, _, found in measured}
    quantities: dict[str, list[Reading]] = {target: [] for target in volumes}
    for target, quantity, found in measured:
        numbers = found.mean, found.median, found.sd, found.above_threshold_percent
        quantities[target].append(Reading(str(quantity), quantity.unit, quantity.channel in channels, *numbers))
    return {target: Readings(volume_ml, quantities[target]) for target, volume_ml in volumes.items()}


def rows_of(subject: str, measured: Sequence[Measured], made_from: Mapping[str, str] | None = None) -> list[dict]:
    """A row for each target and quantity, with the columns of :data:`DEFINITIONS`.

    ``made_from`` are digests by channel; without them, the column is left out.
    """
    rows = []
    for target, quantity, found in measured:
        row: dict[str, Any] = {
            "subject": subject,
            "target": target,
            "quantity": quantity.channel,
            "unit": quantity.unit,
            "quantity_mean": found.mean,
            "quantity_median": found.median,
            "quantity_sd": found.sd,
            "threshold": float("nan") if quantity.threshold is None else float(quantity.threshold),
            "margin_mm": float(quantity.margin_mm),
            "volume_ml": found.volume_ml,
            "measured_ml": found.measured_ml,
            "above_threshold_percent": found.above_threshold_percent,
        }
        for end, corner in (("low", found.low_ras_mm), ("high", found.high_ras_mm)):
            row |= {f"{end}_{axis}_ras_mm": value for axis, value in zip(AXES, corner, strict=True)}
        if made_from is not None:
            row["made_from"] = made_from[quantity.channel]
        rows.append({column: row[column] for column in DEFINITIONS if column in row})
    return rows


def write_measurements(path: Path, rows: list[dict[str, Any]]) -> None:
    """Put rows into ``path``, a CSV by subject, and all of its rows into the JSON next to it.

    Raises :class:`OutputError`.
    """

    def as_json(everything: list[dict[str, str]]) -> None:
        found = [{column: _value(column, row.get(column, "")) for column in DEFINITIONS} for row in everything]
        # A row a line: the encoder that indents is slow, and all rows are written after every subject.
        lines = ",\n".join(json.dumps(row, allow_nan=False) for row in found)
        with writing_beside(beside_as_json(path)) as file:
            text = f'{{"measurements": [\n{lines}\n],\n"definitions": {json.dumps(DEFINITIONS, indent=2)}}}\n'
            file.write_text(text, encoding="utf-8")

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
    if column in _TEXT:
        return from_cell(text)
    try:
        value = float(text)
    except ValueError:
        return None  # undefined, or edited by a person
    return value if isfinite(value) else None
