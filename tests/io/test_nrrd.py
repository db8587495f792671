"""NRRD, read as SimpleITK does, and refused where it should have."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import SimpleITK

from delineate.errors import BadFormat, BadGeometry, BadPath, BadShape, MissingFile, TooLarge, Truncated
from delineate.io.formats import read_header, read_volume

VOXELS = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)


def save(path: Path, data: bytes = VOXELS.tobytes(order="F"), **changed: str | None) -> Path:
    """A header by hand, with fields changed, or left out if None."""
    fields = {
        "type": "short",
        "dimension": "3",
        "space": "left-posterior-superior",
        "sizes": "4 5 6",
        "space directions": "(0.5,0,0) (0,0.5,0) (0,0,3)",
        "endian": "little",
        "encoding": "raw",
        "space origin": "(1,2,3)",
    } | {key.replace("_", " "): value for key, value in changed.items()}
    text = "".join(f"{key}: {value}\n" for key, value in fields.items() if value is not None)
    path.write_bytes(b"NRRD0005\n# a comment: of no meaning\nmodality:=MR\n" + text.encode() + b"\n" + data)
    return path


def origin_and_axes(path: Path) -> np.ndarray:
    """The affine, RAS, as SimpleITK understands the file."""
    made = SimpleITK.ReadImage(path)
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(made.GetDirection(), (3, 3)) * made.GetSpacing()
    affine[:3, 3] = made.GetOrigin()
    return np.diag([-1, -1, 1, 1]) @ affine


@pytest.mark.parametrize("name", ["scan.nrrd", "scan.nhdr"])
@pytest.mark.parametrize("compressed", [False, True])
def test_images_of_simpleitk_are_read_as_it_reads_them(name: str, compressed: bool, tmp_path: Path) -> None:
    image = SimpleITK.GetImageFromArray(VOXELS.T)
    image.SetSpacing((0.7, 1.3, 5.1))
    image.SetOrigin((-91.7, 126.3, -71.9))
    image.SetDirection(SimpleITK.VersorTransform((1, 2, -0.5), 0.4).GetMatrix())
    SimpleITK.WriteImage(image, tmp_path / name, compressed)
    scan = read_volume(tmp_path / name)
    assert np.array_equal(scan.voxels[0], VOXELS)
    np.testing.assert_allclose(scan.grid.affine, origin_and_axes(tmp_path / name), rtol=1e-14)
    assert read_header(tmp_path / name).grid.matches(scan.grid, tolerance_mm=0)


@pytest.mark.parametrize("space", ["left-posterior-superior", "LPS", "right-anterior-superior", "RAS", "LAS"])
def test_every_space_is_turned_to_ras(space: str, tmp_path: Path) -> None:
    path = save(tmp_path / "scan.nrrd", space=space)
    assert np.array_equal(read_volume(path).grid.affine, origin_and_axes(path))


def test_channels_before_or_after_the_voxel_axes(tmp_path: Path) -> None:
    stack = np.stack([VOXELS, -VOXELS, VOXELS + 7])  # (C, X, Y, Z)
    first = save(
        tmp_path / "first.nrrd",
        stack.tobytes(order="F"),
        sizes="3 4 5 6",
        space_directions="none (0.5,0,0) (0,0.5,0) (0,0,3)",
    )
    last = save(
        tmp_path / "last.nrrd",
        np.moveaxis(stack, 0, -1).tobytes(order="F"),
        sizes="4 5 6 3",
        space_directions="(0.5,0,0) (0,0.5,0) (0,0,3) none",
    )
    for path in (first, last):
        assert np.array_equal(read_volume(path).voxels, stack)


def test_big_endian_voxels(tmp_path: Path) -> None:
    path = save(tmp_path / "scan.nrrd", VOXELS.astype(">i2").tobytes(order="F"), endian="big")
    assert np.array_equal(read_volume(path).voxels[0], VOXELS)


def test_detached_voxels_beside_the_header(tmp_path: Path) -> None:
    path = save(tmp_path / "scan.nhdr", b"", data_file="scan.raw.gz", encoding="gzip")
    with pytest.raises(MissingFile):
        read_header(path)
    data = VOXELS.tobytes(order="F")
    (tmp_path / "scan.raw.gz").write_bytes(gzip.compress(data))
    assert np.array_equal(read_volume(path).voxels[0], VOXELS)
    (tmp_path / "scan.raw.gz").write_bytes(gzip.compress(data[:-2]))
    for read in (read_header, read_volume):
        with pytest.raises(Truncated):
            read(path)


def test_a_field_given_twice_is_refused_if_it_differs(tmp_path: Path) -> None:
    path = save(tmp_path / "scan.nrrd")
    content = path.read_bytes()
    for again, allowed in ((b"sizes: 4 5 6\n", True), (b"sizes: 5 4 6\n", False)):
        path.write_bytes(content.replace(b"sizes: 4 5 6\n", b"sizes: 4 5 6\n" + again))
        if allowed:
            assert read_header(path).grid.shape == (4, 5, 6)
        else:
            with pytest.raises(BadFormat, match="twice"):
                read_header(path)


@pytest.mark.parametrize("name", ["/etc/passwd", "../scan.raw", "raw/scan.raw"])
def test_a_data_file_outside_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(BadPath):
        read_header(save(tmp_path / "scan.nhdr", data_file=name))


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("sizes", "30000 30000 30000", TooLarge),
        ("sizes", "4 5 0", BadShape),
        ("sizes", "4 5", BadShape),
        ("sizes", "4 5 six", BadFormat),
        ("sizes", None, BadShape),
        ("sizes", "4 5 7", Truncated),
        ("space", None, BadGeometry),
        ("space", "scanner-xyz", BadGeometry),
        ("space_directions", None, BadGeometry),
        ("space_directions", "(0.5,0,0) (0,0.5,0)", BadGeometry),
        ("space_directions", "(0.5,0,0) (0,0.5,0) (0,0,0)", BadGeometry),
        ("space_directions", "(0.5,0,0) (0,0.5,0) (0,0,nan)", BadGeometry),
        ("space_directions", "(0.5,0,0) (0,0.5,0) (0,0,a)", BadGeometry),
        ("space_directions", "(0.5,0,0) (0,0.5,0) none", BadShape),
        ("space_origin", None, BadGeometry),
        ("space_units", '"m" "m" "m"', BadGeometry),
        ("type", "block", BadFormat),
        ("endian", None, BadFormat),
        ("encoding", "hex", BadFormat),
        ("byte_skip", "-1", BadFormat),
        ("data_file", "LIST", BadFormat),
    ],
)
def test_fields_that_make_no_scan_are_refused(
    field: str, value: str | None, error: type[Exception], tmp_path: Path
) -> None:
    with pytest.raises(error):
        read_header(save(tmp_path / "scan.nrrd", **{field: value}))
