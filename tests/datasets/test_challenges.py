from __future__ import annotations

from pathlib import Path

import pytest

from delineate.core.targets import Targets
from delineate.datasets.layouts import open_dataset
from delineate.errors import DuplicateSubject


def test_promise12_pairs_cases_and_leaves_the_test_set_out(tmp_path: Path, save_scan, save_label) -> None:
    for case in ("Case00", "Case01"):
        save_scan(f"Training/{case}.mhd")
        save_label(f"Training/{case}_segmentation.mhd")
        save_scan(f"TestData/{case}.mhd")
    dataset = open_dataset(tmp_path)
    assert (dataset.layout, dataset.channels, dataset.targets) == ("promise12", ("T2",), Targets({"prostate": (1,)}))
    assert [(s.id, s.label is not None) for s in dataset.subjects] == [("Case00", True), ("Case01", True)]
    assert [s.label for s in open_dataset(tmp_path / "TestData").subjects] == [None, None]


def test_promise12_cases_of_one_name_are_listed(tmp_path: Path, save_scan) -> None:
    save_scan("part1/Case00.mhd")
    save_scan("part2/Case00.mhd")
    with pytest.raises(DuplicateSubject, match=r"part1/Case00.mhd, part2/Case00.mhd"):
        open_dataset(tmp_path)


class TestWmh:
    @pytest.fixture
    def root(self, tmp_path: Path, save_scan, save_label) -> Path:
        for place in ("Utrecht/0", "Amsterdam/GE3T/100"):
            save_scan(f"{place}/pre/FLAIR.nii.gz")
            save_scan(f"{place}/orig/FLAIR.nii.gz")
            save_label(f"{place}/wmh.nii.gz")
        save_scan("Utrecht/0/pre/T1.nii.gz")
        return tmp_path

    def test_sites_are_folders_and_other_pathology_is_ignored(self, root: Path) -> None:
        dataset = open_dataset(root)
        assert dataset.layout == "wmh2017"
        assert [(s.id, s.site, s.channels) for s in dataset.subjects] == [
            ("Amsterdam_GE3T_100", "Amsterdam", ("FLAIR",)),
            ("Utrecht_0", "Utrecht", ("FLAIR", "T1")),
        ]
        assert dataset.targets == Targets({"lesion": (1,)}, ignore=(2,))
        assert all(subject.label for subject in dataset.subjects)

    def test_one_site_and_one_subject_can_be_opened(self, root: Path) -> None:
        (subject,) = open_dataset(root / "Utrecht").subjects
        assert (subject.id, subject.site) == ("Utrecht_0", "Utrecht")
        (subject,) = open_dataset(root / "Utrecht" / "0").subjects
        assert (subject.id, subject.site) == ("0", "")


def test_lits_targets_overlap(tmp_path: Path, save_scan, save_label) -> None:
    for i in (0, 12):
        save_scan(f"batch {i % 2}/volume-{i}.nii")
        save_label(f"batch {i % 2}/segmentation-{i}.nii")
    save_scan("test-volume-0.nii")
    dataset = open_dataset(tmp_path)
    assert (dataset.layout, dataset.modality) == ("lits", "CT")
    assert [(s.id, s.label.name) for s in dataset.subjects if s.label] == [
        ("volume-0", "segmentation-0.nii"),
        ("volume-12", "segmentation-12.nii"),
    ]
    assert dataset.targets == Targets({"liver": (1, 2), "tumour": (2,)}, "overlapping")


@pytest.mark.parametrize(
    ("names", "label", "channels", "values"),
    [
        (["c_flair", "c_t1", "c_t1ce", "c_t2"], "c_seg", ("FLAIR", "T1", "T1c", "T2"), [1, 2, 4]),
        (["C-1-t2f", "C-1-t1n", "C-1-t1c", "C-1-t2w"], "C-1-seg", ("FLAIR", "T1", "T1c", "T2"), [1, 2, 3]),
        (["Flair_subtrMeanDivStd", "T1c_subtrMeanDivStd"], "OTMultiClass", ("FLAIR", "T1c"), [1, 2, 3, 4]),
        (["VSD.XX.O.MR_Flair.54/VSD.XX.O.MR_Flair.54", "MR_T2"], "VSD.XX.OT.55", ("FLAIR", "T2"), [1, 2, 3, 4]),
    ],
    ids=["2020", "2023", "2015 normalised", "2015"],
)
def test_brats_of_any_year(tmp_path: Path, save_scan, save_label, names, label, channels, values) -> None:
    for name in [*names, "brainmask"]:
        save_scan(f"HGG/case_1/{name}.nii.gz")
    save_label(f"HGG/case_1/{label}.nii.gz")
    dataset = open_dataset(tmp_path)
    (subject,) = dataset.subjects
    assert (dataset.layout, subject.id, subject.channels) == ("brats", "case_1", channels)
    assert subject.label is not None
    assert dataset.targets is not None
    assert [v for numbers in dataset.targets.values.values() for v in numbers] == values


def test_many_subjects_in_one_folder_are_no_brats_case(tmp_path: Path, save_scan) -> None:
    for subject in "abc":
        for channel in ("t1", "flair"):
            save_scan(f"{subject}_{channel}.nii.gz")
    assert open_dataset(tmp_path).layout == "scans"


@pytest.mark.parametrize(
    ("folder", "layout", "count", "labelled"),
    [
        ("hippocampus", "msd", 209, 209),
        ("sarcoma", "nnunet", 11, 11),
        ("wmh", "wmh2017", 14, 14),
        ("prostate", "promise12", 22, 22),
        ("brats", "brats", 5, 5),
        ("hippocampus/imagesTr", "scans", 209, 0),
    ],
)
def test_real_data_sets_are_recognised(real_data: Path, folder: str, layout: str, count: int, labelled: int) -> None:
    dataset = open_dataset(real_data / folder)
    assert (dataset.layout, len(dataset.subjects)) == (layout, count)
    assert sum(subject.label is not None for subject in dataset.subjects) == labelled
    assert all(path.is_file() for subject in dataset.subjects for path in subject.files)
