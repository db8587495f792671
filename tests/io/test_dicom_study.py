"""The page about a DICOM study, followed from archive to report as a reader would."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
from pydicom import dcmread
from pydicom.uid import generate_uid
from typer.testing import CliRunner

from delineate.cli.app import app
from delineate.core.grid import Grid

PAGE = Path(__file__).parents[2] / "docs/dicom-study.md"
GRID = Grid((24, 24, 8), np.array([[-3.0, 0, 0, 35], [0, -3, 0, 35], [0, 0, 6, -24], [0, 0, 0, 1]]))


def test_the_commands_run_on_an_archive_that_is_arranged_so(dicom, tmp_path, rng, monkeypatch) -> None:
    index = np.stack(np.meshgrid(*map(np.arange, GRID.shape), indexing="ij"))
    for name in (*(f"archive/patient{i:02}" for i in range(5)), "inbox/new00"):
        study = type(dicom)(tmp_path / name)
        study.study = generate_uid(entropy_srcs=[name])
        centre = rng.uniform((9, 9, 3), (15, 15, 5)).reshape(3, 1, 1, 1)
        organ = ((index - centre) ** 2 * np.array([1, 1, 4]).reshape(3, 1, 1, 1)).sum(0) < 36
        for series in ("CT portal venous", "CT arterial"):
            scan = (organ * 100 + rng.normal(0, 20, organ.shape)).astype(np.int16)
            study.write(series, scan, GRID, PatientID=name)
        if name.startswith("archive"):
            study.write("Liver mask", organ.astype(np.int16), GRID, PatientID=name)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DELINEATE_HOME", str(tmp_path / "home"))
    commands = re.findall(r"^delineate .*", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(commands) == 6
    for command in commands:
        # An hour is what a test cannot afford.
        typed = command.replace("--minutes 60", "--steps 4 --set network.widths=[8,16,32] --threads 1")
        done = CliRunner().invoke(app, shlex.split(typed)[1:])
        assert done.exit_code == 0, command + repr(done.exception) + done.output
    answer = dcmread(tmp_path / "answers/new00.dcm")
    assert (answer.Modality, answer.PatientID) == ("SEG", "inbox/new00")
    portal = dcmread(next((tmp_path / "inbox/new00/CT portal venous").iterdir()))
    assert answer.ReferencedSeriesSequence[0].SeriesInstanceUID == portal.SeriesInstanceUID
    assert "patient0" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert (tmp_path / "run/report.html").is_file()
