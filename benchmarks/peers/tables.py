"""What was measured, as the tables of a page."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from delineate.io.files import writing_beside

BEGIN, END = "<!-- measured: written by benchmarks/peers/run.py -->", "<!-- end of what is measured -->"

DEFAULTS = "each one's defaults"
"""Of tasks that each tool does with a network of its own."""

TITLES = {
    "preparation": "Preparation",
    "steps": "Training steps",
    "dice": "Dice after minutes of wall time",
    "prediction": "Prediction",
    "evaluation": "Evaluation",
}


@dataclass(frozen=True)
class Row:
    """All runs of a tool on one task. ``values`` has each number's runs, such as its ``seconds``."""

    part: str
    what: str
    tool: str
    values: dict[str, list[float]]
    command: str
    measured: list[tuple[str, str]] = field(default_factory=list)
    """When each run began, and of which commit it is."""

    def median(self, name: str) -> float:
        return statistics.median(self.values[name])

    @property
    def ours(self) -> bool:
        return self.tool.startswith("Delineate")

    def origin(self) -> str:
        """The days of the runs, and Delineate's commits."""
        days = _span([start[:10] for start, _ in self.measured])
        commits = ", ".join(dict.fromkeys(commit for _, commit in self.measured))
        return f"{days}, {commits}" if self.ours else days

    def text(self, name: str, form: str) -> str:
        """Median and range."""
        numbers = self.values.get(name, [])
        if not numbers:
            return ""
        middle, least, most = (format(n, form) for n in (statistics.median(numbers), min(numbers), max(numbers)))
        return middle if least == most else f"{middle} ({least} – {most})"


@dataclass(frozen=True)
class Column:
    """A number of each row, whether more of it is better, and how it is printed."""

    name: str
    title: str
    form: str
    more: bool | None = None


SECONDS, MEMORY = (
    Column("seconds", "seconds", ".1f", more=False),
    Column("peak_gb", "peak memory, GB", ".2f", more=False),
)
RATE, DICE = Column("steps_per_second", "steps per second", ".3f", more=True), Column("dice", "Dice", ".3f", more=True)
HD95 = Column("hd95_mm", "HD95, mm", ".2f")
COLUMNS = {
    "preparation": (SECONDS, MEMORY),
    "steps": (RATE, MEMORY),
    "dice": (
        DICE,
        Column("dice_from", "95 %, from", ".3f"),
        Column("dice_to", "to", ".3f"),
        Column("subjects", "n", ".0f"),
        Column("hd95_mm", "HD95, mm", ".2f", more=False),
        Column("hd95_mm_undefined", "targets without HD95", ".0f"),
        Column("minutes", "minutes", ".1f"),
        MEMORY,
    ),
    "prediction": (SECONDS, MEMORY, Column("least_same_voxels", "least same voxels", ".4%")),
    "evaluation": (SECONDS, MEMORY, Column("dice", "Dice", ".4f"), HD95),
}
"""The columns of each part; the first is what it is about."""


def current(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs that count."""
    return [run for run in results["runs"] if "superseded" not in run]


def _span(texts: Sequence[str]) -> str:
    least, most = min(texts), max(texts)
    return least if least == most else f"{least} to {most}"


def rows_of(results: dict[str, Any]) -> list[Row]:
    rows: dict[tuple[str, str, str], Row] = {}
    for run in current(results):
        numbers = {
            "seconds": run["seconds"],
            "minutes": run["seconds"] / 60,
            "peak_gb": run["peak_gb"],
            **run["values"],
        }
        for what in run["what"]:
            key = (run["part"], what, run["tool"])
            row = rows.setdefault(key, Row(*key, {}, run["command"]))
            row.measured.append((run["started"], run["commit"]))
            for name, number in numbers.items():
                if isinstance(number, int | float) and not isinstance(number, bool):
                    row.values.setdefault(name, []).append(float(number))
    return list(rows.values())


def losses(rows: Sequence[Row]) -> list[str]:
    """Where a row of Delineate's is worse than a peer's at the same task, by the medians."""
    found = []
    for row in rows:
        for column in COLUMNS[row.part]:
            if not row.ours or column.more is None or column.name not in row.values:
                continue
            for peer in rows:
                if (peer.part, peer.what) != (row.part, row.what) or peer.ours or column.name not in peer.values:
                    continue
                own, their = row.median(column.name), peer.median(column.name)
                if own < their if column.more else own > their:
                    numbers = f"{format(own, column.form)}, {peer.tool} {format(their, column.form)}"
                    found.append(f"{TITLES[row.part]}, {row.what}, {column.title}: {row.tool} {numbers}")
    return found


def markdown(results: dict[str, Any]) -> str:
    """All tables, what is lost first."""
    rows = rows_of(results)
    if not rows:
        return ""
    worse = losses(rows)
    lines = ["## Where Delineate is behind", ""]
    lines += [f"- {line}" for line in worse] or ["In nothing that is measured below, by the medians."]
    for part, title in TITLES.items():
        of_part = [row for row in rows if row.part == part]
        if of_part:
            lines += ["", f"## {title}", "", *table(part, of_part)]
    return "\n".join([*lines, "", *conditions(results), "", *commands(rows)])


def table(part: str, rows: Sequence[Row]) -> list[str]:
    columns = [column for column in COLUMNS[part] if any(column.name in row.values for row in rows)]
    first = columns[0]
    head = ["", "", *(column.title for column in columns)]
    relative = first.name in ("seconds", "steps_per_second")
    head += ["Delineate's speed"] * relative + ["runs", "measured"]
    lines = [_line(head), _line(["---"] * len(head))]
    named = ""
    order = [row.what for row in rows]
    for row in sorted(rows, key=lambda row: (order.index(row.what), not row.ours)):
        cells = [row.what if row.what != named else "", row.tool]
        named = row.what
        cells += [row.text(column.name, column.form) for column in columns]
        if relative:
            cells.append(times(row, [r for r in rows if r.what == row.what], first))
        lines.append(_line([*cells, str(len(row.values["seconds"])), row.origin()]))
    return lines


def times(row: Row, same: Sequence[Row], column: Column) -> str:
    """How many times as fast as a peer's row each of Delineate's rows is; nothing where their networks differ."""
    ours = [r for r in same if r.ours]
    if row.ours or not ours or row.what.endswith(DEFAULTS):
        return ""
    ratios = [r.median(column.name) / row.median(column.name) for r in ours]
    return "; ".join(f"{ratio if column.more else 1 / ratio:.1f} ×" for ratio in ratios)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def conditions(results: dict[str, Any]) -> list[str]:
    machine, versions, runs = results["machine"], results["versions"], current(results)
    when = _span([run["started"][:10] for run in runs])
    others = max(run["others_percent"] for run in runs)
    about = f"{machine['cores']} cores ({machine['processor']}), {machine['memory, GiB']} GiB, {machine['system']}"
    return [
        "## Conditions",
        "",
        f"{about}; {when}. Programs other than those measured took at most {others:g} % of the cores' time during "
        f"a run. Versions: {', '.join(f'{name} {number}' for name, number in versions.items())}. *Measured* names "
        "the day and, for Delineate, the commit.",
    ]


def commands(rows: Sequence[Row]) -> list[str]:
    lines = [
        "## Commands",
        "",
        "As they were run; `OUT`, `SCRATCH` (emptied before each) and `ENVIRONMENTS` are folders.",
    ]
    for part, title in TITLES.items():
        shown = [f"# {row.tool}\n{row.command}" for row in rows if row.part == part]
        if shown:
            lines += ["", f"{title}:", "", "```text", *dict.fromkeys(shown), "```"]
    return lines


def write(page: Path, results: dict[str, Any]) -> None:
    """Replace what is between the marks of ``page``; every run goes beside it, as JSON."""
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"'{page}' has no place for tables; add the lines {BEGIN} and {END}")
    tables = markdown(results)
    written = f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}" if tables else f"{before}{BEGIN}\n{END}{after}"
    with writing_beside(page) as path:
        path.write_text(written, encoding="utf-8")
    with writing_beside(page.with_suffix(".json")) as path:
        path.write_text(json.dumps(results, indent=1), encoding="utf-8")
