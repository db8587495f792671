"""Tables as CSV: no cell is a formula or a terminal command, and names read back as they were written."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from delineate.core.text import cell, from_cell
from delineate.errors import BadFormat
from delineate.io.files import parsing, read_text, writing_beside


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows with these columns, all or nothing; None and NaN become empty. Raises :class:`OutputError`."""
    with writing_beside(path) as beside, beside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([as_cell(column) for column in columns])
        writer.writerows([as_cell(row.get(column)) for column in columns] for row in rows)


def as_cell(value: Any) -> Any:
    """What is written for a value: text through :func:`delineate.core.text.cell`, numbers as they are."""
    if isinstance(value, str):
        return cell(value)
    return "" if value is None or value != value else value


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a table written by :func:`write_table`, as text. Raises :class:`BadFormat` where it is damaged."""
    with parsing(path, BadFormat):
        header, *rows = csv.reader(io.StringIO(read_text(path), newline="")) if path.stat().st_size else [[]]
        columns = [from_cell(name) for name in header]
        if len(set(columns)) < len(columns) or any(len(row) != len(columns) for row in rows):
            raise BadFormat(
                f"'{path}' is not a table: a row is longer or shorter than the first, or a column appears twice"
            )
        return [dict(zip(columns, map(from_cell, row), strict=True)) for row in rows]
