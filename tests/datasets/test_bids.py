"""BIDS folders as people have them; the same scans arranged otherwise are the same subjects."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from delineate.core.targets import Targets
from delineate.datasets.dataset import load_scan
from delineate.datasets.inspection import inspect
from delineate.datasets.layouts import LAYOUTS, open_dataset
from delineate.errors import DuplicateSubject, UnknownLayout
from delineate.io.formats import read_label
from delineate.testing import check_layout

MANUAL = "derivatives/manual"


@pytest.fixture
def bids(tmp_path: Path, save_scan, save_label) -> Callable[..., Path]:
    """Writes a data set of files by name; what ends like a label is one."""

    def write(*names: str, participants: str = "", **files: object) -> Path:
        about = {"Name": "Study", "BIDSVersion": "1.9.0"}
        (tmp_path / "dataset_description.json").write_text(json.dumps(about), encoding="utf-8")
        if participants:
            (tmp_path / "participants.tsv").write_text(participants.replace(" ", "\t"), encoding="utf-8")
        for name in names:
            (save_label if re.search(r"_(dseg|mask|roi)$", name) else save_scan)(f"{name}.nii.gz")
        return tmp_path

    return write


def test_channels_sessions_sites_and_targets_are_as_named(bids) -> None:
    root = bids(
        *(f"sub-{n}/ses-{s}/anat/sub-{n}_ses-{s}_{kind}" for n in (1, 2) for s in "ab" for kind in ("T1w", "FLAIR")),
        *(f"{MANUAL}/sub-{n}/ses-{s}/anat/sub-{n}_ses-{s}_space-FLAIR_dseg" for n in (1, 2) for s in "ab"),
        participants="participant_id Site age\nsub-1 Utrecht 70\nsub-2 n/a 61\n",
    )
    (root / MANUAL / "dseg.tsv").write_text("index\tname\n0\tbackground\n1\tlesion\n", encoding="utf-8")
    check_layout(LAYOUTS["bids"], root)
    dataset = open_dataset(root)
    assert (dataset.name, dataset.layout, dataset.modality) == ("Study", "bids", "MR")
    assert [subject.id for subject in dataset.subjects] == [f"sub-{n}_ses-{s}" for n in (1, 2) for s in "ab"]
    assert [subject.patient for subject in dataset.subjects] == ["sub-1", "sub-1", "sub-2", "sub-2"]
    assert [subject.site for subject in dataset.subjects] == ["Utrecht", "Utrecht", "", ""]
    assert dataset.channels == ("FLAIR", "T1w")
    assert dataset.targets == Targets({"lesion": (1,)})
    assert dict(dataset.subjects[0].attributes) == {"age": "70"}
    assert not dataset.notes


def test_a_repaired_copy_is_what_the_data_set_was(bids, check_copy) -> None:
    root = bids(
        *(f"sub-{n}/ses-a/anat/sub-{n}_ses-a_{kind}" for n in (1, 2, 3) for kind in ("T1w", "FLAIR")),
        *(f"{MANUAL}/sub-{n}/ses-a/anat/sub-{n}_ses-a_dseg" for n in (1, 2, 3)),
        participants="participant_id site age\nsub-1 Utrecht 70\nsub-2 Oslo 61\nsub-3 Oslo 50\n",
    )
    (root / MANUAL / "dseg.tsv").write_text("index\tname\n1\tlesion\n", encoding="utf-8")
    (root / "FLAIR.json").write_text('{"MagneticFieldStrength": 3}', encoding="utf-8")
    own = root / "sub-1/ses-a/anat/sub-1_ses-a_T1w.json"
    own.write_text('{"EchoTime": 0.004}', encoding="utf-8")
    check_copy(root)


def test_a_mask_is_named_by_its_label_and_raw_data_alone_are_scans(bids) -> None:
    root = bids("sub-1/anat/sub-1_T1w")
    assert [subject.label for subject in open_dataset(root).subjects] == [None]
    bids(f"{MANUAL}/sub-1/anat/sub-1_label-hippocampus_mask")
    dataset = open_dataset(root)
    assert dataset.targets == Targets({"hippocampus": (1,)})
    assert dataset.subjects[0].label == root / MANUAL / "sub-1/anat/sub-1_label-hippocampus_mask.nii.gz"


def test_what_tells_scans_of_a_kind_apart_is_in_the_channel_s_name(bids) -> None:
    root = bids("sub-1/anat/sub-1_T1w", "sub-1/anat/sub-1_ce-gadolinium_T1w", "sub-1/anat/sub-1_acq-fast_T2w")
    assert open_dataset(root).channels == ("T1w", "T2w", "ce-gadolinium_T1w")


def test_runs_of_all_channels_are_examinations_and_of_one_alone_are_repeats(bids) -> None:
    kinds = ("T1w", "FLAIR")
    root = bids(
        *(f"sub-1/anat/sub-1_run-{run}_{kind}" for run in (1, 2) for kind in kinds),
        *(f"{MANUAL}/sub-1/anat/sub-1_run-{run}_dseg" for run in (1, 2)),
        "sub-2/anat/sub-2_run-1_T1w", "sub-2/anat/sub-2_run-2_T1w", "sub-2/anat/sub-2_FLAIR",
        f"{MANUAL}/sub-2/anat/sub-2_run-1_dseg",
        "sub-3/anat/sub-3_run-01_T1w", "sub-3/anat/sub-3_run-01_FLAIR", f"{MANUAL}/sub-3/anat/sub-3_dseg",
    )  # fmt: skip
    dataset = open_dataset(root)
    found = {subject.id: [path.name for path in subject.files] for subject in dataset.subjects}
    assert found == {
        **{f"sub-1_run-{n}": [f"sub-1_run-{n}_{kind}.nii.gz" for kind in ("FLAIR", "T1w", "dseg")] for n in (1, 2)},
        "sub-2": ["sub-2_FLAIR.nii.gz", "sub-2_run-1_T1w.nii.gz", "sub-2_run-1_dseg.nii.gz"],
        "sub-3": ["sub-3_run-01_FLAIR.nii.gz", "sub-3_run-01_T1w.nii.gz", "sub-3_dseg.nii.gz"],
    }
    assert dataset.notes == ("1 repeated scans are left aside: the first run of each channel counts",)


def test_labels_elsewhere_and_other_measurements_are_left_aside_and_said(bids) -> None:
    root = bids(
        "sub-1/anat/sub-1_T1w", "sub-1/func/sub-1_task-rest_bold", f"{MANUAL}/sub-1/anat/sub-1_dseg",
        f"{MANUAL}/sub-1/anat/sub-1_space-MNI152_dseg", f"{MANUAL}/sub-2/anat/sub-2_dseg",
        "derivatives/prep/sub-1/anat/sub-1_desc-preproc_T1w", "sourcedata/sub-1/anat/sub-1_T1w",
    )  # fmt: skip
    dataset = open_dataset(root)
    [subject] = dataset.subjects
    assert [path.relative_to(root).as_posix() for path in subject.files] == [
        "sub-1/anat/sub-1_T1w.nii.gz", f"{MANUAL}/sub-1/anat/sub-1_dseg.nii.gz",
    ]  # fmt: skip
    left = " ".join(dataset.notes)
    assert "1 of func" in left
    assert "(MNI152)" in left
    assert "1 labels belong to no scan" in left


def test_labels_of_several_kinds_are_refused_with_patterns_that_fit(bids) -> None:
    root = bids(
        *(f"sub-{n}/ses-1/anat/sub-{n}_ses-1_T1w" for n in (1, 2)),
        *(f"{MANUAL}/sub-{n}/ses-1/anat/sub-{n}_ses-1_label-lesion_mask" for n in (1, 2)),
        "derivatives/auto/sub-1/ses-1/anat/sub-1_ses-1_dseg",
    )
    with pytest.raises(UnknownLayout, match=r"manual/…_label-lesion_mask \(2\)") as refused:
        open_dataset(root)
    images, labels = re.fullmatch(r".*--images '(.+)' --labels '(.+)'", refused.value.fix).groups()
    dataset = open_dataset(root, images=images, labels=labels)
    assert len(dataset.subjects) == 2
    assert all(subject.label and "manual" in subject.label.parts for subject in dataset.subjects)


def test_two_files_for_one_scan_are_listed(bids, save_scan) -> None:
    root = bids("sub-1/anat/sub-1_T1w")
    save_scan("sub-1/anat/sub-1_T1w.nii")
    with pytest.raises(DuplicateSubject, match="sub-1 T1w"):
        open_dataset(root)


def test_sidecars_near_the_scan_count_and_are_shown_by_inspection(bids) -> None:
    root = bids("sub-1/anat/sub-1_T1w", "sub-1/anat/sub-1_FLAIR", f"{MANUAL}/sub-1/anat/sub-1_dseg")
    for place, about in {
        "T1w.json": {"MagneticFieldStrength": 1.5, "EchoTime": 0.003},
        "sub-1/anat/sub-1_T1w.json": {"MagneticFieldStrength": 3, "Manufacturer": "Siemens"},
        "sub-1/anat/sub-1_FLAIR.json": {"MagneticFieldStrength": 3, "EchoTime": 0.12, "FlipAngle": True},
    }.items():
        (root / place).write_text(json.dumps(about), encoding="utf-8")
    expected = {
        "field_strength_t": "3", "echo_time_ms FLAIR": "120", "echo_time_ms T1w": "3", "scanner": "Siemens",
    }  # fmt: skip
    [row] = inspect(open_dataset(root)).rows
    assert row.acquisition == expected
    (root / "T1w.json").write_text("{", encoding="utf-8")
    assert any("sidecar" in note for note in open_dataset(root).notes)


@pytest.mark.parametrize(
    "content", [b"", b"participant_id\nsub-1\n", b"site\nA\n", b"\n\n", b"participant_id\tsite\n\t"]
)
def test_a_table_of_participants_may_say_little(bids, content) -> None:
    root = bids("sub-1/anat/sub-1_T1w")
    (root / "participants.tsv").write_bytes(content)
    assert [subject.site for subject in open_dataset(root).subjects] == [""]


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"participant_id\tsite\nsub-1\t" + b"x" * 200_000])
def test_a_damaged_table_of_participants_is_refused(bids, content) -> None:
    root = bids("sub-1/anat/sub-1_T1w")
    (root / "participants.tsv").write_bytes(content)
    with pytest.raises(UnknownLayout, match=r"participants\.tsv"):
        open_dataset(root)


def test_real_hippocampi_arranged_so_are_the_same_subjects(real_data: Path, tmp_path: Path) -> None:
    known = open_dataset(real_data / "hippocampus")
    rows = ["participant_id\tsite"]
    for number, subject in enumerate(known.subjects[:6]):
        place = f"sub-{number}/anat/sub-{number}"
        for file, target in (
            (subject.scans[known.channels[0]], f"{place}_T1w"),
            (subject.label, f"{MANUAL}/{place}_dseg"),
        ):
            (tmp_path / target).parent.mkdir(parents=True)
            shutil.copyfile(file, tmp_path / f"{target}.nii.gz")
        rows.append(f"sub-{number}\t{subject.site}")
    (tmp_path / "participants.tsv").write_text("\n".join(rows), encoding="utf-8")
    table = "\n".join(f"{value}\t{name}" for name, values in known.targets.values.items() for value in values)
    (tmp_path / MANUAL / "dseg.tsv").write_text(f"index\tname\n{table}\n", encoding="utf-8")
    found = open_dataset(tmp_path)
    assert found.targets == known.targets
    assert len(found.subjects) == 6
    assert not inspect(found).errors
    for subject, same in zip(found.subjects, known.subjects, strict=False):
        assert subject.site == same.site
        np.testing.assert_array_equal(load_scan(subject).voxels, load_scan(same).voxels)
        np.testing.assert_array_equal(read_label(subject.label).voxels, read_label(same.label).voxels)
