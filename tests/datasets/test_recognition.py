"""The law of layouts: a folder is what its pairs are, whatever else became of it, and no label is ever a scan."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from delineate.cli.app import app
from delineate.core.grid import Grid
from delineate.core.volume import LabelVolume, Volume
from delineate.datasets import layouts
from delineate.datasets.dataset import Dataset
from delineate.datasets.folder import SIMULATED, bare_name, looks_like_label
from delineate.datasets.inspection import inspect
from delineate.datasets.layouts import open_dataset
from delineate.datasets.phantoms.kinds import KINDS
from delineate.datasets.phantoms.writing import ARRANGEMENTS, _write_json
from delineate.errors import DatasetError, DuplicateSubject, MissingFile, UnknownLayout
from delineate.inference.batch import find_subjects
from delineate.io.formats import write_label, write_volume
from delineate.testing import check_layout

GRID = Grid.of_spacing((5, 4, 3))

Pairs = set[tuple[tuple[str, ...], str]]


def write_pair(root: Path, scan: str, label: str) -> None:
    rng = np.random.default_rng(sum(scan.encode()))
    write_volume(root / scan, Volume(rng.integers(1, 5000, (1, *GRID.shape)).astype(np.int16), GRID))
    write_label(root / label, LabelVolume(rng.integers(0, 2, GRID.shape).astype(np.uint8), GRID))


def write_set(root: Path, layout: str, *, described: bool = True) -> Path:
    """Three subjects in a layout, by the writers of simulated scans, with voxels of no matter."""
    if layout == "flat":
        for i in range(3):
            write_pair(root, f"p{i}.nii.gz", f"p{i}_seg.nii.gz")
        return root
    arrangement = ARRANGEMENTS[layout]
    kind = next(kind for kind in KINDS.values() if arrangement.holds(kind))
    rng = np.random.default_rng(0)
    for i in range(3):
        scan = Volume(rng.integers(1, 5000, (len(kind.channels), *GRID.shape)).astype(np.int16), GRID)
        label = LabelVolume(np.minimum(rng.integers(0, 2, GRID.shape), 1).astype(np.uint8), GRID)
        arrangement.write(root, kind, i, scan, label)
    if arrangement.describe is not None and described:
        _write_json(root / "dataset.json", arrangement.describe(kind, range(3)))
    return root


def opened(root: Path, layout: str) -> Dataset:
    return open_dataset(root, **patterns_of(layout))


def patterns_of(layout: str) -> dict[str, str]:
    if layout != "cases":
        return {}
    kind = next(kind for kind in KINDS.values() if ARRANGEMENTS["cases"].holds(kind))
    return {"images": f"*/{kind.channels[0]}.nii", "labels": "*/label.nii"}


def told(path: Path) -> str:
    return f"{path.name} {hash(path.read_bytes())}"


def subjects_of(dataset: Dataset) -> set[tuple[str, str, tuple[str, ...], str]]:
    """Id, site, scans and label of each subject, by the names and bytes of the files."""
    return {
        (s.id, s.site, tuple(sorted({told(p) for p in s.scans.values()})), told(s.label) if s.label else "")
        for s in dataset.subjects
    }


def pairs_of(dataset: Dataset) -> Pairs:
    return {(scans, label) for _, _, scans, label in subjects_of(dataset) if scans and label}


def label_files(dataset: Dataset) -> set[bytes]:
    return {s.label.read_bytes() for s in dataset.subjects if s.label is not None}


def assert_no_label_is_a_scan(root: Path, labels: set[bytes]) -> None:
    """Whatever is found to predict, in the folder and in every folder in it, holds no label's bytes."""
    for folder in [root, *(path for path in root.rglob("*") if path.is_dir())]:
        try:
            subjects = find_subjects([folder], ["image"])
        except DatasetError:
            continue
        inputs = {path for subject in subjects for path in subject.scans.values() if path.is_file()}
        assert not labels & {path.read_bytes() for path in inputs}, folder


LAYOUTS = ["msd", "nnunet", "promise12", "wmh2017", "lits", "brats", "cases", "flat"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_repaired_copy_is_what_the_data_set_was(tmp_path: Path, layout: str, check_copy) -> None:
    root = write_set(tmp_path / "set", layout)
    _write_json(root / SIMULATED, {"simulated": True})
    check_copy(root, **patterns_of(layout))


def drop_description(root: Path) -> Path:
    (root / "dataset.json").unlink(missing_ok=True)
    return root


def stray_scan(root: Path) -> Path:
    write_volume(root / "stray.nii.gz", Volume(np.arange(60, dtype=np.int16).reshape(1, *GRID.shape), GRID))
    return root


def stray_label(root: Path) -> Path:
    write_label(root / "atlas_mask.nii.gz", LabelVolume(np.ones(GRID.shape, np.uint8), GRID))
    return root


def nested(root: Path) -> Path:
    return shutil.move(root, root.parent / "outer" / "inner").parent


def nested_with_a_stray(root: Path) -> Path:
    return stray_scan(nested(root))


def renamed(old: str, new: str) -> Callable[[Path], Path]:
    def rename(root: Path) -> Path:
        for path in [path for path in sorted(root.rglob(old)) if path.is_dir()]:
            path.rename(path.with_name(new))
        return root

    rename.__name__ = f"{old}_is_{new}"
    return rename


MUTATIONS = [
    drop_description,
    stray_scan,
    stray_label,
    nested,
    nested_with_a_stray,
    renamed("imagesTr", "images"),
    renamed("labelsTr", "masks"),
    renamed("labelsTr", "drawn"),
    renamed("labelsTr", "labelsTr_old"),
    renamed("pre", "preprocessed"),
]


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name in layouts.LAYOUTS])
def test_a_layout_keeps_the_laws(layout: str, tmp_path: Path) -> None:
    check_layout(layouts.LAYOUTS[layout], write_set(tmp_path, layout))


@pytest.mark.parametrize("described", [True, False], ids=["described", "bare"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_changed_folder_has_the_same_subjects_or_is_refused(layout: str, described: bool, tmp_path: Path) -> None:
    original = opened(write_set(tmp_path / "original", layout, described=described), layout)
    assert len(pairs_of(original)) == 3
    assert original.reason
    labels, wanted = label_files(original), subjects_of(original)
    recognised = []
    for mutate in MUTATIONS:
        shutil.copytree(tmp_path / "original", tmp_path / mutate.__name__ / "original")
        root = mutate(tmp_path / mutate.__name__ / "original")
        assert_no_label_is_a_scan(root, labels)
        try:
            dataset = opened(root, layout)
        except UnknownLayout:
            continue
        found = subjects_of(dataset)
        # A loose scan is a subject of its own among loose scans.
        assert {subject for subject in found if subject[0] != "stray" or layout != "flat"} == wanted, mutate.__name__
        recognised.append(mutate.__name__)
    # Not everything is refused.
    assert {"drop_description", "stray_scan", "stray_label"} <= set(recognised)


@pytest.mark.parametrize(
    "pair", list(combinations(["msd", "nnunet", "promise12", "wmh2017", "lits", "brats", "flat"], 2))
)
def test_mixed_layouts_lose_no_pair_or_are_refused(pair: tuple[str, str], tmp_path: Path) -> None:
    parts = [open_dataset(write_set(tmp_path / layout, layout)) for layout in pair]
    labels, wanted = set.union(*map(label_files, parts)), set.union(*map(pairs_of, parts))
    for described in (True, False):
        root = tmp_path / f"mixed{described}"
        for layout in pair:
            write_set(root, layout, described=described)
        assert_no_label_is_a_scan(root, labels)
        try:
            dataset = open_dataset(root)
        except (UnknownLayout, DuplicateSubject):
            continue
        found = pairs_of(dataset)
        assert found <= wanted
        assert found == wanted or any("belong to no subject" in note for note in dataset.notes)


def test_nnunet_without_its_description_is_never_promise12(tmp_path: Path) -> None:
    for case in ("case01", "case02"):
        write_pair(tmp_path, f"imagesTr/{case}_0000.nii.gz", f"labelsTr/{case}.nii.gz")
    dataset = open_dataset(tmp_path)
    assert (dataset.layout, dataset.channels, dataset.targets) == ("nnunet", ("image",), None)
    assert "2 pairs" in dataset.reason
    assert [s.scans["T2"].parent.name for s in find_subjects([tmp_path], ["T2"])] == ["imagesTr", "imagesTr"]
    with pytest.raises(UnknownLayout, match="looks like a label"):
        find_subjects([tmp_path / "labelsTr"], ["T2"])


@pytest.mark.parametrize("label", ["x_seg", "x-mask", "x_label", "seg_x", "x_gt", "x_tumour"])
def test_a_label_beside_its_scan_is_its_label(label: str, tmp_path: Path) -> None:
    write_pair(tmp_path, "x.nii.gz", f"{label}.nii.gz")
    write_pair(tmp_path, "y.nii.gz", "z_seg.nii.gz")
    found = {s.id: s.label and s.label.name for s in open_dataset(tmp_path).subjects}
    assert found == {"x": f"{label}.nii.gz", "y": None}
    assert [subject.id for subject in find_subjects([tmp_path], ["T1"])] == ["x", "y"]


def test_a_scan_called_after_another_is_a_scan(tmp_path: Path, save_scan) -> None:
    for name in ("x", "x_late"):
        save_scan(f"{name}.nii.gz")
    assert [subject.id for subject in open_dataset(tmp_path).subjects] == ["x", "x_late"]


def test_a_bare_name_beside_numbered_channels_is_their_label(tmp_path: Path, save_scan) -> None:
    write_pair(tmp_path, "a_0000.nii.gz", "a.nii.gz")
    save_scan("a_0001.nii.gz")
    (subject,) = open_dataset(tmp_path).subjects
    assert (subject.id, subject.channels) == ("a", ("channel_0", "channel_1"))
    assert subject.label == tmp_path / "a.nii.gz"


def test_labels_that_compete_for_a_scan_are_noted_and_none_is_taken(tmp_path: Path) -> None:
    write_pair(tmp_path, "x.nii.gz", "x_seg.nii.gz")
    write_pair(tmp_path, "y.nii.gz", "x_mask.nii.gz")
    dataset = open_dataset(tmp_path)
    assert [(s.id, s.label) for s in dataset.subjects] == [("x", None), ("y", None)]
    assert "several labels" in dataset.notes[0]


def test_a_label_is_an_input_only_where_it_is_named(tmp_path: Path) -> None:
    write_pair(tmp_path, "x.nii.gz", "x_seg.nii.gz")
    (subject,) = find_subjects([tmp_path / "x_seg.nii.gz"], ["T1"])
    assert subject.id == "x_seg"
    with pytest.raises(DatasetError, match=r"x_seg.nii.gz"):  # as a shell's x*.nii.gz gives them
        find_subjects([tmp_path / "x.nii.gz", tmp_path / "x_seg.nii.gz"], ["T1"])
    assert [s.id for s in find_subjects([tmp_path], ["T1"], images="*.nii.gz")] == ["x"]
    assert [s.id for s in find_subjects([tmp_path], ["T1"], images="*_seg.nii.gz")] == ["x"]


def test_an_input_that_cannot_be_looked_for_is_missing(tmp_path: Path) -> None:
    """Its name is too long; no permission does the same to all users but root."""
    for name in ("x" * 300, "x" * 300 + ".nii.gz"):
        with pytest.raises(MissingFile, match=r"too long.*check its name and permissions"):
            find_subjects([tmp_path / name], ["T1"])


def test_predictions_in_a_folder_below_do_not_get_in_the_way(tmp_path: Path, save_scan) -> None:
    save_scan("x.nii.gz")
    shutil.copytree(tmp_path, tmp_path / "out")
    assert [subject.id for subject in find_subjects([tmp_path], ["T1"])] == ["x"]


def test_loose_scans_among_dicom_are_refused(dicom_folder: Path) -> None:
    stray_scan(dicom_folder)
    with pytest.raises(UnknownLayout, match="others such as"):
        open_dataset(dicom_folder)


@pytest.fixture
def dicom_folder(tmp_path: Path) -> Path:
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "1").write_bytes(bytes(128) + b"DICM")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "bare"),
    [("a_seg", "a"), ("a.seg", "a"), ("seg-a", "a"), ("a b_Segmentation", "a b"), ("T1_brainmask", "T1"), ("mask", "")],
)
def test_names_of_labels(name: str, bare: str) -> None:
    assert looks_like_label(Path(f"{name}.nii.gz"))
    assert bare_name(Path(f"{name}.nii.gz")) == bare


@pytest.mark.parametrize("path", ["segment1", "maskell", "labelled_scans/a", "a_seg_t1", "unlabelled", "gtx", "a_0000"])
def test_names_of_scans(path: str) -> None:
    assert not looks_like_label(Path(f"{path}.nii.gz"))
    assert bare_name(Path(f"{path}.nii.gz")) == Path(path).name


def test_inspection_says_which_layout_it_is_and_why(tmp_path: Path) -> None:
    dataset = open_dataset(write_set(tmp_path, "lits"))
    found = inspect(dataset).as_dict()
    assert (found["layout"], found["reason"]) == ("lits", "3 of 3 cases are pairs of volume-N with segmentation-N")
    printed = CliRunner().invoke(app, ["data", "inspect", str(tmp_path)])
    assert f"layout lits: {dataset.reason}" in printed.output
