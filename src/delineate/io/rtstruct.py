"""DICOM RT Structure Sets: regions as closed contours on the slices of a series, as masks and back.

A voxel belongs to a structure if its centre lies inside the structure's contours. Those that share a slice are combined
by exclusive or, and each by the even–odd rule: a contour within another is a hole, and so is what a keyhole leads to.

What is written runs along the edges of voxels: every reader that goes by centres finds the same voxels again, and the
area of the contours is the voxels'. Holes are keyholes, which all readers understand: each is joined to what surrounds
it by a line along edges, there and back.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import datetime
from importlib.metadata import version
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ImplicitVRLittleEndian, RTStructureSetStorage, generate_uid

from delineate.core.grid import Grid
from delineate.core.legend import PLAIN, Legend
from delineate.core.text import near, printable
from delineate.errors import BadFormat, BadGeometry, GridMismatch, MissingFile, TooLarge, Truncated
from delineate.io.dicom import Frame, check_names, describe_series, frames_of
from delineate.io.dicom_series import Instance, Series, parsing
from delineate.io.files import Limits, writing_beside
from delineate.io.voxels import LPS_TO_RAS

_MOST_BYTES = 2**28
_MOST_ITEMS = 2**19  # of all sequences: each takes a kilobyte of memory, however little it holds
_MOST_TEXT = 2**22  # bytes of one contour
_MOST_CROSSINGS = 2**26  # of contours and lines of voxels
_ITEM_TAGS = (b"\xfe\xff\x00\xe0", b"\xff\xfe\xe0\x00")  # in either byte order
_CONTOUR_DATA = 0x30060050

_FLAT = 0.1
"""How many slices the points of a contour, or contours of one plane, may be apart: headers round them."""
_DECIMALS = 6  # of a voxel; so that rounding does not decide on which side of a contour a centre lies

_REGIONS = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")


def structure_names(source: Path | Instance) -> tuple[str, ...]:
    """Names of the structures in an RT Structure Set, in its order and each once. Raises as :func:`read_structures`."""
    with parsing(source):
        return tuple(dict.fromkeys(_numbered(_read(source, "StructureSetROISequence")).values()))


def referenced_series(source: Path | Instance) -> tuple[str, ...]:
    """UIDs of the series that a structure set says it was drawn on; none if it does not say.

    Raises as :func:`read_structures`.
    """
    with parsing(source):
        structures = _read(source, "ReferencedFrameOfReferenceSequence")
        found = [
            str(series.SeriesInstanceUID)
            for frame in structures.get("ReferencedFrameOfReferenceSequence") or []
            for study in frame.get("RTReferencedStudySequence") or []
            for series in study.get("RTReferencedSeriesSequence") or []
        ]
    return tuple(dict.fromkeys(found))


def read_structures(
    source: Path | Instance,
    grid: Grid,
    names: Collection[str] | None = None,
    limits: Limits = Limits(),  # noqa: B008 - frozen
) -> dict[str, NDArray[np.bool_]]:
    """Masks (X, Y, Z) of the structures with these names, or of all, on the grid of the scan that they were drawn on.

    Each slice shows the contours nearest to it that are no further away than half a slice. A centre on a contour
    counts on one of two opposite sides, so that regions side by side share no voxel and leave none out. Points have
    no volume, so a structure of points only is empty, as is one without contours.

    Raises :class:`BadFormat` for anything but a structure set, and for structures that are named twice or have an
    open contour; :class:`MissingFile` for names that it lacks; :class:`BadGeometry` for contours that are
    not parallel to the slices, or leave out every other one; :class:`GridMismatch` for contours off the grid;
    :class:`Truncated`; and :class:`TooLarge`.
    """
    with parsing(source):
        structures = _read(source, "StructureSetROISequence", "ROIContourSequence")
        numbered = _numbered(structures)
        wanted = list(dict.fromkeys(numbered.values() if names is None else names))
        for name in wanted:
            _check_name(source, name, list(numbered.values()))
        if len(wanted) * np.prod(grid.shape, dtype=np.int64) > limits.max_bytes:
            raise TooLarge(
                f"masks of {len(wanted)} structures on {grid} would take more than {limits.max_bytes / 2**30:g} GiB",
                fix="choose fewer structures by their names",
            )
        masks = {name: np.zeros(grid.shape, bool, order="F") for name in wanted}
        crossings = 0
        for drawn in structures.get("ROIContourSequence") or []:
            name = numbered.get(int(drawn.ReferencedROINumber), "")
            if name in masks:
                what = f"structure '{printable(name)}' of '{source}'"
                contours = [_grid_points(points, grid) for points in _contours(what, drawn)]
                crossings = _draw(what, contours, masks[name], crossings)
    return masks


def _read(source: Path | Instance, *keywords: str) -> Dataset:
    """The sequences of these names; nothing else is decoded."""
    instance = source if isinstance(source, Instance) else Instance(source)
    if instance.archive is None and not instance.path.is_file():
        raise MissingFile(f"'{instance}' is not a file", fix="check the name")
    with instance.open() as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES or sum(content.count(tag) for tag in _ITEM_TAGS) > _MOST_ITEMS:
        raise TooLarge(
            f"'{instance}' is larger than structure sets are ({_MOST_BYTES // 2**20} MiB, {_MOST_ITEMS:,} items)",
            fix="export fewer structures at once",
        )
    header = dcmread(BytesIO(content), specific_tags=["SOPClassUID"], stop_before_pixels=True)
    if header.get("SOPClassUID") != RTStructureSetStorage:
        raise BadFormat(f"'{instance}' is not a DICOM RT Structure Set", fix="give the RTSTRUCT file of the study")
    if header.file_meta.TransferSyntaxUID.is_deflated:  # what it unpacks to has not been counted
        raise BadFormat(f"'{instance}' is compressed as a whole", fix="export it uncompressed")
    return dcmread(BytesIO(content), specific_tags=list(keywords))


def _numbered(structures: Dataset) -> dict[int, str]:
    """Names of the structures by number."""
    found = structures.get("StructureSetROISequence") or []
    named = {int(one.ROINumber): str(one.get("ROIName") or f"structure {one.ROINumber}") for one in found}
    return {number: printable(name.strip()) for number, name in named.items()}


def _check_name(source: object, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise MissingFile(
            f"'{source}' has no structure '{printable(name)}'{near(name, known)}",
            fix=f"choose from {', '.join(map(printable, known))}",
        )
    if known.count(name) > 1:
        raise BadFormat(f"'{source}' has several structures called '{printable(name)}'", fix="give each its own name")


def _contours(what: str, drawn: Dataset) -> Iterator[NDArray[np.float64]]:
    """Points (n, 3) of each closed contour, in LPS millimetres."""
    for contour in drawn.get("ContourSequence") or []:
        kind = str(contour.ContourGeometricType)
        if kind == "POINT":
            continue
        if kind not in _REGIONS:
            raise BadFormat(f"{what} has a contour of type {kind}, which encloses nothing", fix="draw it closed")
        text = contour.get_item(_CONTOUR_DATA).value or b""
        if len(text) > _MOST_TEXT:
            raise TooLarge(f"{what} has a contour of more than {_MOST_TEXT // 2**20} MiB", fix="export it again")
        # Not as pydicom decodes it: an object of a few hundred bytes for each number.
        values = np.array([float(number) for number in text.strip(b" \0").split(b"\\") if number], dtype=np.float64)
        if len(values) % 3 or len(values) // 3 != int(contour.get("NumberOfContourPoints") or len(values) // 3):
            raise Truncated(
                f"{what} has a contour of {len(values)} coordinates for {contour.get('NumberOfContourPoints')} points",
                fix="export it again",
            )
        if not np.isfinite(values).all():
            raise BadGeometry(f"{what} has points that are not finite", fix="export it again")
        yield values.reshape(-1, 3)


def _grid_points(points: NDArray[np.float64], grid: Grid) -> NDArray[np.float64]:
    """Points (n, 3) in LPS millimetres as indices of voxels."""
    index = (points * LPS_TO_RAS - grid.affine[:3, 3]) @ np.linalg.inv(grid.affine[:3, :3]).T
    return np.round(index, _DECIMALS)


def _draw(what: str, contours: Sequence[NDArray[np.float64]], mask: NDArray[np.bool_], crossings: int) -> int:
    """Fill contours (points as indices) into a mask; how many crossings that took, added to those before."""
    contours = [points for points in contours if len(points) > 2]  # fewer enclose nothing
    if not contours:
        return crossings
    axis = next((axis for axis in (2, 1, 0) if max(np.ptp(c[:, axis]) for c in contours) <= _FLAT), None)
    if axis is None:
        raise BadGeometry(
            f"{what} has contours that are not parallel to the slices", fix="give the scan that it was drawn on"
        )
    others = [other for other in range(3) if other != axis]
    shape = (mask.shape[others[0]], mask.shape[others[1]])
    slices = np.moveaxis(mask, axis, 2)
    places = np.array([contour[:, axis].mean() for contour in contours])
    for contour, place in zip(contours, places, strict=True):
        ends = contour[:, others].min(axis=0), contour[:, others].max(axis=0)
        beside = (ends[1] < -0.5).any() or (ends[0] > np.array(shape) - 0.5).any()
        if beside or not -0.5 - _FLAT <= place <= mask.shape[axis] - 0.5 + _FLAT:
            raise GridMismatch(f"{what} has contours outside the scan", fix="give the scan that it was drawn on")
    for k, chosen in _by_slice(what, places, mask.shape[axis]).items():
        edges = [(contours[i][:, others], np.roll(contours[i][:, others], -1, axis=0)) for i in chosen]
        begin, end = (np.concatenate(ends) for ends in zip(*edges, strict=True))
        inside, count = _filled(what, begin, end, shape, _MOST_CROSSINGS - crossings)
        slices[:, :, k] |= inside
        crossings += count
    return crossings


def _by_slice(what: str, places: NDArray[np.float64], count: int) -> dict[int, list[int]]:
    """Which contours each slice shows: those of the plane nearest to it, of the planes at these places."""
    order = np.argsort(places, kind="stable")
    planes = np.split(order, np.flatnonzero(np.diff(places[order]) > _FLAT) + 1)
    heights = np.array([places[plane].mean() for plane in planes])
    if len(planes) > 2 and np.diff(heights).min() > 1.5:
        raise BadGeometry(
            f"{what} is drawn on no two neighbouring slices ({np.diff(heights).min():.3g} slices apart at least)",
            fix="interpolate it where it was drawn, or give the scan that it was drawn on",
        )
    shown: dict[int, list[int]] = {}
    distances: dict[int, float] = {}
    for plane, height in zip(planes, heights, strict=True):
        k = min(max(int(np.floor(height + 0.5)), 0), count - 1)
        if abs(height - k) < distances.get(k, np.inf):
            shown[k], distances[k] = plane.tolist(), float(abs(height - k))
    return shown


def _filled(
    what: str, begin: NDArray[np.float64], end: NDArray[np.float64], shape: tuple[int, int], most: int
) -> tuple[NDArray[np.bool_], int]:
    """What edges (n, 2) enclose of a plane of this shape, and how often they cross its lines of voxels.

    Along each line, every crossing changes from outside to inside, or back.
    """
    low, high = (np.clip(np.ceil(pick(begin[:, 1], end[:, 1])), 0, shape[1]) for pick in (np.minimum, np.maximum))
    first, counts = low.astype(np.int64), (high - low).astype(np.int64)
    total = int(counts.sum())
    if total > most:
        raise TooLarge(f"{what} has longer contours than structure sets have", fix="export fewer structures at once")
    edge = np.repeat(np.arange(len(counts)), counts)
    line = first[edge] + np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
    rise = np.where(counts > 0, end[:, 1] - begin[:, 1], 1)
    at = begin[edge, 0] + (line - begin[edge, 1]) * ((end[:, 0] - begin[:, 0]) / rise)[edge]
    crossed = np.clip(np.ceil(np.round(at, _DECIMALS)), 0, shape[0]).astype(np.int64)
    flips = np.bincount(crossed * shape[1] + line, minlength=(shape[0] + 1) * shape[1]).reshape(-1, shape[1])
    inside: NDArray[np.bool_] = np.cumsum(flips, axis=0)[:-1] % 2 == 1
    return inside, total


_COPIED = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID",
    "AccessionNumber", "ReferringPhysicianName",
)  # fmt: skip
"""What a structure set must say about its patient and study, if only that it is unknown."""

_STUDY_CLASS = "1.2.840.10008.3.1.2.3.1"  # retired with nothing in its place, but still required in references


def write_structures(
    path: Path, masks: Mapping[str, NDArray[np.bool_]], grid: Grid, source: Series, *, legend: Legend = PLAIN
) -> None:
    """Write masks (X, Y, Z) by target name as structures 1, 2, … on the slices of the series they were found in.

    :func:`read_structures` gives back the same masks. Overlaps are kept; an empty mask is a structure without
    contours. ``legend`` says what the targets are. Patient, study and frame of reference are the source's:
    docs/privacy.md lists the fields.

    Raises :class:`GridMismatch` where the masks are not on the series' grid, :class:`BadFormat` for headers that cannot
    be copied or a name beyond 64 characters, and :class:`OutputError`.
    """
    from delineate.io.dicom_seg import copying  # imports highdicom, which reading does not need

    series_grid, _ = describe_series(source)
    if not grid.matches(series_grid, 0.1):
        raise GridMismatch(
            f"the label is {grid}, the series '{source.description}' is {series_grid}", fix="predict on the series"
        )
    check_names(masks)
    frames = frames_of(source)
    with copying(source):
        whole = _header(source, frames)
        images = _images(frames)
        whole.ReferencedFrameOfReferenceSequence = [_referenced(whole, source, images)]
        whole.StructureSetROISequence, whole.ROIContourSequence, whole.RTROIObservationsSequence = [], [], []
        for number, (name, colour) in enumerate(legend.colours_of([*masks]).items(), start=1):
            structure, drawn, observed = Dataset(), Dataset(), Dataset()
            structure.ROINumber, structure.ROIName = number, name
            structure.ReferencedFrameOfReferenceUID = whole.FrameOfReferenceUID
            structure.ROIGenerationAlgorithm = "AUTOMATIC"
            drawn.ReferencedROINumber, drawn.ROIDisplayColor = number, list(colour)
            if contours := [*_contours_of(masks[name], grid, images)]:
                drawn.ContourSequence = contours
            observed.ObservationNumber = observed.ReferencedROINumber = number
            observed.RTROIInterpretedType = observed.ROIInterpreter = ""
            if name in legend.codes:
                what, code = legend.codes[name].type, Dataset()
                code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = what.value, what.scheme, what.meaning
                observed.RTROIIdentificationCodeSequence = [code]
            whole.StructureSetROISequence.append(structure)
            whole.ROIContourSequence.append(drawn)
            whole.RTROIObservationsSequence.append(observed)
        with writing_beside(path) as beside:
            whole.save_as(beside, enforce_file_format=True)


def _header(source: Series, frames: Sequence[Frame]) -> Dataset:
    """A structure set without its structures."""
    with frames[0].instance.open() as file:
        scan = dcmread(file, stop_before_pixels=True, specific_tags=[*_COPIED, "FrameOfReferenceUID"])
    whole, meta, now = Dataset(), FileMetaDataset(), datetime.now()
    # Lengths of values have 16 bits in explicit VR, too few for a long contour.
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ImplicitVRLittleEndian, RTStructureSetStorage
    meta.MediaStorageSOPInstanceUID = whole.SOPInstanceUID = generate_uid(prefix=None)
    whole.file_meta, whole.SpecificCharacterSet = meta, "ISO_IR 192"
    scan.decode()
    for keyword in _COPIED:
        if keyword in scan:
            whole[keyword] = scan[keyword]
        else:
            setattr(whole, keyword, "")
    whole.StudyInstanceUID, whole.FrameOfReferenceUID = source.study, scan.FrameOfReferenceUID
    whole.PositionReferenceIndicator = ""
    whole.SOPClassUID, whole.Modality = RTStructureSetStorage, "RTSTRUCT"
    whole.SeriesInstanceUID, whole.SeriesNumber = generate_uid(prefix=None), source.number + 2000
    whole.SeriesDescription, whole.OperatorsName, whole.InstanceNumber = "Delineate: not for diagnosis", "", 1
    whole.Manufacturer = whole.ManufacturerModelName = "Delineate"
    whole.SoftwareVersions = version("delineate")
    whole.StructureSetLabel, whole.ApprovalStatus = "DELINEATE", "UNAPPROVED"
    whole.StructureSetDate = whole.InstanceCreationDate = now.strftime("%Y%m%d")
    whole.StructureSetTime = whole.InstanceCreationTime = now.strftime("%H%M%S")
    return whole


def _images(frames: Sequence[Frame]) -> list[Dataset]:
    """References to the images of a series."""
    headers: dict[Instance, Dataset] = {}
    references = []
    for frame in frames:
        if frame.instance not in headers:
            with frame.instance.open() as file:
                tags = ["SOPClassUID", "SOPInstanceUID", "NumberOfFrames"]
                headers[frame.instance] = dcmread(file, stop_before_pixels=True, specific_tags=tags)
        header, image = headers[frame.instance], Dataset()
        image.ReferencedSOPClassUID, image.ReferencedSOPInstanceUID = header.SOPClassUID, header.SOPInstanceUID
        if "NumberOfFrames" in header:
            image.ReferencedFrameNumber = frame.index + 1
        references.append(image)
    return references


def _referenced(whole: Dataset, source: Series, images: Sequence[Dataset]) -> Dataset:
    """The frame of reference, in it the study, in it the series, and its images."""
    frame, study, series = Dataset(), Dataset(), Dataset()
    series.SeriesInstanceUID, series.ContourImageSequence = source.uid, list(images)
    study.ReferencedSOPClassUID, study.ReferencedSOPInstanceUID = _STUDY_CLASS, source.study
    study.RTReferencedSeriesSequence = [series]
    frame.FrameOfReferenceUID, frame.RTReferencedStudySequence = whole.FrameOfReferenceUID, [study]
    return frame


def _contours_of(mask: NDArray[np.bool_], grid: Grid, images: Sequence[Dataset]) -> Iterator[Dataset]:
    """Contours around the voxels of each slice."""
    for k in np.flatnonzero(mask.any(axis=(0, 1))).tolist():
        for outline in outlines(mask[:, :, k]):
            points = grid.world(np.column_stack([outline, np.full(len(outline), float(k))])) * LPS_TO_RAS
            contour = Dataset()
            contour.ContourImageSequence = [images[k]]
            contour.ContourGeometricType, contour.NumberOfContourPoints = "CLOSED_PLANAR", len(points)
            contour.ContourData = [f"{value:.4f}" for value in points.ravel()]
            yield contour


def outlines(plane: NDArray[np.bool_]) -> list[NDArray[np.float64]]:
    """Closed polygons (n, 2) along the edges of a plane's pixels, in pixels: one around each piece, holes as keyholes.

    Pixels that touch only at a corner are pieces of their own. A piece lies to the left of its polygon.
    """
    loops = _loops(plane)
    on = {vertex: number for number, loop in enumerate(loops) for vertex in loop}
    firsts = [min(loop) for loop in loops]
    holes = [number for number, loop in enumerate(loops) if _doubled_area(loop) < 0]
    # From each hole's first vertex a line leads to the next loop to the left, the piece's outline or a hole that is
    # further left. The holes on the right come first, so that they are whole when another takes them in.
    for number in sorted(holes, key=lambda number: firsts[number], reverse=True):
        x, y = firsts[number]
        left = next((i, y) for i in range(x - 1, -1, -1) if (i, y) in on)
        around, hole = loops[on[left]], loops[number]
        begin, at = hole.index((x, y)), around.index(left)
        around[at:at] = [left, *hole[begin:], *hole[:begin], (x, y)]
    return [_straightened(loop) - 0.5 for number, loop in enumerate(loops) if number not in set(holes)]


Vertex = tuple[int, int]
_STEPS: tuple[Vertex, ...] = ((1, 0), (0, 1), (-1, 0), (0, -1))  # each to the left of the one before


def _loops(plane: NDArray[np.bool_]) -> list[list[Vertex]]:
    """Closed walks along the borders between inside, on the left, and outside; vertex (0, 0) is the first corner.

    At a corner where four borders meet, they turn left and so stay with one pixel.
    """
    padded = np.pad(plane, 1)
    inside, outside = padded[1:-1, 1:-1], ~padded
    ahead = np.zeros((4, plane.shape[0] + 1, plane.shape[1] + 1), bool)  # whether a border leaves a vertex that way
    ahead[0, :-1, :-1] = inside & outside[1:-1, :-2]
    ahead[1, 1:, :-1] = inside & outside[2:, 1:-1]
    ahead[2, 1:, 1:] = inside & outside[1:-1, 2:]
    ahead[3, :-1, 1:] = inside & outside[:-2, 1:-1]
    borders = {(int(d), int(i), int(j)) for d, i, j in np.argwhere(ahead)}
    loops = []
    for first in sorted(borders):
        loop: list[Vertex] = []
        way, i, j = first
        while (way, i, j) in borders:
            borders.remove((way, i, j))
            loop.append((i, j))
            i, j = i + _STEPS[way][0], j + _STEPS[way][1]
            way = next((turn % 4 for turn in (way + 1, way, way - 1) if (turn % 4, i, j) in borders), way)
        if loop:
            loops.append(loop)
    return loops


def _doubled_area(loop: Sequence[Vertex]) -> int:
    """Positive for a loop with its inside on the left all around, negative for a hole."""
    return sum(a[0] * b[1] - b[0] * a[1] for a, b in zip(loop, [*loop[1:], loop[0]], strict=True))


def _straightened(loop: Sequence[Vertex]) -> NDArray[np.float64]:
    """A loop's vertices without those on a straight way."""
    points = np.array(loop, dtype=np.float64)
    before, after = np.sign(points - np.roll(points, 1, axis=0)), np.sign(np.roll(points, -1, axis=0) - points)
    return points[(before != after).any(axis=1)]
