"""DICOM-SEG: labels as segments that refer to the series they were drawn on, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import highdicom
import numpy as np
from highdicom.sr import CodedConcept
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.sr.codedict import codes as concepts
from pydicom.uid import ExplicitVRLittleEndian

from delineate.core.grid import Grid, Shape3, permute_axes
from delineate.core.legend import PLAIN, RGB, Code, Coding, Legend
from delineate.core.text import printable
from delineate.core.volume import LabelVolume
from delineate.core.warning_filters import filtered_warnings
from delineate.errors import BadFormat, BadGeometry, BadLabelValue, GridMismatch, RecipeError
from delineate.io.dicom import check_names, check_size, describe_series, frames_of
from delineate.io.dicom_series import Instance, Series, parsing
from delineate.io.files import Limits, writing_beside
from delineate.io.voxels import LPS_TO_RAS, check_grid

SegmentationKind = Literal["BINARY", "LABELMAP"]

REGION = Coding(Code("309825002", "SCT", "Spatial and Relational Concept"), Code("111099", "DCM", "Selected region"))
"""The code for a target that nobody coded: some region. The segment's label is still the target's name."""


UTF_8 = "ISO_IR 192"

_STRAY = 0.1
"""How many slices the last plane of a segmentation may lie off the slice that it is taken for."""
_MOST_GAP = 1.5
"""How many times their thickness slices side by side may be apart."""

_MAY_BE_EMPTY = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID",
    "AccessionNumber", "ReferringPhysicianName",
)  # fmt: skip
"""What every image must say about its patient and study, if only that it is unknown; some leave it out."""


@contextmanager
def copying(source: object) -> Iterator[None]:
    """Guard copying header fields into what is made from a scan: the library's errors may quote the patient.

    So does its warning about an unusual name.
    """
    try:
        with filtered_warnings("ignore", "The string .* person name"):
            yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadFormat(
            f"in the headers of {source}, fields that a result has to copy are missing or garbled "
            f"({type(error).__name__})",
            fix="export the series again, or choose another --format",
        ) from error


def write_segmentation(
    path: Path,
    masks: Mapping[str, NDArray[np.bool_]],
    grid: Grid,
    source: Series,
    *,
    kind: SegmentationKind = "BINARY",
    legend: Legend = PLAIN,
) -> None:
    """Write masks (X, Y, Z) by target name as segments 1, 2, … that refer to the series they were found in.

    ``legend`` says what the targets are; one without a code is a :data:`REGION`, whatever its name.
    Empty frames are kept, so that every reader finds as many slices as the source has. A ``LABELMAP``
    holds one value per voxel, so its targets must not overlap.

    Patient, study and frame of reference are the source's, with everything that its headers say about
    them: docs/privacy.md lists the fields.
    Raises :class:`GridMismatch` where the masks are not on the series' grid, :class:`BadFormat` for headers that cannot
    be copied or a name beyond 64 characters, :class:`RecipeError` for overlapping masks in a label map, and
    :class:`OutputError`.
    """
    series_grid, _ = describe_series(source)
    if not grid.matches(series_grid, 0.1):
        raise GridMismatch(
            f"the label is {grid}, the series '{source.description}' is {series_grid}", fix="predict on the series"
        )
    check_names(masks)
    pixels = _joined(masks, grid.shape)
    if pixels is None and kind == "LABELMAP":
        raise RecipeError("targets overlap, which a label map cannot hold", fix="write them as BINARY segments")
    if pixels is None:
        pixels = _stacked(masks, grid.shape)
    frames = frames_of(source)
    instances = list(dict.fromkeys(frame.instance for frame in frames))
    headers = []
    for instance in instances:
        with instance.open() as file:
            headers.append(dcmread(file, stop_before_pixels=True))
    for header in headers:
        for keyword in _MAY_BE_EMPTY:
            if keyword not in header:
                setattr(header, keyword, None)
    positions = [
        highdicom.PlanePositionSequence(
            coordinate_system=highdicom.CoordinateSystemNames.PATIENT, image_position=frame.position.tolist()
        )
        for frame in frames
    ]
    measures = highdicom.PixelMeasuresSequence(
        pixel_spacing=frames[0].spacing_mm[::-1],
        slice_thickness=grid.spacing_mm[2],
        spacing_between_slices=grid.spacing_mm[2],
    )
    with copying(source):
        segmentation = highdicom.seg.Segmentation(
            source_images=headers,
            pixel_array=pixels,
            segmentation_type=kind,
            segment_descriptions=[
                _description(number, name, legend.codes.get(name, REGION), colour)
                for number, (name, colour) in enumerate(legend.colours_of([*masks]).items(), start=1)
            ],
            series_instance_uid=highdicom.UID(),
            series_number=source.number + 1000,
            sop_instance_uid=highdicom.UID(),
            instance_number=1,
            manufacturer="Delineate",
            manufacturer_model_name="Delineate",
            software_versions=version("delineate"),
            device_serial_number=version("delineate"),  # required; the closest thing that a program has
            plane_positions=positions,
            pixel_measures=measures,
            omit_empty_frames=False,
            transfer_syntax_uid=ExplicitVRLittleEndian,
            content_label="SEGMENTATION",
            specific_character_set=UTF_8,  # targets may have any names, whatever the scanner writes
            series_description="Delineate: not for diagnosis",
        )
    with writing_beside(path) as beside:
        segmentation.save_as(beside, enforce_file_format=True)


def _joined(masks: Mapping[str, NDArray[np.bool_]], shape: Shape3) -> NDArray | None:
    """Planes (slice, row, column) of segment numbers, which take less memory than a mask each; None for overlaps."""
    pixels = np.zeros(shape[::-1], np.min_scalar_type(len(masks)))
    for number, name in enumerate(masks, start=1):
        inside = masks[name].transpose(2, 1, 0)
        if pixels[inside].any():
            return None
        pixels[inside] = number
    return pixels


def _stacked(masks: Mapping[str, NDArray[np.bool_]], shape: Shape3) -> NDArray:
    """Planes (slice, row, column, segment) of masks, of which one is held at a time; segments lie apart in memory."""
    pixels = np.empty((len(masks), *shape[::-1]), np.uint8)
    for k, name in enumerate(masks):
        pixels[k] = masks[name].transpose(2, 1, 0)
    return np.moveaxis(pixels, 0, -1)


def read_segmentation(instance: Instance, limits: Limits = Limits()) -> LabelVolume:  # noqa: B008 - frozen
    """A label of segment numbers (X, Y, Z) on the grid of its frames; the higher number where segments overlap.

    Raises :class:`BadFormat` for anything but a segmentation, :class:`TooLarge` and :class:`BadGeometry`.
    """
    with parsing(instance):
        segmentation = _opened(instance, limits)
        volume = segmentation.get_volume(combine_segments=True, relabel=False, skip_overlap_checks=True)
        voxels, grid = _placed(instance, segmentation, volume.array, volume.affine, None, limits)
    return LabelVolume(np.asfortranarray(voxels), grid)


def segments(instance: Instance) -> dict[int, str]:
    """The labels of a segmentation's segments by number; raises :class:`BadFormat` for anything else."""
    with parsing(instance):
        with instance.open() as file:
            header = dcmread(file, stop_before_pixels=True)
        numbered = {int(one.SegmentNumber): str(one.SegmentLabel) for one in header.SegmentSequence}
    # A label map may describe its background, too.
    return {number: printable(name.strip()) for number, name in numbered.items() if number > 0}


def read_masks(
    instance: Instance,
    numbers: Sequence[int],
    scan: Grid | None = None,
    limits: Limits = Limits(),  # noqa: B008 - frozen
) -> Iterator[tuple[NDArray[np.bool_], Grid]]:
    """The masks (X, Y, Z) of these segments, one at a time, whatever they overlap with; all on one grid.

    ``scan`` is the grid that they were drawn on, if known. It says how far apart slices are where the segmentation
    does not, which may have left out empty ones.

    Raises as :func:`read_segmentation` does, and :class:`BadLabelValue` for a share of a voxel.
    """
    with parsing(instance):
        segmentation = _opened(instance, limits)
    for number in numbers:
        with parsing(instance):
            volume = segmentation.get_volume(segment_numbers=[number], combine_segments=False)
            voxels, grid = _placed(instance, segmentation, volume.array[..., 0], volume.affine, scan, limits)
        mask = voxels != 0
        if not (voxels[mask] == 1).all():
            raise BadLabelValue(f"'{instance}' holds shares of voxels", fix="export it as a binary segmentation")
        yield np.asfortranarray(mask), grid


def _opened(instance: Instance, limits: Limits) -> highdicom.seg.Segmentation:
    """A segmentation whose size was checked."""
    with instance.open() as file:
        segmentation = highdicom.seg.segread(file)
    # As many slices as fit between the first and the last, however few of them have frames. Where the frames form no
    # volume, making one says why.
    if (geometry := segmentation.get_volume_geometry(allow_missing_positions=True)) is not None:
        slices, rows, columns = geometry.spatial_shape
        check_size(f"'{instance}'", (columns, rows, slices), limits)
    return segmentation


def _placed(
    instance: Instance,
    segmentation: highdicom.seg.Segmentation,
    planes: NDArray,
    lps: NDArray,
    scan: Grid | None,
    limits: Limits,
) -> tuple[NDArray, Grid]:
    """Voxels (X, Y, Z) and their grid from highdicom's planes (slice, row, column) in LPS millimetres."""
    affine = np.eye(4)
    affine[:3] = LPS_TO_RAS[:, None] * lps[:3][:, [2, 1, 0, 3]]
    voxels = planes.transpose(2, 1, 0)
    x, y, z = voxels.shape
    occupied = Grid((x, y, z), affine)
    apart_mm, slice_mm = occupied.spacing_mm[2], _slice_mm(instance, segmentation, occupied, scan)
    every = max(1, round(apart_mm / slice_mm)) if z > 1 else 1
    # Where planes lie between the slices of the scan, their grid stays as it is, and does not match.
    if abs(apart_mm - every * slice_mm) * (z - 1) < _STRAY * slice_mm:
        affine[:3, 2] *= slice_mm / apart_mm
        if every > 1:
            z = every * (z - 1) + 1
            check_size(f"'{instance}'", (x, y, z), limits)
            sparse, voxels = voxels, np.zeros((x, y, z), voxels.dtype, order="F")
            voxels[:, :, ::every] = sparse
    grid = check_grid(instance.path, (x, y, z), affine + 0.0)
    # Slices in the order in which a series is read: along the normal to their rows and columns.
    backwards = np.linalg.det(affine[:3, :3]) < 0
    order, flip = (0, 1, 2), (False, False, bool(backwards))
    return permute_axes(voxels, order, flip), grid.permute(order, flip)


def _slice_mm(instance: Instance, segmentation: highdicom.seg.Segmentation, occupied: Grid, scan: Grid | None) -> float:
    """How far apart slices are, of which the ``occupied`` ones may be only every third, or a single one.

    Raises :class:`BadGeometry` where nothing tells.
    """
    apart_mm, single = occupied.spacing_mm[2], occupied.shape[2] == 1
    if _said_mm(segmentation, "SpacingBetweenSlices"):
        return apart_mm  # of which it is a multiple
    if scan is not None and np.allclose(occupied.affine[:3, :2], scan.affine[:3, :2], atol=1e-4):
        return scan.spacing_mm[2]
    thickness_mm = _said_mm(segmentation, "SliceThickness")
    if single and thickness_mm:
        return thickness_mm
    if single or 0 < _MOST_GAP * thickness_mm < apart_mm:
        raise BadGeometry(
            f"'{instance}' marks no two slices side by side, and does not say how far apart slices are",
            fix="export it with SpacingBetweenSlices, or with its empty slices; in a data set, its scan says it",
        )
    return apart_mm


def _said_mm(segmentation: highdicom.seg.Segmentation, keyword: str) -> float:
    """A length that all frames share; 0 where they do not say it."""
    shared = segmentation.get("SharedFunctionalGroupsSequence") or []
    each = segmentation.get("PerFrameFunctionalGroupsSequence") or []
    measures = (one for group in (*shared[:1], *each[:1]) for one in group.get("PixelMeasuresSequence") or [])
    return next((abs(float(value)) for one in measures if (value := one.get(keyword))), 0.0)


def _description(number: int, name: str, coding: Coding, colour: RGB) -> highdicom.seg.SegmentDescription:
    return highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=name,
        segmented_property_category=CodedConcept(*astuple(coding.category)),
        segmented_property_type=CodedConcept(*astuple(coding.type)),
        display_color=highdicom.color.CIELabColor.from_rgb(*colour),
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name="Delineate", version=version("delineate"), family=concepts.cid7162.ArtificialIntelligence
        ),
    )
