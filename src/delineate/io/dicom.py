"""DICOM: the series in a folder or a zip, and one series as a volume.

Order, spacing and direction come from each slice's own position, never from names or numbers of
files. Nothing that identifies a patient is read, but for a digest that keeps one patient together.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from delineate.core.grid import Grid
from delineate.errors import (
    BadFormat,
    BadGeometry,
    BadPath,
    BadShape,
    DelineateError,
    DuplicateSlice,
    MissingFile,
    MissingSlice,
    MixedOrientations,
    SeveralSeries,
    SeveralTimes,
    TiltedGantry,
    TooLarge,
    Truncated,
    UnevenSlices,
)
from delineate.io.files import Limits
from delineate.io.voxels import LPS_TO_RAS, check_grid, check_spacing

try:
    from pydicom import Dataset, dcmread
    from pydicom.uid import DeflatedExplicitVRLittleEndian
except ModuleNotFoundError as error:
    raise BadFormat("DICOM needs more libraries; pip install 'delineate[dicom]'") from error

UNIFORMITY = 0.01
"""How far a distance between slices may differ from the usual one, as a share of it."""

_MOST_FILES = 100_000
_PARALLEL = 1e-3  # difference of direction cosines that rounding in headers leaves
_TAGS = [
    "SeriesInstanceUID", "StudyInstanceUID", "PatientID", "Modality", "SeriesDescription", "SeriesNumber",
    "StudyDate", "SeriesDate", "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "BitsAllocated", "BitsStored",
    "PixelRepresentation", "ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing", "SpacingBetweenSlices",
    "SliceThickness", "RescaleSlope", "RescaleIntercept", "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence", "TemporalPositionIdentifier", "AcquisitionNumber", "EchoNumbers",
    "AcquisitionTime",
]  # fmt: skip


@dataclass(frozen=True)
class Instance:
    """One DICOM file, or one member of a zip."""

    path: Path
    member: str = ""
    archive: zipfile.ZipFile | None = field(default=None, compare=False, repr=False)

    def open(self) -> BinaryIO:
        return self.path.open("rb") if self.archive is None else io.BytesIO(self.archive.read(self.member))

    def __str__(self) -> str:
        return f"{self.path}:{self.member}" if self.member else str(self.path)


@dataclass(frozen=True)
class Series:
    """What a series says of itself. ``patient`` is a digest of the patient's number, not the number.

    ``slices`` counts its images; ``shape`` is (columns, rows). ``headers`` go with ``instances`` and
    hold what tells where each image lies, nothing of a person.
    """

    uid: str
    study: str
    patient: str
    modality: str
    description: str
    number: int
    date: str
    shape: tuple[int, int]
    spacing_mm: tuple[float, float] | None
    slices: int
    instances: tuple[Instance, ...] = field(repr=False)
    headers: tuple[Dataset, ...] = field(repr=False, compare=False)

    @property
    def folder(self) -> Path:
        """The innermost folder (or zip) that holds all of it."""
        first = self.instances[0].path
        if first.suffix.lower() == ".zip":
            return first
        return Path(os.path.commonpath([instance.path.parent for instance in self.instances]))

    def __str__(self) -> str:
        return f"'{self.description or self.uid}' ({self.modality}, {self.slices} slices)"


def find_series(path: Path, limits: Limits = Limits()) -> list[Series]:  # noqa: B008 - frozen
    """Every series of images in a folder and those below it, in a zip, or beside one of its files.

    Sorted by study and number; files that are not DICOM, and objects without images, are passed
    over. Raises :class:`BadPath` and :class:`TooLarge` for a zip that would leave its folder or
    unpack to too much, and :class:`MissingFile` where nothing is found.
    """
    if not path.exists():
        raise MissingFile(f"'{path}' is not there; check the name")
    found: dict[str, list[tuple[Instance, Dataset]]] = defaultdict(list)
    for instance in _instances(path, limits):
        with _parsing(instance):
            header = _header(instance, limits)
            if header is not None and "Rows" in header:
                found[str(header.get("SeriesInstanceUID", ""))].append((instance, header))
    series = []
    for uid, members in found.items():
        with _parsing(members[0][0]):
            series.append(_described(uid, members))
    if path.is_file() and path.suffix.lower() != ".zip":
        series = [s for s in series if any(instance.path == path for instance in s.instances)]
    if not series:
        raise MissingFile(f"'{path}' holds no DICOM images; give the folder, or the zip, of a series")
    return sorted(series, key=lambda s: (s.date, s.study, s.number, s.description, s.uid))


def the_series(path: Path, pattern: str | None = None, limits: Limits = Limits()) -> Series:  # noqa: B008
    """The one series of a place, or the one whose description or UID fits a pattern.

    Patterns are as in a shell, letters large or small. Raises :class:`SeveralSeries`, listing them,
    and :class:`MissingFile`.
    """
    series = find_series(path, limits)
    fitting = series if pattern is None else [s for s in series if fits(s, pattern)]
    if len(fitting) == 1:
        return fitting[0]
    listed = ", ".join(map(str, (fitting or series)[:8]))
    if not fitting:
        raise MissingFile(f"no series of '{path}' fits '{pattern}'; there are {listed}")
    raise SeveralSeries(f"'{path}' holds {len(fitting)} series: {listed}; name one by a pattern of its description")


def fits(series: Series, pattern: str) -> bool:
    """Whether a series' description or UID fits a shell pattern, whatever the case of letters."""
    from fnmatch import fnmatch

    return series.uid == pattern or fnmatch(series.description.lower(), pattern.lower())


def describe_series(series: Series, limits: Limits = Limits()) -> tuple[Grid, np.dtype]:  # noqa: B008
    """Grid and type of what :func:`read_series` returns, from the headers alone."""
    frames = frames_of(series)
    return _grid(series, frames, limits), _dtype(frames)


def read_series(series: Series, limits: Limits = Limits()) -> tuple[NDArray, Grid]:  # noqa: B008
    """Voxels (1, X, Y, Z), rescaled, and their grid; see :func:`frames_of` for the order and the errors.

    Integers stay integers where every slice has slope 1 and one whole intercept; else float32.
    """
    frames = frames_of(series)
    grid = _grid(series, frames, limits)
    first, dtype = frames[0], _dtype(frames)
    planes = np.empty((len(frames), first.rows, first.columns), dtype)
    places: dict[Instance, list[int]] = defaultdict(list)
    for k, frame in enumerate(frames):
        places[frame.instance].append(k)
    for instance, ks in places.items():
        pixels = _pixels(instance, (first.rows, first.columns), limits)
        for k in ks:
            plane, frame = pixels[frames[k].index], frames[k]
            if dtype.kind == "f":
                planes[k] = plane.astype(np.float32) * np.float32(frame.slope) + np.float32(frame.inter)
            else:
                planes[k] = plane.astype(dtype) + dtype.type(int(frame.inter))
    return planes.transpose(2, 1, 0)[None], grid  # columns run along x, rows along y


def _dtype(frames: Sequence[Frame]) -> np.dtype:
    """What the rescaled values are kept as."""
    scales = {(f.slope, f.inter) for f in frames}
    slope, inter = next(iter(scales))
    if len(scales) > 1 or slope != 1 or not float(inter).is_integer():
        return np.dtype(np.float32)
    least, most = (value + int(inter) for value in frames[0].value_range)
    kinds = ("u1", "u2", "u4") if least >= 0 else ("i1", "i2", "i4")
    return next((np.dtype(t) for t in kinds if _fits(np.dtype(t), least, most)), np.dtype(np.int64))


@dataclass(frozen=True, eq=False)
class Frame:
    """One image: where its pixels are, and where it lies in the patient (LPS millimetres)."""

    instance: Instance
    index: int
    rows: int
    columns: int
    position: NDArray[np.float64]
    across: NDArray[np.float64]  # direction of increasing column
    down: NDArray[np.float64]  # direction of increasing row
    spacing_mm: tuple[float, float]  # of columns, of rows
    thickness_mm: float
    slope: float
    inter: float
    value_range: tuple[int, int]  # of the values that its bits can hold
    time: tuple[str, ...]

    @property
    def normal(self) -> NDArray[np.float64]:
        return np.cross(self.across, self.down)


def frames_of(series: Series) -> list[Frame]:
    """Every image of a series, in order along the slices' normal.

    Raises :class:`BadGeometry` where a position or spacing is missing, :class:`BadShape` where
    sizes differ or pixels have colours, and :class:`BadFormat` for a header that makes no sense.
    """
    frames: list[Frame] = []
    for instance, header in zip(series.instances, series.headers, strict=True):
        with _parsing(instance):
            frames += _frames(instance, header)
    if {(f.rows, f.columns) for f in frames} != {(frames[0].rows, frames[0].columns)}:
        sizes = sorted({f"{f.columns} × {f.rows}" for f in frames})
        raise BadShape(f"{_named(series)} has slices of different sizes ({', '.join(sizes)}); export one size")
    along = frames[0].normal
    return sorted(frames, key=lambda f: float(f.position @ along))


def _grid(series: Series, frames: Sequence[Frame], limits: Limits) -> Grid:
    """The frames' common grid, in RAS+ millimetres, once nothing is wrong with it."""
    first, name, n = frames[0], _named(series), len(frames)
    check_size(name, (first.columns, first.rows, n), limits)
    for frame in frames:
        turned = max(abs(frame.across - first.across).max(), abs(frame.down - first.down).max())
        if turned > _PARALLEL:
            raise MixedOrientations(f"{name} has slices in different planes, as localisers do; leave it out")
        if not np.allclose(frame.spacing_mm, first.spacing_mm, rtol=UNIFORMITY):
            raise BadGeometry(f"{name} has slices of different pixel spacing; export one spacing")
    check_spacing(Path(name), first.spacing_mm)
    step = first.normal * first.thickness_mm
    if n > 1:
        _check_places(name, frames)
        step = (frames[-1].position - first.position) / (n - 1)
    elif not np.isfinite(first.thickness_mm):
        raise BadGeometry(f"{name} is one slice without a thickness; export it with its geometry")
    affine = np.eye(4)
    columns = (first.across * first.spacing_mm[0], first.down * first.spacing_mm[1], step, first.position)
    affine[:3] = LPS_TO_RAS[:, None] * np.array(columns).T
    return check_grid(Path(name), (first.columns, first.rows, n), affine + 0.0)


def _check_places(name: str, frames: Sequence[Frame]) -> None:
    """Whether the slices lie one after the other at even distances, straight above each other."""
    places = np.array([f.position @ frames[0].normal for f in frames])
    gaps = np.diff(places)
    usual = float(np.median(gaps[gaps > 1e-3])) if (gaps > 1e-3).any() else 0.0
    if usual == 0 or gaps.min() < UNIFORMITY * usual:
        groups = np.unique(np.round(places, 2), return_counts=True)[1]
        if usual and len(set(groups)) == 1 and len({f.time for f in frames}) > 1:
            raise SeveralTimes(f"{name} has {groups[0]} images at each of {len(groups)} positions; export one of them")
        twice = places[1:][gaps < UNIFORMITY * usual] if usual else places[:1]
        at = ", ".join(f"{p:.1f}" for p in twice[:4])
        raise DuplicateSlice(f"{name} has several slices at {at} mm along its normal; send it again, or remove copies")
    uneven = np.flatnonzero(abs(gaps - usual) > UNIFORMITY * usual)
    if uneven.size:
        whole = np.round(gaps[uneven] / usual)
        where = ", ".join(f"{places[i]:.1f} and {places[i + 1]:.1f}" for i in uneven[:4])
        if (whole >= 2).all() and (abs(gaps[uneven] / usual - whole) <= UNIFORMITY * whole).all():
            raise MissingSlice(
                f"{name} lacks {int((whole - 1).sum())} slices, between {where} mm along its normal "
                f"(slices are {usual:.4g} mm apart); send it again"
            )
        raise UnevenSlices(
            f"{name} has slices {gaps.min():.4g} to {gaps.max():.4g} mm apart (between {where} mm); "
            "export an even reconstruction"
        )
    steps = np.diff([f.position for f in frames], axis=0)
    aside = np.linalg.norm(steps - gaps[:, None] * frames[0].normal, axis=1).max()
    if aside > UNIFORMITY * usual:
        degrees = np.degrees(np.arctan2(aside, usual))
        raise TiltedGantry(f"{name} was taken with a tilted gantry ({degrees:.1f}°); export it corrected for the tilt")


def _frames(instance: Instance, header: Dataset) -> Iterator[Frame]:
    """The images of one file: one, or many with a place each in the enhanced objects."""
    if int(header.get("SamplesPerPixel", 1)) != 1:
        raise BadShape(f"'{instance}' has colours; give the scan itself, not a picture of it")
    per_frame = header.get("PerFrameFunctionalGroupsSequence")
    shared = (header.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    count = int(header.get("NumberOfFrames", 1) or 1)
    if count > 1 and (per_frame is None or len(per_frame) != count):
        raise BadGeometry(f"'{instance}' has {count} frames without a place each; export it with its geometry")
    for index in range(count):
        groups = (per_frame[index], shared, header) if per_frame is not None else (header,)
        yield _frame(instance, index, header, groups)


def _frame(instance: Instance, index: int, header: Dataset, groups: Sequence[Dataset]) -> Frame:
    def of(name: str, sequence: str) -> Any:
        for group in groups:
            macro = group.get(sequence)
            value = (macro[0] if macro else group).get(name)
            if value is not None and value != "":
                return value
        return None

    def numbers(name: str, sequence: str, count: int) -> NDArray[np.float64]:
        value = of(name, sequence)
        try:
            found = np.array([float(v) for v in value], dtype=np.float64)
        except (TypeError, ValueError):
            found = np.empty(0, dtype=np.float64)
        if found.size != count or not np.isfinite(found).all():
            raise BadGeometry(f"'{instance}' has no valid {name}; export it with its geometry")
        return found

    position = numbers("ImagePositionPatient", "PlanePositionSequence", 3)
    cosines = numbers("ImageOrientationPatient", "PlaneOrientationSequence", 6)
    across, down = cosines[:3], cosines[3:]
    if not (np.allclose([across @ across, down @ down], 1, atol=0.01) and abs(across @ down) < 0.01):
        raise BadGeometry(f"'{instance}' has directions that are not at right angles; export it with its geometry")
    row_mm, column_mm = numbers("PixelSpacing", "PixelMeasuresSequence", 2)
    thickness = of("SpacingBetweenSlices", "PixelMeasuresSequence") or of("SliceThickness", "PixelMeasuresSequence")
    slope, inter = (of(f"Rescale{what}", "PixelValueTransformationSequence") for what in ("Slope", "Intercept"))
    scale = [1.0 if slope is None else float(str(slope)), 0.0 if inter is None else float(str(inter))]
    if scale[0] == 0 or not np.isfinite(scale).all():
        raise BadFormat(f"'{instance}' has values scaled by {scale[0]:g} plus {scale[1]:g}; export it again")
    time = ("TemporalPositionIdentifier", "AcquisitionNumber", "EchoNumbers", "AcquisitionTime")
    bits, signed = int(header.get("BitsStored") or header.BitsAllocated), bool(header.get("PixelRepresentation"))
    return Frame(
        instance=instance,
        index=index,
        rows=int(header.get("Rows", 0)),
        columns=int(header.get("Columns", 0)),
        position=position,
        across=across / np.linalg.norm(across),
        down=down / np.linalg.norm(down),
        spacing_mm=(float(column_mm), float(row_mm)),
        thickness_mm=abs(float(str(thickness))) if thickness else float("nan"),
        slope=scale[0],
        inter=scale[1],
        value_range=(-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1),
        time=tuple(str(header.get(name, "")) for name in time),
    )


def _pixels(instance: Instance, shape: tuple[int, int], limits: Limits) -> NDArray:
    """Stored values (frames, rows, columns) of one file, decompressed.

    Raises :class:`Truncated`, :class:`BadFormat`, :class:`BadShape`, :class:`TooLarge`.
    """
    with _parsing(instance):
        with instance.open() as file:
            dataset = dcmread(file)
        frames, rows, columns = int(dataset.get("NumberOfFrames", 1) or 1), int(dataset.Rows), int(dataset.Columns)
        check_size(f"'{instance}'", (columns, rows, frames), limits)
        if "PixelData" not in dataset:
            raise Truncated(f"'{instance}' holds no pixels; send it again")
        if not dataset.file_meta.TransferSyntaxUID.is_compressed:
            there, expected = len(dataset.PixelData), frames * rows * columns * int(dataset.BitsAllocated) // 8
            if there < expected:
                raise Truncated(f"'{instance}' holds {there} of {expected} bytes of pixels; send it again")
    try:
        pixels: NDArray = dataset.pixel_array
    except Exception as error:  # decoders of many libraries, each with its own errors
        syntax = dataset.file_meta.TransferSyntaxUID.name
        raise BadFormat(f"'{instance}' ({syntax}) cannot be decoded: {error}; send it uncompressed") from error
    pixels = pixels.reshape(-1, *pixels.shape[-2:])
    if pixels.shape != (frames, *shape):
        raise BadShape(f"'{instance}' decodes to {pixels.shape}, its header says {(frames, *shape)}; send it again")
    return pixels


def _fits(dtype: np.dtype, least: int, most: int) -> bool:
    return bool(np.iinfo(dtype).min <= least and most <= np.iinfo(dtype).max)


def check_size(name: str, shape: tuple[int, int, int], limits: Limits) -> None:
    """Raise :class:`BadShape` and :class:`TooLarge` for what should not be allocated."""
    text = " × ".join(map(str, shape))
    if min(shape) < 1:
        raise BadShape(f"{name} has {text} voxels: an axis is empty; export it again")
    if max(shape) > limits.max_axis or int(np.prod(shape, dtype=np.int64)) * 2 > limits.max_bytes:
        raise TooLarge(f"{name} claims {text} voxels; the limits are {limits.max_axis} along an axis; crop the scan")


def _described(uid: str, members: list[tuple[Instance, Dataset]]) -> Series:
    members = sorted(members, key=lambda member: str(member[0]))
    header = members[0][1]
    spacing, study = header.get("PixelSpacing"), str(header.get("StudyInstanceUID", ""))
    # Without a number, as after some ways of removing names, all that is known is that studies differ.
    patient = hashlib.blake2b(str(header.get("PatientID") or study).encode(), digest_size=6).hexdigest()
    for _, other in members:
        other.pop("PatientID", None)
    return Series(
        uid=uid,
        study=study,
        patient=patient,
        modality=str(header.get("Modality", "")),
        description=str(header.get("SeriesDescription", "")),
        number=int(header.get("SeriesNumber") or 0),
        date=str(header.get("SeriesDate") or header.get("StudyDate") or ""),
        shape=(int(header.Columns), int(header.Rows)),
        spacing_mm=None if not spacing else (float(spacing[1]), float(spacing[0])),
        slices=sum(int(h.get("NumberOfFrames", 1) or 1) for _, h in members),
        instances=tuple(instance for instance, _ in members),
        headers=tuple(header for _, header in members),
    )


def _header(instance: Instance, limits: Limits) -> Dataset | None:
    """The tags that describe an image, None for what is not DICOM."""
    with instance.open() as file:
        if file.read(132)[128:] != b"DICM":
            return None
        _check_deflated(instance, file, limits)
        file.seek(0)
        header = dcmread(file, stop_before_pixels=True, specific_tags=list(_TAGS))
    kind = header.file_meta.get("MediaStorageSOPClassUID")
    if kind is None or ("Rows" not in header and "Image Storage" in kind.name):
        # Passed over, it would be a volume that lacks its last slice.
        raise EOFError("it ends before its header does")
    return header


@contextmanager
def _parsing(instance: Instance) -> Iterator[None]:
    """Any failure to understand a file's bytes, as one of ours."""
    try:
        yield
    except DelineateError:
        raise
    except (EOFError, zlib.error, zipfile.BadZipFile, OSError) as error:
        raise Truncated(f"'{instance}' is damaged: {error}; send it again") from error
    except Exception as error:  # the parser lets through whatever strange bytes lead to
        raise BadFormat(f"'{instance}' has a header that makes no sense: {error}; send it again") from error


def _check_deflated(instance: Instance, file: BinaryIO, limits: Limits) -> None:
    """Raise :class:`TooLarge` before a compressed data set is unpacked to more than a scan can be."""
    file.seek(132)
    head = file.read(2**16)
    # The group's first element is its length: tag, VR, length of the value, value.
    end = 12 + int.from_bytes(head[8:12], "little")
    if DeflatedExplicitVRLittleEndian.encode() not in head[:end]:
        return
    file.seek(132 + end)
    inflate, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
    rest = file.read(2**16)
    while rest and not inflate.eof:
        size += len(inflate.decompress(rest, 2**20))
        rest = inflate.unconsumed_tail or file.read(2**16)
        if size > limits.max_bytes // 4:
            raise TooLarge(f"'{instance}' unpacks to more than {limits.max_bytes // 2**22} MiB; send it uncompressed")


def _instances(path: Path, limits: Limits) -> Iterator[Instance]:
    if path.is_dir():
        count = 0
        for place, folders, files in os.walk(path):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(files):
                if not name.startswith(".") and name != "DICOMDIR":
                    count += 1
                    if count > _MOST_FILES:
                        raise TooLarge(f"'{path}' holds more than {_MOST_FILES} files; give the folder of one study")
                    yield Instance(Path(place, name))
    elif path.suffix.lower() == ".zip":
        yield from _members(path, limits)
    else:
        yield from (Instance(file) for file in sorted(path.parent.iterdir()) if file.is_file())


def _members(path: Path, limits: Limits) -> Iterator[Instance]:
    """The files of a zip, once its names stay inside and its sizes within the limits."""
    try:
        archive = zipfile.ZipFile(path)  # read from for as long as an instance refers to it
    except zipfile.BadZipFile as error:
        raise Truncated(f"'{path}' is no whole zip: {error}; copy it again") from error
    entries = [entry for entry in archive.infolist() if not entry.is_dir()]
    if len(entries) > _MOST_FILES or sum(entry.file_size for entry in entries) > 2 * limits.max_bytes:
        raise TooLarge(f"'{path}' unpacks to more than {limits.max_bytes // 2**29} GiB; pack one study")
    for entry in entries:
        place = PurePosixPath(entry.filename.replace("\\", "/"))
        if place.is_absolute() or ".." in place.parts or re.match("[A-Za-z]:", entry.filename):
            raise BadPath(f"'{path}' holds '{entry.filename}', outside of itself; pack it again")
        if stat.S_ISLNK(entry.external_attr >> 16):
            raise BadPath(f"'{path}' holds a link, '{entry.filename}'; pack the files themselves")
        if not place.name.startswith(".") and place.name != "DICOMDIR":
            yield Instance(path, entry.filename, archive)


def _named(series: Series) -> str:
    return f"series {series.description or series.uid}"
