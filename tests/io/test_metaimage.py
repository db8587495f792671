"""MetaImage, read as SimpleITK does, and refused where it should have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK

from delineate.errors import BadFormat, BadGeometry, BadPath, BadShape, MissingFile, TooLarge, Truncated
from delineate.io.formats import read_header, read_volume

VOXELS = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)
LPS_TO_RAS = np.diag([-1, -1, 1, 1])


def image(voxels: np.ndarray = VOXELS) -> SimpleITK.Image:
    """An oblique image, by SimpleITK."""
    made = SimpleITK.GetImageFromArray(voxels.T)
    made.SetSpacing((0.7, 1.3, 5.1))
    made.SetOrigin((-91.7, 126.3, -71.9))
    made.SetDirection(SimpleITK.VersorTransform((1, 2, -0.5), 0.4).GetMatrix())
    return made


def affine_of(made: SimpleITK.Image) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(made.GetDirection(), (3, 3)) * made.GetSpacing()
    affine[:3, 3] = made.GetOrigin()
    return LPS_TO_RAS @ affine


def save(folder: Path, data: bytes = VOXELS.tobytes(order="F"), **changed: str | None) -> Path:
    """A header by hand, with fields changed, or left out if None."""
    fields = {
        "ObjectType": "Image",
        "NDims": "3",
        "BinaryData": "True",
        "TransformMatrix": "1 0 0 0 1 0 0 0 1",
        "Offset": "1 2 3",
        "ElementSpacing": "0.5 0.5 3",
        "DimSize": "4 5 6",
        "ElementType": "MET_SHORT",
        "ElementDataFile": "LOCAL",
    } | changed
    fields["ElementDataFile"] = fields.pop("ElementDataFile")  # ends the header
    text = "".join(f"{key} = {value}\n" for key, value in fields.items() if value is not None)
    path = folder / "scan.mha"
    path.write_bytes(text.encode() + data)
    return path


@pytest.mark.parametrize("name", ["scan.mha", "scan.mhd"])
@pytest.mark.parametrize("compressed", [False, True])
def test_images_of_simpleitk_are_read_as_it_reads_them(name: str, compressed: bool, tmp_path: Path) -> None:
    SimpleITK.WriteImage(image(), tmp_path / name, compressed)
    scan = read_volume(tmp_path / name)
    assert np.array_equal(scan.voxels[0], VOXELS)
    np.testing.assert_allclose(scan.grid.affine, affine_of(image()), rtol=1e-15)
    assert read_header(tmp_path / name).grid.matches(scan.grid, tolerance_mm=0)


def test_channels_within_voxels_or_as_fourth_axis(tmp_path: Path) -> None:
    stack = np.stack([VOXELS, -VOXELS, VOXELS + 7])  # (C, X, Y, Z)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(stack.T, isVector=True), tmp_path / "inside.mha")
    last = SimpleITK.GetImageFromArray(np.moveaxis(stack, 0, -1).T, isVector=False)
    SimpleITK.WriteImage(last, tmp_path / "last.mha")
    for name in ("inside.mha", "last.mha"):
        assert np.array_equal(read_volume(tmp_path / name).voxels, stack)


def test_defaults_synonyms_and_line_ends(tmp_path: Path) -> None:
    path = save(tmp_path, TransformMatrix=None, Offset=None, Position="1 2 3", ElementSize="9 9 9")
    assert np.array_equal(
        read_volume(path).grid.affine, LPS_TO_RAS @ [[0.5, 0, 0, 1], [0, 0.5, 0, 2], [0, 0, 3, 3], [0, 0, 0, 1]]
    )
    header, _, data = path.read_bytes().partition(b"LOCAL\n")
    path.write_bytes(header.replace(b"\n", b"\r\n") + b"Local\r\n" + data)
    assert np.array_equal(read_volume(path).voxels[0], VOXELS)


def test_big_endian_voxels(tmp_path: Path) -> None:
    path = save(tmp_path, VOXELS.astype(">i2").tobytes(order="F"), BinaryDataByteOrderMSB="True")
    assert np.array_equal(read_volume(path).voxels[0], VOXELS)


@pytest.mark.parametrize("name", ["/etc/passwd", "../scan.raw", "raw/scan.raw"])
def test_a_data_file_outside_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(BadPath):
        read_header(save(tmp_path, ElementDataFile=name))


def test_a_data_file_that_is_missing_or_short_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, ElementDataFile="scan.raw")
    with pytest.raises(MissingFile):
        read_header(path)
    (tmp_path / "scan.raw").write_bytes(VOXELS.tobytes()[:-2])
    for read in (read_header, read_volume):
        with pytest.raises(Truncated):
            read(path)


def test_compressed_voxels_cut_short_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "scan.mha"
    SimpleITK.WriteImage(image(), path, True)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(Truncated):
        read_volume(path)


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("DimSize", "30000 30000 30000", TooLarge),
        ("DimSize", "4 5 0", BadShape),
        ("DimSize", "4 5", BadShape),
        ("DimSize", "4 5 six", BadFormat),
        ("DimSize", None, BadFormat),
        ("DimSize", "4 5 7", Truncated),
        ("ElementNumberOfChannels", "0", BadShape),
        ("ElementNumberOfChannels", "2", Truncated),
        ("ElementNumberOfChannels", "1000000000", TooLarge),
        ("Position", "7 8 9", BadFormat),  # another Offset
        ("ElementSpacing", None, BadGeometry),
        ("ElementSpacing", "0.5 0.5 0", BadGeometry),
        ("ElementSpacing", "0.5 0.5 nan", BadGeometry),
        ("ElementSpacing", "0.5 0.5", BadFormat),
        ("TransformMatrix", "1 0 0 1 0 0 0 0 1", BadGeometry),
        ("TransformMatrix", "1 0 0 1", BadFormat),
        ("Offset", "inf 0 0", BadGeometry),
        ("ElementType", "MET_STRING", BadFormat),
        ("ElementType", None, BadFormat),
        ("BinaryData", "False", BadFormat),
        ("HeaderSize", "128", BadFormat),
        ("ElementDataFile", "LIST", BadFormat),
        ("ElementDataFile", None, BadFormat),
    ],
)
def test_fields_that_make_no_scan_are_refused(
    field: str, value: str | None, error: type[Exception], tmp_path: Path
) -> None:
    with pytest.raises(error):
        read_header(save(tmp_path, **{field: value}))
