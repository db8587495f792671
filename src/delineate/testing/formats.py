"""What every file format promises: what is written reads back exactly, and damaged files are refused."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from itertools import permutations, product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from delineate.core.grid import Affine, Grid
from delineate.core.volume import LabelVolume, Volume
from delineate.errors import ScanError, TooLarge
from delineate.io.files import Limits
from delineate.io.formats import (
    FORMATS,
    Format,
    read_header,
    read_label,
    read_volume,
    suffix_of,
    write_label,
    write_volume,
)
from delineate.testing.laws import Law, hold, require

SHAPE = (4, 5, 3)
SPACING_MM = (0.7, 1.3, 5.1)
DTYPES = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4")
LABELS = (((0, 1), "u1"), ((0, 255), "u1"), ((0, 256), "u2"), ((-1, 1), "i1"), ((-1, 200), "i2"), ((0, 70000), "u4"))


def check_format(format: Format, *, skip: Iterable[str] = ()) -> None:
    """Hold a format that is read and written to :data:`FORMAT_LAWS`, in a temporary folder."""
    require(
        FORMATS.get(format.suffix[1:]) is format,
        f"format '{format.suffix}' is not found; install its package, whose entry point is named "
        f"'{format.suffix[1:]}', or name its module in DELINEATE_PLUGINS",
    )
    with tempfile.TemporaryDirectory() as folder:
        hold(f"format '{format.suffix}'", FORMAT_LAWS, tuple(skip), format.suffix, Path(folder))


def affines(*, oblique: bool, bits: int = 32) -> Iterator[Affine]:
    """All 48 orientations of an anisotropic grid, along the world's axes or rotated."""
    for order, signs in product(permutations(range(3)), product((1, -1), repeat=3)):
        axes = np.zeros((3, 3))
        axes[list(order), range(3)] = signs
        affine = np.eye(4)
        affine[:3, :3] = (turned() if oblique else np.eye(3)) @ axes * SPACING_MM
        affine[:3, 3] = (-91.7, 126.3, -71.9)
        yield affine.astype(np.float32).astype(np.float64) if bits == 32 else affine


def turned() -> Affine:
    """A rotation about an arbitrary axis (Rodrigues)."""
    x, y, z = np.array([2.0, -1.0, 0.5]) / np.linalg.norm([2.0, -1.0, 0.5])
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    rotation: Affine = np.eye(3) + np.sin(0.4) * cross + (1 - np.cos(0.4)) * cross @ cross
    return rotation


def numbered(channels: int = 1, dtype: str = "int16") -> NDArray:
    """Voxels (C, X, Y, Z) that all differ, so that no swapped or mirrored axis goes unseen."""
    return np.arange(channels * np.prod(SHAPE)).astype(dtype).reshape(channels, *SHAPE)


def volume(affine: Affine | None = None) -> Volume:
    return Volume(numbered(), Grid(SHAPE, next(affines(oblique=False)) if affine is None else affine))


def the_suffix_is_known(suffix: str, folder: Path) -> None:
    for name in ("scan", "SCAN", "a.b"):
        found = suffix_of(Path(name + suffix))
        require(found == suffix, f"{name}{suffix} is read as '{found}'")


def what_is_written_reads_back_exactly(suffix: str, folder: Path) -> None:
    path = folder / f"scan{suffix}"
    sheared = np.array([[-1, 0.25, 0, 7], [0, 2, 0.5, 8], [0, 0, 3, 9], [0, 0, 0, 1.0]])
    for affine in (*affines(oblique=False), *affines(oblique=True), sheared):
        write_volume(path, volume(affine))
        back = read_volume(path)
        require(
            np.array_equal(back.grid.affine, affine),
            f"the affine {affine.tolist()} reads back as {back.grid.affine.tolist()}",
        )
        require(np.array_equal(back.voxels, numbered()), "voxels differ, or are in another order")
        require(back.voxels.dtype == np.int16, f"int16 voxels read back as {back.voxels.dtype}")


def types_and_channels_are_kept(suffix: str, folder: Path) -> None:
    path = folder / f"scan{suffix}"
    for channels, dtype in product((1, 3), DTYPES):
        written = Volume(numbered(channels, dtype), volume().grid)
        write_volume(path, written)
        header, back = read_header(path), read_volume(path)
        require(np.array_equal(back.voxels, written.voxels), f"{channels} channels of {dtype} read back differently")
        found = (back.voxels.dtype, header.dtype, header.channels)
        expected = (np.dtype(dtype), np.dtype(dtype), channels)
        require(found == expected, f"type of voxels, type in the header and channels are {found}, not {expected}")
        require(header.grid.matches(back.grid, tolerance_mm=0), "the header's grid is not the volume's")
        require(back.voxels.flags.writeable, "voxels cannot be written to")


def labels_take_the_smallest_type(suffix: str, folder: Path) -> None:
    path = folder / f"label{suffix}"
    for values, dtype in LABELS:
        voxels = np.full(SHAPE, values[0], dtype=np.int64)
        voxels[1, 2, 0] = values[1]
        write_label(path, LabelVolume(voxels, volume().grid))
        back = read_label(path)
        require(np.array_equal(back.voxels, voxels), f"a label of {values} reads back differently")
        found = (back.voxels.dtype, read_header(path).dtype)
        require(found == (np.dtype(dtype),) * 2, f"a label of {values} is {found}, not {dtype}")


def a_file_cut_short_anywhere_is_refused(suffix: str, folder: Path) -> None:
    path = folder / f"scan{suffix}"
    write_volume(path, volume())
    data = path.read_bytes()
    for length in [*range(0, len(data), 17), len(data) - 1]:
        path.write_bytes(data[:length])
        for read in (read_header, read_volume, read_label):
            try:
                read(path)
            except ScanError:
                continue
            raise AssertionError(f"{read.__name__} accepts the first {length} of {len(data)} bytes")


def sizes_are_limited(suffix: str, folder: Path) -> None:
    path = folder / f"scan{suffix}"
    write_volume(path, volume())
    fitting = Limits(max_axis=max(SHAPE), max_bytes=numbered().nbytes)
    require(read_volume(path, limits=fitting).channels == 1, "a scan within the limits is not read")
    for limits in (Limits(max_axis=max(SHAPE) - 1), Limits(max_bytes=numbered().nbytes - 1)):
        for read in (read_volume, read_label, read_header):
            try:
                read(path, limits=limits)
            except TooLarge:
                continue
            raise AssertionError(f"{read.__name__} accepts a scan beyond {limits}")


FORMAT_LAWS: tuple[Law, ...] = (
    the_suffix_is_known,
    what_is_written_reads_back_exactly,
    types_and_channels_are_kept,
    labels_take_the_smallest_type,
    a_file_cut_short_anywhere_is_refused,
    sizes_are_limited,
)
