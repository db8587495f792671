"""Laws that hold for every page: figures say what they show and how to read it, and nothing is wider than a phone."""

from __future__ import annotations

import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from delineate.core.grid import Grid
from delineate.core.targets import Targets
from delineate.core.volume import LabelVolume, Volume
from delineate.datasets.inspection import SubjectRow
from delineate.evaluation.change import Change
from delineate.evaluation.measure import Measuring, measure_prediction
from delineate.evaluation.methods import compare_methods
from delineate.evaluation.table import Evaluation, reliability_table
from delineate.metrics.catalogue import METRICS
from delineate.metrics.quantities import QuantityMap
from delineate.reporting.html import (
    AdaptationReport,
    EvaluationReport,
    MethodsReport,
    Report,
    RunReport,
    StudyReport,
    StudySection,
    write_report,
)
from delineate.reporting.overlays import MOST_SLICE_BYTES, Overlay, slice_pictures, slices_of, views_of

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
ORGAN = Targets({"organ": (1,)})
GRID = Grid((20, 24, 10), np.diag([-1.0, 1.0, 4.0, 1.0]))
PAGES = ("run", "evaluation", "few", "methods", "study", "adaptation")
VOID = {"img", "input", "meta", "link", "br", "hr", "path", "use", "rect", "circle"}


def label(shift: int = 0) -> LabelVolume:
    voxels = np.zeros(GRID.shape, np.uint8)
    voxels[5 + shift : 14, 6:16, 2:8] = 1
    return LabelVolume(voxels, GRID)


VOLUMES = "dice,volume_ml,reference_volume_ml"


def evaluation(n: int = 7, shift: int = 1, metrics: str = "dice", quantity: QuantityMap | None = None) -> Evaluation:
    """Shifted references of two sites; with ``VOLUMES`` and more, everything that can be drawn."""
    full = metrics != "dice"
    measuring = Measuring(metrics, quantity=quantity, probabilities=Path("kept") if full else None)
    rows, lesions, bins, confusion = [], [], [], []
    for i in range(n):
        probabilities = np.clip(np.stack([m.astype(float) for m in ORGAN.masks(label().voxels).values()]), 0.1, 0.9)
        fat = np.full(GRID.shape, 4.0 + 0.4 * i, np.float32)
        fat[:9] += 3
        found = measure_prediction(
            label((i + shift) % 4),
            label(),
            ORGAN,
            measuring,
            subject=f"s{i}",
            site="AB"[i % 2],
            quantity=None if quantity is None else fat,
            probabilities=probabilities if full else None,
        )
        rows += found.targets
        lesions += found.lesions
        bins += found.reliability
        confusion += found.confusion if full else []
    tables = {"lesions": lesions, "confusion": confusion} if full else {}
    return Evaluation(
        pd.DataFrame(rows),
        **{name: pd.DataFrame(found) for name, found in tables.items() if found},
        reliability=reliability_table(bins),
        quantity=quantity,
    )


def overlay(subject: str, rank: str, slices: bool) -> Overlay:
    scan = Volume(np.random.default_rng(0).random((1, *GRID.shape)), GRID)
    views = views_of(scan, label(1), label(), ORGAN, subject=subject)
    return Overlay(subject, rank, 0.9, views, slices_of(scan, label(1), label(), ORGAN) if slices else ())


def reports() -> dict[str, Report]:
    measured, other, curve = evaluation(), evaluation(shift=3), pd.Series(np.linspace(1, 0.1, 40), range(40))
    fat = QuantityMap("fat_fraction")
    drawn = evaluation(metrics=f"{VOLUMES},avd_percent,density_percent,lesion_recall")
    read = evaluation(metrics=VOLUMES, quantity=fat)
    row = SubjectRow(
        subject="s0", site="A", patient="s0", shape=(20, 24, 10), spacing_mm=(1, 1, 4), orientation="LAS",
        channels=("T1",), dtype="int16", intensities={}, foreground_shape=(1, 1, 1), label_voxels={},
        volume_ml={"organ": 2.0}, label_box_shape=(0, 0, 0), hashes={},
    )  # fmt: skip
    steps = range(10, 60, 10)
    run = RunReport(
        title="a run", description="what for", simulated=True, data_rows=[row],
        learning=pd.DataFrame({"step": range(50), "loss": np.linspace(9, 0.1, 50)}),
        validation=pd.DataFrame({"step": steps, "dice": 0.5, "dice_a": 0.6, "dice_b": 0.4}),
        validation_loss=pd.DataFrame({"step": steps, "validation_loss": 1.0}), evaluation=drawn,
        overlays=[overlay("s1", "best", True), overlay("s2", "", False)], recipe_yaml="name: a\n", plan=[],
        provenance={"Seed": "0"}, crop=b"picture",
    )  # fmt: skip
    section = StudySection(
        "one", {"a": measured, "b": other}, learning={"training loss": {"a": curve, "b": curve + 1}}, picture=b"p",
        pictured="s1", measures=(["arm", "steps"], [["a", "3"]]),
    )  # fmt: skip
    points = [(float(n), measured.overall()["dice"]) for n in (1, 3)]
    curved = StudySection("two", {"a": measured}, curves={"a": points}, axis="labelled subjects")
    return {
        "run": run,
        "evaluation": EvaluationReport("all", "7 subjects", read, run.overlays, band_percent=5),
        "few": EvaluationReport("few", "3 subjects", evaluation(3, metrics=VOLUMES, quantity=fat)),
        "methods": MethodsReport(
            "a, b", "two", {"a": measured, "b": other}, compare_methods({"a": measured, "b": other})
        ),
        "study": StudyReport("s", "why?", True, ["one"], "dice", [section, curved], runs=[("r", "", "done", "1", "")]),
        "adaptation": AdaptationReport("a", "b", True, ["one"], {"new scans": Change.between(measured, other)}),
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("laws")
    files = {name: folder / f"{name}.html" for name in PAGES}
    for name, report in reports().items():
        write_report(files[name], report)
    return files


class Structure(HTMLParser):
    """Which elements lie within which; the text of figures."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[tuple[str, set[str]]] = []
        self.tables_beside: list[str] = []
        self.hidden: list[bool] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag == "table" and not any("scroll" in classes for _, classes in self.open):
            self.tables_beside.append(self.get_starttag_text() or "")
        if tag == "img" and any("stack" in classes for _, classes in self.open):
            self.hidden.append("hidden" in found)
        self.sources += [found[name] or "" for name in ("src", "href", "xlink:href") if name in found]
        if tag not in VOID:
            self.open.append((tag, set((found.get("class") or "").split())))

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop()[0] != tag:
            pass


def structure(page: str) -> Structure:
    found = Structure()
    found.feed(page)
    return found


@pytest.mark.parametrize("name", PAGES)
def test_every_figure_has_a_title_and_says_how_to_read_it(name: str, written: dict[str, Path]) -> None:
    page = written[name].read_text(encoding="utf-8")
    figures = re.findall(r"<figure.*?</figure>", page, re.DOTALL)
    assert figures
    for figure in figures:
        assert re.search(r'<figcaption class="title">(<b>)?\w', figure), figure[:300]
        assert re.search(r'<p class="reading">[A-Z][^<]{20,}\.', figure), figure[:300]
    inside = sum(figure.count("<svg") for figure in figures)
    assert page.count("<svg") == inside, "a chart beside a figure"


UNITS = {metric.unit for metric in METRICS.values()} - {""} | {"percentage points", "ml", "mm", "%"}
WITHOUT = ("(no unit)", "(count)", "(unit not known)", "class", "names of rows")


@pytest.mark.parametrize("name", PAGES)
def test_every_axis_has_a_unit_or_says_that_it_has_none(name: str, written: dict[str, Path]) -> None:
    page = unescape(written[name].read_text(encoding="utf-8"))
    charts = re.findall(r'<svg class="chart" role="img" aria-label="([^"]*)"', page)
    assert charts
    for said in charts:
        axes = re.fullmatch(r".*\. Horizontal axis: (.+)\. Vertical axis: (.+)\.", said)
        assert axes, said
        for axis in (axis.removesuffix(" (log scale)") for axis in axes.groups()):
            assert axis.rpartition(", ")[2] in UNITS or axis.endswith(WITHOUT), axis


@pytest.mark.parametrize("name", PAGES)
def test_tables_scroll_and_nothing_comes_from_elsewhere(name: str, written: dict[str, Path]) -> None:
    page = written[name].read_text(encoding="utf-8")
    found = structure(page)
    assert not found.tables_beside
    assert 'content: "Scroll sideways' in page
    assert all(source.startswith(("#", "data:image/")) for source in found.sources)
    assert "default-src 'none'" in page
    assert len(page) < 2_000_000


@pytest.mark.parametrize("name", PAGES)
def test_a_switch_puts_pictures_or_tables_first(name: str, written: dict[str, Path]) -> None:
    page = written[name].read_text(encoding="utf-8")
    assert re.findall(r'<input type="radio" name="first" value="(\w+)"( checked)?>', page) == [
        ("pictures", " checked"), ("tables", ""),
    ]  # fmt: skip
    assert re.search(r'class="(\w+ )*look', page)
    assert re.search(r'class="(\w+ )*count', page)


def test_slices_scroll_without_a_server_and_show_the_middle_one_without_a_script(written: dict[str, Path]) -> None:
    page = written["run"].read_text(encoding="utf-8")
    hidden = structure(page).hidden
    n = len(hidden)
    assert n == 6, "slices through the organ"
    assert [i for i, away in enumerate(hidden) if not away] == [n // 2]
    [slider] = re.findall(r'<label class="slider" hidden>.*?</label>', page, re.DOTALL)
    assert f'type="range" min="1" max="{n}" value="{n // 2 + 1}"' in slider
    assert page.count('class="slices"') == 1, "only of the subjects that are ranked"


def test_slices_stay_small_however_large_the_scan() -> None:
    grid = Grid.of_spacing((160, 160, 120))
    noise = Volume(np.random.default_rng(0).random((1, *grid.shape), np.float32), grid)
    whole = LabelVolume(np.ones(grid.shape, np.uint8), grid)
    slices = slices_of(noise, whole, whole, Targets({"a": (1,)}))
    depths = [view.depth_mm for view in slices]
    assert (len(slices), depths[0], depths[-1]) == (16, 0.0, 119.0)
    drawn = slice_pictures(slices)
    assert sum(len(webp) for _, webp in drawn) <= MOST_SLICE_BYTES
    assert drawn


def test_what_is_missing_is_said_in_its_place(written: dict[str, Path]) -> None:
    said = re.findall(r'<p class="absent">(.*?)</p>', written["few"].read_text(encoding="utf-8"), re.DOTALL)
    for part in ("volume of organ is not shown: fewer than 5 patients", "mean fat fraction of organ", "No pictures"):
        assert any(part in sentence for sentence in said), part


def test_a_reading_is_told_as_a_radiologist_reads_it(written: dict[str, Path]) -> None:
    page = written["evaluation"].read_text(encoding="utf-8")
    section = page[page.index('class="parts quantity"') :]
    assert section.count(">threshold 5.56 %</text>") >= 2, "in both figures"
    for said in (
        "What was read: fat fraction (channel fat_fraction, %), within the target; threshold 5.56 %.",
        "95 % limits of agreement",
        '<th scope="row">Reference at or above</th>',
        "only in the prediction: ",
    ):
        assert said in section, said


FRAME = """<body style="margin: 0"><iframe id="page" src="%s" style="border: 0; width: 390px; height: 900px"></iframe>
<script>page.onload = () => {
  const d = page.contentDocument, wide = [], silent = [];
  const scrolls = (node) => node && (node.matches(".scroll, pre") || scrolls(node.parentElement));
  for (const part of d.querySelectorAll("details")) part.open = true;
  for (const node of d.body.querySelectorAll("*"))
    if (node.getBoundingClientRect().right > 391 && !scrolls(node)) wide.push(node.tagName + "." + node.className);
  for (const node of d.querySelectorAll(".scroll")) {
    const says = page.contentWindow.getComputedStyle(node, "::before").display !== "none";
    if (node.scrollWidth > node.clientWidth + 1 && !says) silent.push(node.ariaLabel);
  }
  const slider = d.querySelector(".slider input");
  if (slider) { slider.value = 1; slider.dispatchEvent(new Event("input")); }
  const shown = [...d.querySelectorAll(".stack img")].map((image) => !image.hidden);
  document.body.textContent = "found " + JSON.stringify({ wide, silent, shown: shown.indexOf(true) }) + " end";
};</script>"""


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium to open pages in; apt-get install chromium")
@pytest.mark.parametrize("name", ["run", "study"])
def test_a_page_fits_a_phone_and_its_slider_moves(name: str, written: dict[str, Path], tmp_path: Path) -> None:
    assert BROWSER is not None
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME % written[name].as_uri(), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--virtual-time-budget=4000"]
    options += ["--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    dumped = subprocess.run(
        [BROWSER, *options, frame.as_uri()], capture_output=True, encoding="utf-8", timeout=120, check=True
    ).stdout
    found = re.search(r"found (\{.*\}) end", dumped)
    assert found is not None, dumped[-500:]
    assert found[1] == f'{{"wide":[],"silent":[],"shown":{0 if name == "run" else -1}}}'
