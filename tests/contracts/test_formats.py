"""Every format keeps the laws of ``delineate.testing``; Delineate's own keep more."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from hypothesis import given, settings
from hypothesis import strategies as st

from delineate.core.grid import Grid
from delineate.core.volume import Volume
from delineate.errors import DelineateError, OutputError, Truncated
from delineate.io.formats import read_header, read_label, read_volume, write_volume
from delineate.io.suffixes import SUFFIXES
from delineate.testing.formats import FORMAT_LAWS, SHAPE, affines, numbered, volume
from delineate.testing.laws import Law

every_format = pytest.mark.parametrize("suffix", SUFFIXES)


@every_format
@pytest.mark.parametrize("law", FORMAT_LAWS, ids=lambda law: law.__name__)
def test_it_keeps(law: Law, suffix: str, tmp_path: Path) -> None:
    law(suffix, tmp_path)


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
def test_memory_order_and_byte_order_change_no_byte_of_the_file(suffix: str, tmp_path: Path) -> None:
    orders = [numbered(), np.asfortranarray(numbered()), numbered().astype(">i2"), numbered()[:, ::-1][:, ::-1]]
    for i, voxels in enumerate(orders):
        write_volume(tmp_path / f"{i}{suffix}", Volume(voxels, volume().grid))
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


@every_format
def test_a_file_without_its_last_byte_is_truncated(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"scan{suffix}"
    write_volume(path, volume())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Truncated):
        read_volume(path)


@every_format
def test_bytes_after_the_voxels_are_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"scan{suffix}"
    write_volume(path, volume())
    with path.open("ab") as file:
        file.write(b"more")
    with pytest.raises(Truncated):
        read_volume(path)


@every_format
def test_a_full_disk_leaves_the_old_file_and_nothing_else(
    suffix: str, tmp_path: Path, no_file_beyond: Callable[[int], AbstractContextManager[None]]
) -> None:
    path = tmp_path / f"scan{suffix}"
    write_volume(path, volume())
    before = path.read_bytes()
    noise = np.random.default_rng(7).integers(0, 2**15, (1, 64, 64, 64)).astype(np.int16)
    with no_file_beyond(100_000), pytest.raises(OutputError, match="too large"):
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
