from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest

from delineate.core.grid import Grid
from delineate.core.targets import Targets
from delineate.core.volume import LabelVolume, Volume
from delineate.evaluation.measure import compare
from delineate.evaluation.table import Evaluation
from delineate.reporting.figures import confusion_chart
from delineate.reporting.html import EvaluationReport, RunReport, write_report
from delineate.reporting.overlays import Overlay, views_of

TARGETS = Targets({"organ": (1,), "<lesion>": (2,)})
GRID = Grid((20, 24, 10), np.diag([-1.0, 1.0, 4.0, 1.0]))


def label(shift: int = 0) -> LabelVolume:
    voxels = np.zeros(GRID.shape, np.uint8)
    voxels[5 + shift : 14, 6:16, 2:8] = 1
    voxels[8:11, 8:11, 3:5] = 2
    return LabelVolume(voxels, GRID)


@pytest.fixture
def report(rng) -> RunReport:
    rows = []
    for i in range(4):
        rows += compare(label(i), label(), TARGETS, subject=f"s{i}", site="AB"[i % 2]).targets
    rows[-1]["hd95_mm"] = float("inf")
    scan = Volume(rng.random((1, *GRID.shape)), GRID)
    overlay = Overlay("s1", "best", 0.9, views_of(scan, label(1), label(), TARGETS, subject="s1"))
    return RunReport(
        title="a run & more",
        description="what it was for",
        simulated=True,
        data_rows=[
            {"subject": "s0", "site": "A", "shape": (20, 24, 10), "spacing_mm": (1, 1, 4), "orientation": "LAS",
             "volume_ml": {"organ": 2.0, "<lesion>": 0.1}}
        ],
        learning=pd.DataFrame({"step": range(50), "loss": rng.random(50)}),
        validation=pd.DataFrame({"step": [10, 20], "dice": [0.5, 0.6], "dice_organ": [0.6, 0.7]}),
        evaluation=Evaluation(pd.DataFrame(rows)),
        overlays=[overlay],
        recipe_yaml="name: <b>bold</b>\n",
        plan=[{"what": "device", "choice": "cpu", "why": "no GPU found"}],
        provenance={"Seed": "0"},
        notes=["left out: s9"],
    )  # fmt: skip


def page_of(report, tmp_path) -> str:
    write_report(tmp_path / "report.html", report)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_page_needs_nothing_from_outside(report, tmp_path) -> None:
    page = page_of(report, tmp_path)
    loaded = re.findall(r'(?:src|href|url)\s*[=(]\s*"?([^")\s>]+)', page)
    assert all(address.startswith(("data:", "#")) for address in loaded)
    assert len(page) < 1_500_000


def test_every_picture_has_words_and_there_is_one_first_heading(report, tmp_path) -> None:
    page = page_of(report, tmp_path)
    images, charts = re.findall(r"<img[^>]*>", page), re.findall(r"<svg[^>]*>", page)
    assert len(images) == 3
    assert len(charts) == 8  # two of training, two metrics, two a target of volumes; confusion is not measured here
    assert all(re.search(r'alt="[^"]+"', image) for image in images)
    assert all(re.search(r'role="img" aria-label="[^"]+"', chart) for chart in charts)
    assert page.count("<h1") == 1


def test_names_from_data_are_text_not_markup(report, tmp_path) -> None:
    page = page_of(report, tmp_path)
    assert "<lesion>" not in page
    assert "<b>bold" not in page
    assert "&lt;lesion&gt;" in page
    assert "a run &amp; more" in page


def test_what_must_be_said_is_said(report, tmp_path) -> None:
    page = page_of(report, tmp_path)
    assert "Simulated scans" in page
    assert "Not for diagnosis" in page
    assert "left out: s9" in page
    assert "∞" in page


def test_a_run_without_held_out_subjects_has_a_page_too(report, tmp_path) -> None:
    from dataclasses import replace

    page = page_of(replace(report, evaluation=None, overlays=[], learning=None, validation=None, notes=[]), tmp_path)
    assert "How it was made" in page
    assert "Every held-out subject" not in page


def test_a_measurement_has_a_page_of_its_own(report, tmp_path) -> None:
    write_report(
        tmp_path / "page.html", EvaluationReport("a against b", "4 subjects", report.evaluation, band_percent=1.7)
    )
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Bland-Altman of organ volumes, 4 subjects" in page
    assert "Every subject" in page
    assert "How it was made" not in page
    assert page.count("<h1") == 1


def test_confusion_is_shown_by_rows_of_the_reference() -> None:
    confusion = pd.DataFrame(compare(label(2), label(), TARGETS, subject="a").confusion)
    evaluation = Evaluation(pd.DataFrame(compare(label(2), label(), TARGETS).targets), confusion=confusion)
    chart = confusion_chart(evaluation)
    organ = confusion[confusion["reference"] == "organ"].set_index("prediction")["voxels"]
    assert f"{organ['organ'] / organ.sum():.1%}" in chart
    assert "organ" in chart
