"""What files are, by their names and first bytes."""

from __future__ import annotations

import re
from pathlib import Path

from delineate.errors import BadFormat
from delineate.io.files import open_file

NIFTI_SUFFIXES = (".nii.gz", ".nii")
SUFFIXES = (*NIFTI_SUFFIXES, ".mha", ".mhd", ".nrrd", ".nhdr")

DICOM_SUFFIXES = (".dcm", ".ima")
REPORT_SUFFIX = ".sr.dcm"
"""A report of what was measured within a DICOM-SEG's segments: a DICOM file without an image, so never a scan."""
PICTURE_SUFFIXES = (".png", ".tif", ".tiff")
PREVIEW_SUFFIX = ".preview.png"
"""A picture of a scan with its label, to look at: no scan, though in a format of scans."""
VTK_SUFFIXES = (".vtk", ".vti")
"""Formats that are written for viewers, but not read."""

SEGMENTATION_SUFFIX = ".seg.nrrd"
"""A label whose header names its segments, written by :func:`delineate.io.exports.export_label`."""
STRUCTURES_SUFFIX = ".rtstruct.dcm"
"""A label as contours on the slices of a DICOM series (RT Structure Set), written in the same way."""


def is_dicom(path: Path) -> bool:
    """Whether a file begins as DICOM files do."""
    try:
        with open_file(path) as file:
            return file.read(132)[128:] == b"DICM"
    except (OSError, BadFormat):
        return False


def zip_around(path: Path) -> Path | None:
    """The zip that a path leads into; None for any other path."""
    return next((above for above in path.parents if above.suffix.lower() == ".zip" and above.is_file()), None)


def is_picture(path: Path) -> bool:
    """Whether a file is a picture that may hold a slice: neither hidden nor a preview."""
    name = path.name.lower()
    return name.endswith(PICTURE_SUFFIXES) and not name.startswith(".") and not name.endswith(PREVIEW_SUFFIX)


def pictures_in(folder: Path) -> list[Path]:
    """The pictures directly in a folder, in the order of their names, numbers counting as numbers."""
    found = [path for path in folder.iterdir() if is_picture(path)]
    return sorted(found, key=lambda path: [(len(text), text) for text in re.split(r"(\d+)", path.name.lower())])


def is_stack(path: Path) -> bool:
    """Whether a path is a folder of pictures, not a DICOM series with previews."""
    if not path.is_dir() or not any(map(is_picture, path.iterdir())):
        return False
    return not any(is_dicom(file) for file in path.iterdir() if not is_picture(file))
