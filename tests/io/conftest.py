"""DICOM series made on the spot: every geometry a scanner can have, and every way to break one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian, generate_uid

from delineate.core.grid import Grid
from delineate.io.voxels import LPS_TO_RAS


class SeriesMaker:
    """Writes voxels (X, Y, Z) on a grid as one file a slice, in an order that means nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.study = folder, generate_uid(entropy_srcs=["study"])

    def write(self, name: str, voxels: np.ndarray, grid: Grid, *, slope: float = 1, inter: float = 0, **tags) -> Path:
        folder = self.folder / name
        folder.mkdir(parents=True)
        uid = generate_uid(entropy_srcs=[name, str(self.folder)])
        shuffled = np.random.default_rng(1).permutation(voxels.shape[2])
        for number, k in enumerate(shuffled):
            header = self.slice_header(name, uid, voxels[:, :, k].T, grid, int(k))
            header.RescaleSlope, header.RescaleIntercept = slope, inter
            for tag, value in tags.items():
                setattr(header, tag, value)
            header.save_as(folder / f"IM{number:04d}.dcm", enforce_file_format=True)
        return folder

    def slice_header(self, name: str, uid: str, plane: np.ndarray, grid: Grid, k: int) -> FileDataset:
        meta = FileMetaDataset()
        meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[uid, str(k)])
        header = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        header.SOPClassUID, header.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        header.SeriesInstanceUID, header.StudyInstanceUID, header.FrameOfReferenceUID = uid, self.study, self.study
        header.PatientName, header.PatientID, header.Modality = "Canary^Patient", "canary-4711", "CT"
        header.PatientBirthDate, header.PatientSex, header.StudyID, header.AccessionNumber = "", "", "", ""
        header.StudyDate, header.StudyTime, header.SeriesDescription, header.SeriesNumber = "20200102", "", name, 3
        header.InstanceNumber = 1  # the same for all: it must not matter
        header.Rows, header.Columns = plane.shape
        header.PixelSpacing = [grid.spacing_mm[1], grid.spacing_mm[0]]
        header.SliceThickness = grid.spacing_mm[2]
        lps = LPS_TO_RAS[:, None] * grid.affine[:3]
        across, down = (lps[:, axis] / grid.spacing_mm[axis] for axis in (0, 1))
        header.ImageOrientationPatient = [round(float(v), 12) for v in (*across, *down)]
        header.ImagePositionPatient = [round(float(v), 8) for v in lps[:, 3] + k * lps[:, 2]]
        header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
        header.BitsAllocated = header.BitsStored = 16
        header.HighBit, header.PixelRepresentation = 15, int(plane.dtype.kind == "i")
        header.PixelData = np.ascontiguousarray(plane).tobytes()
        return header

    def write_multiframe(self, name: str, voxels: np.ndarray, grid: Grid) -> Path:
        """All slices in one file, each with its place, in an order that means nothing."""
        uid = generate_uid(entropy_srcs=[name, str(self.folder)])
        order = np.random.default_rng(2).permutation(voxels.shape[2])
        headers = [self.slice_header(name, uid, voxels[:, :, k].T, grid, int(k)) for k in order]
        whole = headers[0]
        shared, orientation, measures = Dataset(), Dataset(), Dataset()
        orientation.ImageOrientationPatient = whole.ImageOrientationPatient
        measures.PixelSpacing, measures.SliceThickness = whole.PixelSpacing, whole.SliceThickness
        shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = Sequence([orientation]), Sequence([measures])
        groups = []
        for header in headers:
            position, group = Dataset(), Dataset()
            position.ImagePositionPatient = header.ImagePositionPatient
            group.PlanePositionSequence = Sequence([position])
            groups.append(group)
        whole.SOPClassUID = whole.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
        whole.NumberOfFrames = len(headers)
        whole.PixelData = b"".join(header.PixelData for header in headers)
        for tag in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"):
            delattr(whole, tag)
        whole.PerFrameFunctionalGroupsSequence = Sequence(groups)
        whole.SharedFunctionalGroupsSequence = Sequence([shared])
        folder = self.folder / name
        folder.mkdir(parents=True)
        whole.save_as(folder / "all.dcm", enforce_file_format=True)
        return folder


@pytest.fixture
def dicom(tmp_path: Path) -> SeriesMaker:
    return SeriesMaker(tmp_path / "study")
