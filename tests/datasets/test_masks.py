"""A mask for each target, in folders as TotalSegmentator and others have them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from delineate.cli.app import app
from delineate.core.grid import Grid
from delineate.core.subject import Masks
from delineate.core.targets import Targets
from delineate.core.volume import LabelVolume
from delineate.datasets.dataset import Dataset, load_label, load_scan
from delineate.datasets.inspection import inspect
from delineate.datasets.layouts import LAYOUTS, open_dataset
from delineate.datasets.repair import repair
from delineate.errors import DelineateError, UnknownLayout
from delineate.evaluation.measure import evaluate_folders
from delineate.inference.batch import find_subjects
from delineate.io.exports import export_label
from delineate.io.files import content_hash
from delineate.io.formats import read_label, suffix_of, write_label, write_volume
from delineate.io.segments import segments_in
from delineate.testing import check_layout

ARRANGED: dict[str, tuple[str, str]] = {
    "TotalSegmentator": ("{}/ct", "{}/segmentations/{}"),
    "named after the subject": ("{0}/{0}_ct", "{0}/rois/{0}_{1}_mask"),
    "two folders a subject": ("{}/images/ct", "{}/masks/{}"),
    "a folder of masks a scan": ("images/{}", "masks/{}/{}"),
    "a folder of scans a target": ("images/{}", "masks/{1}/{0}"),
    "sets": ("train/{}/ct", "train/{}/labels/{}"),
}
"""Where a subject's scan and, by target, its masks lie."""
NAMES = ("s01", "s02", "s03")


@pytest.fixture
def arranged(tmp_path: Path, save_scan, save_label) -> Callable[..., Path]:
    """Masks of a liver and, beside it, a spleen."""
    spleen = np.zeros((6, 5, 4), np.uint8)
    spleen[0, 0, 0] = 255

    def write(scan: str, mask: str, names: tuple[str, ...] = NAMES) -> Path:
        for name in names:
            save_scan(f"{scan.format(name)}.nii.gz")
            save_label(f"{mask.format(name, 'liver')}.nii.gz")
            save_label(f"{mask.format(name, 'spleen')}.nii.gz", spleen)
        return tmp_path

    return write


@pytest.mark.parametrize("patterns", ARRANGED.values(), ids=ARRANGED)
def test_every_scan_finds_its_masks(arranged, patterns: tuple[str, str]) -> None:
    root = arranged(*patterns)
    check_layout(LAYOUTS["masks"], root)
    dataset = open_dataset(root)
    assert (dataset.layout, dataset.targets) == ("masks", Targets({"liver": (1,), "spleen": (2,)}))
    assert [subject.id for subject in dataset.subjects] == [*NAMES]
    assert {len(subject.scans) for subject in dataset.subjects} == {1}
    files = [path for subject in dataset.subjects for path in subject.files]
    assert sorted(files) == sorted(root.rglob("*.nii.gz"))
    for subject in dataset.subjects:
        assert all(subject.id in path.relative_to(root).as_posix() for path in subject.files)
        assert all(name in path.relative_to(root).as_posix() for name, path in subject.label.files.items())
    inspection = inspect(dataset)
    assert not inspection.errors
    assert {tuple(row.label_voxels.values()) for row in inspection.rows} == {(6 * 5 * 4 - 9, 8, 1)}
    assert not dataset.notes


def test_inspect_says_what_it_took_the_folder_for(arranged) -> None:
    root = arranged(*ARRANGED["TotalSegmentator"])
    shown = CliRunner().invoke(app, ["data", "inspect", str(root)])
    assert shown.exit_code == 0, shown.output
    assert "layout masks: 3 of 3 scans have masks, such as s01/ct.nii.gz with s01/segmentations/liver" in shown.output
    assert "2 targets: liver, spleen" in shown.output


@pytest.mark.parametrize("patterns", ARRANGED.values(), ids=ARRANGED)
def test_no_mask_is_ever_a_scan(arranged, patterns: tuple[str, str]) -> None:
    """Whichever folder of it is given to be predicted."""
    root = arranged(*patterns)
    masks = {content_hash(path) for subject in open_dataset(root).subjects for path in subject.label.paths}
    found = 0
    for folder in [root, *(path for path in root.rglob("*") if path.is_dir())]:
        try:
            subjects = find_subjects([folder], ["image"])
        except DelineateError:
            continue
        found += len(subjects)
        assert not masks & {content_hash(path) for subject in subjects for path in subject.scans.values()}
    assert found >= 3


def test_one_subject_s_folder_can_be_given(arranged) -> None:
    root = arranged(*ARRANGED["TotalSegmentator"])
    [subject] = open_dataset(root / "s02").subjects
    assert (subject.id, subject.channels, subject.label.names) == ("s02", ("ct",), ("liver", "spleen"))
    [subject] = find_subjects([root / "s02"], ["CT"])
    assert [path.name for path in subject.scans.values()] == ["ct.nii.gz"]


def test_several_channels_a_scan_without_masks_and_institutes(arranged, save_scan) -> None:
    root = arranged(*ARRANGED["TotalSegmentator"])
    for name in (*NAMES, "s04"):
        save_scan(f"{name}/mri.nii.gz")
    save_scan("s04/ct.nii.gz")
    (root / "meta.csv").write_text("image_id;age;institute;split\ns01;70;A;train\ns04;;B;test\n", encoding="utf-8")
    dataset = open_dataset(root)
    assert dataset.channels == ("ct", "mri")
    assert {subject.id: subject.label is not None for subject in dataset.subjects} == {
        "s01": True, "s02": True, "s03": True, "s04": False,
    }  # fmt: skip
    assert [subject.site for subject in dataset.subjects] == ["A", "", "", "B"]
    assert dict(dataset.subjects[0].attributes) == {"age": "70", "split": "train"}


def another_label(root: Path, save_scan, save_label) -> None:
    save_label("s01/liver_seg.nii.gz")


def a_label_of_the_scan_s_name(root: Path, save_scan, save_label) -> None:
    save_label("s01/segmentations/ct.nii.gz")


def scans_in_one_folder(root: Path, save_scan, save_label) -> None:
    for name in ("a", "b"):
        save_scan(f"s01/{name}.nii.gz")


@pytest.mark.parametrize("spoil", [another_label, a_label_of_the_scan_s_name, scans_in_one_folder])
def test_what_may_mean_something_else_is_refused(arranged, save_scan, save_label, spoil) -> None:
    root = arranged(*ARRANGED["TotalSegmentator"])
    (root / "s03" / "ct.nii.gz").unlink() if spoil is scans_in_one_folder else None
    spoil(root, save_scan, save_label)
    with pytest.raises(UnknownLayout):
        open_dataset(root)


def test_many_scans_beside_masks_of_other_names_are_refused(save_scan, save_label, tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_scan(f"images/{name}.nii.gz")
        save_label(f"masks/of_{name}.nii.gz")
    with pytest.raises(UnknownLayout):
        open_dataset(tmp_path)


def test_a_target_that_a_subject_has_no_mask_of_is_an_error_unless_it_is_not_asked_for(arranged) -> None:
    root = arranged(*ARRANGED["TotalSegmentator"])
    (root / "s02" / "segmentations" / "spleen.nii.gz").unlink()
    dataset = open_dataset(root)
    assert dataset.targets.names == ("liver", "spleen")
    [problem] = inspect(dataset).errors
    assert (problem.code, problem.subject) == ("E_MISSING", "s02")
    assert "no mask of spleen" in problem.message
    assert "empty mask" in problem.fix
    liver = Targets({"liver": (1,)})
    assert not inspect(open_dataset(root, targets=liver)).errors


def test_an_overlap_is_an_error_that_says_which_targets_would_fit(arranged, save_label) -> None:
    root = arranged(*ARRANGED["TotalSegmentator"])
    tumour = np.zeros((6, 5, 4), np.uint8)
    tumour[2, 2, 1] = 1
    for name in NAMES:
        save_label(f"{name}/segmentations/tumour.nii.gz", tumour)
    problems = inspect(open_dataset(root)).errors
    assert {problem.code for problem in problems} == {"E_LABEL_VALUE"}
    assert "liver and tumour (1 voxel)" in problems[0].message
    assert "--targets 'liver=1+3,spleen=2,tumour=3'" in problems[0].fix
    said = CliRunner().invoke(app, ["data", "inspect", str(root), "--targets", "liver=1+3,spleen=2,tumour=3"])
    assert said.exit_code == 0, said.output
    assert "nothing to fix" in said.output


def test_slicer_s_segmentations_are_targets_by_name(save_scan, tmp_path: Path) -> None:
    """They overlap, and each scan's are numbered as they were drawn."""
    grid = Grid.of_spacing((6, 5, 4))
    nested = np.zeros(grid.shape, np.uint8)
    nested[1:5, 1:4, 1:3], nested[2, 2, 1] = 1, 2
    for name, order in (("a", ("liver", "tumour")), ("b", ("tumour", "liver"))):
        save_scan(f"{name}/ct.nii.gz")
        values = {"liver": (1, 2), "tumour": (2,)}
        drawn = Targets({one: values[one] for one in order}, "overlapping")
        export_label(tmp_path / name / "Segmentation.seg.nrrd", LabelVolume(nested, grid), drawn)
    dataset = open_dataset(tmp_path)
    assert (dataset.layout, dataset.targets.names) == ("pairs", ("liver", "tumour"))
    assert all(isinstance(subject.label, Masks) for subject in dataset.subjects)
    targets = Targets({"tumour": (7,), "liver": (4, 7)}, "overlapping")
    for subject in dataset.subjects:
        assert np.array_equal(load_label(subject, targets, grid).voxels, np.array([0, 4, 7])[nested])
    for subject in dataset.subjects:  # predictions under the subjects' names, evaluated by the targets' names
        write_label(tmp_path / "out" / f"{subject.id}.nii.gz", LabelVolume(np.array([0, 4, 7], np.uint8)[nested], grid))
    evaluation = evaluate_folders(tmp_path / "out", dataset, targets)
    assert set(evaluation.table["dice"]) == {1.0}


def test_annotators_segments_agree_by_name_and_are_converted_with_their_values(tmp_path: Path) -> None:
    grid = Grid.of_spacing((6, 5, 4))
    voxels = np.zeros(grid.shape, np.uint8)
    voxels[1:5, 1:4, 1:3], voxels[0, 0, 0] = 3, 8
    drawn = {"one": Targets({"liver": (3,), "spleen": (8,)}), "two": Targets({"spleen": (8,), "liver": (3,)})}
    for annotator, targets in drawn.items():
        export_label(tmp_path / annotator / "a.seg.nrrd", LabelVolume(voxels, grid), targets)
    folders = [str(tmp_path / annotator) for annotator in drawn]
    agreed = CliRunner().invoke(app, ["data", "consensus", *folders, "-o", str(tmp_path / "agreed")])
    assert agreed.exit_code == 0, agreed.output
    assert agreed.output.count("1.000") == 2
    assert np.unique(read_label(tmp_path / "agreed" / "a.nii.gz").voxels).tolist() == [0, 1, 2]
    new = tmp_path / "new.seg.nrrd"
    done = CliRunner().invoke(app, ["data", "convert", "--label", str(tmp_path / "two" / "a.seg.nrrd"), str(new)])
    assert done.exit_code == 0, done.output
    assert np.array_equal(read_label(new).voxels, voxels)
    assert segments_in(new).names == ("spleen", "liver")


def test_a_copy_is_repaired_mask_by_mask(arranged, tmp_path_factory) -> None:
    root = arranged(*ARRANGED["TotalSegmentator"])
    spleen = root / "s01" / "segmentations" / "spleen.nii.gz"
    moved = Grid.of_spacing((6, 5, 4)).permute((2, 1, 0), (False, False, False))
    write_label(spleen, LabelVolume(np.transpose(np.ones((6, 5, 4), np.uint8) * (np.arange(4) < 1), (2, 1, 0)), moved))
    assert {problem.code for problem in inspect(open_dataset(root)).errors} == {"E_GRID_MISMATCH"}
    out = tmp_path_factory.mktemp("copies") / "new"
    done = {one.file: one.done for one in repair(open_dataset(root), out)}
    assert done.pop("s01/segmentations/spleen.nii.gz") == "repaired"
    assert set(done.values()) == {"copied"}
    copies = open_dataset(out)
    assert not inspect(copies).errors
    assert (load_label(copies.subjects[0], copies.targets, None).voxels == 2).sum() > 1


@pytest.mark.parametrize("patterns", ARRANGED.values(), ids=ARRANGED)
def test_a_repaired_copy_is_what_the_data_set_was(arranged, patterns: tuple[str, str], check_copy) -> None:
    root = arranged(*patterns)
    (root / "meta.csv").write_text("image_id;institute\ns01;site A\ns02;site B\n", encoding="utf-8")
    check_copy(root)


def written_as_masks(dataset: Dataset, targets: Targets, root: Path) -> None:
    """The data set's first subjects as TotalSegmentator would have them."""
    for subject in dataset.subjects[:2]:
        for channel, file in subject.scans.items():
            target = root / subject.id / f"{channel}{suffix_of(file)}"
            if suffix_of(file) == ".nii.gz":
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
            else:
                write_volume(target, load_scan(subject, [channel]))
        label = load_label(subject, targets, None)
        for name, mask in targets.masks(label.voxels).items():
            only = LabelVolume(mask.astype(np.uint8), label.grid)
            write_label(root / subject.id / "segmentations" / f"{name}.nii", only)


REAL = {
    "hippocampus": None,
    "sarcoma": None,
    "prostate": None,
    "brats": Targets({"whole": (1, 2, 3, 4), "core": (1, 3, 4), "enhancing": (4,)}, "overlapping"),
    "wmh": Targets({"lesion": (1,)}, ignore=(2,)),
}


@pytest.mark.parametrize("name", REAL)
def test_real_data_rewritten_as_masks_are_the_same_subjects(real_data: Path, tmp_path: Path, name: str) -> None:
    dataset = open_dataset(real_data / name)
    targets = REAL[name] or dataset.targets or Targets({"target": (1,)})
    written_as_masks(dataset, targets, tmp_path)
    again = open_dataset(tmp_path, targets=targets)
    assert (again.layout, again.channels) == ("masks", tuple(sorted(dataset.channels)))
    assert not any("segmentations" in path.parts for subject in again.subjects for path in subject.scans.values())
    known = dataset.subjects[:2]
    assert [subject.id for subject in again.subjects] == [subject.id for subject in known]
    for subject, same in zip(again.subjects, known, strict=True):
        after, before = load_label(subject, targets, None).voxels, load_label(same, targets, None).voxels
        if targets.exclusive and not targets.ignore:
            assert np.array_equal(after, before)
        for name, mask in targets.masks(before).items():
            assert np.array_equal(targets.masks(after)[name], mask)
        channel = dataset.channels[-1]
        assert np.array_equal(load_scan(subject, [channel]).voxels, load_scan(same, [channel]).voxels)
