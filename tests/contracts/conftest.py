from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest


class Hang(BaseException):
    """No answer in time. No error of ours or of a library's, so that nobody turns it into one."""


@pytest.fixture
def within() -> Callable[[float], AbstractContextManager[None]]:
    """``with within(seconds)``: a block that works for longer, or waits for ten times as long, ends in :class:`Hang`.

    Work is the processor's time, so that a busy machine does not matter.
    """

    def late(*_: object) -> None:
        raise Hang("no answer in time")

    @contextmanager
    def block(seconds: float) -> Iterator[None]:
        before = signal.signal(signal.SIGALRM, late), signal.signal(signal.SIGPROF, late)
        signal.setitimer(signal.ITIMER_REAL, 10 * seconds)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGALRM, before[0])
            signal.signal(signal.SIGPROF, before[1])

    return block


@pytest.fixture
def sound_slice() -> Callable[[Path], None]:
    """Writes a slice of DICOM that is a volume by itself."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage

    def write(path: Path) -> None:
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = MRImageStorage, "1.2.3"
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        scan = Dataset()
        scan.file_meta = meta
        scan.SOPClassUID, scan.SOPInstanceUID = MRImageStorage, "1.2.3"
        scan.SeriesInstanceUID, scan.StudyInstanceUID, scan.PatientID = "1.2.4", "1.2.5", "p"
        scan.Modality, scan.SeriesDescription, scan.SeriesNumber, scan.SeriesDate = "MR", "t1", 4, "20200101"
        scan.ImagePositionPatient, scan.ImageOrientationPatient = [1, 2, 3], [1, 0, 0, 0, 1, 0]
        scan.PixelSpacing, scan.SliceThickness, scan.NumberOfFrames = [1.5, 1], 3, 1
        scan.SamplesPerPixel, scan.PhotometricInterpretation = 1, "MONOCHROME2"
        scan.Rows, scan.Columns, scan.BitsAllocated, scan.BitsStored, scan.HighBit = 4, 5, 16, 12, 11
        scan.PixelRepresentation, scan.RescaleSlope, scan.RescaleIntercept = 0, 1, 0
        scan.PixelData = np.arange(20, dtype=np.int16).tobytes()
        scan.save_as(path, enforce_file_format=True)

    return write
