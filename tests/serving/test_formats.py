"""What a server can answer with is what ``delineate predict`` can write, and one list says so."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest

from delineate.io.exports import exported_files, label_formats
from delineate.io.suffixes import REPORT_SUFFIX
from delineate.io.surfaces import WRITERS, surface_files
from delineate.serving.formats import COMPANIONS, OUTPUTS, suffix_of, written
from delineate.serving.protocol import Done, Output, decode, encode

ROOT = Path(__file__).parents[2]


def test_all_that_predict_writes_is_offered() -> None:
    assert set(label_formats()) < set(OUTPUTS)
    for format in WRITERS:
        alone = len(set(surface_files(Path("case"), ("a", "b"), format).values())) == 1
        assert format + ".zip" * (not alone) in OUTPUTS
    assert REPORT_SUFFIX[1:] in OUTPUTS


def test_what_comes_along_is_what_the_writers_write() -> None:
    for format in label_formats():
        beside = {path.name.partition(".")[2] for path in exported_files(Path(f"label.{format}"))}
        assert beside <= set(written([format])) == {format, "json", *COMPANIONS.get(format, ())}


@pytest.mark.parametrize("count", [0, 1, 2])
def test_what_is_written_holds_what_was_asked_for_and_needs_nothing_more(count: int) -> None:
    for asked in combinations(OUTPUTS, count):
        found = written(asked)
        assert [*dict.fromkeys([*asked, "json"])] == found[: len({*asked, "json"})]
        assert len(set(found)) == len(found)
        assert set(written(found)) == set(found) <= set(OUTPUTS)


def test_a_name_has_the_longest_suffix_that_fits() -> None:
    for format in OUTPUTS:
        assert suffix_of(Path(f"a.b.{format.upper()}")) == f".{format}"
    assert suffix_of(Path("a.stl")) == suffix_of(Path("a.zip")) == ""


def test_all_formats_together_fit_into_a_message() -> None:
    outputs = tuple(Output(f"label.{format}", 1, "0" * 64) for format in OUTPUTS)
    done = Done(lease="0123456789abcdef", outputs=outputs)
    assert decode(encode(done)) == (done, b"")


def test_the_page_on_serving_explains_every_format() -> None:
    page = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `.")]
    assert {name.strip(" `.") for row in rows for name in row.split(",")} == set(OUTPUTS)
