"""What every format promises: what is written reads back exactly, and what is broken is refused."""

from __future__ import annotations

import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from hypothesis import given, settings
from hypothesis import strategies as st

from delineate.core.grid import Affine, Grid
from delineate.core.volume import LabelVolume, Volume
from delineate.errors import DelineateError, OutputError, ScanError, TooLarge, Truncated
from delineate.io.files import Limits
from delineate.io.formats import SUFFIXES, read_header, read_label, read_volume, write_label, write_volume

SHAPE = (4, 5, 3)
SPACING_MM = (0.7, 1.3, 5.1)
every_format = pytest.mark.parametrize("suffix", SUFFIXES)


def affines(*, oblique: bool, bits: int = 32) -> Iterator[Affine]:
    """All 48 orientations of an anisotropic grid, along the world's axes or turned against them."""
    for order, signs in product(permutations(range(3)), product((1, -1), repeat=3)):
        axes = np.zeros((3, 3))
        axes[list(order), range(3)] = signs
        affine = np.eye(4)
        affine[:3, :3] = (turned() if oblique else np.eye(3)) @ axes * SPACING_MM
        affine[:3, 3] = (-91.7, 126.3, -71.9)
        yield affine.astype(np.float32).astype(np.float64) if bits == 32 else affine


def turned() -> Affine:
    """A rotation about no axis in particular (Rodrigues)."""
    x, y, z = np.array([2.0, -1.0, 0.5]) / np.linalg.norm([2.0, -1.0, 0.5])
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(0.4) * cross + (1 - np.cos(0.4)) * cross @ cross


def numbered(channels: int = 1, dtype: str = "int16") -> np.ndarray:
    """Voxels (C, X, Y, Z) that all differ, so that no swapped or mirrored axis goes unseen."""
    return np.arange(channels * np.prod(SHAPE)).astype(dtype).reshape(channels, *SHAPE)


def volume(affine: Affine | None = None) -> Volume:
    return Volume(numbered(), Grid(SHAPE, next(affines(oblique=False)) if affine is None else affine))


@contextmanager
def full_disk(free: int) -> Iterator[None]:
    """No file may grow beyond ``free`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@every_format
@pytest.mark.parametrize("oblique", [False, True])
def test_what_is_written_reads_back_exactly(suffix: str, oblique: bool, tmp_path: Path) -> None:
    path = tmp_path / f"scan{suffix}"
    for affine in affines(oblique=oblique):
        write_volume(path, volume(affine))
        back = read_volume(path)
        assert np.array_equal(back.grid.affine, affine)
        assert np.array_equal(back.voxels, numbered())
        assert back.voxels.dtype == np.int16


@every_format
def test_affines_of_64_bits_read_back_exactly_where_the_format_has_them(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"scan{suffix}"
    for affine in affines(oblique=True, bits=64):
        write_volume(path, volume(affine))
        back = read_volume(path)
        if suffix.startswith(".nii"):
            assert back.grid.matches(Grid(SHAPE, affine), tolerance_mm=1e-4)
        else:
            assert np.array_equal(back.grid.affine, affine)


@every_format
@pytest.mark.parametrize("oblique", [False, True])
def test_another_reader_finds_every_voxel_at_the_same_millimetres(suffix: str, oblique: bool, tmp_path: Path) -> None:
    path, marker = tmp_path / f"scan{suffix}", (3, 1, 2)
    for affine in affines(oblique=oblique):
        write_volume(path, volume(affine))
        image = SimpleITK.ReadImage(str(path))
        assert image[marker] == numbered()[0][marker]
        world_ras = np.array(image.TransformIndexToPhysicalPoint(marker)) * (-1, -1, 1)
        np.testing.assert_allclose(world_ras, (affine @ [*marker, 1])[:3], atol=1e-4)


@every_format
def test_a_sheared_grid_reads_back_exactly(suffix: str, tmp_path: Path) -> None:
    affine = np.array([[-1, 0.25, 0, 7], [0, 2, 0.5, 8], [0, 0, 3, 9], [0, 0, 0, 1.0]])
    write_volume(tmp_path / f"scan{suffix}", volume(affine))
    assert np.array_equal(read_volume(tmp_path / f"scan{suffix}").grid.affine, affine)


@every_format
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4"])
def test_types_and_channels_are_kept(suffix: str, channels: int, dtype: str, tmp_path: Path) -> None:
    path = tmp_path / f"scan{suffix}"
    written = Volume(numbered(channels, dtype), volume().grid)
    write_volume(path, written)
    header, back = read_header(path), read_volume(path)
    assert np.array_equal(back.voxels, written.voxels)
    assert back.voxels.dtype == header.dtype == np.dtype(dtype)
    assert header.channels == channels
    assert header.grid.matches(back.grid, tolerance_mm=0)
    assert back.voxels.flags.writeable


@every_format
def test_memory_order_and_byte_order_change_no_byte_of_the_file(suffix: str, tmp_path: Path) -> None:
    orders = [numbered(), np.asfortranarray(numbered()), numbered().astype(">i2"), numbered()[:, ::-1][:, ::-1]]
    for i, voxels in enumerate(orders):
        write_volume(tmp_path / f"{i}{suffix}", Volume(voxels, volume().grid))
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


@every_format
@pytest.mark.parametrize(
    ("values", "dtype"),
    [((0, 1), "u1"), ((0, 255), "u1"), ((0, 256), "u2"), ((-1, 1), "i1"), ((-1, 200), "i2"), ((0, 70000), "u4")],
)
def test_labels_take_the_smallest_type(suffix: str, values: tuple[int, int], dtype: str, tmp_path: Path) -> None:
    path = tmp_path / f"label{suffix}"
    voxels = np.full(SHAPE, values[0], dtype=np.int64)
    voxels[1, 2, 0] = values[1]
    write_label(path, LabelVolume(voxels, volume().grid))
    back = read_label(path)
    assert np.array_equal(back.voxels, voxels)
    assert back.voxels.dtype == read_header(path).dtype == np.dtype(dtype)


@every_format
def test_a_file_cut_short_anywhere_is_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"scan{suffix}"
    write_volume(path, volume())
    data = path.read_bytes()
    for length in [*range(0, len(data), 17), len(data) - 1]:
        path.write_bytes(data[:length])
        for read in (read_header, read_volume, read_label):
            with pytest.raises(ScanError):
                read(path)
    with pytest.raises(Truncated):
        read_volume(path)  # the last: all but one byte


@every_format
def test_bytes_after_the_voxels_are_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"scan{suffix}"
    write_volume(path, volume())
    with path.open("ab") as file:
        file.write(b"more")
    with pytest.raises(Truncated):
        read_volume(path)


@every_format
def test_sizes_are_limited_by_what_the_header_says(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"scan{suffix}"
    write_volume(path, volume())
    fitting = Limits(max_axis=max(SHAPE), max_bytes=numbered().nbytes)
    assert read_volume(path, limits=fitting).channels == 1
    for limits in (Limits(max_axis=max(SHAPE) - 1), Limits(max_bytes=numbered().nbytes - 1)):
        for read in (read_volume, read_label):
            with pytest.raises(TooLarge):
                read(path, limits=limits)
        with pytest.raises(TooLarge):
            read_header(path, limits)


@every_format
def test_a_full_disk_leaves_the_old_file_and_nothing_else(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"scan{suffix}"
    write_volume(path, volume())
    before = path.read_bytes()
    noise = np.random.default_rng(7).integers(0, 2**15, (1, 64, 64, 64)).astype(np.int16)
    with full_disk(free=100_000), pytest.raises(OutputError, match="too large"):
        write_volume(path, Volume(noise, Grid.of_spacing(noise.shape[1:])))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@every_format
@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_damage_is_harmless_or_refused_by_name(suffix: str, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"scan{suffix}"
        write_volume(path, volume())
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(content)
        for read in (read_header, read_volume, read_label):
            with suppress(DelineateError):
                read(path)
