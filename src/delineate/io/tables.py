"""Tables as CSV: no cell is a formula or a terminal command, and names read back as they were written."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from delineate.core.text import cell, from_cell, printable
from delineate.errors import BadFormat, OutputError
from delineate.io.files import parsing, read_text, writing_beside


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows with these columns, all or nothing; None and NaN become empty. Raises :class:`OutputError`."""
    with writing_beside(path) as beside, beside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([as_cell(column) for column in columns])
        writer.writerows([as_cell(row.get(column)) for column in columns] for row in rows)


def as_cell(value: Any) -> Any:
    """The cell for a value: text through :func:`delineate.core.text.cell`, numbers unchanged."""
    if isinstance(value, str):
        return cell(value)
    return "" if value is None or value != value else value


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a table written by :func:`write_table`, as text. Raises :class:`BadFormat` if it is damaged."""
    with parsing(path, BadFormat):
        header, *rows = csv.reader(io.StringIO(read_text(path), newline="")) if path.stat().st_size else [[]]
        columns = [from_cell(name) for name in header]
        if len(set(columns)) < len(columns) or any(len(row) != len(columns) for row in rows):
            raise BadFormat(
                f"'{path}' is not a table: a row is longer or shorter than the first, or a column appears twice"
            )
        return [dict(zip(columns, map(from_cell, row), strict=True)) for row in rows]


def put_rows(
    path: Path,
    columns: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    order: Callable[[Mapping[str, str]], Any],
    first: Callable[[list[dict[str, str]]], None] = lambda rows: None,
) -> None:
    """Put rows into a table that grows, sorted by ``order``. The first column names a subject.

    Rows of the same subjects are replaced; others, and columns that somebody added, are unchanged; numbers have four
    decimals, or four digits if they are small, and undefined ones are left empty. The file is complete at any moment,
    even if other processes write to the folder. ``first`` is called with all rows before they are written, so it has
    seen every row in the table. Raises :class:`OutputError`.
    """
    key = columns[0]
    now = {printable(str(row[key])) for row in rows}
    with _alone_in(path.parent):
        there = growing_rows(path, columns[:3])
        kept = [row for row in there if from_cell(row[key]) not in now]
        kept += [{name: _as_text(value) for name, value in row.items()} for row in rows]
        kept.sort(key=order)
        first(kept)
        with writing_beside(path) as beside, beside.open("w", newline="", encoding="utf-8") as file:
            everything = dict.fromkeys((*columns, *(there[0] if there else ())))
            writer = csv.DictWriter(file, everything, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(kept)


def growing_rows(path: Path, needed: Sequence[str]) -> list[dict[str, str]]:
    """The rows of the file that :func:`put_rows` wrote, unparsed; none if there is no file.

    Raises :class:`OutputError` for a file that lacks one of the ``needed`` columns: it is something else.
    """
    if not path.exists():
        return []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file, restkey="", restval="")
            rows = [{name: value for name, value in row.items() if name} for row in table]
            known = set(needed) <= set(table.fieldnames or ())
    except (OSError, ValueError, csv.Error) as error:
        raise OutputError(f"'{path}' cannot be read ({error})", fix="move it away, or choose another folder") from error
    if not known:
        raise OutputError(f"'{path}' is not a list from predict", fix="move it away, or choose another folder")
    return rows


def _as_text(value: Any) -> str:
    if isinstance(value, float):
        return "" if value != value else str(float(f"{value:.4g}") if abs(value) < 1 else round(value, 4))
    return cell(str(value))


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Lock the folder against other processes that add to the same file, if the system can."""
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
        with suppress(OSError):  # not every network disk can
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
