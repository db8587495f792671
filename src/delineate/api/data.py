"""Scans, labels and data sets: opened, read, written and inspected."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Literal, overload

from delineate.api.progress import Cancel, Progress, check, counting
from delineate.core.subject import Subject
from delineate.core.volume import LabelVolume, Volume
from delineate.datasets.dataset import load_label, load_scan, read_numbered
from delineate.datasets.layouts import open_dataset
from delineate.io.formats import read_volume, write_label, write_volume

if TYPE_CHECKING:
    from delineate.core.targets import Targets
    from delineate.datasets.dataset import Dataset
    from delineate.datasets.inspection import Inspection
    from delineate.interop import Image

__all__ = ["as_dataset", "inspect", "open_dataset", "read", "simulate", "write"]


@overload
def read(path: str | Path | Subject, *, label: Literal[False] = False) -> Volume: ...
@overload
def read(path: str | Path | Subject, *, label: Literal[True], targets: Targets | None = None) -> LabelVolume: ...
def read(path: str | Path | Subject, *, label: bool = False, targets: Targets | None = None) -> Volume | LabelVolume:
    """Read a scan, or a ``label``, in any known format: NIfTI, MetaImage, NRRD, DICOM, or a picture.

    >>> import delineate
    >>> scan = delineate.read("scan.nii.gz")
    >>> scan.grid
    16 × 16 × 12 voxels of 1 × 1 × 1.5 mm, RAS
    >>> scan.voxels.shape  # channels first
    (1, 16, 16, 12)
    >>> delineate.read("reference.nii.gz", label=True).voxels.dtype
    dtype('uint8')

    All channels of a subject are read as one volume. A label that is a mask for each target, or a file of named
    segments, becomes one label with the values of ``targets``. Raises a subclass of
    :class:`~delineate.errors.ScanError` that names the cause, or :class:`~delineate.errors.MissingFile`.
    """
    if isinstance(path, Subject):
        return load_label(path, targets, None) if label else load_scan(path)
    return read_numbered(Path(path), targets, str(path)) if label else read_volume(Path(path))


def write(path: str | Path, volume: Volume | LabelVolume | Image) -> None:
    """Write a scan or a label on its own grid, in the format of the suffix; an existing file is overwritten.

    >>> import delineate
    >>> scan = delineate.read("scan.nii.gz")
    >>> delineate.write("scan.nrrd", scan)
    >>> delineate.read("scan.nrrd").grid.matches(scan.grid)
    True

    Images of nibabel, SimpleITK and TorchIO are written as scans. Either the whole file is written, or nothing and
    :class:`~delineate.errors.OutputError` is raised.
    """
    if isinstance(volume, LabelVolume):
        write_label(Path(path), volume)
        return
    from delineate.interop import volume_of

    write_volume(Path(path), volume_of(volume))


def inspect(
    data: str | Path | Dataset,
    *,
    targets: Targets | None = None,
    for_training: bool = True,
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> Inspection:
    """Read every subject of a data set (or its folder) and report what it holds and everything wrong with it.

    >>> import delineate
    >>> inspection = delineate.inspect("scans")
    >>> len(inspection.rows), inspection.errors
    (4, ())
    >>> inspection.rows[0].spacing_mm
    (1.0, 1.0, 1.5)

    A bad subject raises nothing but is listed in ``problems``. ``targets`` replace the data set's own. With
    ``for_training``, a missing label is an error. A notebook shows the result as a table. Setting ``cancel`` raises
    :class:`~delineate.errors.Cancelled`.
    """
    from delineate.datasets.inspection import inspect as run

    check(cancel)
    return run(
        as_dataset(data),
        targets=targets,
        for_training=for_training,
        progress=counting("inspecting", progress, cancel),
    )


def simulate(
    kind: str,
    out: str | Path,
    patients: int = 20,
    *,
    layout: str | None = None,
    seed: int = 0,
    sites: Collection[str] | None = None,
    coarse: float = 1.0,
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> Dataset:
    """Simulate patients whose truth is known, write them to the new folder ``out``, and open it as a data set.

    >>> import delineate
    >>> dataset = delineate.simulate("abdomen", "simulated", patients=2)
    >>> dataset.layout, dataset.targets.names, len(dataset.subjects)
    ('msd', ('liver', 'tumour'), 2)

    ``kind`` is abdomen, liver, liver-tumour, liver-ct, liver-fat, liver-fat-fraction, ct-slice-liver,
    ct-slice-abdomen, ct-slice-thigh, brain-tumour, white-matter or prostate; ``layout`` is its challenge's, unless
    another is named. Patient i depends on ``kind``, ``seed`` and i alone. With ``sites``, patients who are imaged
    elsewhere are left out. ``coarse`` divides the number of voxels along each axis over the same field of view.

    Raises :class:`~delineate.errors.RecipeError` for an unknown kind or site, a factor that is not from 1 to 16, or
    a layout that cannot hold the kind, and
    :class:`~delineate.errors.OutputError` where ``out`` holds anything else. Setting ``cancel`` raises
    :class:`~delineate.errors.Cancelled`.
    """
    from delineate.datasets.phantoms.writing import write_phantoms

    check(cancel)
    return write_phantoms(
        Path(out),
        patients,
        kind,
        seed=seed,
        layout=layout,
        sites=sites,
        coarse=coarse,
        progress=counting("simulating", progress, cancel),
    )


def as_dataset(data: str | Path | Dataset) -> Dataset:
    """A data set, opened first if a folder is given."""
    return open_dataset(data) if isinstance(data, str | Path) else data
