from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from delineate.calibration import Case, Confidence, Intervals, check_intervals
from delineate.compute import Choice
from delineate.core.grid import Grid
from delineate.core.subject import Subject, unnamed
from delineate.core.targets import Targets
from delineate.core.volume import LabelVolume, Volume
from delineate.datasets.inspection import SubjectRow
from delineate.evaluation.measure import Measuring, measure_prediction
from delineate.evaluation.pairs import Pair
from delineate.evaluation.table import Evaluation, reliability_table
from delineate.io.formats import write_label, write_volume
from delineate.metrics.quantities import _KNOWN, QuantityMap
from delineate.reporting.classes import class_rows
from delineate.reporting.evaluation import write_evaluation_report, write_held_out_report
from delineate.reporting.figures import agreement_chart, class_chart, confusion_chart, density_chart, methods_chart
from delineate.reporting.html import (
    EvaluationReport,
    MethodsReport,
    RunReport,
    StudyReport,
    StudySection,
    write_report,
)
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
    for i in range(6):
        rows += measure_prediction(label(i), label(), TARGETS, subject=f"s{i}", site="AB"[i % 2]).targets
    rows[-1]["hd95_mm"] = float("inf")
    scan = Volume(rng.random((1, *GRID.shape)), GRID)
    overlay = Overlay("s1", "best", 0.9, views_of(scan, label(1), label(), TARGETS, subject="s1"))
    return RunReport(
        title="a run & more",
        description="what it was for",
        simulated=True,
        data_rows=[SubjectRow(
    subject="s0", site="A", patient="s0", shape=(20, 24, 10), spacing_mm=(1, 1, 4),
    orientation="LAS", channels=("T1",),
    dtype="int16", intensities={}, foreground_shape=(1, 1, 1), label_voxels={},
    volume_ml={"organ": 2.0, "<lesion>": 0.1},
    label_box_shape=(0, 0, 0), hashes={},
)],
        learning=pd.DataFrame({"step": range(50), "loss": rng.random(50)}),
        validation=pd.DataFrame({"step": [10, 20], "dice": [0.5, 0.6], "dice_organ": [0.6, 0.7]}),
        evaluation=Evaluation(pd.DataFrame(rows)),
        overlays=[overlay],
        recipe_yaml="name: <b>bold</b>\n",
        plan=[Choice("device", "cpu", "no GPU found")],
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
    page = page_of(replace(report, evaluation=None, overlays=[], learning=None, validation=None, notes=[]), tmp_path)
    assert "How it was made" in page
    assert "Every held-out subject" not in page


def test_a_measurement_has_a_page_of_its_own(report, tmp_path) -> None:
    write_report(
        tmp_path / "page.html", EvaluationReport("a against b", "6 subjects", report.evaluation, band_percent=1.7)
    )
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Bland-Altman plot of organ, volume, 6 subjects" in page
    assert "Every subject" in page
    assert "How it was made" not in page
    assert page.count("<h1") == 1


def test_pages_of_simulated_scans_say_so(report, tmp_path) -> None:
    real, simulated = report.evaluation, replace(report.evaluation, simulated=True)
    for pages, marked in (
        ([EvaluationReport("a", "b", real), MethodsReport("a", "b", {"one": real, "two": real}, [])], False),
        ([EvaluationReport("a", "b", simulated), MethodsReport("a", "b", {"one": real, "two": simulated}, [])], True),
    ):
        for page in pages:
            assert ("Simulated scans" in page_of(page, tmp_path)) == marked


def test_a_run_counts_its_classes_apart_for_training_and_test(report, tmp_path) -> None:
    """Background is a class, what is ignored is none, and overlapping targets count each for itself."""
    voxels = {"a": {0: 90, 1: 10}, "b": {0: 80, 1: 15, 2: 5}, "c": {0: 1969, 2: 20, 9: 11}}
    rows = [replace(report.data_rows[0], subject=name, label_voxels=found) for name, found in voxels.items()]
    targets = Targets({"liver": (1, 2), "<lesion>": (2,)}, "overlapping", ignore=(9,))
    found = class_rows(rows, targets, {"training": ("a", "b"), "validation": (), "held out": ("c",)})
    assert [(row.subjects, row.name, row.voxels) for row in found] == [
        ("training", "background", 170), ("training", "liver", 30), ("training", "<lesion>", 5),
        ("held out", "background", 1969), ("held out", "liver", 20), ("held out", "<lesion>", 20),
    ]  # fmt: skip
    assert [row.share for row in found[:3]] == [0.85, 0.15, 0.025]
    page = page_of(replace(report, classes=found), tmp_path)
    assert '<td>held out</td><td>background</td><td class="n">1,969</td>' in page


def test_classes_pooled_over_voxels_stand_on_the_page(tmp_path) -> None:
    found = measure_prediction(label(2), label(), Targets({"organ": (1,), "<lesion>": (2,), "cyst": (3,)}), subject="a")
    page = page_of(EvaluationReport("a", "b", found.evaluation()), tmp_path)
    assert "Voxels of all subjects together" in page
    assert page.count('<td class="n">0/0</td>') == 3


def test_confusion_is_shown_by_rows_of_the_reference() -> None:
    confusion = pd.DataFrame(measure_prediction(label(2), label(), TARGETS, subject="a").confusion)
    evaluation = Evaluation(pd.DataFrame(measure_prediction(label(2), label(), TARGETS).targets), confusion=confusion)
    chart = confusion_chart(evaluation).svg
    organ = confusion[confusion["reference"] == "organ"].set_index("prediction")["voxels"]
    assert f"{organ['organ'] / organ.sum():.1%}" in chart
    assert f">{organ['organ']}<" in chart
    assert "organ" in chart


class Outline(HTMLParser):
    """What a screen reader meets: headings, names, links, regions."""

    def __init__(self) -> None:
        super().__init__()
        self.headings: list[int] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.regions: list[dict[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if "id" in found:
            self.ids.append(found["id"] or "")
        if tag == "a":
            self.links.append(found["href"] or "")
        if "scroll" in (found.get("class") or "").split():
            self.regions.append(found)


def test_headings_names_and_regions_are_in_order(report, tmp_path) -> None:
    outline = Outline()
    outline.feed(page_of(report, tmp_path))
    assert outline.headings[0] == 1
    assert all(after - before <= 1 for before, after in zip(outline.headings, outline.headings[1:], strict=False))
    assert len(set(outline.ids)) == len(outline.ids)
    assert all(region["tabindex"] == "0" and region["aria-label"] for region in outline.regions)
    assert outline.links
    assert {link.removeprefix("#") for link in outline.links} <= set(outline.ids)


def luminance(colour: str) -> float:
    """Relative, as WCAG 2.2 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_stands_out_from_its_ground_in_light_and_dark(report, tmp_path) -> None:
    page = page_of(report, tmp_path)
    light, dark = (dict(re.findall(r"--([\w-]+): (#\w{6})", part)) for part in page.split("prefers-color-scheme")[:2])
    for scheme in (light, light | dark):
        for ground in ("paper", "soft", "warn"):
            for text in ("ink", "muted", "accent"):
                bright, dim = sorted((luminance(scheme[text]), luminance(scheme[ground])), reverse=True)
                assert (bright + 0.05) / (dim + 0.05) >= 4.5, (text, ground)
    assert dark != light


def with_probabilities() -> Evaluation:
    rows, bins = [], []
    for i in range(9):
        p = np.clip(np.stack([m.astype(float) for m in TARGETS.masks(label().voxels).values()]), 0.1 + 0.02 * i, 0.9)
        measuring = Measuring("standard,avd_percent,density_percent", probabilities=Path("kept"))
        measured = measure_prediction(label(i % 3), label(), TARGETS, measuring, subject=f"s{i}", probabilities=p)
        rows += measured.targets
        bins += measured.reliability
    confusion = pd.DataFrame(measure_prediction(label(2), label(), TARGETS, subject="a").confusion)
    return Evaluation(pd.DataFrame(rows), confusion=confusion, reliability=reliability_table(bins))


def test_what_was_measured_besides_is_drawn(tmp_path) -> None:
    evaluation = with_probabilities()
    write_report(tmp_path / "page.html", EvaluationReport("a", "b", evaluation))
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    error = evaluation.reliabilities()["organ"].expected_error
    assert f"organ expected calibration error {error:.4f}" in page
    assert "Classes by voxels: background" in page
    assert "mathdefault" not in page, "powers of ten are plain text"
    assert "10⁰" in page
    assert "Absolute volume error, % of organ over its density, 9 subjects" in page
    assert "0.3–1 (n 9)" in page


def test_a_study_draws_the_volume_error_of_each_arm_over_density(tmp_path) -> None:
    arms = {"external/dice": with_probabilities(), "external/gdl": with_probabilities()}
    study = StudyReport("a", "b", False, (), "dice", [StudySection("external", arms)])
    write_report(tmp_path / "page.html", study)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    for arm in arms:
        assert f"{arm}: Absolute volume error, % of organ over its density, 9 subjects" in page


def test_density_bins_have_fixed_edges_and_name_outliers() -> None:
    """A bin holds its lower edge; an empty one keeps its place; of the last six, one is far off."""
    table = with_probabilities().table.query("target == 'organ'").copy()
    table["density_percent"] = [0.0, 0.029, 0.03, *[0.5] * 6]
    table["avd_percent"] = [10.0, 20.0, 30.0, 1.0, 1.1, 1.2, 1.3, 1.4, 140.0]
    chart = density_chart(Evaluation(table), "organ", "avd_percent", "volume error").svg
    bins = re.findall(r"[\d.]+–[\d.]+ \(n \d\)", chart)
    assert bins == ["0–0.03 (n 2)", "0.03–0.1 (n 1)", "0.1–0.3 (n 0)", "0.3–1 (n 6)"]
    assert [name for name in table["subject"] if f">{name}<" in chart] == ["s8"]
    wide = density_chart(Evaluation(table), "organ", "avd_percent", "volume error", edges_percent=(0, 0.4, 1)).svg
    assert "0–0.4 (n 3)" in wide


def test_agreement_lesions_and_sides_are_drawn_and_written(tmp_path) -> None:
    rows, lesions = [], []
    for i in range(6):
        measuring = Measuring(
            "dice,lesion_recall,lesion_f1,volume_ml,reference_volume_ml", quantity=QuantityMap("fat", 0, 5)
        )
        fat = np.full(GRID.shape, 4.0 + 0.4 * i, np.float32)
        fat[:9] += 1
        measured = measure_prediction(label(i % 3), label(), TARGETS, measuring, subject=f"s{i}", quantity=fat)
        rows += measured.targets
        lesions += measured.lesions
    evaluation = Evaluation(pd.DataFrame(rows), lesions=pd.DataFrame(lesions), quantity=measuring.quantity)
    write_report(tmp_path / "page.html", EvaluationReport("a", "b", evaluation))
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    for chart in (
        "Bland-Altman plot of organ, volume, 6 subjects: bias",
        "Bland-Altman plot of organ, mean fat, 6 subjects: bias",
        "Predicted against reference, organ, median fat, 6 subjects",
        "Lesions of organ by size:",
    ):
        assert f'aria-label="{chart}' in page
    assert 'aria-label="Agreement with the reference"' in page
    assert 'aria-label="Lesions by size"' in page
    assert page.count("Subjects by side of 5;") == 2


def test_a_page_of_fat_fractions_says_what_was_read_in_which_unit(tmp_path) -> None:
    rows = []
    measuring, organ = Measuring("dice", quantity=QuantityMap("fat_fraction", 2)), Targets({"organ": (1, 2)})
    for i in range(6):
        # The wedge that is missed has another fat fraction, so that one subject changes sides.
        fat = np.full(GRID.shape, 3.9 + 0.5 * i, np.float32)
        fat[:9] += 0.5
        rows += measure_prediction(label(2), label(), organ, measuring, subject=f"s{i}", quantity=fat).targets
    evaluation = Evaluation(pd.DataFrame(rows), quantity=measuring.quantity)
    [wrong] = evaluation.crossings()
    assert "in 5 of 6" in wrong
    write_evaluation_report(tmp_path / "page.html", evaluation, tmp_path / "predictions", tmp_path / "references")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    for said in (
        "fat fraction (channel fat_fraction, %), 2 mm or more inside the surface; threshold 5.56 %.",
        "<dt>Bias of mean fat fraction, percentage points</dt>",
        "<dt>On the right side of 5.56 %</dt><dd>5 of 6</dd>",
        ">threshold 5.56 %</text>",
        ">organ, reference mean fat fraction, %</text>",
        ">predicted mean fat fraction, %</text>",
        ">error, percentage points</text>",
        "<td>Fat fraction, mean, %</td>",
        "<li>Below 5.56 % only in the prediction: s3.</li>",
        '<th scope="row">Reference at or above</th><td class="n"><b>1</b></td>',
        "percentage points too low (95 % interval",
    ):
        assert said in page, said


def test_pictures_show_the_first_channel_even_where_channels_have_only_numbers(rng, tmp_path) -> None:
    """As nnU-Net's files have without a dataset.json."""
    files, reference, page = [tmp_path / f"{i}.nii" for i in range(2)], tmp_path / "label.nii", tmp_path / "page.html"
    for file in files:
        write_volume(file, Volume(rng.random((1, *GRID.shape), np.float32), GRID))
    write_label(reference, label())
    evaluation = Evaluation(pd.DataFrame(measure_prediction(label(), label(), TARGETS, subject="s0").targets))
    shown = []
    for names in (("T1", "FLAIR"), unnamed(2)):
        pair = Pair("s0", reference, reference, Subject("s0", dict(zip(names, files, strict=True)), reference))
        write_held_out_report(page, evaluation, [pair], TARGETS, title="a test", channels=("T1", "FLAIR"))
        shown.append(re.findall('src="data:image/[^"]+"', page.read_text(encoding="utf-8")))
    by_name, by_number = shown
    assert by_name
    assert by_number == by_name


@pytest.mark.parametrize("channel", [*_KNOWN, "T1map"])
def test_a_quantity_has_a_page_whatever_its_unit_and_keeps_its_name(channel: str, tmp_path: Path) -> None:
    quantity, read = QuantityMap(channel), np.array([40.0, 45, 51, 58, 66, 75])
    rows = {"subject": list("abcdef"), "site": "", "target": "organ", "dice": 0.9, "quantity_mean": 1.1 * read}
    table = pd.DataFrame(rows).assign(reference_quantity_mean=read)
    page = page_of(EvaluationReport("a page", "", Evaluation(table, quantity=quantity)), tmp_path)
    assert f"<h2>{quantity.title[0].upper()}{quantity.title[1:]} of organ</h2>" in page
    short = quantity.unit.replace("%", "pp")
    assert f">{f'+5.58 {short}'.rstrip()}</text>" in page, "the bias, in its unit"


def test_differences_that_are_all_one_have_one_line() -> None:
    said = np.array([3.0, 5, 7, 11, 13])
    more = {"subject": list("abcde"), "site": "", "target": "organ", "quantity_median": said}
    table = pd.DataFrame(more).assign(reference_quantity_median=said - 0.5)
    [agreeing] = Evaluation(table, quantity=QuantityMap("fat_fraction")).agreements
    chart = agreement_chart(agreeing).svg
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", chart)
    assert "bias" in texts
    assert not any("1.96" in text for text in texts), "three names in one place"
    assert not any("e−" in text for text in texts)


@pytest.mark.parametrize("outliers", [1, 2, 3])
def test_names_of_neighbours_stand_one_above_the_other(outliers) -> None:
    true = np.linspace(10, 11, 60 + outliers)
    said = true * np.r_[np.full(outliers, 1.5), np.tile([0.99, 1.01], 30)]
    rows = {"subject": [f"s{i:02}" for i in range(len(true))], "site": "", "target": "organ"}
    [agreeing] = Evaluation(pd.DataFrame(rows).assign(volume_ml=said, reference_volume_ml=true)).agreements
    drawn = re.findall(r'<text[^>]* y="([\d.]+)"[^>]*>(s\d\d)</text>', agreement_chart(agreeing).svg)
    assert [name for _, name in drawn] == [f"s{i:02}" for i in range(outliers)]
    heights = sorted(float(y) for y, _ in drawn)
    assert np.all(np.diff(heights) >= 8), "letters are 8 points high"


def test_powers_of_ten_are_written_as_such(tmp_path) -> None:
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", class_chart(with_probabilities()).svg)
    assert "10³" in texts
    assert not any("math" in text for text in texts)


def test_validation_loss_and_seams_have_their_place(report, tmp_path) -> None:
    beside = pd.DataFrame({"step": [0, 20, 40], "validation_loss": [1.0, 0.7, 0.6]})
    page = page_of(replace(report, validation_loss=beside, seams={"organ": (1.234, 6)}), tmp_path)
    assert "Training and validation loss over 49 steps" in page
    assert "1.23 times (organ, median of 6 subjects)" in page


@pytest.mark.parametrize(("sites", "rows"), [("AB", ["A: one", "A: two", "B: one", "B: two"]), ("A", ["one", "two"])])
def test_methods_are_drawn_by_site_where_there_are_some(sites: str, rows: list[str]) -> None:
    table = pd.DataFrame({"subject": list("abcdef"), "site": [*sites * 3][:6] if len(sites) > 1 else "A"})
    table = table.assign(target="organ", dice=np.linspace(0.5, 0.9, 6))
    chart = methods_chart({"one": Evaluation(table), "two": Evaluation(table)}, "dice", "Dice").svg
    named = [name for name in re.findall(r"<text[^>]*>([^<]*)</text>", chart) if "one" in name or "two" in name]
    assert named == rows


def test_every_row_leads_to_its_pictures(report, tmp_path) -> None:
    overlay = report.overlays[0]
    other = replace(overlay, subject="s 2", rank="")
    page = page_of(replace(report, overlays=[overlay, other]), tmp_path)
    assert '<a href="#subject-0">s1</a>' in page
    assert page.count('id="subject-') == 2
    assert "1 more subject," in page


def test_colours_may_be_those_of_the_reports(report, tmp_path) -> None:
    pages = []
    for palette in ("distinct", "purple"):
        write_report(
            tmp_path / "p.html", EvaluationReport("a", "b", report.evaluation, report.overlays, palette=palette)
        )
        pages.append((tmp_path / "p.html").read_text(encoding="utf-8"))
    assert "#56b4e9" in pages[0]
    assert "#8a2be2" in pages[1]
    assert "#56b4e9" not in pages[1]


def test_intervals_and_the_crop_have_their_place(report, tmp_path) -> None:
    steps = np.linspace(0, 1, 30)
    cases = [
        Case("organ", site, f"{site}{s}", Confidence(100.0, 0.9), 0.85 - 0.1 * s, 100 + s)
        for s in steps
        for site in "AB"
    ]
    intervals = Intervals(level=0.9, rows=check_intervals(cases))
    page = page_of(replace(report, intervals=intervals, crop=b"picture"), tmp_path)
    rows = re.search(r'aria-label="Intervals for new scans".*?</table>', page, re.DOTALL)
    assert rows is not None
    assert re.findall(r"<td>(all|A|B)</td>", rows[0]) == ["all", "A", "B"]
    assert "90 % of scans of the same kind" in page
    assert "data:image/webp;base64,cGljdHVyZQ==" in page
    unknown = replace(intervals.rows[0], site="C", dice_width=None, volume_width=None, rank=None)
    nowhere = Intervals(level=0.9, rows=(unknown,))
    page = page_of(replace(report, intervals=nowhere), tmp_path)
    assert re.findall(r"<td>C</td>.*?</tr>", page, re.DOTALL)[0].count("–") >= 3
