"""Bytes come into memory complete, bounded by the header, or not at all."""

from __future__ import annotations

import gzip
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest

from delineate.core.grid import Grid
from delineate.errors import BadFormat, BadGeometry, BadPath, BadShape, MissingFile, TooLarge, Truncated
from delineate.io.files import Limits
from delineate.io.voxels import (
    Encoding,
    Stored,
    check_complete,
    check_grid,
    check_shape,
    check_spacing,
    read_voxels,
    sibling,
)

HERE = Path("scan")
VOXELS = np.arange(2 * 3 * 4, dtype=np.int16).reshape(2, 3, 4)
BYTES = VOXELS.tobytes(order="F")
ENCODE = {"raw": bytes, "gzip": gzip.compress, "zlib": zlib.compress}
every_encoding = pytest.mark.parametrize("encoding", ENCODE)


def stored(path: Path, content: bytes, encoding: Encoding, **more: int) -> Stored:
    path.write_bytes(content)
    return Stored(path, Grid.of_spacing(VOXELS.shape), 1, np.dtype("<i2"), encoding=encoding, **more)


@every_encoding
def test_voxels_come_as_they_were(encoding: Encoding, tmp_path: Path) -> None:
    content = b"text" + ENCODE[encoding](b"skipped" + BYTES)
    scan = stored(tmp_path / "scan", content, encoding, start=4, skip=7)
    check_complete(scan)
    voxels = read_voxels(scan)
    assert np.array_equal(voxels[0], VOXELS)
    assert voxels.flags.aligned  # although the bytes were not


@every_encoding
@pytest.mark.parametrize("change", [-1, 1])
def test_one_byte_less_or_more_is_refused(encoding: Encoding, change: int, tmp_path: Path) -> None:
    scan = stored(tmp_path / "scan", ENCODE[encoding](BYTES[:-1] if change < 0 else BYTES + b"\0"), encoding)
    with pytest.raises(Truncated, match="header promises"):
        read_voxels(scan)
    if encoding != "zlib":
        with pytest.raises(Truncated):
            check_complete(scan)


@pytest.mark.parametrize("encoding", ["gzip", "zlib"])
def test_a_checksum_that_fails_or_does_not_end_the_stream_is_refused(encoding: Encoding, tmp_path: Path) -> None:
    content = ENCODE[encoding](BYTES)
    checksum = -8 if encoding == "gzip" else -4
    flipped = bytearray(content)
    flipped[checksum] ^= 1
    for damaged in (flipped, content[:checksum], content[:-1], content + b"more"):
        with pytest.raises(Truncated):
            read_voxels(stored(tmp_path / "scan", bytes(damaged), encoding))


def test_gzip_of_several_members_is_one_stream(tmp_path: Path) -> None:
    """As bgzip and parallel compressors write; the size at the end is only the last member's."""
    scan = stored(tmp_path / "scan", gzip.compress(BYTES[:10]) + gzip.compress(BYTES[10:]), "gzip")
    check_complete(scan)
    assert np.array_equal(read_voxels(scan)[0], VOXELS)


@pytest.mark.parametrize("encoding", ["gzip", "zlib"])
def test_a_bomb_takes_no_more_memory_than_its_header_says(encoding: Encoding, tmp_path: Path) -> None:
    bomb = stored(tmp_path / "bomb", ENCODE[encoding](bytes(64 * 2**20)), encoding)
    tracemalloc.start()
    try:
        with pytest.raises(Truncated, match="more than the 48 bytes"):
            read_voxels(bomb)
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20  # of 64
    finally:
        tracemalloc.stop()


def test_what_is_no_gzip_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadFormat, match="not gzip"):
        read_voxels(stored(tmp_path / "scan", BYTES, "gzip"))


@pytest.mark.parametrize("code", ["u1", "i1", "<i2", ">i2", "<u4", ">i4", "<f4", ">f4", "<f8", ">f8"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_every_byte_order_and_channel_order(code: str, interleaved: bool, tmp_path: Path) -> None:
    channels = np.stack([VOXELS, 100 - VOXELS])  # (C, X, Y, Z)
    in_file = channels if interleaved else np.moveaxis(channels, 0, -1)
    path = tmp_path / "scan"
    path.write_bytes(in_file.astype(code).tobytes(order="F"))
    scan = Stored(path, Grid.of_spacing(VOXELS.shape), 2, np.dtype(code), interleaved=interleaved)
    voxels = read_voxels(scan)
    assert np.array_equal(voxels, channels)
    assert voxels.dtype == scan.read_dtype
    assert voxels.dtype.isnative
    assert voxels.dtype.kind != "f" or voxels.dtype == np.float32


@pytest.mark.parametrize("code", ["u1", "i2", "i4", "f4", "f8"])
def test_scaling_is_exact_to_float32(code: str, tmp_path: Path) -> None:
    values = (VOXELS * 5.0).astype(code)
    if code == "i4":
        values *= 2**24 + 1  # more digits than float32 has
    path = tmp_path / "scan"
    path.write_bytes(values.tobytes(order="F"))
    # The intercept nearly cancels the largest value, whose rounding would show.
    slope = 0.3
    inter = -slope * float(values.max()) + 1e-3
    scan = Stored(path, Grid.of_spacing(VOXELS.shape), 1, np.dtype(code), slope=slope, inter=inter)
    voxels = read_voxels(scan)
    assert np.array_equal(voxels[0], (values.astype(np.float64) * slope + inter).astype(np.float32))
    assert voxels.dtype == scan.read_dtype == np.float32


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((5, 6, 7), ((5, 6, 7), 1)),
        ((5, 6, 7, 1, 1), ((5, 6, 7), 1)),
        ((5, 6, 7, 4), ((5, 6, 7), 4)),
        ((5, 6, 7, 4, 1, 1, 1), ((5, 6, 7), 4)),
    ],
)
def test_a_fourth_axis_is_channels_and_ones_are_nothing(shape: tuple[int, ...], expected: object) -> None:
    assert check_shape(HERE, shape, 2, Limits()) == expected


@pytest.mark.parametrize("shape", [(0, 6, 7), (5, 6, 0), (5, 6, 7, 0), (5, -6, 7), (5, 6, 7, 1, 3), (5, 6, 7, 2, 2)])
def test_empty_and_surplus_axes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(BadShape):
        check_shape(HERE, shape, 2, Limits())


@pytest.mark.parametrize("shape", [(30000, 30000, 30000), (4097, 1, 1), (1024, 1024, 1024), (512, 512, 512, 9)])
def test_sizes_beyond_the_limits_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(TooLarge, match="crop the scan"):
        check_shape(HERE, shape, 4, Limits())


def test_long_scans_are_within_the_limits() -> None:
    assert check_shape(HERE, (512, 512, 1100), 2, Limits()) == ((512, 512, 1100), 1)
    assert check_shape(HERE, (512, 512, 4096), 2, Limits()) == ((512, 512, 4096), 1)
    with pytest.raises(TooLarge):
        check_shape(HERE, (512, 512, 4096), 4, Limits())


@pytest.mark.parametrize("spacing", [0, -1, 0.009, 101, np.nan, np.inf])
def test_a_spacing_that_no_scanner_has_is_refused(spacing: float) -> None:
    check_spacing(HERE, (0.01, 1, 100))
    with pytest.raises(BadGeometry, match="spacing"):
        check_spacing(HERE, (1, 1, spacing))


def test_geometry_without_volume_or_number_is_refused() -> None:
    flat = np.eye(4)
    flat[:3, 2] = flat[:3, 1]
    nowhere = np.eye(4)
    nowhere[0, 3] = np.nan
    for affine in (flat, nowhere, np.diag([0.0, 0, 0, 1])):
        with pytest.raises(BadGeometry):
            check_grid(HERE, (5, 6, 7), affine)


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../scan.raw", "folder/scan.raw", "..", ".", "", "C:\\scan.raw", "..\\scan.raw", "a\0b"]
)
def test_only_plain_names_beside_the_header_are_followed(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for file in (tmp_path / "scan.raw", tmp_path / "folder" / "scan.raw"):
        file.write_bytes(b"")
    assert sibling(tmp_path / "folder" / "scan.mhd", "scan.raw") == tmp_path / "folder" / "scan.raw"
    with pytest.raises(BadPath):
        sibling(tmp_path / "folder" / "scan.mhd", name)


def test_a_data_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match=r"scan\.raw"):
        sibling(tmp_path / "scan.mhd", "scan.raw")
