"""DICOM RT Structure Sets: regions as closed contours on the slices of a series, as masks and back.

A voxel belongs to a structure if its centre lies inside the structure's contours. Those that share a slice are combined
by exclusive or, and each by the even–odd rule: a contour within another is a hole, and so is what a keyhole leads to.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset, dcmread
from pydicom.uid import RTStructureSetStorage

from delineate.core.grid import Grid
from delineate.core.text import near, printable
from delineate.errors import BadFormat, BadGeometry, GridMismatch, MissingFile, TooLarge, Truncated
from delineate.io.dicom_series import Instance, parsing
from delineate.io.files import Limits
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
                contours = [grid_points(points, grid) for points in _contours(what, drawn)]
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
    return {int(one.ROINumber): str(one.get("ROIName") or f"structure {one.ROINumber}").strip() for one in found}


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


def grid_points(points: NDArray[np.float64], grid: Grid) -> NDArray[np.float64]:
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
