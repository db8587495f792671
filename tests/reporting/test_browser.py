"""Pages with hostile names, opened in a browser: nothing of the names runs, nothing is asked for from elsewhere."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from delineate.compute import Choice
from delineate.core.grid import Grid
from delineate.core.targets import Targets
from delineate.core.volume import LabelVolume, Volume
from delineate.datasets.inspection import SubjectRow
from delineate.evaluation.measure import measure_prediction
from delineate.evaluation.methods import compare_methods
from delineate.evaluation.table import Evaluation
from delineate.metrics.quantities import QuantityMap
from delineate.reporting.card import blocks_of
from delineate.reporting.html import CardReport, EvaluationReport, MethodsReport, Report, RunReport, write_report
from delineate.reporting.overlays import Overlay, views_of

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
OWN = "document.documentElement.dataset.owned=1"
EVIL = (
    f"<script>{OWN}</script>", f'"><img src=x onerror="{OWN}">', f"'><svg onload={OWN}>",
    f"</script><script>{OWN}</script>", f"javascript:{OWN}", f"</title><script>{OWN}</script>",
    f"--><script>{OWN}</script><!--", f"]]><script>{OWN}</script>", f"</style><script>{OWN}</script>",
    "{{ 7*7 }}<a href=https://example.org>", "$\\frac{$", "\x1b[31m\ud800\u202e",
)  # fmt: skip
TARGETS = Targets({EVIL[0]: (1,), EVIL[1]: (2,)})
GRID = Grid((16, 16, 8), np.diag([-1.0, 1.0, 4.0, 1.0]))


def label(shift: int) -> LabelVolume:
    voxels = np.zeros(GRID.shape, np.uint8)
    voxels[3 + shift : 11, 4:12, 2:6] = 1
    voxels[6:9, 6:9, 3:5] = 2
    return LabelVolume(voxels, GRID)


def evaluation(shift: int = 0) -> Evaluation:
    rows = []
    for i, name in enumerate(EVIL):
        rows += measure_prediction(label((i + shift) % 4), label(0), TARGETS, subject=name, site=EVIL[i % 3]).targets
    return Evaluation(pd.DataFrame(rows), {EVIL[2]: [EVIL[3]]}, quantity=QuantityMap(EVIL[1]))


def card() -> str:
    """A card whose author writes HTML, Markdown and whatever else."""
    cells = " | ".join(EVIL)
    lines = [f"## {EVIL[0]}", *EVIL, *(f"- {text}" for text in EVIL), f"### {EVIL[1]}", f"| {cells} |", f"| {cells} |"]
    return "\n\n".join(lines)


def pages() -> dict[str, Report]:
    measured, other = evaluation(), evaluation(1)
    scan = Volume(np.random.default_rng(0).random((1, *GRID.shape)), GRID)
    overlays = [
        Overlay(name, "best" if name == EVIL[0] else "", 0.9, views_of(scan, label(1), label(0), TARGETS, subject=name))
        for name in EVIL[:3]
    ]
    row = SubjectRow(
        subject=EVIL[0],
        site=EVIL[1],
        patient=EVIL[0],
        shape=(1, 1, 1),
        spacing_mm=(1, 1, 4),
        orientation=EVIL[2],
        channels=("T1",),
        dtype="int16",
        intensities={},
        foreground_shape=(1, 1, 1),
        label_voxels={},
        volume_ml={EVIL[3]: 2.0},
        label_box_shape=(0, 0, 0),
        hashes={},
    )
    run = RunReport(
        title=EVIL[5],
        description=EVIL[6],
        simulated=True,
        data_rows=[row],
        learning=pd.DataFrame({"step": range(50), "loss": np.linspace(1, 0.1, 50)}),
        validation=pd.DataFrame({"step": [10, 20], "dice": [0.5, 0.6], f"dice_{EVIL[0]}": [0.6, 0.7]}),
        evaluation=measured,
        overlays=overlays,
        recipe_yaml=f"name: {EVIL[8]}\n",
        plan=[Choice(EVIL[0], EVIL[1], EVIL[2])],
        provenance={EVIL[3]: EVIL[4]},
        notes=list(EVIL),
        seams={EVIL[0]: (1.0, 3)},
    )
    methods = {EVIL[0]: measured, EVIL[4]: other}
    return {
        "run": run,
        "evaluation": EvaluationReport(EVIL[3], EVIL[9], measured, overlays),
        "card": CardReport(EVIL[5], EVIL[6], simulated=False, blocks=list(blocks_of(card()))),
        "methods": MethodsReport(EVIL[7], EVIL[8], methods, compare_methods(methods)),
    }


class Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]


def elements(page: str) -> Elements:
    found = Elements()
    found.feed(page)
    return found


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    files = {name: folder / f"{name}.html" for name in pages()}
    for name, report in pages().items():
        write_report(files[name], report)
    return files


@pytest.mark.parametrize("name", ["run", "evaluation", "card", "methods"])
def test_hostile_names_are_text(name: str, written: dict[str, Path]) -> None:
    page = written[name].read_text(encoding="utf-8")
    found = elements(page)
    assert found.tags.count("script") == 1
    assert not [attribute for attribute, _ in found.attributes if attribute.startswith("on")]
    linked = [value for attribute, value in found.attributes if attribute in ("src", "href", "xlink:href", "action")]
    assert all(value.startswith(("#", "data:image/")) for value in linked)
    assert "\x1b" not in page
    assert re.search(r"script-src 'sha256-[\w+/]+='", page)


def dumped(page: Path, profile: Path) -> str:
    """A page as a browser has it once its script has run."""
    assert BROWSER is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--virtual-time-budget=3000"]
    command = [BROWSER, *options, f"--user-data-dir={profile}", "--dump-dom", page.as_uri()]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120, check=True).stdout


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium to open pages in; apt-get install chromium")
@pytest.mark.parametrize("name", ["run", "evaluation", "card", "methods"])
def test_nothing_of_a_hostile_name_runs_in_a_browser(name: str, written: dict[str, Path], tmp_path: Path) -> None:
    assert BROWSER is not None
    # A page of our own shows that a browser runs what is let through: the marker is one.
    page = written[name].read_text(encoding="utf-8")
    open_page = tmp_path / "open.html"
    open_page.write_text(f"<p>x</p><script>{OWN}</script>", encoding="utf-8")
    control, shown = (dumped(file, tmp_path / "profile") for file in (open_page, written[name]))
    assert 'data-owned="1"' in control
    assert "data-owned" not in shown.split(">", 2)[1]
    drawn, before = elements(shown), elements(page)
    assert drawn.tags.count("script") == 1
    assert drawn.tags.count("img") == before.tags.count("img")
    # The page's own script has run under its policy: headings became buttons.
    assert drawn.tags.count("button") == sum(
        len(re.findall("<th[ >]", row)) for row in re.findall(r'class="sortable">.*?</thead>', page, re.S)
    )


RISING = (
    ("9", "87,000", "100,000", "2,200,000", "∞", "–"),
    ("−10.50 (−12.00 to −9.00)", "−4.20 (−5.00 to −3.40)", "+0.50 (−1.00 to 2.00)", "3.00 (2.00 to 4.00)"),
    ("0.085 ± 0.010", "0.85 ± 0.03 of the 3 that did not fail", "0.9", "1.2e+03"),
    ("−1.5 to 0.2", "0.85 to 0.9", "0.9 to 1"),
    ("", "3 of 20", "12 of 20"),
    ("s2", "s10 (left)", "s10 (right)"),
)
"""Columns of tables, each in the order of its values."""


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium to open pages in; apt-get install chromium")
def test_a_table_is_sorted_by_value_however_numbers_are_written(tmp_path: Path) -> None:
    tables = [
        "<table class=sortable><thead><tr><th>x</th></tr></thead><tbody>"
        + "".join(f"<tr><td>{cell}</td></tr>" for cell in (*column[1::2], *column[::2]))
        + "</tbody></table>"
        for column in RISING
    ]
    script = (resources.files("delineate.reporting") / "templates" / "page.js").read_text(encoding="utf-8")
    click = "for (const button of document.querySelectorAll('button')) button.click();"
    page = tmp_path / "page.html"
    page.write_text(f"<meta charset=utf-8>{''.join(tables)}<script>{script}{click}</script>", encoding="utf-8")
    shown = dumped(page, tmp_path / "profile")
    found = [tuple(re.findall("<td>(.*?)</td>", table)) for table in shown.split("<table")[1:]]
    assert found == list(RISING)
