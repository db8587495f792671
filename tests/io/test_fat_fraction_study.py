"""The page about fat fractions, followed from archive to report as an analyst would."""

from __future__ import annotations

import csv
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.uid import MRImageStorage, generate_uid
from typer.testing import CliRunner

from delineate.cli.app import app
from delineate.core.grid import Grid

PAGE = Path(__file__).parents[2] / "docs/fat-fraction.md"
GRID = Grid((24, 24, 8), np.array([[-3.0, 0, 0, 35], [0, -3, 0, 35], [0, 0, 6, -24], [0, 0, 0, 1]]))


def test_the_five_commands_run_on_studies_that_are_arranged_so(dicom, tmp_path, rng, monkeypatch) -> None:
    index = np.stack(np.meshgrid(*map(np.arange, GRID.shape), indexing="ij"))
    groups = {"archive/patient": 5, "inbox/new": 1, "later/later": 5}
    for i, name in enumerate(f"{group}{i:02}" for group, n in groups.items() for i in range(n)):
        study = type(dicom)(tmp_path / name)
        study.study = generate_uid(entropy_srcs=[name])
        centre = rng.uniform((10, 10, 3), (14, 14, 5)).reshape(3, 1, 1, 1)
        liver = ((index - centre) ** 2 * np.array([1, 1, 4]).reshape(3, 1, 1, 1)).sum(0) < 49
        tags = {"PatientID": name, "Modality": "MR", "SOPClassUID": MRImageStorage}
        water = (liver * 300 + rng.normal(200, 20, liver.shape)).astype(np.int16)
        # In tenths of percent, as scanners store it.
        fat = np.where(liver, 20 + 20 * (i % 5), 400) + rng.normal(0, 5, liver.shape)
        study.write("Dixon water", water, GRID, **tags)
        study.write("Dixon fat fraction", fat.clip(0).astype(np.int16), GRID, slope=0.1, **tags)
        if "new" not in name:
            study.write("Liver mask", liver.astype(np.int16), GRID, **tags)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DELINEATE_HOME", str(tmp_path / "home"))
    commands = re.findall(r"^delineate .*", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(commands) == 5
    for command in commands:
        # An hour is what a test cannot afford.
        typed = command.replace("--minutes 60", "--steps 30 --set network.widths=[8,16,32] --threads 1")
        done = CliRunner().invoke(app, shlex.split(typed)[1:])
        assert done.exit_code == 0, command + repr(done.exception) + done.output

    answer = dcmread("answers/new00.dcm")
    assert (answer.Modality, answer.PatientID) == ("SEG", "inbox/new00")
    with Path("answers/measurements.csv").open(encoding="utf-8", newline="") as file:
        [fat] = [row for row in csv.DictReader(file) if row["quantity"] == "fat_fraction"]
    assert (fat["subject"], fat["target"], fat["unit"], fat["threshold"]) == ("new00", "liver", "%", "5.56")
    assert answer.pixel_array.any()
    assert float(fat["volume_ml"]) == pytest.approx(answer.pixel_array.sum() * GRID.voxel_ml)
    assert 0 < float(fat["quantity_mean"]) < 40
    report = dcmread("answers/new00.sr.dcm")
    assert (report.Modality, report.PatientID) == ("SR", "inbox/new00")
    for page in ("tested/report.html", "run/report.html"):
        assert "percentage points" in Path(page).read_text(encoding="utf-8")
    page = Path("tested/report.html").read_text(encoding="utf-8")
    assert "5.56 %" in page
    assert "later03" in page
    card = Path("card.html").read_text(encoding="utf-8")
    assert "Scanner B" in card
    assert "fat fraction (channel fat_fraction, %), 5 mm" in card
    assert not re.search("later0|patient0", card)
