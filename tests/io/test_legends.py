"""Names and colours beside labels, as ITK-SNAP and 3D Slicer read them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from delineate.core.legend import PALETTE, Legend
from delineate.core.targets import Targets
from delineate.errors import OutputError, RecipeError
from delineate.io.legends import ITK_SNAP, SLICER, write_legends

TARGETS = Targets({"liver": (1, 3), 'a "hot" spot': (2,)})
LEGEND = Legend(colours={"liver": "#DD8265"})

Row = tuple[int, str, tuple[int, ...]]


def itk_snap(path: Path) -> list[Row]:
    """By the columns that its header names: IDX R G B A VIS MSH LABEL."""
    row = re.compile(r'\s*(\d+)\s+(\d+)\s+(\d+)\s+(\d+)\s+([01]|0?\.\d+)\s+[01]\s+[01]\s+"([^"]*)"')
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    found = [row.fullmatch(line) for line in lines]
    assert all(found)
    return [(int(m[1]), m[6], (int(m[2]), int(m[3]), int(m[4]))) for m in found]


def slicer(path: Path) -> list[Row]:
    """Number, a name without spaces, red, green, blue and alpha."""
    lines = [line.split(" ") for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return [(int(value), name, tuple(map(int, colour))) for value, name, *colour in lines]


def test_every_value_of_a_label_has_its_target_s_name_and_colour(tmp_path: Path) -> None:
    write_legends(tmp_path, TARGETS, LEGEND)
    clear, *rows = itk_snap(tmp_path / ITK_SNAP)
    assert clear == (0, "Clear Label", (0, 0, 0))
    orange = (221, 130, 101)
    assert rows == [(1, "liver", orange), (2, "a 'hot' spot", (86, 180, 233)), (3, "liver", orange)]
    assert slicer(tmp_path / SLICER) == [
        (0, "background", (0, 0, 0, 0)),
        (1, "liver", (*orange, 255)),
        (2, 'a_"hot"_spot', (86, 180, 233, 255)),
        (3, "liver", (*orange, 255)),
    ]


def test_a_value_of_several_targets_is_the_innermost_s_however_they_are_listed(tmp_path: Path) -> None:
    for name, values in (("outer", {"liver": (1, 2), "cyst": (2,)}), ("inner", {"cyst": (2,), "liver": (1, 2)})):
        write_legends(tmp_path / name, Targets(values, "overlapping"), LEGEND)
        assert [row[:2] for row in slicer(tmp_path / name / SLICER)] == [(0, "background"), (1, "liver"), (2, "cyst")]


@given(st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=30, unique=True))
def test_any_names_are_a_row_each(tmp_path_factory: pytest.TempPathFactory, names: list[str]) -> None:
    try:
        targets = Targets({name: (value,) for value, name in enumerate(names, start=1)})
    except RecipeError:  # names that no recipe may have
        return
    folder = tmp_path_factory.mktemp("named")
    write_legends(folder, targets, Legend())
    values = [0, *range(1, len(targets.names) + 1)]
    assert [value for value, _, _ in itk_snap(folder / ITK_SNAP)] == values
    assert [value for value, _, _ in slicer(folder / SLICER)] == values


def test_colours_of_ones_own_are_used_for_no_other_target() -> None:
    names = [f"t{n}" for n in range(5)]
    colours = Legend(colours={"t4": PALETTE[0]}).colours_of(names)
    assert len(set(colours.values())) == len(names)


def test_ours_are_written_anew_and_others_are_kept(tmp_path: Path) -> None:
    first = write_legends(tmp_path, TARGETS, Legend())
    before = [path.read_bytes() for path in first]
    write_legends(tmp_path, TARGETS, LEGEND)
    assert [path.read_bytes() for path in first] != before
    (tmp_path / SLICER).write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match="not ours"):
        write_legends(tmp_path, TARGETS, LEGEND)
    assert (tmp_path / SLICER).read_text(encoding="utf-8") == "mine"
