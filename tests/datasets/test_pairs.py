"""Scans and labels that belong together by their names, in folders as people have them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from delineate.datasets.dataset import load_scan
from delineate.datasets.folder import looks_like_label
from delineate.datasets.inspection import inspect
from delineate.datasets.layouts import LAYOUTS, open_dataset
from delineate.errors import UnknownLayout
from delineate.io.formats import read_label
from delineate.testing import check_layout

ARRANGED: dict[str, tuple[str, ...]] = {
    "two folders": ("images/{}", "labels/{}"),
    "two folders with words": ("imgs/{}_img", "segs/{}_seg"),
    "a word in front": ("scans/{}", "masks/mask_{}"),
    "a folder each": ("{}/ct", "{}/seg"),
    "a folder each, named after it": ("{0}/{0}_ct", "{0}/{0}_label"),
    "several channels": ("{0}/{0}_t1", "{0}/{0}_t2", "{0}/mask"),
    "channels by folder": ("T1/{}", "T2/{}", "labels/{}"),
    "labels in a folder of the subject's": ("{0}/{0}", "{0}/labels/{0}"),
    "sets with two folders each": ("train/images/{}", "train/labels/{}"),
    "one subject's name begins another's": ("images/{}", "images/{}_1", "labels/{}", "labels/{}_1"),
}
"""Where subjects' scans and, last, labels lie."""


@pytest.fixture
def arranged(tmp_path: Path, save_scan, save_label) -> Callable[..., Path]:
    def write(*patterns: str, names: tuple[str, ...] = ("anna", "ben", "case_1")) -> Path:
        for pattern in patterns:
            for name in names:
                path = pattern.format(name) + ".nii.gz"
                (save_label if looks_like_label(Path(path)) else save_scan)(path)
        return tmp_path

    return write


@pytest.mark.parametrize("patterns", ARRANGED.values(), ids=ARRANGED)
def test_every_label_finds_its_scans(arranged, patterns) -> None:
    root = arranged(*patterns)
    check_layout(LAYOUTS["pairs"], root)
    dataset = open_dataset(root)
    files = [path for subject in dataset.subjects for path in subject.files]
    assert sorted(files) == sorted(root.rglob("*.nii.gz"))
    for subject in dataset.subjects:
        [name] = {name for name in ("anna", "ben", "case_1") if name in subject.label.relative_to(root).as_posix()}
        assert all(name in path.relative_to(root).as_posix() for path in subject.files)
    assert not dataset.notes
    assert not inspect(dataset).errors


def test_channels_have_the_names_in_which_files_differ(arranged) -> None:
    assert open_dataset(arranged("{0}/{0}_t1", "{0}/{0}_t2", "{0}/mask")).channels == ("t1", "t2")
    assert open_dataset(arranged("{0}/flair", "{0}/mask", names=("carl",))).channels == ("t1", "t2", "flair")


def test_a_scan_without_a_label_is_a_subject_and_one_of_another_kind_is_said(arranged, save_scan) -> None:
    root = arranged("images/{}", "labels/{}")
    save_scan("images/dora.nii.gz")
    dataset = open_dataset(root)
    assert {subject.id: subject.label is not None for subject in dataset.subjects} == {
        "anna": True, "ben": True, "case_1": True, "dora": False,
    }  # fmt: skip
    save_scan("other/place/x_y_z.nii.gz")
    [note] = open_dataset(root, layout="pairs").notes
    assert "x_y_z" in note


@pytest.mark.parametrize("more", [("labels/{}_gt",), ("labels/stranger_{}",)], ids=["two for one", "none for one"])
def test_labels_that_are_not_one_for_each_scan_are_refused(arranged, more) -> None:
    with pytest.raises(UnknownLayout):
        open_dataset(arranged("images/{}", "labels/{}", *more))


def test_the_error_proposes_patterns_that_fit(arranged) -> None:
    root = arranged("{}/ct", "{}/liver_mask", "{}/spleen_mask")
    with pytest.raises(UnknownLayout, match="found 9 scans") as refused:
        open_dataset(root)
    found = re.findall(r"--images '(.+?)' --labels '(.+?)' \((\d+) pairs\)", refused.value.fix)
    assert [labels for _, labels, _ in found] == [
        "*/{target}_mask.nii.gz", "*/liver_mask.nii.gz", "*/spleen_mask.nii.gz",
    ]  # fmt: skip
    for images, labels, pairs in found:
        dataset = open_dataset(root, images=images, labels=labels)
        assert sum(subject.label is not None for subject in dataset.subjects) == int(pairs) == 3
    masks = open_dataset(root, images=found[0][0], labels=found[0][1])
    assert masks.targets.names == ("liver", "spleen")
    assert {len(subject.files) for subject in masks.subjects} == {3}


def test_a_name_in_a_pattern_stands_for_no_scan(arranged) -> None:
    root = arranged("{}/ct", "{}/liver_seg", "{}/x/spleen_seg")
    dataset = open_dataset(root, images="*/ct.nii.gz", labels="*/{target}.nii.gz")
    assert dataset.targets.names == ("liver_seg",)
    deeper = open_dataset(root, images="**/ct.nii.gz", labels="**/{target}_seg.nii.gz")
    assert [subject.label.names for subject in deeper.subjects if subject.scans] == [("liver",)] * 3
    with pytest.raises(UnknownLayout, match="pattern of images"):
        open_dataset(root, images="*/{target}.nii.gz", labels="*/{target}_seg.nii.gz")


@pytest.mark.parametrize("patterns", ["two folders", "a folder each", "labels in a folder of the subject's"])
def test_real_hippocampi_arranged_so_are_the_same_subjects(real_data: Path, tmp_path: Path, patterns) -> None:
    known = open_dataset(real_data / "hippocampus").subjects[:5]
    for subject in known:
        [scan] = subject.scans.values()
        for file, pattern in zip((scan, subject.label), ARRANGED[patterns], strict=True):
            target = tmp_path / f"{pattern.format(subject.id)}.nii.gz"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    for found, same in zip(open_dataset(tmp_path).subjects, known, strict=True):
        assert found.id == same.id
        np.testing.assert_array_equal(load_scan(found).voxels, load_scan(same).voxels)
        np.testing.assert_array_equal(read_label(found.label).voxels, read_label(same.label).voxels)


@pytest.mark.parametrize("patterns", ARRANGED.values(), ids=ARRANGED)
def test_a_repaired_copy_is_what_the_data_set_was(arranged, patterns, check_copy) -> None:
    root = arranged(*patterns)
    (root / "sites.csv").write_text("subject,site,patient\nanna,A,p1\nben,B,p2\n", encoding="utf-8")
    check_copy(root)
