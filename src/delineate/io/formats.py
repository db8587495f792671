"""Reading and writing scans and labels in any known format, chosen by suffix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from delineate.core.grid import Grid
from delineate.core.text import near, printable
from delineate.core.volume import LabelVolume, Volume
from delineate.errors import BadFormat, BadLabelValue, BadShape, BadVoxels, DelineateError, MissingFile, OutputError
from delineate.io.files import Limits, open_file, parsing, writing_beside
from delineate.io.suffixes import (
    DICOM_SUFFIXES,
    NIFTI_SUFFIXES,
    PICTURE_SUFFIXES,
    PREVIEW_SUFFIX,
    SEGMENTATION_SUFFIX,
    SUFFIXES,
    VTK_SUFFIXES,
    is_dicom,
    is_stack,
    pictures_in,
    zip_around,
)
from delineate.io.voxels import Orientation, Stored, check_complete, check_grid, check_shape, read_voxels
from delineate.plugins import Parts

__all__ = [
    "FORMATS",
    "Format",
    "Header",
    "check_writable",
    "holds_label",
    "is_series",
    "name_of",
    "names_segments",
    "read_header",
    "read_label",
    "read_volume",
    "suffix_of",
    "write_label",
    "write_volume",
]

_FOREIGN = {
    ".seg.nhdr": "a 3D Slicer segmentation in two files; write .seg.nrrd",
    ".seq.nrrd": "a sequence of volumes; write each as .nrrd",
    ".seq.nhdr": "a sequence of volumes; write each as .nrrd",
    ".ome.tif": "OME-TIFF, which contains a description; write .tif",
    ".ome.tiff": "OME-TIFF, which contains a description; write .tif",
    **dict.fromkeys(
        (
            f".{kind}.nii"
            for kind in ("dscalar", "dtseries", "dlabel", "dconn", "pscalar", "ptseries", "plabel", "pconn")
        ),
        "CIFTI-2, which holds surfaces and voxels; write .nii.gz",
    ),
}
"""Endings that mean more than their last part says, and what they are."""

_LIMITS = Limits()
_FIX = "check disk and permissions, or export it again"
_LABEL_TOLERANCE = 1e-3
_LABEL_VALUES = 32
_LOOKED_AT = 10_000
"""How many voxels are enough to tell most scans from labels."""
_LABEL_DTYPES = (np.uint8, np.uint16, np.uint32, np.int8, np.int16, np.int32)


@dataclass(frozen=True)
class Header:
    """What a file says about its voxels: ``dtype`` is what :func:`read_volume` returns."""

    grid: Grid
    channels: int
    dtype: np.dtype


@dataclass(frozen=True)
class Format:
    """A format from another package, recognised by ``suffix``, such as ``.own``; without its dot, that is its name.

    ``read`` returns voxels (C, X, Y, Z) in RAS+ millimetres; ``write`` writes a file from which ``read`` returns the
    same voxels and affine. Shape, size and geometry are checked here, and whatever else ``read`` raises is
    ``E_FORMAT``. Without ``write``, nothing is written with that suffix.
    """

    suffix: str
    read: Callable[[Path], Volume]
    write: Callable[[Path, Volume], object] | None = None

    def __post_init__(self) -> None:
        if not self.suffix.startswith(".") or self.suffix != self.suffix.lower() or len(self.suffix) < 2:
            raise BadFormat(
                f"a format has '{self.suffix}' for its suffix", fix="give it a dot and lower-case letters, as in .own"
            )


FORMATS: Parts[Format] = Parts(
    "formats", "file format", {}, lambda part: part.suffix[1:] if isinstance(part, Format) else None
)
"""Formats from other packages; Delineate's own are modules in ``io``."""


def suffix_of(path: Path) -> str:
    """The suffix, in lower case, that identifies a scan's format; ``""`` if the file is not a scan.

    Hidden files do not count as scans: archives made on a Mac hold ``._case.nii.gz`` beside ``case.nii.gz``.
    Nor do previews.
    """
    name = path.name.lower()
    if name.startswith(".") or "." not in name or name.endswith(PREVIEW_SUFFIX):
        return ""
    own = next((s for s in (*SUFFIXES, *PICTURE_SUFFIXES) if name.endswith(s)), "")
    return own or max((f".{s}" for s in FORMATS if name.endswith(f".{s}")), key=len, default="")


def parts_of(path: Path) -> list[Path]:
    """The file itself and, if it is a detached header, the files beside it that it names; for a series, its files.

    A folder of pictures lies as the series beside it tells, so that its files count too.
    """
    if is_stack(path):
        from delineate.io.stacks import drawn_on

        return sorted({*pictures_in(path), *(file.path for series in drawn_on(path) for file in series.instances)})
    if is_series(path):
        from delineate.io.dicom_series import is_contours, the_series

        if is_contours(path):
            return [path]
        return sorted({instance.path for instance in the_series(path).instances})
    if suffix_of(path) not in (".mhd", ".nhdr") or not path.exists():
        return [path]
    with parsing(path, BadFormat), open_file(path) as file:
        lines = file.read(2**20).decode("utf-8", "replace").split("\n")
    # A field's value, after = in one format and : in the other, or a line of a list of files.
    named = {part.strip() for line in lines for part in (line, line.partition("=")[2], line.partition(":")[2])}
    beside = (other for other in path.parent.iterdir() if other != path and other.name in named)
    return [path, *sorted(other for other in beside if other.is_file())]


def name_of(path: Path) -> str:
    """The file's name without its suffix, printable: ``case`` for ``case.nii.gz`` and ``case.seg.nrrd``."""
    if names_segments(path):
        return printable(path.name[: -len(SEGMENTATION_SUFFIX)])
    suffix = suffix_of(path) or next((s for s in (*DICOM_SUFFIXES, ".zip") if path.name.lower().endswith(s)), "")
    return printable(path.name[: len(path.name) - len(suffix)])


def names_segments(path: Path) -> bool:
    """Whether a file is called as 3D Slicer's segmentations are."""
    return path.name.lower().endswith(SEGMENTATION_SUFFIX) and suffix_of(path) == ".nrrd"


def is_series(path: Path) -> bool:
    """Whether a path stands for a DICOM series: its folder, a zip, or any one of its files, also one in a zip."""
    if suffix_of(path):
        return False
    if path.is_dir():
        return not is_stack(path)
    if path.name.lower().endswith((*DICOM_SUFFIXES, ".zip")):
        return True
    return is_dicom(path) if path.is_file() else zip_around(path) is not None


def read_header(path: Path, limits: Limits = _LIMITS, *, orientation: Orientation = "refuse") -> Header:
    """Grid, channels and dtype, after checking them and that the file is complete; voxels stay on the disk.

    Raises what :func:`read_volume` raises, except for faults that only voxels and checksums reveal.
    """
    with parsing(path, BadFormat, fix=_FIX):
        if is_series(path):
            from delineate.io.dicom import describe_series
            from delineate.io.dicom_series import the_series

            grid, dtype = describe_series(the_series(path, limits=limits), limits)
            return Header(grid, 1, dtype)
        suffix = suffix_of(path)
        if suffix in PICTURE_SUFFIXES or suffix[1:] in FORMATS:
            voxels, grid = _read(path, limits, orientation)  # only reading can tell
            return Header(grid, len(voxels), voxels.dtype)
        stored = _describe(path, limits, orientation)
        check_complete(stored)
    return Header(stored.grid, stored.channels, stored.read_dtype)


def read_volume(
    path: Path,
    *,
    limits: Limits = _LIMITS,
    orientation: Orientation = "refuse",
    nan: Literal["refuse", "fill"] = "refuse",
) -> Volume:
    """A scan: voxels (C, X, Y, Z), each channel Fortran-ordered, in RAS+ millimetres.

    Integers keep their type; scaled values and floats are float32. A fourth axis is channels.
    ``orientation`` chooses between a NIfTI file's sform and qform where they disagree by more than 0.01 mm.
    ``nan="fill"`` replaces voxels that are not finite by the channel's smallest finite value, its background.

    Raises a :class:`ScanError`, by cause: ``Truncated``, ``BadGeometry``,
    ``AmbiguousOrientation``, ``BadShape``, ``TooLarge``, ``BadPath``, ``BadVoxels``, ``BadFormat``;
    and :class:`MissingFile`.
    """
    with parsing(path, BadFormat, fix=_FIX):
        voxels, grid = _read(path, limits, orientation)
    return Volume(_finite(path, voxels, nan), grid)


def read_label(
    path: Path,
    *,
    limits: Limits = _LIMITS,
    orientation: Orientation = "refuse",
) -> LabelVolume:
    """A label: voxels (X, Y, Z) in the smallest integer type, unsigned if it can be.

    Values within 1e-3 of an integer are rounded, such as 254.99999994; others raise
    :class:`BadLabelValue`. A folder of pictures beside a DICOM series is a label too. Otherwise like
    :func:`read_volume`.
    """
    with parsing(path, BadFormat, fix=_FIX):
        if is_series(path):
            from delineate.io.dicom import read_series
            from delineate.io.dicom_series import is_contours, the_series

            if is_contours(path, limits):
                raise BadFormat(
                    f"'{path}' holds contours, which have names but no values",
                    fix="name the targets as its structures are named",
                )
            series = the_series(path, limits=limits)
            if series.modality == "SEG":
                from delineate.io.dicom_seg import read_segmentation

                return read_segmentation(series.instances[0], limits)
            voxels, grid = read_series(series, limits)
        elif is_stack(path):
            from delineate.io.stacks import read_stack

            voxels, grid = read_stack(path, limits)
        else:
            voxels, grid = _read(path, limits, orientation)
        if len(voxels) != 1:
            layers = names_segments(path)
            raise BadShape(
                f"label '{path}' has {len(voxels)} {'layers of segments' if layers else 'channels'}",
                fix="name the targets as its segments are named" if layers else "save one label (x, y, z)",
            )
    return LabelVolume(_smallest(path, _rounded(path, voxels[0])), grid)


def holds_label(path: Path) -> bool:
    """Whether a file's voxels look like a label's, not a scan's: one channel with only a few different whole numbers.

    A file that cannot be read does not count as a label.
    """
    try:
        voxels = read_volume(path).voxels
    except DelineateError:
        return False
    few = np.unique(voxels.ravel(order="K")[:: max(1, voxels.size // _LOOKED_AT)])  # settles it for most scans
    if len(voxels) > 1 or len(few) > _LABEL_VALUES:
        return False
    values = np.unique(voxels)
    whole = bool(values[0] >= 0) and np.array_equal(values, np.rint(values))
    return whole and 2 <= len(values) <= _LABEL_VALUES


def write_volume(path: Path, volume: Volume, *, like: Path | None = None) -> None:
    """Write a scan; integers keep their type, floats become float32. It reads back exactly, grid included.

    NIfTI keeps an affine bit for bit if it came from NIfTI-1, and any other to 32-bit precision. Where
    ``like`` is a NIfTI file on the same grid, its header's geometry is copied exactly. MetaImage and
    NRRD become one uncompressed file, even as ``.mhd`` or ``.nhdr``. ``.vtk`` and ``.vti`` are for
    viewers; PNG and TIFF hold one slice, an axial one as radiologists view it, and no grid. The file appears complete
    or not at all: :class:`OutputError`.
    """
    voxels = volume.voxels
    if voxels.dtype.kind not in "iu":
        voxels = voxels.astype(np.uint8 if voxels.dtype == bool else np.float32, copy=False)
    _write(path, voxels, volume.grid, like)


def write_label(
    path: Path, label: LabelVolume, *, like: Path | None = None, extension: tuple[int, bytes] | None = None
) -> None:
    """Write a label in the smallest integer type that holds its values; otherwise like :func:`write_volume`.

    ``extension`` is a code and its text, for the header of a NIfTI file.
    """
    _write(path, _smallest(path, label.voxels)[None], label.grid, like, extension)


class _Format(Protocol):
    """What each format's module offers."""

    def describe(self, path: Path, limits: Limits, orientation: Orientation) -> Stored: ...

    def write(self, path: Path, voxels: NDArray, grid: Grid) -> None: ...


def _format_of(path: Path) -> _Format:
    match suffix_of(path):
        case ".nii" | ".nii.gz":
            from delineate.io import nifti  # imports nibabel, a tenth of a second

            return nifti
        case ".mha" | ".mhd":
            from delineate.io import metaimage

            return metaimage
        case ".nrrd" | ".nhdr":
            from delineate.io import nrrd

            return nrrd
    ours = (*SUFFIXES, *PICTURE_SUFFIXES, *(f".{name}" for name in FORMATS))
    hint = near("".join(path.suffixes[-2:]), ours) or near(path.suffix, ours)
    raise BadFormat(f"'{path}' has no known suffix", fix=f"known are {', '.join(ours)}, and DICOM{hint}")


def _describe(path: Path, limits: Limits, orientation: Orientation) -> Stored:
    if not path.is_file():
        raise MissingFile(f"'{path}' is not a file", fix="check the name")
    return _format_of(path).describe(path, limits, orientation)


def _read(path: Path, limits: Limits, orientation: Orientation) -> tuple[NDArray, Grid]:
    """Voxels (C, X, Y, Z) and their grid, whatever the format."""
    if is_series(path):
        from delineate.io.dicom import read_series
        from delineate.io.dicom_series import the_series

        return read_series(the_series(path, limits=limits), limits)
    if suffix_of(path) in PICTURE_SUFFIXES:
        from delineate.io import pictures

        if not path.is_file():
            raise MissingFile(f"'{path}' is not a file", fix="check the name")
        return pictures.read_picture(path, limits)
    if suffix_of(path)[1:] in FORMATS:
        return _read_foreign(path, FORMATS[suffix_of(path)[1:]], limits)
    stored = _describe(path, limits, orientation)
    return read_voxels(stored), stored.grid


def _read_foreign(path: Path, format: Format, limits: Limits) -> tuple[NDArray, Grid]:
    """What another package's format reads, held to the same rules as Delineate's own formats."""
    if not path.is_file():
        raise MissingFile(f"'{path}' is not a file", fix="check the name")
    volume = format.read(path)
    if not isinstance(volume, Volume):
        raise BadFormat(
            f"'{path}' was read as a {type(volume).__name__}, not a Volume", fix="ask the authors of its format"
        )
    voxels = np.asarray(volume.voxels)
    check_shape(path, voxels.shape[1:], voxels.dtype.itemsize * len(voxels), limits)
    if not len(voxels) or voxels.dtype.kind not in "iuf":
        raise BadFormat(
            f"'{path}' has {len(voxels)} channels of type {voxels.dtype}", fix="give numbers in at least one channel"
        )
    dtype = np.dtype(np.float32) if voxels.dtype.kind == "f" else voxels.dtype.newbyteorder("=")
    ours = np.empty((len(voxels), *voxels.shape[:0:-1]), dtype).transpose(0, 3, 2, 1)  # Fortran order, writeable
    ours[...] = voxels
    return ours, check_grid(path, volume.grid.shape, volume.grid.affine)


def _write(
    path: Path, voxels: NDArray, grid: Grid, like: Path | None, extension: tuple[int, bytes] | None = None
) -> None:
    check_writable(path)
    write = _writer_of(path)
    if suffix_of(path) in NIFTI_SUFFIXES:
        from delineate.io import nifti

        copied = like if like is not None and suffix_of(like) in NIFTI_SUFFIXES else None
        write = partial(nifti.write, like=copied, extension=extension)
    with writing_beside(path) as beside:
        write(beside, voxels, grid)


def check_writable(path: Path, *, segments: bool = False) -> None:
    """Raise :class:`BadFormat` for a suffix that cannot be written; ``segments`` allows labels with named segments."""
    name = path.name.lower()
    for ending, what in _FOREIGN.items():
        if name.endswith(ending):
            raise BadFormat(f"'{path}' would be {what}")
    if name.endswith(SEGMENTATION_SUFFIX) and not segments:
        raise BadFormat(f"'{path}' names its segments", fix="export it as a label with its targets, or write .nrrd")
    if not (segments and name.endswith(DICOM_SUFFIXES)):
        _writer_of(path)


def _writer_of(path: Path) -> Callable[[Path, NDArray, Grid], None]:
    if suffix_of(path) in PICTURE_SUFFIXES:
        from delineate.io import pictures

        return pictures.write_picture
    if path.suffix.lower() in VTK_SUFFIXES:
        return _write_vtk
    if (name := suffix_of(path)[1:]) in FORMATS:
        return _foreign_writer(path, FORMATS[name])
    return _format_of(path).write


def _foreign_writer(path: Path, format: Format) -> Callable[[Path, NDArray, Grid], None]:
    write_foreign = format.write
    if write_foreign is None:
        raise BadFormat(f"'{path}' cannot be written: {format.suffix} is only read", fix="write .nii.gz")

    def write(beside: Path, voxels: NDArray, grid: Grid) -> None:
        try:
            write_foreign(beside, Volume(voxels, grid))
        except (DelineateError, OSError):
            raise
        except Exception as error:
            raise OutputError(
                f"'{path}' cannot be written: {type(error).__name__}: {error}",
                fix=(f"write .nii.gz, or ask the authors of the {format.suffix} format"),
            ) from error

    return write


def _write_vtk(path: Path, voxels: NDArray, grid: Grid) -> None:
    from delineate.io import vtk

    if len(voxels) != 1:
        raise BadShape(f"'{path}' would hold {len(voxels)} channels", fix="write each to its own file")
    (vtk.write_legacy if path.suffix.lower() == ".vtk" else vtk.write_xml)(path, voxels[0], grid)


def _finite(path: Path, voxels: NDArray, nan: Literal["refuse", "fill"]) -> NDArray:
    if voxels.dtype.kind != "f":
        return voxels
    finite = np.isfinite(voxels)
    if finite.all():
        return voxels
    count = f"{finite.size - np.count_nonzero(finite)} of {finite.size} voxels that are not finite"
    if nan == "refuse":
        raise BadVoxels(
            f"'{path}' has {count}",
            fix="export the scan again, or have them filled: delineate data inspect FOLDER --repair NEW",
        )
    for channel, good in zip(voxels, finite, strict=True):
        if not good.any():
            raise BadVoxels(f"'{path}' has {count}, a whole channel among them", fix="leave the scan out")
        channel[~good] = channel[good].min()
    return voxels


def _rounded(path: Path, voxels: NDArray) -> NDArray:
    """The voxels rounded, provided that each is within the tolerance of a whole number."""
    if voxels.dtype.kind != "f":
        return voxels
    rounded = np.rint(voxels)
    with np.errstate(invalid="ignore"):
        bad = ~(abs(voxels - rounded) <= _LABEL_TOLERANCE)  # NaN and infinity among them
    if bad.any():
        values = ", ".join(f"{v:g}" for v in np.unique(voxels[bad])[:5])
        raise BadLabelValue(
            f"label '{path}' has {np.count_nonzero(bad)} voxels that are not whole numbers ({values}, …)",
            fix="resample it with nearest neighbours, or draw the label again",
        )
    return rounded


def _smallest(path: Path, voxels: NDArray) -> NDArray:
    """Whole numbers in the smallest integer type, unsigned if none is negative."""
    least, most = voxels.min(), voxels.max()
    for dtype in _LABEL_DTYPES:
        if np.iinfo(dtype).min <= least and most <= np.iinfo(dtype).max:
            return voxels.astype(dtype, copy=False)
    raise BadLabelValue(f"label '{path}' has values from {least} to {most}", fix="number its structures from 1")
