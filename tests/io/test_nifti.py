"""NIfTI: what its header can say wrongly, and affines that read back bit for bit."""

from __future__ import annotations

import gzip
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header

from delineate.core.grid import Grid
from delineate.core.targets import Targets
from delineate.core.volume import LabelVolume
from delineate.errors import AmbiguousOrientation, BadFormat, BadGeometry, BadShape, TooLarge, Truncated
from delineate.io.exports import export_label
from delineate.io.formats import read_header, read_label, read_volume, write_label, write_volume

VOXELS = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)
AFFINE = np.array([[-0.75, 0, 0, 90], [0, 0, 1.5, -126], [0, 2.0, 0, -72], [0, 0, 0, 1]])


def header_of(kind: type[Nifti1Header] = Nifti1Header, shape: tuple[int, ...] = VOXELS.shape) -> Nifti1Header:
    header = kind()
    header.set_data_dtype(VOXELS.dtype)
    header.set_data_shape(shape)
    header.set_sform(AFFINE, 1)
    header.set_qform(AFFINE, 1)
    header["vox_offset"] = header.single_vox_offset
    return header


def save(path: Path, header: Nifti1Header, data: bytes = VOXELS.tobytes(order="F")) -> Path:
    """The header byte for byte, without the mends that libraries make."""
    content = header.binaryblock + bytes(4) + data
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.fixture(params=[".nii", ".nii.gz"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / f"scan{request.param}"


@pytest.mark.parametrize("kind", [Nifti1Header, Nifti2Header])
@pytest.mark.parametrize("endianness", ["<", ">"])
def test_both_versions_and_byte_orders(kind: type[Nifti1Header], endianness: str, path: Path) -> None:
    data = VOXELS.astype(f"{endianness}i2").tobytes(order="F")
    scan = read_volume(save(path, header_of(kind).as_byteswapped(endianness), data))
    assert np.array_equal(scan.voxels[0], VOXELS)
    assert np.array_equal(scan.grid.affine, AFFINE)
    assert scan.voxels.dtype == np.int16


@pytest.mark.parametrize("value", [np.nan, np.inf, 0, -1, 1000])
@pytest.mark.parametrize("axis", [1, 3])
def test_a_pixdim_that_is_no_spacing_is_refused(value: float, axis: int, path: Path) -> None:
    header = header_of()
    header["pixdim"][axis] = value
    with pytest.raises(BadGeometry, match="spacing"):
        read_header(save(path, header))


@pytest.mark.parametrize("rows", [np.full((4, 4), np.nan), np.zeros((4, 4)), np.ones((4, 4))])
def test_a_sform_that_is_nan_zero_or_flat_is_refused(rows: np.ndarray, path: Path) -> None:
    header = header_of()
    header.set_sform(rows, 1)
    with pytest.raises(BadGeometry):
        read_volume(save(path, header))


@pytest.mark.parametrize(
    ("field", "value"), [("quatern_b", np.nan), ("quatern_b", np.inf), ("quatern_b", 1.5), ("qoffset_x", np.nan)]
)
def test_a_qform_that_is_no_rotation_is_refused(field: str, value: float, path: Path) -> None:
    header = header_of()
    header["sform_code"] = 0
    header[field] = value
    with pytest.raises(BadGeometry):
        read_header(save(path, header))


@pytest.mark.parametrize(("field", "value"), [("sform_code", 9), ("qform_code", -1), ("xyzt_units", 1)])
def test_codes_and_units_that_mean_something_else_are_refused(field: str, value: int, path: Path) -> None:
    header = header_of()
    header[field] = value
    with pytest.raises(BadGeometry):
        read_header(save(path, header))


def test_qform_against_sform_is_refused_until_one_is_chosen(path: Path) -> None:
    mirrored = AFFINE * [[-1], [1], [1], [1]]
    header = header_of()
    header.set_qform(mirrored, 1)
    save(path, header)
    for read in (read_header, read_volume, read_label):
        with pytest.raises(AmbiguousOrientation, match="--orientation sform"):
            read(path)
        assert read(path, orientation="sform").grid.orientation == "LSA"
        assert read(path, orientation="qform").grid.orientation == "RSA"


@pytest.mark.parametrize(("shift_mm", "refused"), [(0.009, False), (0.011, True)])
def test_qform_and_sform_may_differ_by_a_hundredth_of_a_millimetre(shift_mm: float, refused: bool, path: Path) -> None:
    header = header_of()
    header["qoffset_x"] = 90 + shift_mm
    save(path, header)
    if refused:
        with pytest.raises(AmbiguousOrientation):
            read_volume(path)
    else:
        assert np.array_equal(read_volume(path).grid.affine, AFFINE)


@pytest.mark.parametrize("without", ["sform_code", "qform_code"])
def test_a_transform_without_code_is_not_looked_at(without: str, path: Path) -> None:
    header = header_of()
    header["srow_x" if without == "sform_code" else "quatern_d"] = np.nan
    header[without] = 0
    for orientation in ("refuse", "sform", "qform"):
        assert np.allclose(read_volume(save(path, header), orientation=orientation).grid.affine, AFFINE, atol=1e-5)


def test_without_codes_the_spacing_alone_places_the_scan(path: Path) -> None:
    header = header_of()
    header["sform_code"] = header["qform_code"] = 0
    save(path, header)
    assert np.array_equal(read_volume(path).grid.affine, nib.load(path).affine)
    assert read_volume(path).grid.orientation == "LAS"


def test_a_header_of_30000_cubed_with_few_bytes_allocates_nothing(path: Path) -> None:
    header = header_of(shape=(30000, 30000, 30000))
    for read in (read_header, read_volume, read_label):
        with pytest.raises(TooLarge):
            read(save(path, header, bytes(10)))


def test_more_slices_claimed_than_there_are(path: Path) -> None:
    save(path, header_of(shape=(4, 5, 7)))
    for read in (read_header, read_volume, read_label):
        with pytest.raises(Truncated):
            read(path)


@pytest.mark.parametrize("dim", [(3, 4, 0, 6), (4, 4, 5, 6, 0), (3, 4, -5, 6), (5, 4, 5, 2, 1, 3), (0, 4, 5, 6)])
def test_empty_and_surplus_axes_are_refused(dim: tuple[int, ...], path: Path) -> None:
    header = header_of()
    header["dim"][: len(dim)] = dim
    with pytest.raises(BadShape):
        read_header(save(path, header))


def test_a_fourth_axis_is_channels_in_images_only(path: Path) -> None:
    save(path, header_of(shape=(4, 5, 2, 3)))
    assert np.array_equal(read_volume(path).voxels, np.asarray(nib.load(path).dataobj).transpose(3, 0, 1, 2))
    with pytest.raises(BadShape, match="3 channels"):
        read_label(path)
    save(path, header_of(shape=(4, 5, 6, 1, 1)))
    assert np.array_equal(read_label(path).voxels, VOXELS)


def test_a_single_slice_is_a_volume(path: Path) -> None:
    header = header_of(shape=(20, 6))
    header["pixdim"][3] = 2
    assert read_volume(save(path, header)).voxels.shape == (1, 20, 6, 1)


@pytest.mark.parametrize("code", [1, 32, 128, 1536, 1792, 2304, 77])
def test_voxels_that_are_no_real_numbers_are_refused(code: int, path: Path) -> None:
    header = header_of()
    header["datatype"] = code
    with pytest.raises(BadFormat, match=f"type {code}"):
        read_header(save(path, header))


@pytest.mark.parametrize("offset", [0, 351, 352.5, np.nan, np.inf])
def test_voxels_inside_the_header_are_refused(offset: float, path: Path) -> None:
    header = header_of()
    header["vox_offset"] = offset
    with pytest.raises(BadFormat):
        read_header(save(path, header))


def test_voxels_far_behind_the_header_are_refused(path: Path) -> None:
    header = header_of()
    header["vox_offset"] = 2**40
    with pytest.raises(TooLarge):
        read_header(save(path, header))


def test_header_extensions_are_skipped(path: Path) -> None:
    image = nib.Nifti1Image(VOXELS, AFFINE)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"by a friend"))
    nib.save(image, path)
    assert np.array_equal(read_volume(path).voxels[0], VOXELS)


@pytest.mark.parametrize("magic", [b"ni1", b"", b"abc"])
def test_files_of_two_pieces_or_other_formats_are_refused(magic: bytes, path: Path) -> None:
    header = header_of()
    header["magic"] = magic
    with pytest.raises(BadFormat):
        read_header(save(path, header))


def test_a_name_that_lies_about_compression_is_found(tmp_path: Path) -> None:
    plain, zipped = save(tmp_path / "a.nii", header_of()), save(tmp_path / "b.nii.gz", header_of())
    for path, name in ((plain, "plain.nii.gz"), (zipped, "zipped.nii")):
        with pytest.raises(BadFormat, match="rename it"):
            read_header(path.rename(tmp_path / name))


@pytest.mark.parametrize(("slope", "inter"), [(0.25, -7), (2, 0), (1, -1024), (1, 0), (0, 5), (np.nan, np.nan)])
@pytest.mark.parametrize("code", ["u1", "i2", "i4", "f4"])
def test_scaling_is_as_nibabel_does_it(slope: float, inter: float, code: str, path: Path) -> None:
    header = header_of()
    header.set_data_dtype(code)
    header["scl_slope"], header["scl_inter"] = slope, inter
    save(path, header, VOXELS.astype(code).tobytes(order="F"))
    scan = read_volume(path)
    assert np.array_equal(scan.voxels[0], nib.load(path).get_fdata(dtype=np.float32))
    scaled = slope not in (0, 1) and np.isfinite(slope)
    assert scan.voxels.dtype == (np.float32 if scaled or inter == -1024 else np.dtype(code))
    assert read_header(path).dtype == scan.voxels.dtype


def test_a_scaling_without_meaning_is_refused(path: Path) -> None:
    header = header_of()
    header["scl_slope"], header["scl_inter"] = 1, np.inf
    with pytest.raises(BadFormat, match="scaling"):
        read_header(save(path, header))


def assert_label_gets_affine_of(header: Nifti1Header) -> None:
    """A label written for this image has, for other readers, exactly its affine."""
    with tempfile.TemporaryDirectory() as folder:
        image, label = save(Path(folder) / "image.nii", header), Path(folder) / "label.nii"
        grid = read_volume(image).grid
        write_label(label, LabelVolume(np.zeros(grid.shape, np.uint8), grid))
        assert np.array_equal(nib.load(label).affine, nib.load(image).affine)
        assert np.array_equal(read_label(label).grid.affine, grid.affine)


numbers32 = st.floats(-1, 1, width=32)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    a=numbers32,
    b=numbers32,
    c=numbers32,
    d=numbers32,
    spacing=st.tuples(*[st.floats(0.125, 8, width=32)] * 3),
    origin=st.tuples(*[st.floats(-512, 512, width=32)] * 3),
    qfac=st.sampled_from([-1, 0, 1]),
)
@example(a=0, b=0, c=0, d=1, spacing=(0.5, 0.75, 3), origin=(90, 90, -7), qfac=1)
@example(a=0.359375, b=0.0, c=0.1875, d=0.658203125, spacing=(1.5, 1.25, 1.75), origin=(0, 0, 0), qfac=-1)
@example(a=0.37689346, b=0.0, c=-0.72980697, d=0.44297668, spacing=(2.75, 1.75, 2.5), origin=(0, 0, 0), qfac=1)
@example(a=1, b=1e-8, c=-3e-9, d=2e-8, spacing=(0.7, 0.7, 5), origin=(1, 2, 3), qfac=-1)
@example(a=3e-5, b=-7e-6, c=5e-8, d=1, spacing=(0.7, 0.7, 5), origin=(1, 2, 3), qfac=1)
def test_an_affine_from_a_qform_is_written_bit_for_bit(
    a: float, b: float, c: float, d: float, spacing: tuple, origin: tuple, qfac: int
) -> None:
    """Such an affine has 64-bit numbers, which no sform holds: it must become the same quaternion again."""
    length = np.linalg.norm([a, b, c, d])
    quaternion = np.array([a, b, c, d]) / length if length > 0.1 else np.array([1.0, 0, 0, 0])
    header = header_of()
    header["sform_code"] = 0
    header["quatern_b"], header["quatern_c"], header["quatern_d"] = quaternion[1:] * (1 if a >= 0 else -1)
    header["pixdim"][:4] = (qfac, *spacing)
    header["qoffset_x"], header["qoffset_y"], header["qoffset_z"] = origin
    assert_label_gets_affine_of(header)


def test_an_affine_from_spacing_alone_is_written_bit_for_bit() -> None:
    header = header_of(shape=(4, 5, 6))
    header["pixdim"][1:4] = (0.7, 1.1, 3.3)
    header["sform_code"] = header["qform_code"] = 0
    assert_label_gets_affine_of(header)


def test_an_affine_from_a_sheared_sform_is_written_bit_for_bit() -> None:
    header = header_of()
    header.set_sform(AFFINE + np.array([[0, 0.3, 0, 0], [0.1, 0, 0, 0], [0, 0, 0.7, 0], [0, 0, 0, 0]]), 2)
    header["qform_code"] = 0
    assert_label_gets_affine_of(header)


def test_other_readers_find_qform_and_sform_where_both_can_be(tmp_path: Path) -> None:
    image = read_volume(save(tmp_path / "image.nii", header_of()))
    write_label(tmp_path / "label.nii", LabelVolume(VOXELS, image.grid))
    header = nib.load(tmp_path / "label.nii").header
    assert (int(header["qform_code"]), int(header["sform_code"])) == (1, 1)
    assert np.allclose(header.get_qform(), AFFINE, atol=1e-5)
    assert header.get_zooms() == (0.75, 2.0, 1.5)
    assert header.get_xyzt_units()[0] == "mm"


GEOMETRY = [
    "dim", "pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d",
    "qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z",
]  # fmt: skip
OBLIQUE = np.array([[-0.7, 0.1, 0.3, 90.1], [0.1, 1.4, -0.1, -126.7], [0.2, 0.1, 2.9, -72.3], [0, 0, 0, 1]])
SHAPES = [(4, 5), (4, 5, 1), (4, 5, 6), (4, 5, 6, 1), (4, 1, 6), (4, 5, 6, 1, 1), (4, 5, 1, 1)]


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from([Nifti1Header, Nifti2Header]),
    endianness=st.sampled_from("<>"),
    shape=st.sampled_from(SHAPES),
    codes=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    units=st.sampled_from([0, 2, 10, 18]),
    unused=st.floats(0, 4, width=32),
    ending=st.sampled_from([".nii", ".nii.gz"]),
)
@example(Nifti1Header, "<", (4, 5), (2, 2), 10, 2.5, ".nii.gz")
def test_a_label_keeps_its_scans_geometry_to_the_letter(kind, endianness, shape, codes, units, unused, ending) -> None:
    header = kind()
    header.set_data_dtype(np.int16)
    header.set_data_shape(shape)
    affine = rigid() if all(codes) else OBLIQUE  # a quaternion holds no shear, and both must agree
    header.set_sform(affine, codes[0])
    header.set_qform(affine, codes[1])
    header["pixdim"][4:] = unused
    header["xyzt_units"] = units
    header["vox_offset"] = header.single_vox_offset
    header["descrip"], header["aux_file"], header["intent_name"] = b"DOE JOHN", b"DOE", b"JOHN"
    voxels = np.arange(np.prod(shape)).astype(f"{endianness}i2")
    with tempfile.TemporaryDirectory() as folder:
        path, copy = Path(folder) / f"scan{ending}", Path(folder) / "label.nii.gz"
        save(path, header.as_byteswapped(endianness), voxels.tobytes())
        scan = read_volume(path)
        label = LabelVolume((scan.voxels[0] % 3).astype(np.uint8), scan.grid)
        export_label(copy, label, Targets({"organ": (1, 2)}), source=path)
        source, written = nib.load(path), nib.load(copy)
        for field in GEOMETRY:
            assert np.array_equal(written.header[field], source.header[field]), field
        assert type(written.header) is type(source.header)
        assert written.shape == shape
        assert np.array_equal(written.affine, source.affine)
        back = read_label(copy)
        assert np.array_equal(back.voxels, label.voxels)
        assert np.array_equal(back.grid.affine, scan.grid.affine)
        assert b"DOE" not in written.header.binaryblock


def rigid() -> np.ndarray:
    """A rotation with spacing, of which quaternion and rows tell the same."""
    turn = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn * (0.7, 1.4, 2.9)
    affine[:3, 3] = (90.1, -126.7, -72.3)
    return affine


def test_geometry_is_kept_only_of_a_scan_on_the_same_grid(tmp_path: Path) -> None:
    scan = read_volume(save(tmp_path / "scan.nii", header_of()))
    other = LabelVolume(np.zeros(scan.grid.shape, np.uint8), Grid(scan.grid.shape, OBLIQUE))
    write_label(tmp_path / "label.nii", other, like=tmp_path / "scan.nii")
    assert read_label(tmp_path / "label.nii").grid.matches(other.grid, 1e-4)
    for like in ("nowhere.nii", "scan.mha"):
        (tmp_path / "scan.mha").write_bytes(b"")
        write_label(tmp_path / "label.nii", other, like=tmp_path / like)
        assert read_label(tmp_path / "label.nii").grid.matches(other.grid, 1e-4)


def test_channels_of_a_scan_with_channels_keep_its_geometry(tmp_path: Path) -> None:
    header = header_of(shape=(4, 5, 3, 2))
    header.set_sform(AFFINE, 2)
    path = save(tmp_path / "scan.nii", header)
    scan = read_volume(path)
    write_volume(tmp_path / "probabilities.nii.gz", scan, like=path)
    write_label(tmp_path / "label.nii.gz", LabelVolume(np.zeros((4, 5, 3), np.uint8), scan.grid), like=path)
    for name, shape in (("probabilities", (4, 5, 3, 2)), ("label", (4, 5, 3))):
        written = nib.load(tmp_path / f"{name}.nii.gz")
        assert (written.shape, int(written.header["sform_code"])) == (shape, 2)
