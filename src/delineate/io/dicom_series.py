"""DICOM: the series in a folder or a zip, and the contours drawn on them, without their pixels.

Nothing that identifies a patient is read except the patient ID, of which only a pseudonym is kept.
"""

from __future__ import annotations

import io
import logging
import os
import re
import stat
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from delineate.errors import (
    BadFormat,
    BadPath,
    DelineateError,
    MissingFile,
    SeveralSeries,
    TooLarge,
)
from delineate.io import files
from delineate.io.files import Limits, open_file, walk
from delineate.io.pseudonyms import pseudonym
from delineate.io.suffixes import is_dicom, zip_around

try:
    from pydicom import Dataset, dcmread
    from pydicom.uid import DeflatedExplicitVRLittleEndian
except ModuleNotFoundError as error:
    raise BadFormat("DICOM needs more libraries", fix="pip install 'delineate[dicom]'") from error

# The library logs what it could not decode, with tracebacks; without a handler they would go to the terminal.
logging.getLogger("pydicom").addHandler(logging.NullHandler())

_MOST_FILES = 100_000
_SHOWN = 8
_LEVELS = 4  # folders up, to look for what contours were drawn on
_RATIO, _RATIO_FROM = 100, 2**28
"""How many times its own size a zip of scans may unpack to, and up to how many bytes any ratio is allowed."""
_TAGS = [
    "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "PatientID", "Modality", "SeriesDescription",
    "ProtocolName", "SeriesNumber", "StudyDate", "StudyTime", "SeriesDate", "Rows", "Columns", "NumberOfFrames",
    "SamplesPerPixel", "BitsAllocated", "BitsStored", "PixelRepresentation", "ImageOrientationPatient",
    "ImagePositionPatient", "PixelSpacing", "SpacingBetweenSlices", "SliceThickness", "RescaleSlope",
    "RescaleIntercept", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
    "TemporalPositionIdentifier", "AcquisitionNumber", "EchoNumbers", "AcquisitionTime", "ReferencedSeriesSequence",
    "ReferencedFrameOfReferenceSequence",
]  # fmt: skip
CONTOURS = "RTSTRUCT"
"""The modality of contours, which have no pixels."""
MARKING = ("SEG", CONTOURS)
"""Modalities of objects that mark structures by name on other series."""


@dataclass(frozen=True)
class Instance:
    """One DICOM file, or one member of a zip."""

    path: Path
    member: str = ""
    archive: zipfile.ZipFile | None = field(default=None, compare=False, repr=False)

    def open(self) -> BinaryIO:
        """Open the file at its beginning; a member of a zip is unpacked only as far as it is read."""
        return open_file(self.path) if self.archive is None else self.archive.open(self.member)  # type: ignore[return-value]

    def read(self, limits: Limits = Limits()) -> Dataset:  # noqa: B008 - frozen
        """The whole data set, pixels still compressed. Raises :class:`TooLarge` before reading more than a scan has."""
        with self.open() as file:
            size = (
                os.fstat(file.fileno()).st_size if self.archive is None else self.archive.getinfo(self.member).file_size
            )
            if size > 2 * limits.max_bytes:
                raise TooLarge(
                    f"'{self}' has {size / 2**30:.1f} GiB", fix=f"give a scan of less than {limits.max_bytes // 2**29}"
                )
            return dcmread(file if self.archive is None else io.BytesIO(file.read()))

    @property
    def place(self) -> Path:
        """The path that stands for it: that of the file, or of the member as if the zip were a folder."""
        return self.path / self.member.replace("\\", "/") if self.member else self.path

    @property
    def folder(self) -> str:
        """The folder that it lies in; inside a zip, the one that it would be unpacked to."""
        if self.archive is None:
            return os.path.abspath(self.path.parent)
        inside = PurePosixPath(self.member.replace("\\", "/")).parent
        return os.path.join(os.path.abspath(self.path.with_suffix("")), inside)

    def __str__(self) -> str:
        return f"{self.path}:{self.member}" if self.member else str(self.path)


@dataclass(frozen=True)
class Series:
    """What a series says about itself. ``patient`` is a pseudonym of the patient ID, not the ID.

    ``slices`` counts its images; ``shape`` is (columns, rows). ``headers`` match ``instances`` and
    hold what is needed to place each image, nothing about a person. ``studied`` is the study's date and time.
    ``refers_to``: UIDs of the series and images that segments or contours were drawn on.
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
    protocol: str = ""
    studied: str = ""
    refers_to: frozenset[str] = field(default=frozenset(), repr=False)

    @property
    def folder(self) -> Path:
        """The innermost folder (or zip) that holds all of the series."""
        first = self.instances[0].path
        if first.suffix.lower() == ".zip":
            return first
        return Path(os.path.commonpath([instance.path.parent for instance in self.instances]))

    @property
    def name(self) -> str:
        """What errors call the series."""
        return f"series {self.description or self.uid}"

    @property
    def images(self) -> frozenset[str]:
        """UIDs of its images."""
        return frozenset(str(header.get("SOPInstanceUID", "")) for header in self.headers)

    def is_among(self, uids: frozenset[str]) -> bool:
        """Whether it, or one of its images, has one of these UIDs."""
        return self.uid in uids or not self.images.isdisjoint(uids)

    def __str__(self) -> str:
        holds = "contours" if self.modality == CONTOURS else f"{self.slices} slices"
        return f"'{self.description or self.uid}' ({self.modality} {self.number}, {holds})"


def find_series(path: Path, limits: Limits = Limits()) -> list[Series]:  # noqa: B008 - frozen
    """Every series of images in a folder and those below it, in a zip, or beside one of its files.

    A path may lead into a zip. Sorted by study and series number; files that are not DICOM, and objects without images,
    are skipped. A series whose folders each hold an image for the same places, such as one for each echo,
    is one series for each folder. Raises :class:`BadPath` and :class:`TooLarge` for a zip that would
    leave its folder or unpack to too much, and :class:`MissingFile` where nothing is found.
    """
    if series := [one for one in find_objects(path, limits) if one.modality != CONTOURS]:
        return series
    raise MissingFile(f"'{path}' holds no DICOM images", fix="give the folder, or the zip, of a series")


def find_objects(path: Path, limits: Limits = Limits()) -> list[Series]:  # noqa: B008 - frozen
    """As :func:`find_series`, with contours as series without slices; none where there is no DICOM."""
    inside = zip_around(path)
    given, path = path, inside or path
    if not path.exists():
        raise MissingFile(f"'{path}' does not exist", fix="check the name")
    if not (path.is_dir() or path.is_file()):
        raise BadFormat(f"'{path}' is neither a file nor a folder", fix="give the folder, or the zip, of a series")
    series = _series_of(_instances(path, limits), limits)
    if inside is not None or (path.is_file() and path.suffix.lower() != ".zip"):
        series = [s for s in series if any(instance.place == given for instance in s.instances)]
    return sorted(series, key=lambda s: (s.date, s.study, s.number, s.description, s.uid, str(s.instances[0])))


def file_of(series: Series) -> Path:
    """The path of a file that stands for all of its series: for those beside it, or in the same zip.

    Raises :class:`BadPath` where some lie elsewhere.
    """
    folders = sorted({str(instance.path.parent) for instance in series.instances})
    if len(folders) > 1:
        raise BadPath(
            f"{series.name} lies in {len(folders)} folders: {', '.join(folders[:_SHOWN])}",
            fix="put its files into one folder",
        )
    return series.instances[0].place


def check_together(file: Path, limits: Limits = Limits()) -> None:  # noqa: B008 - frozen
    """Raise :class:`BadPath` where folders beside a file's own hold more of its series, which would not be read.

    The first file of each tells whose it is: programs that divide a series put nothing else there.
    """
    if not is_dicom(file):
        return
    try:
        own, folder = the_series(file.absolute(), limits=limits), file.absolute().parent
    except DelineateError:
        return  # reading it will say what is wrong
    together = [*own.instances]
    for place, names in walk(folder.parent, 1, links=False):
        inside = [Instance(place / name) for name in names if place != folder and name != "DICOMDIR"]
        first = [one for one in inside[:_SHOWN] if is_dicom(one.path)][:1]
        with suppress(DelineateError):  # what is wrong with other series does not matter
            if [series.uid for series in _series_of(first, limits)] == [own.uid]:
                together += inside
    for series in _series_of(together, limits) if len(together) > len(own.instances) else []:
        if own.instances[0] in series.instances:
            file_of(series)


def the_series(path: Path, pattern: str | None = None, limits: Limits = Limits()) -> Series:  # noqa: B008
    """The only series in a file, folder or zip, or the one whose description or UID matches a pattern.

    Patterns are as in a shell, but ignore case. Raises :class:`SeveralSeries`, listing them, and
    :class:`MissingFile`.
    """
    series = find_series(path, limits)
    fitting = series if pattern is None else [s for s in series if fits(s, pattern)]
    if len(fitting) == 1:
        return fitting[0]
    listed = ", ".join(map(str, (fitting or series)[:8]))
    if not fitting:
        raise MissingFile(f"no series in '{path}' matches '{pattern}'", fix=f"choose from {listed}")
    raise SeveralSeries(
        f"'{path}' holds {len(fitting)} series: {listed}", fix="choose one by a pattern that its description matches"
    )


def is_contours(path: Path, limits: Limits = Limits()) -> bool:  # noqa: B008 - frozen
    """Whether a file holds contours, of DICOM."""
    if not path.is_file() or path.suffix.lower() == ".zip":
        return False
    with parsing(path):
        header = _header(Instance(path), limits)
    return header is not None and header.get("Modality") == CONTOURS


def drawn_on(path: Path, limits: Limits = Limits()) -> Series:  # noqa: B008 - frozen
    """The series around a file of contours that they refer to; of several, the first.

    Raises :class:`MissingFile` where there is none.
    """
    with parsing(path):
        header = _header(Instance(path), limits)
        refers_to = frozenset(_referred(header)) if header is not None else frozenset()
    for above in list(path.absolute().parents)[:_LEVELS]:
        for series in find_objects(above, limits):
            if series.slices and series.modality not in MARKING and series.is_among(refers_to):
                return series
    raise MissingFile(
        f"the series that '{path}' was drawn on does not lie beside it", fix="put it into the folder of its study"
    )


def fits(series: Series, pattern: str) -> bool:
    """Whether a series' description or UID matches a shell pattern, ignoring case."""
    from fnmatch import fnmatch

    return series.uid == pattern or fnmatch(series.description.lower(), pattern.lower())


def _series_of(instances: Iterable[Instance], limits: Limits) -> list[Series]:
    """The series that files belong to."""
    found: dict[str, list[tuple[Instance, Dataset]]] = defaultdict(list)
    for instance in instances:
        with parsing(instance):
            header = _header(instance, limits)
            if header is not None and ("Rows" in header or header.get("Modality") == CONTOURS):
                found[str(header.get("SeriesInstanceUID", ""))].append((instance, header))
    series = []
    for uid, members in found.items():
        with parsing(members[0][0]):
            series += [_described(uid, part) for part in _apart(members)]
    return series


def _apart(members: list[tuple[Instance, Dataset]]) -> list[list[tuple[Instance, Dataset]]]:
    """The parts of a series that are a series each: segmentations and contours, which are complete in themselves, and
    folders, if different images of the same places lie in several."""
    if any(header.get("Modality") in MARKING for _, header in members):
        return [[member] for member in members]
    folders: dict[str, list[tuple[Instance, Dataset]]] = defaultdict(list)
    for instance, header in members:
        folders[instance.folder].append((instance, header))
    places = {str(header.get("ImagePositionPatient", instance)) for instance, header in members}
    images = {str(header.get("SOPInstanceUID", instance)) for instance, header in members}
    return [*folders.values()] if len(places) < len(members) == len(images) else [members]


def _described(uid: str, members: list[tuple[Instance, Dataset]]) -> Series:
    members = sorted(members, key=lambda member: str(member[0]))
    header = members[0][1]
    spacing, study = header.get("PixelSpacing"), str(header.get("StudyInstanceUID", ""))
    # Without a patient ID, which some anonymisers remove, all that is known is that studies differ.
    patient = pseudonym("patient", str(header.get("PatientID") or study))
    modality = str(header.get("Modality", ""))
    refers_to = {one for _, other in members for one in _referred(other)} if modality in MARKING else set()
    for _, other in members:
        other.pop("PatientID", None)
    return Series(
        uid=uid,
        study=study,
        patient=patient,
        modality=modality,
        description=str(header.get("SeriesDescription", "")),
        number=int(header.get("SeriesNumber") or 0),
        date=str(header.get("SeriesDate") or header.get("StudyDate") or ""),
        shape=(int(header.get("Columns", 0)), int(header.get("Rows", 0))),
        spacing_mm=None if not spacing else (float(spacing[1]), float(spacing[0])),
        slices=sum(int(h.get("NumberOfFrames", 1) or 1) for _, h in members if "Rows" in h),
        instances=tuple(instance for instance, _ in members),
        headers=tuple(header for _, header in members),
        protocol=str(header.get("ProtocolName", "")),
        studied=f"{header.get('StudyDate') or header.get('SeriesDate') or ''}{header.get('StudyTime') or ''}",
        refers_to=frozenset(refers_to - {uid}),
    )


def _referred(header: Dataset) -> Iterator[str]:
    """UIDs of the series and images that segments or contours were drawn on, at any depth of a header."""
    for element in header:
        if element.VR == "SQ":
            for item in element.value:
                yield from _referred(item)
        elif element.keyword in ("SeriesInstanceUID", "ReferencedSOPInstanceUID"):
            yield str(element.value)


def _header(instance: Instance, limits: Limits) -> Dataset | None:
    """The tags that describe an image; None for a file that is not DICOM."""
    with instance.open() as file:
        if file.read(132)[128:] != b"DICM":
            return None
        _check_deflated(instance, file, limits)
        file.seek(0)
        header = dcmread(file, stop_before_pixels=True, specific_tags=list(_TAGS))
    kind = header.file_meta.get("MediaStorageSOPClassUID")
    if kind is None or ("Rows" not in header and "Image Storage" in kind.name):
        # If it were skipped, the volume would lack its last slice.
        raise EOFError("it ends before its header does")
    return header


def parsing(instance: object) -> AbstractContextManager[None]:
    """Turn any failure to understand a file's bytes into a :class:`ScanError`."""
    damaged = (EOFError, zlib.error, zipfile.BadZipFile, OSError)
    return files.parsing(instance, BadFormat, cut_short=damaged, fix="send it again")


def _check_deflated(instance: Instance, file: BinaryIO, limits: Limits) -> None:
    """Raise :class:`TooLarge` before a compressed data set is unpacked to more than a scan can be."""
    file.seek(132)
    head = file.read(2**16)
    # The group's first element is its length: tag, VR, value length, value.
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
            raise TooLarge(
                f"'{instance}' unpacks to more than {limits.max_bytes // 2**22} MiB", fix="send it uncompressed"
            )


def _instances(path: Path, limits: Limits) -> Iterator[Instance]:
    if path.is_dir():
        count = 0
        for place, names in walk(path, links=False):
            for name in names:
                file = place / name
                if name == "DICOMDIR" or (file.exists() and not file.is_file()):  # reading a pipe would block
                    continue
                count += 1
                if count > _MOST_FILES:
                    raise TooLarge(f"'{path}' holds more than {_MOST_FILES} files", fix="give the folder of one study")
                yield Instance(file)
    elif path.suffix.lower() == ".zip":
        yield from _members(path, limits)
    else:
        yield from (Instance(file) for file in sorted(path.parent.iterdir()) if file.is_file())


class _Kept(io.FileIO):
    """A file shared by the instances in it: open as long as one refers to it, and closed with the last."""

    def __del__(self) -> None:
        self.close()


def _members(path: Path, limits: Limits) -> Iterator[Instance]:
    """The files in a zip, once checked that their names stay inside it and their sizes within the limits."""
    with parsing(path):
        open_file(path).close()  # only a regular file
        archive = zipfile.ZipFile(_Kept(path))
    entries = [entry for entry in archive.infolist() if not entry.is_dir()]
    size, packed = sum(entry.file_size for entry in entries), path.stat().st_size
    if len(entries) > _MOST_FILES or size > 2 * limits.max_bytes:
        raise TooLarge(f"'{path}' unpacks to more than {limits.max_bytes // 2**29} GiB", fix="pack one study")
    if size > max(_RATIO_FROM, _RATIO * packed):
        raise TooLarge(f"'{path}' unpacks to {size / packed:.0f} times its size: no scans do", fix="pack one study")
    if len({entry.filename for entry in entries}) < len(entries):
        raise BadFormat(f"'{path}' holds several files with the same name", fix="pack it again")
    for entry in entries:
        place = PurePosixPath(entry.filename.replace("\\", "/"))
        if place.is_absolute() or ".." in place.parts or re.match("[A-Za-z]:", entry.filename):
            raise BadPath(f"'{path}' holds '{entry.filename}', which points outside it", fix="pack it again")
        if stat.S_ISLNK(entry.external_attr >> 16):
            raise BadPath(f"'{path}' holds a link, '{entry.filename}'", fix="pack the files themselves")
        if not place.name.startswith(".") and place.name != "DICOMDIR":
            yield Instance(path, entry.filename, archive)
