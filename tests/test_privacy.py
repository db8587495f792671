"""What a scan says of a person goes where docs/privacy.md says, and nowhere else."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import numpy as np
import pytest
from pydicom.datadict import DicomDictionary
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from delineate.bundle import Bundle
from delineate.compute import plan_compute
from delineate.core.targets import Targets
from delineate.datasets.layouts import open_dataset
from delineate.inference.batch import find_subjects, predict_subjects
from delineate.inference.outputs import Outputs
from delineate.inference.predictor import Predictor
from delineate.io.pseudonyms import key_file
from delineate.recipe import recipe_from
from delineate.reporting.run import write_run_report
from delineate.training.options import Reporter, RunOptions
from delineate.training.run import train

TEXT = ("AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UR", "UT")
KEPT = {
    "SpecificCharacterSet",
    "Modality",
    "PhotometricInterpretation",
    "PatientSex",
    "PatientPosition",
}  # have their own values
FIELDS = {
    entry[4]: tag
    for tag, entry in DicomDictionary.items()
    if entry[0] in TEXT and entry[4] and entry[4] not in KEPT and tag >> 16 not in (0, 2, 4)
}
"""Every text field of DICOM that a scan can hold, by keyword."""
DATES = {"PatientBirthDate": "17891231", "StudyDate": "17910203", "AcquisitionDateTime": "17920304050607"}
PRIVATE = "QXPRIVATEZ"
DATA_SET, SUBJECT = "Clinic of Doctor Canary", "canary_jones"


def canary(tag: int) -> str:
    return f"QX{tag:08X}Z"


def write_series(folder: Path, voxels: np.ndarray, study: str, **tags: object) -> None:
    folder.mkdir(parents=True)
    uid = generate_uid()
    for k in range(voxels.shape[2]):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        header = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        for tag in FIELDS.values():
            header.add_new(tag, DicomDictionary[tag][0], canary(tag))
        for name, value in DATES.items():
            setattr(header, name, value)
        header.private_block(0x0099, "DELINEATE TEST", create=True).add_new(0x01, "LO", PRIVATE)
        header.SOPClassUID, header.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        header.SeriesInstanceUID, header.StudyInstanceUID, header.FrameOfReferenceUID = uid, study, study
        header.Modality, header.SeriesNumber, header.InstanceNumber = "CT", 1, k + 1
        header.PatientSex, header.PatientPosition, header.StudyTime = "O", "HFS", ""
        header.Rows, header.Columns = voxels.shape[1], voxels.shape[0]
        header.PixelSpacing, header.SliceThickness = [1, 1], 2
        header.ImageOrientationPatient, header.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, 2 * k]
        header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
        header.BitsAllocated = header.BitsStored = 16
        header.HighBit, header.PixelRepresentation = 15, 0
        header.PixelData = np.ascontiguousarray(voxels[:, :, k].T).tobytes()
        for name, value in tags.items():
            setattr(header, name, value)
        header.save_as(folder / f"{k}.dcm", enforce_file_format=True)


def found_in(place: Path) -> set[str]:
    """Keywords of the fields whose text stands in a file, or in any file of a folder, packed or not."""
    found: set[str] = set()
    keywords = {canary(tag): keyword for keyword, tag in FIELDS.items()}
    for path in [place] if place.is_file() else sorted(place.rglob("*")):
        if not path.is_file():
            continue
        content = path.read_bytes()
        contents = [content, gzip.decompress(content)] if path.suffix == ".gz" else [content]
        for text in (path.name.encode(), *contents, *(c.replace(b"\0", b"") for c in contents)):
            found |= {keywords[name] for name in re.findall("QX[0-9A-F]{8}Z", text.decode("latin-1"))}
            found |= {name for name, date in DATES.items() if re.search(rf"(?<![\d.]){date}".encode(), text)}
            found |= {"private"} if PRIVATE.encode() in text else set()
    return found


def names_in(folder: Path) -> set[str]:
    names = {DATA_SET, SUBJECT}
    return {
        n for n in names for p in folder.rglob("*") if p.is_file() and n.encode() in p.name.encode() + p.read_bytes()
    }


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A training on scans full of canaries, and predictions of one, by where they were written."""
    root = tmp_path_factory.mktemp("privacy")
    data, rng = root / DATA_SET, np.random.default_rng(0)
    for i in range(4):
        label = np.zeros((16, 16, 6), np.uint16)
        label[4:10, 5:11, 2:4] = 1
        scan = (label * 300 + rng.integers(0, 100, label.shape)).astype(np.uint16)
        study = generate_uid()
        write_series(data / f"{SUBJECT}{i}/scan", scan, study, PatientID=f"{canary(0x00100020)}{i}")
        write_series(
            data / f"{SUBJECT}{i}/mask", label, study, PatientID=f"{canary(0x00100020)}{i}", SeriesDescription="mask"
        )
    recipe = recipe_from(
        {
            "name": "tiny",
            "preprocessing": [{"kind": "normalise"}],
            "tiles": {"kind": "patches", "shape": [16, 16, 6]},
            "network": {"kind": "unet", "dimensions": 3, "widths": [4, 4]},
            "training": {"steps": 2, "validation": {"times": 1}, "folds": 2},
        }
    )
    dataset = open_dataset(data, targets=Targets({"lesion": (1,)}))
    options = RunOptions(cache=root / "cache", device="cpu", compile="off", threads=1)
    report = Reporter()
    train(recipe, dataset, root / "run", options, report)
    write_run_report(root / "run", dataset)
    (root / "run/bundle").rename(root / "bundle")
    bundle = Bundle.load(root / "bundle")
    subjects = find_subjects([data / f"{SUBJECT}0/scan"], bundle.channels)
    predictor = Predictor([bundle], plan_compute(device="cpu", compile="off"), probabilities=True)
    for suffix in (".nii.gz", ".mha", ".nrrd", ".vti", ".dcm", ".rtstruct.dcm"):
        out = root / ("segmentation" if suffix.endswith(".dcm") else "predictions")
        outputs = Outputs(out, suffix, out / "probabilities", [bundle])
        [outcome] = predict_subjects(predictor, subjects, out, outputs=outputs)
        assert outcome.error is None
    return {name: root / name for name in ("run", "bundle", "cache", "predictions")} | {
        "DICOM-SEG": root / "segmentation/scan.dcm",
        "report in DICOM": root / "segmentation/scan.sr.dcm",
        "RTSTRUCT": root / "segmentation/scan.rtstruct.dcm",
    }


def documented(place: str) -> set[str]:
    """Fields that the table of docs/privacy.md sends to a place."""
    text = (Path(__file__).parents[1] / "docs/privacy.md").read_text(encoding="utf-8")
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| `")]
    return {name for fields, *_, where in rows if place in where for name in re.findall("`([A-Za-z]+)`", fields)}


@pytest.mark.parametrize("place", ["run", "bundle", "cache", "predictions", "DICOM-SEG", "report in DICOM", "RTSTRUCT"])
def test_fields_of_a_scan_go_where_the_documentation_says(place: str, places: dict[str, Path]) -> None:
    assert any(places[place].rglob("*")) or places[place].is_file()
    assert found_in(places[place]) == documented(place) & {*FIELDS, *DATES}


def test_the_bundle_names_nobody_and_the_run_keeps_the_names(places: dict[str, Path]) -> None:
    assert names_in(places["bundle"]) == set()
    assert names_in(places["run"]) == {DATA_SET, SUBJECT}
    key = key_file().read_text(encoding="utf-8").strip()
    assert not [
        p for place in places.values() for p in place.rglob("*") if p.is_file() and key.encode() in p.read_bytes()
    ]


def test_the_canaries_would_be_seen(places: dict[str, Path]) -> None:
    """In the scans themselves every field is found."""
    assert found_in(places["run"].parent / DATA_SET) >= {*FIELDS, *DATES, "private"}
    assert len(FIELDS) > 1000
