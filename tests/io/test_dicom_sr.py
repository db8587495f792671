"""Measurements within a DICOM-SEG's segments as a structured report, read by highdicom and pydicom."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from math import nan
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
import torch
from pydicom.sr.codedict import codes
from pydicom.uid import ComprehensiveSRStorage, MRImageStorage

import delineate
from delineate.bundle import Bundle
from delineate.core.grid import Grid
from delineate.core.legend import Code, Coding, Legend
from delineate.core.subject import paths_of
from delineate.core.targets import Targets
from delineate.core.volume import LabelVolume
from delineate.datasets.layouts import open_dataset
from delineate.errors import BadFormat, MissingFile
from delineate.inference.measurements import read_measurements
from delineate.io.dicom_sr import ABOVE_THRESHOLD, Reading, Readings, write_report
from delineate.io.exports import export_label
from delineate.io.formats import read_label, read_volume
from delineate.io.segments import segments_in
from delineate.recipe import recipe_from
from delineate.sampling.tiles import TileGeometry

SHAPE = (7, 6, 5)
GRID = Grid(SHAPE, np.diag([-0.7, -0.9, 2.5, 1]))
LIVER = Coding(Code("91723000", "SCT", "Anatomical Structure"), Code("10200004", "SCT", "Liver"))
TARGETS = Targets({"liver": (1, 2), "Zyste κύστη": (2,), "nowhere": (3,)}, mode="overlapping")
FAT = Reading("fat fraction (channel ff, %), within the target; threshold 5.56 %", "%", False, 6.5, 6.25, 1.5, 70.0)
WATER = Reading("water, within the target", "", True, 312.0, 310.5, 20.25, nan)
READINGS = {
    "liver": Readings(1512.5, (WATER, FAT)),
    "Zyste κύστη": Readings(3.25, (WATER,)),
    "nowhere": Readings(0.0, (Reading(WATER.about, "", True, nan, nan, nan, nan),)),
}


@dataclass(frozen=True)
class Written:
    series: Path
    segmentation: Path
    report: Path


@pytest.fixture
def written(dicom, tmp_path: Path) -> Written:
    """A report of an MR study, whose headers are in Latin-1."""
    series = dicom.write(
        "mr",
        np.zeros(SHAPE, np.int16),
        GRID,
        SOPClassUID=MRImageStorage,
        Modality="MR",
        SpecificCharacterSet="ISO_IR 100",
        PatientName="Müller^Jörg",
    )
    voxels = np.zeros(SHAPE, np.uint8)
    voxels[1:4, 1:5, 1:3], voxels[2, 2, 2] = 1, 2
    label = LabelVolume(voxels, read_volume(series).grid)
    out = Written(series, tmp_path / "out/a.dcm", tmp_path / "out/a.sr.dcm")
    export_label(out.segmentation, label, TARGETS, source=series, legend=Legend({"liver": LIVER}))
    write_report(out.report, out.segmentation, READINGS)
    return out


def items(content: pydicom.Dataset) -> Iterator[pydicom.Dataset]:
    """The content items of a report, innermost first."""
    for item in content.get("ContentSequence", []):
        yield from items(item)
        yield item


def test_each_segment_has_its_measurements_with_codes_and_units(written: Written) -> None:
    report = highdicom.sr.srread(written.report)
    seg = highdicom.seg.segread(written.segmentation)
    groups = report.content.get_volumetric_roi_measurement_groups()
    assert [group.tracking_identifier for group in groups] == [*READINGS]
    for number, (group, (name, readings)) in enumerate(zip(groups, READINGS.items(), strict=True), start=1):
        segment = group.referenced_segment
        assert (segment.referenced_sop_instance_uid, segment.referenced_segment_numbers) == (
            seg.SOPInstanceUID,
            [number],
        )
        [volume] = group.get_measurements(codes.SCT.Volume)
        assert (volume.value, volume.unit.value, volume.unit.scheme_designator) == (readings.volume_ml, "ml", "UCUM")
        assert group.finding_type == (codes.SCT.Liver if name == "liver" else codes.DCM.SelectedRegion)
        assert all(np.isfinite(one.value) for one in group.get_measurements())
    liver, _, nowhere = groups
    signal = {one.derivation.meaning: one for one in liver.get_measurements(codes.DCM.MRSignalIntensity)}
    assert {name: one.value for name, one in signal.items()} == {
        "Mean": 312.0, "Median": 310.5, "Standard Deviation": 20.25,
    }  # fmt: skip
    assert {one.unit for one in signal.values()} == {codes.UCUM.NoUnits}
    fat = liver.get_measurements(codes.DCM.FatFraction)
    assert [(one.value, one.unit) for one in fat] == [(value, codes.UCUM.Percent) for value in (6.5, 6.25, 1.5)]
    [share] = liver.get_measurements(ABOVE_THRESHOLD)
    assert (share.value, share.unit) == (70.0, codes.UCUM.Percent)
    item = next(
        item for item in items(pydicom.dcmread(written.report)) if "ABOVE" in str(item.get("ConceptNameCodeSequence"))
    )
    texts = [one.TextValue for one in item.ContentSequence if one.ValueType == "TEXT"]
    assert texts == [FAT.about], "it says which threshold"
    assert len(nowhere.get_measurements()) == 1, "an empty target has a volume and nothing else"


def test_dcmqi_reads_the_same(written: Written, tmp_path: Path) -> None:
    reader = shutil.which("tid1500reader", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if reader is None:
        pytest.skip("dcmqi is not installed")
    read = tmp_path / "read.json"
    subprocess.run([reader, "--inputDICOM", written.report, "--outputMetadata", read], check=True, capture_output=True)
    groups = json.loads(read.read_text(encoding="utf-8"))["Measurements"]
    source = pydicom.dcmread(next(written.series.iterdir())).SeriesInstanceUID
    for number, (group, (name, readings)) in enumerate(zip(groups, READINGS.items(), strict=True), start=1):
        assert (group["TrackingIdentifier"], group["ReferencedSegment"]) == (name, number)
        assert group["SourceSeriesForImageSegmentation"] == source
        found = [
            (item["quantity"]["CodeMeaning"], item["units"]["CodeValue"], float(item["value"]))
            for item in group["measurementItems"]
        ]
        expected = [("Volume", "ml", readings.volume_ml)]
        for one in readings.quantities:
            what = ("Fat fraction", "%") if one is FAT else ("MR signal intensity", "1")
            expected += [(*what, value) for value in (one.mean, one.median, one.sd)]
            expected += [(ABOVE_THRESHOLD.meaning, "%", one.above_threshold_percent)]
        assert found == [(*what, value) for *what, value in expected if np.isfinite(value)]


def test_a_report_belongs_to_the_patient_and_refers_to_the_segmentation(written: Written) -> None:
    report, seg = pydicom.dcmread(written.report), pydicom.dcmread(written.segmentation)
    source = pydicom.dcmread(next(written.series.iterdir()))
    assert report.SOPClassUID == ComprehensiveSRStorage
    for keyword in ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "StudyDate"):
        assert report.get(keyword) == source.get(keyword)
    assert report.SeriesInstanceUID not in (seg.SeriesInstanceUID, source.SeriesInstanceUID)
    assert (report.VerificationFlag, report.PreliminaryFlag) == ("UNVERIFIED", "PRELIMINARY")
    evidence = report.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence
    assert [item.ReferencedSOPInstanceUID for one in evidence for item in one.ReferencedSOPSequence] == [
        seg.SOPInstanceUID
    ]
    read = highdicom.sr.srread(written.report).content.get_volumetric_roi_measurement_groups()
    assert {group.referenced_segment.source_series_for_segmentation.value for group in read} == {
        source.SeriesInstanceUID
    }


def test_a_report_is_never_taken_for_a_scan(written: Written) -> None:
    """Not beside the label that it belongs to, nor among the slices of the scan."""
    [subject] = open_dataset(written.series.parents[1]).subjects
    assert subject.scans == {"mr": written.series}
    assert paths_of(subject.label) == (written.segmentation.parent,)
    [folder] = paths_of(subject.label)
    assert np.array_equal(read_label(folder).voxels > 0, read_label(written.segmentation).voxels > 0)
    before = read_volume(written.series)
    (written.series / "a.sr.dcm").write_bytes(written.report.read_bytes())
    assert np.array_equal(read_volume(written.series).voxels, before.voxels)
    with pytest.raises(MissingFile, match="no DICOM images"):
        read_volume(written.report)


def test_a_segmentation_without_its_source_has_no_report(written: Written) -> None:
    seg = pydicom.dcmread(written.segmentation)
    del seg.ReferencedSeriesSequence
    seg.save_as(written.segmentation)
    written.report.unlink()
    with pytest.raises(BadFormat, match="missing or garbled"):
        write_report(written.report, written.segmentation, READINGS)
    assert not written.report.exists()


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """An untrained network of one channel and two targets that overlap; what it finds is as good as anything."""
    recipe = recipe_from(
        {
            "name": "small",
            "tiles": {"kind": "patches", "shape": [8, 8, 4]},
            "network": {"kind": "unet", "dimensions": 3, "widths": [4, 4]},
        }
    )
    targets = Targets({"liver": (1, 2), "tumour": (2,)}, "overlapping")
    made = Bundle(recipe, recipe.pipeline, targets, ("water",), TileGeometry((8, 8, 4)), (0.7, 0.9, 2.5))
    torch.manual_seed(1)
    made.save(tmp_path / "bundle", made.network().state_dict(), {})
    return tmp_path / "bundle"


def reported(path: Path) -> dict[str, dict[tuple[str, str], float]]:
    """Values by concept and derivation in each group of a report."""
    groups = highdicom.sr.srread(path).content.get_volumetric_roi_measurement_groups()
    return {
        group.tracking_identifier: {
            (one.name.meaning, one.derivation.meaning if one.derivation else ""): one.value
            for one in group.get_measurements()
        }
        for group in groups
    }


def test_a_predicted_segmentation_comes_with_a_report_and_a_corrected_one_is_measured_again(
    dicom, bundle: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    values = rng.integers(0, 900, SHAPE).astype(np.int16)
    series, out = dicom.write("scan", values, GRID), tmp_path / "answers"
    asked = {"images": {"water": "scan"}, "format": "dcm"}
    found = delineate.predict(bundle, series.parent, out, **asked)
    assert not found.failed
    [(name, path)] = found.made.items()
    report = out / f"{name}.sr.dcm"
    for _ in range(2):
        segments = segments_in(path)
        assert segments is not None
        masks = {name: mask for name, (mask, _) in segments.masks(segments.names, None)}
        told = reported(report)
        assert [*told] == ["liver", "tumour"]
        for target, mask in masks.items():
            assert told[target]["Volume", ""] == pytest.approx(mask.sum() * GRID.voxel_ml)
            for how, number in (("Mean", np.mean), ("Median", np.median), ("Standard Deviation", np.std)):
                assert told[target]["Quantity", how] == pytest.approx(number(values[mask]))
        # As if somebody had corrected it.
        smaller = np.where(values > 500, 2, np.where(values > 300, 1, 0)).astype(np.uint8)
        label = LabelVolume(smaller, read_volume(series).grid)
        before = told
        export_label(path, label, Targets({"liver": (1, 2), "tumour": (2,)}, "overlapping"), source=series)
        again = delineate.predict(bundle, series.parent, out, **asked)
        assert (again.kept, again.failed, [*again.measured]) == ((name,), {}, [name])
    assert reported(report) == before
    export_label(path, label, Targets({"other": (1,)}), source=series)
    unnamed = delineate.predict(bundle, series.parent, out, **asked)
    assert "has no segment liver, tumour: it holds other" in str(unnamed.failed[name])
    export_label(path, label, Targets({"liver": (1, 2), "tumour": (2,)}, "overlapping"), source=series)
    report.unlink()
    delineate.predict(bundle, series.parent, out, **asked)
    assert reported(report) == before
    [row, _] = read_measurements(out / "measurements.csv")
    assert float(row["volume_ml"]) == pytest.approx(before["liver"]["Volume", ""], abs=1e-4)
