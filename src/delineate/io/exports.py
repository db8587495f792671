"""A label in whatever format its reader wants, with a file beside it for what that format cannot hold."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from delineate.core.legend import PLAIN, Legend
from delineate.core.targets import Targets
from delineate.core.text import near, printable
from delineate.core.volume import LabelVolume
from delineate.errors import BadFormat
from delineate.io.files import writing_beside
from delineate.io.formats import FORMATS, check_writable, is_series, suffix_of, write_label
from delineate.io.suffixes import DICOM_SUFFIXES, NIFTI_SUFFIXES, SEGMENTATION_SUFFIX, STRUCTURES_SUFFIX

if TYPE_CHECKING:
    from delineate.io.dicom_seg import SegmentationKind


_LABEL_FORMATS = ("nii.gz", "mha", "nrrd", "seg.nrrd", "vtk", "vti", "dcm", "rtstruct.dcm")


def label_formats() -> list[str]:
    """Names of the formats that labels can be written in, including those from other packages."""
    return [*_LABEL_FORMATS, *(name for name, known in FORMATS.items() if known.write is not None)]


def check_label_format(name: str) -> None:
    """Raise :class:`BadFormat` where labels cannot be written in the format of this name."""
    if name not in label_formats():
        raise BadFormat(
            f"'{printable(name)}' is not a label format{near(name, label_formats())}",
            fix=f"choose from {', '.join(label_formats())}",
        )
    check_installed(f".{name}")


def check_installed(suffix: str) -> None:
    """Raise :class:`BadFormat` where the packages that write a format are not installed."""
    if not suffix.endswith(DICOM_SUFFIXES):
        return
    try:
        import delineate.io.dicom_seg  # noqa: F401 - whether it can be imported
    except ModuleNotFoundError as error:
        raise BadFormat(
            f"writing DICOM needs '{error.name}', which is missing", fix="pip install 'delineate[dicom]'"
        ) from error


def exported_files(path: Path) -> list[Path]:
    """The files that :func:`export_label` writes for ``path``, that one first."""
    beside = {".vtk": (".nii.gz", ".json"), ".vti": (".json",)}
    return [path, *(path.with_suffix(ending) for ending in beside.get(path.suffix.lower(), ()))]


def export_label(
    path: Path,
    label: LabelVolume,
    targets: Targets | None,
    *,
    source: Path | None = None,
    kind: SegmentationKind = "BINARY",
    about: Mapping[str, Any] | None = None,
    legend: Legend = PLAIN,
) -> list[Path]:
    """Write a label in the format of ``path``'s suffix; returns the files, that one first.

    Where ``source`` is the NIfTI scan that was segmented, a NIfTI label copies its header's geometry
    exactly. A ``.vtk`` comes with a ``.nii.gz`` of the same name, since legacy VTK has no directions,
    and ``.vtk`` and ``.vti`` with a ``.json``: the affine, the targets' values and volumes, and
    ``about``. A ``.dcm`` is a DICOM-SEG that refers to the series at ``source`` and says with
    ``legend`` what the targets are; a ``.rtstruct.dcm`` does so with contours, as an RT Structure Set.
    A ``.seg.nrrd`` names its segments, as 3D Slicer does, in several layers where they overlap. All three have colours,
    and NIfTI labels have names and colours in their headers. Without targets, a label is its values alone.

    Raises :class:`BadFormat` where the DICOM series is missing, or targets for a format that names them, and what
    writing raises.
    """
    check_writable(path, segments=True)
    suffix = path.suffix.lower()
    if suffix in DICOM_SUFFIXES:
        if source is None or not is_series(source):
            raise BadFormat(
                f"'{path}' would be DICOM that refers to a series", fix="give the DICOM series that it segments"
            )
        check_installed(suffix)
        from delineate.io.dicom_series import the_series

        masks, series = _Masks(_to_name(path, targets), label.voxels), the_series(source)
        if path.name.lower().endswith(STRUCTURES_SUFFIX):
            from delineate.io.rtstruct import write_structures

            write_structures(path, masks, label.grid, series, legend=legend)
        else:
            from delineate.io.dicom_seg import write_segmentation

            write_segmentation(path, masks, label.grid, series, kind=kind, legend=legend)
        return [path]
    if path.name.lower().endswith(SEGMENTATION_SUFFIX):
        from delineate.io.nrrd import write_segments

        targets = _to_name(path, targets)
        with writing_beside(path) as beside:
            values = {name: targets.written_value(name) for name in targets.names}
            write_segments(beside, _Masks(targets, label.voxels), values, label.grid, legend)
        return [path]
    written = exported_files(path)
    for file in written:
        if file.suffix == ".json":
            with writing_beside(file) as beside:
                beside.write_text(
                    json.dumps(sidecar_of(label, targets) | dict(about or {}), indent=2) + "\n", encoding="utf-8"
                )
        elif suffix_of(file) in NIFTI_SUFFIXES:
            from delineate.io.nifti_names import CODE, names_and_colours  # imports nibabel

            names = None if targets is None else (CODE, names_and_colours(targets, legend))
            write_label(file, label, like=source, extension=names)
        else:
            write_label(file, label, like=source)
    return written


@dataclass(frozen=True, eq=False)
class _Masks(Mapping[str, NDArray[np.bool_]]):
    """The masks of targets in a label, each made when it is asked for: those of many targets fill the memory."""

    targets: Targets
    voxels: NDArray

    def __getitem__(self, name: str) -> NDArray[np.bool_]:
        return self.targets.mask_of(name, self.voxels)

    def __iter__(self) -> Iterator[str]:
        return iter(self.targets.names)

    def __len__(self) -> int:
        return len(self.targets.names)


def _to_name(path: Path, targets: Targets | None) -> Targets:
    """The targets for a format that names them."""
    if targets is None:
        raise BadFormat(
            f"'{path}' would name what the label marks, but no targets are given",
            fix="name them (--targets 'liver=1,tumour=2'), or write .nii.gz",
        )
    return targets


def sidecar_of(label: LabelVolume, targets: Targets | None) -> dict[str, Any]:
    """What a label's format may not hold: its affine and shape, and the targets with their values and volumes."""
    voxel_ml = label.grid.voxel_ml
    masks: Mapping[str, NDArray[np.bool_]] = {} if targets is None else _Masks(targets, label.voxels)
    volumes = {name: int(np.count_nonzero(mask)) * voxel_ml for name, mask in masks.items()}
    return {
        "affine_ras_mm": label.grid.affine.tolist(),
        "shape": list(label.grid.shape),
        "targets": {} if targets is None else {name: list(values) for name, values in targets.values.items()},
        "volume_ml": volumes,
    }
