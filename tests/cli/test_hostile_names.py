"""Names from outside steer no terminal, are no formula in a table, and run nothing in a page."""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from delineate.cli import main
from delineate.core.grid import Grid
from delineate.core.text import printable
from delineate.core.volume import LabelVolume, Volume
from delineate.evaluation.table import Evaluation
from delineate.io.formats import write_label, write_volume
from delineate.io.tables import read_table, write_table

NAMES = (
    "=cmd|' C calc'!A0", "+1", "-1", "@SUM(1)", "\x1b[31mred", "\x1b]0;owned\x07", "\u202egnp.exe",
    "<script>owned()<", "a,b", 'a"b', "$x$", "[red]x", ":bomb:", "\x9b2J", "\x7f", "{x}", "%s",
)  # fmt: skip
GRID = Grid.of_spacing((8, 8, 6), (1.0, 1.0, 2.0))


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    """A data set whose subjects, sites and files have such names, predictions of it, and a lone one."""
    rng = np.random.default_rng(0)
    rows = []
    for i, name in enumerate(NAMES):
        voxels = np.zeros(GRID.shape, np.uint8)
        voxels[2:6, 2:6, 1 : 3 + i % 3] = 1
        write_volume(
            tmp_path / "data" / "imagesTr" / f"{name}.nii", Volume(rng.random((1, *GRID.shape), np.float32), GRID)
        )
        for folder in ("data/labelsTr", "predictions"):
            write_label(tmp_path / folder / f"{name}.nii", LabelVolume(voxels, GRID))
        rows.append({"subject": name, "site": NAMES[-1 - i % 3]})
    write_label(tmp_path / "predictions" / "\x1blone.nii", LabelVolume(voxels, GRID))
    pairs = [{"image": f"imagesTr/{n}.nii", "label": f"labelsTr/{n}.nii"} for n in NAMES]
    about = {"modality": {"0": "\x1bMRI"}, "labels": {"0": "background", "1": "=\x1borgan"}, "training": pairs}
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(about), encoding="utf-8")
    with (tmp_path / "data" / "sites.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, ("subject", "site"))
        table.writeheader()
        table.writerows(rows)
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["delineate", *map(str, arguments)])
    with monkeypatch.context() as streams:  # what main puts in front of both is taken away again
        streams.setattr(sys, "stdout", sys.stdout)
        streams.setattr(sys, "stderr", sys.stderr)
        with pytest.raises(SystemExit) as end:
            main()
    return int(end.value.code or 0)


def check_shown(text: str) -> None:
    assert text
    assert re.sub(r"[^\n]", "", text) == "\n" * text.count("\n")
    assert all(line.isprintable() for line in text.split("\n"))


@pytest.mark.parametrize("json_", [[], ["--json"]], ids=["text", "json"])
def test_nothing_that_is_printed_steers_a_terminal(cohort: Path, json_, monkeypatch, capsys) -> None:
    run(monkeypatch, "data", "inspect", cohort / "data", *json_)
    run(monkeypatch, "evaluate", cohort / "predictions", cohort / "data", "-o", cohort / "out", *json_)
    run(monkeypatch, "recipes", "show", cohort / "\x1b[31mno.yaml")
    run(
        monkeypatch,
        "train",
        "demo",
        "--data",
        cohort / "data",
        "-o",
        cohort / "run",
        "--set",
        "\x1b=\x1b",
        "--fold",
        "\x1b",
    )
    run(monkeypatch, "predict", cohort / "\x1bbundle", cohort / "data", "-o", cohort / "p")
    run(monkeypatch, "nothing\x1b")
    shown = capsys.readouterr()
    check_shown(shown.out)
    check_shown(shown.err)
    assert "\\x1b" in shown.err
    assert "\\x1b" in shown.out or "\\u001b" in shown.out


def test_no_cell_of_a_table_is_a_formula_and_names_come_back(cohort: Path, monkeypatch, capsys) -> None:
    assert run(monkeypatch, "evaluate", cohort / "predictions", cohort / "data", "-o", cohort / "out") == 0
    tables = sorted((cohort / "out").glob("*.csv"))
    assert [table.name for table in tables][:2] == ["confusion.csv", "metrics.csv"]
    for table in tables:
        with table.open(newline="", encoding="utf-8") as file:
            cells = [cell for row in csv.reader(file) for cell in row]
        assert all(cell.isprintable() for cell in cells)
        assert not [c for c in cells if c.startswith(("=", "+", "@", "\t", "\r")) or re.match(r"-[^\d.i]", c)]
    back = Evaluation.read(cohort / "out")
    assert set(back.subjects) == {printable(name) for name in NAMES}
    assert set(back.sites) == {printable(name) for name in NAMES[-3:]}
    assert back.targets == (printable("=\x1borgan"),)


def test_a_table_gives_back_what_was_written(tmp_path: Path) -> None:
    rows = [{"name": name, name: i / 7} for i, name in enumerate(NAMES)]
    columns = ["name", *NAMES]
    write_table(tmp_path / "t.csv", columns, rows)
    back = read_table(tmp_path / "t.csv")
    assert [row["name"] for row in back] == [printable(name) for name in NAMES]
    assert [float(row[printable(name)]) for row, name in zip(back, NAMES, strict=True)] == [
        i / 7 for i in range(len(NAMES))
    ]
