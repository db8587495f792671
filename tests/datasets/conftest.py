"""Small data sets on disk, written by the tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from delineate.core.grid import Grid
from delineate.core.volume import LabelVolume, Volume
from delineate.datasets.dataset import Dataset
from delineate.datasets.layouts import open_dataset
from delineate.datasets.repair import repair
from delineate.io.formats import parts_of, write_label, write_volume

SHAPE = (6, 5, 4)

Save = Callable[..., Path]


@pytest.fixture
def save_scan(tmp_path: Path) -> Save:
    """``save_scan("a/b.nii.gz")`` writes a scan there, another for each name, on a common grid."""

    def save(path: str, voxels: NDArray | None = None, grid: Grid | None = None) -> Path:
        grid = grid or Grid.of_spacing(SHAPE if voxels is None else voxels.shape[-3:])
        if voxels is None:
            voxels = np.random.default_rng(sum(path.encode())).integers(1, 1000, grid.shape).astype(np.int16)
        write_volume(tmp_path / path, Volume(voxels if voxels.ndim == 4 else voxels[None], grid))
        return tmp_path / path

    return save


@pytest.fixture
def save_label(tmp_path: Path) -> Save:
    """``save_label("a/b.nii.gz")`` writes a label with values 0 and 1 there."""

    def save(path: str, voxels: NDArray | None = None, grid: Grid | None = None) -> Path:
        if voxels is None:
            voxels = np.zeros(grid.shape if grid else SHAPE, dtype=np.uint8)
            voxels[2:4, 2:4, 1:3] = 1
        write_label(tmp_path / path, LabelVolume(voxels, grid or Grid.of_spacing(voxels.shape)))
        return tmp_path / path

    return save


@pytest.fixture
def msd(tmp_path: Path, save_scan: Save, save_label: Save) -> Callable[..., Path]:
    """``msd("a", "b")`` makes a Decathlon data set of these subjects; further keys go to its dataset.json."""

    def make(*subjects: str, **about: Any) -> Path:
        for subject in subjects:
            save_scan(f"imagesTr/{subject}.nii.gz")
            save_label(f"labelsTr/{subject}.nii.gz")
        pairs = [{"image": f"./imagesTr/{s}.nii.gz", "label": f"./labelsTr/{s}.nii.gz"} for s in subjects]
        contents = {"modality": {"0": "MRI"}, "labels": {"0": "background", "1": "organ"}, "training": pairs, **about}
        (tmp_path / "dataset.json").write_text(json.dumps(contents), encoding="utf-8")
        return tmp_path

    return make


@pytest.fixture
def save_series(tmp_path: Path) -> Save:
    """``save_series("a/t1", voxels)`` writes a DICOM series there, a file for each slice, in no order of names.

    ``uids`` are those of study and series, made from the folder if not given; further keys are tags.
    """
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

    def save(path: str, voxels: NDArray, grid: Grid | None = None, *, study: str = "", series: str = "", **tags: Any):
        grid = grid or Grid(voxels.shape[-3:], np.diag([-1.0, -1.0, 2.0, 1.0]))
        folder = tmp_path / path
        folder.mkdir(parents=True, exist_ok=True)
        uid = generate_uid(entropy_srcs=[series or path])
        lps = grid.affine[:3] * [[-1], [-1], [1]]
        for number, k in enumerate(np.random.default_rng(len(path)).permutation(voxels.shape[2])):
            meta = FileMetaDataset()
            meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, MRImageStorage
            meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[path, str(k)])
            header = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
            header.SOPClassUID, header.SOPInstanceUID = MRImageStorage, meta.MediaStorageSOPInstanceUID
            header.StudyInstanceUID = header.FrameOfReferenceUID = generate_uid(entropy_srcs=[study or "study"])
            header.SeriesInstanceUID, header.SeriesNumber, header.Modality = uid, 1, "MR"
            header.PatientName, header.PatientID, header.PatientBirthDate = "Canary^Patient", "4711", "17891231"
            header.PatientSex, header.StudyID, header.AccessionNumber, header.InstanceNumber = "", "", "", number + 1
            header.StudyDate, header.StudyTime, header.SeriesDescription = "17910203", "", Path(path).name
            header.Rows, header.Columns = voxels.shape[1], voxels.shape[0]
            header.PixelSpacing, header.SliceThickness = [grid.spacing_mm[1], grid.spacing_mm[0]], grid.spacing_mm[2]
            across, down = (lps[:, axis] / grid.spacing_mm[axis] for axis in (0, 1))
            header.ImageOrientationPatient = [float(value) for value in (*across, *down)]
            header.ImagePositionPatient = [float(value) for value in lps[:, 3] + k * lps[:, 2]]
            header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
            header.BitsAllocated, header.BitsStored, header.HighBit, header.PixelRepresentation = 16, 16, 15, 0
            header.PixelData = np.ascontiguousarray(voxels[:, :, k].T.astype(np.uint16)).tobytes()
            for tag, value in tags.items():
                setattr(header, tag, value)
            header.save_as(folder / f"IM{number:03d}.dcm", enforce_file_format=True)
        return folder

    return save


@pytest.fixture
def save_pictures(tmp_path: Path) -> Save:
    """``save_pictures("a/masks", label)`` writes a label (X, Y, Z) as a picture for each slice."""
    from PIL import Image

    def save(path: str, label: NDArray, names: list[str] | None = None) -> Path:
        (tmp_path / path).mkdir(parents=True)
        for k in range(label.shape[2]):
            name = f"slice{k + 1}" if names is None else names[k]
            Image.fromarray(label[:, :, k].T.astype(np.uint8)).save(tmp_path / path / f"{name}.png")
        return tmp_path / path

    return save


@pytest.fixture
def check_copy(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """Checks the law of repair: a copy is the same data set, without the subject that had to be left out."""

    def told(dataset: Dataset) -> list[object]:
        subjects = [
            (
                s.id,
                s.channels,
                s.patient,
                s.site,
                s.attributes,
                s.acquisition,
                [f.relative_to(dataset.root) for f in s.files],
            )
            for s in dataset.subjects
        ]
        about = (dataset.layout, dataset.channels, dataset.targets, dataset.modality, dataset.simulated)
        return [*about, *subjects]

    def check(root: Path, **patterns: Any) -> None:
        dataset = open_dataset(root, **patterns)
        *_, torn = dataset.subjects
        copies = [tmp_path_factory.mktemp("copies") / root.name for _ in range(2)]
        repair(dataset, copies[0])
        assert told(open_dataset(copies[0], **patterns)) == told(dataset)
        largest = max(parts_of(torn.files[0]), key=lambda file: file.stat().st_size)
        largest.write_bytes(largest.read_bytes()[:-4])
        repair(dataset, copies[1])
        without = replace(dataset, subjects=dataset.subjects[:-1])
        assert told(open_dataset(copies[1], **patterns)) == told(without)

    return check
