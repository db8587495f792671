"""What every layout promises."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

from delineate.core.subject import Subject, paths_of
from delineate.datasets.dataset import Dataset
from delineate.datasets.folder import Folder, Layout, own_folder
from delineate.datasets.layouts import LAYOUTS, open_dataset
from delineate.testing.laws import Law, hold, require, require_own_name


def check_layout(layout: Layout, example: Path, *, skip: Iterable[str] = ()) -> None:
    """Hold a layout to :data:`LAYOUT_LAWS`; ``example`` is a folder arranged that way, with scans and labels."""
    hold(f"layout '{layout.name}'", LAYOUT_LAWS, tuple(skip), layout, example)


def its_name_is_its_own_and_its_tree_is_shown(layout: Layout, example: Path) -> None:
    require_own_name(LAYOUTS, layout.name, layout)
    require(layout.name != "auto", "'auto' cannot be a layout's name")
    require(layout.tree.strip(), "it has no tree, which errors show when a folder has no known layout")


def it_reads_its_example(layout: Layout, example: Path) -> None:
    dataset = _read(layout, example)
    require(dataset.layout == layout.name, f"the data set's layout is '{dataset.layout}'")
    require(dataset.reason, "the data set does not say how it was recognised (reason)")
    require(dataset.subjects, "the data set has no subjects")
    lost = [str(file) for subject in dataset.subjects for file in subject.files if not file.is_file()]
    require(not lost, f"it names files that do not exist: {', '.join(lost[:3])}")
    names = [subject.id for subject in dataset.subjects]
    require(len(set(names)) == len(names), f"subjects share names: {', '.join(names)}")


def a_label_is_no_scan(layout: Layout, example: Path) -> None:
    subjects = _read(layout, example).subjects
    labels = {path for subject in subjects for path in paths_of(subject.label)}
    require(labels, "the example has no labels; give one that does")
    taken = labels & {file for subject in subjects for file in subject.scans.values()}
    require(not taken, f"it takes labels for scans: {', '.join(map(str, taken))}")


def reading_again_finds_the_same(layout: Layout, example: Path) -> None:
    require(_known(_read(layout, example)) == _known(_read(layout, example)), "a second reading finds other subjects")


def other_folders_are_not_its_own(layout: Layout, example: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = layout.read(Folder.walk(Path(folder)))
    require(found is None, "an empty folder is taken for a data set; return None")


def the_example_is_recognised(layout: Layout, example: Path) -> None:
    require(
        LAYOUTS.get(layout.name) is layout,
        "it is not found by name; install its package, whose entry point has that name, or name its module in "
        "DELINEATE_PLUGINS",
    )
    for named in (layout.name, "auto"):
        dataset = open_dataset(example, layout=named)
        require(dataset.layout == layout.name, f"open_dataset(layout='{named}') finds '{dataset.layout}'")
        require(
            _known(dataset) == _known(_read(layout, example)), f"open_dataset(layout='{named}') finds other subjects"
        )


LAYOUT_LAWS: tuple[Law, ...] = (
    its_name_is_its_own_and_its_tree_is_shown,
    it_reads_its_example,
    a_label_is_no_scan,
    reading_again_finds_the_same,
    other_folders_are_not_its_own,
    the_example_is_recognised,
)


def _read(layout: Layout, example: Path) -> Dataset:
    dataset = layout.read(Folder.walk(own_folder(example)))
    require(dataset is not None, f"it does not recognise '{example}'")
    assert dataset is not None
    return dataset


def _known(dataset: Dataset) -> dict[str, tuple[Path, ...]]:
    def files(subject: Subject) -> tuple[Path, ...]:
        return tuple(file.resolve() for file in subject.files)

    return {subject.id: files(subject) for subject in dataset.subjects}
