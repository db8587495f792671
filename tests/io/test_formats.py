"""Scans and labels by suffix: names, voxels that are no numbers, labels that are no whole numbers."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from delineate.core.grid import Grid
from delineate.core.volume import LabelVolume, Volume
from delineate.errors import BadFormat, BadLabelValue, BadVoxels, MissingFile
from delineate.io.formats import (
    name_of,
    parts_of,
    read_header,
    read_label,
    read_volume,
    suffix_of,
    write_label,
    write_volume,
)

GRID = Grid.of_spacing((3, 4, 5), (1, 1, 3))


def save(path: Path, values: object, dtype: type = np.float32) -> Path:
    """Ones, but for the first voxels."""
    voxels = np.ones(GRID.shape, dtype=dtype)
    voxels.ravel()[: np.size(values)] = values
    nib.save(nib.Nifti1Image(voxels, GRID.affine), path)
    return path


@pytest.mark.parametrize(
    ("name", "suffix", "stem"),
    [
        ("case.nii.gz", ".nii.gz", "case"),
        ("case.1.NII.GZ", ".nii.gz", "case.1"),
        ("case.nii", ".nii", "case"),
        ("Case01.mhd", ".mhd", "Case01"),
        ("case.nrrd", ".nrrd", "case"),
        ("case.raw", "", "case.raw"),
        ("case.gz", "", "case.gz"),
        ("._case.nii.gz", "", "._case.nii.gz"),
    ],
)
def test_names_and_suffixes(name: str, suffix: str, stem: str) -> None:
    assert suffix_of(Path("folder") / name) == suffix
    assert name_of(Path("folder") / name) == stem


@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("11.mhd", "ObjectType = Image\r\nElementDataFile = 11.raw\r\n"),
        ("11.mhd", "ElementDataFile = LIST\n11.raw\n"),
        ("11.nhdr", "NRRD0004\ndata file: 11.raw\n\n"),
    ],
)
def test_only_whole_names_of_files_make_them_part_of_a_scan(name: str, header: str, tmp_path: Path) -> None:
    """A folder raw/ beside the scan was taken for its data, and so were the data of scan 1."""
    (tmp_path / "raw").mkdir()
    for other in ("1.raw", "11.raw"):
        (tmp_path / other).touch()
    path = tmp_path / name
    path.write_bytes(header.encode())
    assert parts_of(path) == [path, tmp_path / "11.raw"]


def test_unknown_and_missing_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "scan.jpg").write_bytes(b"")
    with pytest.raises(BadFormat, match="known are"):
        read_volume(tmp_path / "scan.jpg")
    with pytest.raises(BadFormat, match="known are"):
        write_label(tmp_path / "scan.jpg", LabelVolume(np.zeros(GRID.shape, np.uint8), GRID))
    for path in (tmp_path / "scan.nii", tmp_path):
        with pytest.raises(MissingFile):
            read_header(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_no_numbers_are_counted_and_refused(value: float, tmp_path: Path) -> None:
    path = save(tmp_path / "scan.nii", [value, value, -7])
    with pytest.raises(BadVoxels, match="2 of 60 voxels"):
        read_volume(path)
    filled = read_volume(path, nan="fill").voxels
    assert filled.ravel().tolist()[:4] == [-7, -7, -7, 1]  # as the background of their channel


def test_a_channel_without_any_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadVoxels, match="a whole channel among them"):
        read_volume(save(tmp_path / "scan.nii", np.full(60, np.nan)), nan="fill")


def test_numbers_beyond_float32_are_no_numbers(tmp_path: Path) -> None:
    with pytest.raises(BadVoxels, match="1 of 60"):
        read_volume(save(tmp_path / "scan.nii", [1e300], np.float64))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_labels_near_whole_numbers_are_rounded_not_cut_off(dtype: type, suffix: str, tmp_path: Path) -> None:
    path = save(tmp_path / f"label{suffix}", [254.99999994, 1.00000006, 0.99999998, 1e-3, 3.9991], dtype)
    label = read_label(path).voxels
    assert label.ravel().tolist()[:6] == [255, 1, 1, 0, 4, 1]
    assert label.dtype == np.uint8


@pytest.mark.parametrize("value", [0.5, 1.002, np.nan, np.inf, 1e30, -(2.0**40)])
def test_labels_that_are_no_whole_numbers_are_refused(value: float, tmp_path: Path) -> None:
    with pytest.raises(BadLabelValue, match=r"label\.nii"):
        read_label(save(tmp_path / "label.nii", [value]))


def test_labels_scaled_in_the_header_are_rounded(tmp_path: Path) -> None:
    """As a converter stores a mask: over all that 32 bits can say."""
    voxels = np.where(np.arange(60) % 2, 2**31 - 1, -(2**31)).astype(np.int32).reshape(GRID.shape)
    image = nib.Nifti1Image(voxels, GRID.affine)
    image.header.set_slope_inter(2.0**-32, 0.5)
    nib.save(image, tmp_path / "label.nii")
    assert np.array_equal(read_label(tmp_path / "label.nii").voxels, voxels > 0)


@pytest.mark.parametrize(("dtype", "written"), [(bool, np.uint8), (np.float16, np.float32), (np.float64, np.float32)])
def test_types_that_formats_lack_are_written_as_the_next(dtype: type, written: type, tmp_path: Path) -> None:
    voxels = (np.arange(60) % 2).reshape(1, *GRID.shape)
    write_volume(tmp_path / "scan.nii", Volume(voxels.astype(dtype), GRID))
    back = read_volume(tmp_path / "scan.nii").voxels
    assert np.array_equal(back, voxels)
    assert back.dtype == written


def test_real_scans_are_read_and_their_labels_get_exactly_their_affine(real_data: Path, tmp_path: Path) -> None:
    folders = [f for f in sorted(real_data.rglob("*")) if f.is_dir() and f.parent.name != "dicom" and f.name != "dicom"]
    paths = [p for folder in folders for p in [f for f in sorted(folder.iterdir()) if suffix_of(f)][:3]]
    assert len(paths) > 40
    for path in paths:
        scan, label = read_volume(path), tmp_path / "label.nii.gz"
        write_label(label, LabelVolume(np.zeros(scan.grid.shape, np.uint8), scan.grid))
        assert np.array_equal(nib.load(label).affine, scan.grid.affine), path
        if suffix_of(path).startswith(".nii"):
            image = nib.load(path)
            assert np.array_equal(image.affine, scan.grid.affine), path
            assert np.allclose(np.asanyarray(image.dataobj), scan.voxels[0], rtol=1e-6, atol=0), path


def test_real_labels_hold_few_whole_numbers(real_data: Path) -> None:
    paths = [
        *sorted(real_data.glob("brats/*/OTMultiClass.nii.gz"))[:2],
        *sorted(real_data.glob("wmh/*/*/wmh.nii.gz"))[:2],
        *sorted(real_data.glob("prostate/*_segmentation.mhd"))[:2],
        *sorted(real_data.glob("sarcoma/labelsTr/*"))[:2],
        real_data / "dirty" / "mirrored_headers" / "101228_Vent_Mask.nii.gz",
    ]
    for path in paths:
        label = read_label(path)
        assert label.voxels.dtype == np.uint8
        assert label.voxels.max() <= 4
