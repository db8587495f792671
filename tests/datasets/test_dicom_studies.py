"""DICOM studies as a data set: channels by description, labels, names that name nobody."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.uid import generate_uid
from typer.testing import CliRunner

from delineate.cli.app import app
from delineate.core.grid import Grid
from delineate.core.targets import Targets
from delineate.datasets.dataset import load_label, load_scan
from delineate.datasets.inspection import inspect
from delineate.datasets.layouts import open_dataset
from delineate.errors import BadPath, MissingFile, SeveralSeries, UnknownLayout
from delineate.inference.batch import find_subjects
from delineate.io.dicom_series import check_together, find_series, fits
from delineate.io.formats import read_volume

PATTERNS = {"T1": "*t1pre*", "T1c": "*t1post*", "T2": "t2*", "FLAIR": "*flair*"}


def test_the_real_study_has_four_channels_and_a_label_on_one_grid(real_data: Path) -> None:
    dataset = open_dataset(
        real_data / "dicom" / "PGBM-001", images=PATTERNS, labels="*mask*", targets=Targets({"tumour": (1,)})
    )
    [subject] = dataset.subjects
    assert subject.channels == ("T1", "T1c", "T2", "FLAIR")
    scan = load_scan(subject)
    label = load_label(subject, dataset.targets, scan.grid)
    assert scan.voxels.shape == (4, 260, 320, 25)
    assert 0 < np.count_nonzero(label.voxels) < label.voxels.size / 100
    assert not inspect(dataset).problems


def test_without_patterns_channels_are_called_by_their_descriptions(real_data: Path) -> None:
    subjects = {s.id: s for s in open_dataset(real_data / "dicom").subjects}
    assert set(subjects) == {"PGBM-001", "ProstateX-0000"}
    assert set(subjects["PGBM-001"].channels) == {"T1post", "T1pre_reg", "FLAIR_reg", "T2_reg"}
    assert subjects["PGBM-001"].label is not None
    assert subjects["ProstateX-0000"].channels == ("t2_tse_tra",)


def test_patterns_that_fit_two_or_none_say_what_is_there(real_data: Path) -> None:
    with pytest.raises(SeveralSeries, match=r"T1 of 'PGBM-001' could be 'T1post'"):
        open_dataset(real_data / "dicom", images={"T1": "*t1*"})
    with pytest.raises(UnknownLayout, match="descriptions there are"):
        open_dataset(real_data / "dicom", images={"CT": "*angio*"})


def test_a_series_can_be_predicted_by_folder_or_file(real_data: Path) -> None:
    series = min((real_data / "dicom" / "ProstateX-0000").rglob("*.dcm"))
    for place in (series, series.parent, real_data / "dicom" / "ProstateX-0000"):
        [subject] = find_subjects([place], ["T2"])
        assert load_scan(subject).voxels.shape == (1, 384, 384, 19)


@pytest.mark.parametrize(("patient", "pattern"), [("ProstateX-0000", "t2_tse*"), ("PGBM-001", "*t1post*")])
def test_a_result_has_one_name_whichever_folder_is_given(
    real_data: Path, tmp_path: Path, patient: str, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The collection, the patient, the study, the series, one of its files, a zip of any of them, a relative path."""
    top = real_data / "dicom"
    series = next(s for s in find_series(top / patient) if fits(s, pattern))
    study = series.folder.parent
    given = [top, top / patient, study, study / ".." / study.name, series.folder, series.instances[0].path]
    zips = [
        Path(shutil.make_archive(str(tmp_path / "any"), "zip", top, series.folder.relative_to(top))),
        Path(shutil.make_archive(str(tmp_path / patient), "zip", series.folder)),
    ]
    monkeypatch.chdir(top / patient)
    for place in (*given, *zips, Path(".")):
        subjects = find_subjects([place], ["T2"], {"T2": pattern}) if place.is_dir() else find_subjects([place], ["T2"])
        assert patient in [subject.id for subject in subjects], place


def test_studies_whose_folders_have_one_name_are_told_apart_by_those_around(real_data: Path, tmp_path: Path) -> None:
    header = dcmread(min((real_data / "dicom" / "ProstateX-0000").rglob("*.dcm")))
    for study in ("ann/DICOM/ST000", "ann/DICOM/ST001", "bob/20110707", "bob/x", "17"):
        header.StudyInstanceUID = header.SeriesInstanceUID = generate_uid(entropy_srcs=[study])
        (tmp_path / "all" / study / "SE000").mkdir(parents=True)
        header.save_as(tmp_path / "all" / study / "SE000/IM0000")
    names = {subject.id for subject in open_dataset(tmp_path / "all").subjects}
    assert names == {"ann_DICOM_ST000", "ann_DICOM_ST001", "bob", "x", "17"}
    for folder, name in (("bob/20110707", "bob"), ("bob/x/SE000", "x"), ("17", "17"), ("17/SE000", "17")):
        assert [subject.id for subject in open_dataset(tmp_path / "all" / folder).subjects] == [name]


def test_studies_of_a_patient_follow_each_other_in_order_of_date(tmp_path: Path, save_series) -> None:
    """Whichever names their folders have; and nothing says when or who."""
    dates = {"b/20190301": "20190301", "b/20180301": "20180301", "b/20190101": "20190101", "a/x": "20200101"}
    for folder, day in dates.items():
        save_series(f"all/{folder}/t1", np.ones((3, 3, 2)), study=folder, PatientID=folder[0], StudyDate=day)
    dataset = open_dataset(tmp_path / "all")
    assert [subject.id for subject in dataset.subjects] == ["b_1", "b_2", "b_3", "x"]
    first, second, third, alone = dataset.subjects
    assert first.scans["t1"].parent.name == "20180301"
    assert [dict(subject.acquisition) for subject in (first, second, third, alone)] == [
        {"study": "1 of 3", "days_after_the_first": "0"},
        {"study": "2 of 3", "days_after_the_first": "306"},
        {"study": "3 of 3", "days_after_the_first": "365"},
        {},
    ]
    assert first.patient == second.patient == third.patient != alone.patient
    inspection = inspect(dataset, for_training=False)
    assert inspection.rows[1].scanned_with == "study 2 of 3, days_after_the_first 306"
    told = str(inspection.as_dict()) + inspection._repr_html_()
    assert not [mark for mark in ("20180301", "2018", "Canary", "4711", "1789", "'b'") if mark in told]
    save_series("all/b/20170101/t1", np.ones((3, 3, 2)), study="0", PatientID="b", StudyDate="")
    assert dict(open_dataset(tmp_path / "all").subjects[0].acquisition) == {"study": "1 of 4"}


def test_a_series_in_several_folders_is_read_whole_or_refused(tmp_path: Path, save_series) -> None:
    grid = Grid((5, 4, 6), np.diag([-1.0, -1.0, 2.0, 1.0]))
    voxels = np.arange(120).reshape(grid.shape)
    for name, start in (("A1", 0), ("A2", 3)):
        half = grid.crop((0, 0, start), (5, 4, 3))
        save_series(f"ann/{name}", voxels[:, :, start : start + 3], half, series="A", SeriesDescription="A")
    [subject] = open_dataset(tmp_path / "ann", images={"A": "A"}).subjects
    assert np.array_equal(load_scan(subject).voxels[0], voxels)
    save_series("ann/B", voxels, grid)
    [subject] = open_dataset(tmp_path / "ann", images={"B": "B"}).subjects
    assert np.array_equal(load_scan(subject).voxels[0], voxels)
    part = tmp_path / "ann" / "A1" / "IM000.dcm"
    for refused in (
        lambda: open_dataset(tmp_path / "ann", images={"A": "A"}),
        lambda: find_subjects([part], ["A"]),
        lambda: check_together(part),
    ):
        with pytest.raises(BadPath, match=r"series A lies in 2 folders: .*A1, .*A2; put its files into one folder"):
            refused()
    for command in (["data", "convert", str(part)], ["data", "convert", "--series", "A", str(tmp_path / "ann")]):
        done = CliRunner().invoke(app, [*command, str(tmp_path / "out.mha")])
        assert isinstance(done.exception, BadPath)
    find_subjects([tmp_path / "ann" / "B" / "IM000.dcm"], ["B"])


def test_folders_that_each_hold_all_places_of_a_series_stand_alone(tmp_path: Path, save_series) -> None:
    for echo in ("e1", "e2"):
        save_series(f"bob/{echo}", np.ones((4, 4, 3)), series="E")
    [subject] = find_subjects([tmp_path / "bob" / "e1" / "IM000.dcm"], ["T2"])
    assert load_scan(subject).voxels.shape == (1, 4, 4, 3)


def test_series_in_a_zip_are_picked_by_their_patterns(tmp_path: Path, save_series) -> None:
    voxels = np.arange(60).reshape(5, 4, 3)
    for name, factor in (("t1", 1), ("flair", 2)):
        save_series(f"ann/{name}", factor * voxels)
    packed = Path(shutil.make_archive(str(tmp_path / "ann"), "zip", tmp_path / "ann"))
    [subject] = find_subjects([packed], ["T1", "FLAIR"], {"T1": "t1", "FLAIR": "fl*"})
    assert subject.id == "ann"
    assert np.array_equal(load_scan(subject).voxels, [voxels, 2 * voxels])
    with pytest.raises(UnknownLayout, match="descriptions there are"):
        find_subjects([packed], ["T1"], {"T1": "*pet*"})
    for options in ([], ["--label"]):
        out = tmp_path / f"out{len(options)}.mha"
        done = CliRunner().invoke(app, ["data", "convert", *options, "--series", "*fl*", str(packed), str(out)])
        assert done.exit_code == 0, done.output
        assert np.array_equal(read_volume(out).voxels[0], 2 * voxels)
    with pytest.raises(MissingFile, match="holds no DICOM"):
        read_volume(packed / "t1" / "IM999.dcm")


def test_numbers_have_the_same_length_so_that_names_sort_as_dates_do(tmp_path: Path, save_series) -> None:
    for i in range(11):
        save_series(f"ann/2018{i + 1:02}01/t1", np.ones((3, 3, 1)), study=str(i), StudyDate=f"2018{i % 12 + 1:02}01")
    names = [subject.id for subject in open_dataset(tmp_path).subjects]
    assert names == sorted(names)
    assert names[-1] == "ann_11"
