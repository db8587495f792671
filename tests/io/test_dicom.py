"""DICOM in: geometry exact in every orientation, and a code for every way a series can be broken."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)

from delineate.core.grid import Grid
from delineate.errors import (
    BadFormat,
    BadGeometry,
    BadPath,
    BadShape,
    DelineateError,
    DuplicateSlice,
    MissingFile,
    MissingSlice,
    MixedOrientations,
    SeveralSeries,
    SeveralTimes,
    TiltedGantry,
    TooLarge,
    Truncated,
    UnevenSlices,
)
from delineate.io.dicom_series import find_series, the_series
from delineate.io.files import Limits
from delineate.io.formats import read_header, read_label, read_volume

SHAPE = (7, 6, 5)
VOXELS = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)


def grids() -> Iterator[Grid]:
    """The 24 right-handed orientations of an oblique, anisotropic grid: a slice's normal sets its order."""
    turn = np.array([[0.9, 0.43588989, 0], [-0.43588989, 0.9, 0], [0, 0, 1.0]])
    tip = np.array([[1, 0, 0], [0, 0.8, 0.6], [0, -0.6, 0.8]])
    for order, signs in product(permutations(range(3)), product((1, -1), repeat=3)):
        axes = np.zeros((3, 3))
        axes[list(order), range(3)] = signs
        if np.linalg.det(axes) > 0:
            affine = np.eye(4)
            affine[:3, :3] = turn @ tip @ axes * (0.7, 0.9, 2.5)
            affine[:3, 3] = (-31.5, 12.25, 88.0)
            yield Grid(SHAPE, affine)


GRID = next(grids())


def test_every_orientation_is_exact_and_as_another_reader_has_it(dicom) -> None:
    for i, grid in enumerate(grids()):
        folder = dicom.write(f"s{i}", VOXELS, grid)
        back = read_volume(folder)
        assert np.array_equal(back.voxels[0], VOXELS)
        assert back.grid.matches(grid, 1e-5)
        image = SimpleITK.ReadImage(SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder)))
        marker = (5, 1, 3)
        assert image[marker] == VOXELS[marker]
        world = np.array(image.TransformIndexToPhysicalPoint(marker)) * (-1, -1, 1)
        np.testing.assert_allclose(world, back.grid.world(np.array([marker], float))[0], atol=1e-4)


def test_many_frames_in_one_file(dicom) -> None:
    for i, grid in enumerate(grids()):
        back = read_volume(dicom.write_multiframe(f"m{i}", VOXELS, grid))
        assert np.array_equal(back.voxels[0], VOXELS)
        assert back.grid.matches(grid, 1e-5)


def test_a_series_is_its_folder_a_zip_or_any_of_its_files(dicom, tmp_path: Path) -> None:
    folder = dicom.write("a", VOXELS, GRID)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for file in folder.iterdir():
            archive.write(file, f"deep/er/{file.name}")
    bare = folder / "IM0002"
    (folder / "IM0002.dcm").rename(bare)
    for place in (folder, folder / "IM0000.dcm", bare, tmp_path / "a.zip", folder.parent):
        assert np.array_equal(read_volume(place).voxels[0], VOXELS)
        header = read_header(place)
        assert (header.channels, header.dtype) == (1, read_volume(place).voxels.dtype)
        assert header.grid.matches(GRID, 1e-5)


def test_values_are_rescaled(dicom) -> None:
    ct = read_volume(dicom.write("ct", VOXELS, GRID, inter=-1024, BitsStored=12, HighBit=11))
    assert ct.voxels.dtype == np.int16
    assert np.array_equal(ct.voxels[0], VOXELS - 1024)
    pet = read_volume(dicom.write("pet", VOXELS, GRID, slope=0.5, inter=2))
    assert pet.voxels.dtype == np.float32
    assert np.array_equal(pet.voxels[0], VOXELS * np.float32(0.5) + 2)


def test_slices_stored_in_different_bits_keep_their_values(dicom) -> None:
    voxels = (VOXELS * 150).astype(np.uint16)  # up to 31350

    def stored(header: pydicom.Dataset, k: int) -> None:
        plane = voxels[:, :, k].T.astype(np.int32) - 4000 * (k == 3)  # one slice has signs, another few bits
        header.PixelRepresentation = int(k == 3)
        if k == 0:
            plane %= 256
            header.BitsStored, header.HighBit = 8, 7
        expected[:, :, k] = plane.T
        header.PixelData = np.ascontiguousarray(plane.astype("<i2" if k == 3 else "<u2")).tobytes()

    expected = np.empty(SHAPE, np.int32)
    folder = change(dicom.write("a", voxels, STRAIGHT), stored)
    assert np.array_equal(read_volume(folder).voxels[0], expected)
    assert read_header(folder).dtype == read_volume(folder).voxels.dtype == np.int32


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless, JPEGLSLossless])
def test_compressed_pixels(dicom, syntax) -> None:
    large = np.tile(VOXELS.astype(np.uint16), (10, 10, 1))  # codecs want some pixels to work on
    folder = dicom.write("c", large, Grid(large.shape, GRID.affine))
    for file in folder.iterdir():
        header = pydicom.dcmread(file)
        header.compress(syntax)
        header.save_as(file)
    assert np.array_equal(read_volume(folder).voxels[0], large)


def test_series_are_listed_by_what_tells_them_apart(dicom) -> None:
    dicom.write("T1 pre", VOXELS, GRID)
    dicom.write("T2 flair", VOXELS[:, :, :3], GRID)
    found = {series.description: series for series in find_series(dicom.folder)}
    assert {name: (s.slices, s.shape, s.modality, s.date) for name, s in found.items()} == {
        "T1 pre": (5, (7, 6), "CT", "20200102"),
        "T2 flair": (3, (7, 6), "CT", "20200102"),
    }
    assert the_series(dicom.folder, "*FLAIR*").slices == 3
    with pytest.raises(SeveralSeries, match=r"'T1 pre' .* 'T2 flair'"):
        read_volume(dicom.folder)
    with pytest.raises(MissingFile, match="choose from 'T1 pre'"):
        the_series(dicom.folder, "*pet*")


def test_nothing_that_names_a_patient_is_kept_or_said(dicom) -> None:
    folder = dicom.write("a", VOXELS, GRID)
    series = the_series(folder)
    broken = change(folder, lambda header, i: setattr(header, "Rows", 3) if i == 0 else None)
    with pytest.raises(DelineateError) as error:
        read_volume(broken)
    for text in (repr(series), str(series), str(error.value)):
        assert "canary" not in text.casefold()  # in the name and the number; digits alone may be a hash's


def change(folder: Path, how: Callable[[pydicom.Dataset, int], object]) -> Path:
    """Each slice's header changed, by its place in the stack; ``how`` returns False to remove the slice."""
    files = sorted(folder.iterdir(), key=lambda f: pydicom.dcmread(f).ImagePositionPatient[2])
    for i, file in enumerate(files):
        header = pydicom.dcmread(file)
        kept = how(header, i)
        file.unlink()
        if kept is not False:
            header.save_as(file)
    return folder


def moved(header: pydicom.Dataset, by: np.ndarray) -> None:
    header.ImagePositionPatient = [float(p) + float(b) for p, b in zip(header.ImagePositionPatient, by, strict=True)]


def repeated(folder: Path, **tags: object) -> Path:
    for file in list(folder.iterdir()):
        header = pydicom.dcmread(file)
        for tag, value in tags.items():
            setattr(header, tag, value)
        header.SOPInstanceUID = generate_uid()
        header.save_as(file.with_name(f"again-{file.name}"))
    return folder


def every(folder: Path, **tags: object) -> Path:
    def set_all(header: pydicom.Dataset, i: int) -> None:
        for tag, value in tags.items():
            setattr(header, tag, value)

    return change(folder, set_all)


def without(folder: Path, tag: str) -> Path:
    return change(folder, lambda header, i: delattr(header, tag))


STRAIGHT = Grid.of_spacing(SHAPE, (0.7, 0.9, 2.5))
ALONG = np.array([0, 0, 1.0])

BROKEN = {
    "a slice missing": (MissingSlice, lambda f: change(f, lambda h, i: i != 2), "lacks 1 slices, between"),
    "one copied": (DuplicateSlice, lambda f: change(f, lambda h, i: moved(h, ALONG * 2.5) if i == 1 else None), "mm"),
    "all copied": (DuplicateSlice, repeated, "several slices at"),
    "two times": (SeveralTimes, lambda f: repeated(f, TemporalPositionIdentifier=2), "2 images at each of 5"),
    "uneven": (UnevenSlices, lambda f: change(f, lambda h, i: moved(h, ALONG * 0.3) if i == 2 else None), "2.2 to 2.8"),
    "tilted": (TiltedGantry, lambda f: change(f, lambda h, i: moved(h, np.array([0, 0.4 * i, 0]))), "tilted gantry"),
    "turned": (
        MixedOrientations,
        lambda f: change(f, lambda h, i: setattr(h, "ImageOrientationPatient", [1, 0, 0, 0, 0, 1]) if i == 0 else None),
        "different planes",
    ),
    "no position": (BadGeometry, lambda f: without(f, "ImagePositionPatient"), "no valid ImagePosition"),
    "no spacing": (BadGeometry, lambda f: without(f, "PixelSpacing"), "no valid PixelSpacing"),
    "zero spacing": (BadGeometry, lambda f: every(f, PixelSpacing=[0, 0]), "spacing 0"),
    "two sizes": (
        BadShape,
        lambda f: change(f, lambda h, i: setattr(h, "Rows", 3) if i == 0 else None),
        "different sizes",
    ),
    "colours": (BadShape, lambda f: every(f, SamplesPerPixel=3), "in colour"),
    "short pixels": (
        Truncated,
        lambda f: change(f, lambda h, i: setattr(h, "PixelData", h.PixelData[:-2]) if i == 3 else None),
        "82 of 84 bytes",
    ),
    "no pixels": (Truncated, lambda f: without(f, "PixelData"), "no pixels"),
    "huge": (TooLarge, lambda f: every(f, Rows=60000, Columns=60000), "60000"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_refused_by_its_code(dicom, what: str) -> None:
    error, breaking, message = BROKEN[what]
    folder = breaking(dicom.write("a", VOXELS, STRAIGHT))
    with pytest.raises(error, match=message) as raised:
        read_volume(folder)
    assert type(raised.value) is error


def test_rounding_in_headers_is_no_unevenness(dicom) -> None:
    def rounded(header: pydicom.Dataset, i: int) -> None:
        header.ImagePositionPatient = [round(float(p) + 0.004 * (-1) ** i, 3) for p in header.ImagePositionPatient]

    assert read_volume(change(dicom.write("a", VOXELS, STRAIGHT), rounded)).grid.matches(STRAIGHT, 0.02)


def test_files_cut_short_are_refused(dicom) -> None:
    folder = dicom.write("a", VOXELS, STRAIGHT)
    file = folder / "IM0001.dcm"
    data = file.read_bytes()
    for length in (140, 200, 400, len(data) - 40):
        file.write_bytes(data[:length])
        with pytest.raises(DelineateError):
            read_volume(folder)


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_mutated_headers_meet_only_our_errors(dicom) -> None:
    rng = np.random.default_rng(3)
    folder = dicom.write("a", VOXELS, STRAIGHT)
    file = folder / "IM0001.dcm"
    content = file.read_bytes()
    for _ in range(400):
        mutated = bytearray(content)
        for _ in range(rng.integers(1, 4)):
            at = int(rng.integers(128, 900))
            if rng.random() < 0.2:
                del mutated[at : at + int(rng.integers(1, 20))]
            else:
                mutated[at] = rng.integers(256)
        file.write_bytes(mutated)
        for read in (read_header, read_volume, read_label):
            with suppress(DelineateError):
                read(folder)


@pytest.mark.parametrize(
    "tags", [{"BitsAllocated": 24}, {"BitsStored": 0}, {"NumberOfFrames": 10**9}, {"RescaleSlope": "0"}]
)
def test_fields_that_make_no_sense_are_refused(dicom, tags: dict[str, object]) -> None:
    with pytest.raises(DelineateError):
        read_volume(every(dicom.write("a", VOXELS, STRAIGHT), **tags))


def test_without_a_patients_number_studies_are_patients(dicom, tmp_path: Path) -> None:
    patients = set()
    for name in ("a", "b"):
        dicom.study = generate_uid()
        patients.add(the_series(every(dicom.write(name, VOXELS, STRAIGHT), PatientID="")).patient)
    assert len(patients) == 2


def test_a_damaged_member_of_a_zip_is_refused(dicom, tmp_path: Path) -> None:
    folder = dicom.write("a", VOXELS, STRAIGHT)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for file in folder.iterdir():
            archive.write(file, file.name)
    content = bytearray((tmp_path / "a.zip").read_bytes())
    at = content.index(b"DICM")
    content[at + 40] ^= 255  # its checksum does not fit any more
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(Truncated, match="CRC"):
        read_volume(tmp_path / "a.zip")


def test_a_deflate_bomb_is_refused_before_it_unpacks(dicom) -> None:
    folder = dicom.write("a", VOXELS[:, :, :1], STRAIGHT)
    file = next(folder.iterdir())
    header = pydicom.dcmread(file)
    header.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    header.save_as(file, enforce_file_format=True)
    assert np.array_equal(read_volume(folder).voxels[0], VOXELS[:, :, :1])  # an honest one is read
    packed = file.read_bytes()
    meta = packed[: 132 + 12 + int.from_bytes(packed[140:144], "little")]
    deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    file.write_bytes(meta + deflate.compress(bytes(40_000_000)) + deflate.flush())
    with pytest.raises(TooLarge, match="unpacks to more than"):
        read_volume(folder, limits=Limits(max_bytes=2**26))


def test_pixels_that_do_not_decode_are_refused(dicom) -> None:
    folder = dicom.write("a", VOXELS, STRAIGHT)
    file = next(folder.iterdir())
    header = pydicom.dcmread(file)
    header.file_meta.TransferSyntaxUID = JPEG2000Lossless
    header.PixelData = encapsulate([b"\xff\x4fno picture at all"])
    header["PixelData"].VR = "OB"
    header.save_as(file)
    with pytest.raises(BadFormat, match="send it uncompressed"):
        read_volume(folder)


@pytest.mark.parametrize("name", ["../out.dcm", "/etc/out.dcm", "a/../../out.dcm", "C:\\out.dcm"])
def test_a_zip_that_leaves_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(name, b"x")
    with pytest.raises(BadPath, match="points outside it"):
        find_series(tmp_path / "a.zip")


def test_a_zip_bomb_is_refused_by_its_list(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.dcm", bytes(5_000_000))
    with pytest.raises(TooLarge):
        find_series(tmp_path / "a.zip", Limits(max_bytes=2_000_000))


def test_other_files_are_passed_over_and_none_at_all_is_an_error(dicom, tmp_path: Path) -> None:
    folder = dicom.write("a", VOXELS, STRAIGHT)
    (folder / "readme.txt").write_text("hello", encoding="utf-8")
    (folder / "DICOMDIR").write_bytes(b"\0" * 200)
    assert read_volume(folder).channels == 1
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingFile, match="holds no DICOM"):
        read_volume(tmp_path / "empty")


def test_the_mask_series_of_the_real_study_is_a_label_on_its_grid(real_data: Path) -> None:
    study = real_data / "dicom" / "PGBM-001"
    image = read_volume(the_series(study, "T1post").instances[0].path)
    mask = read_label(the_series(study, "*mask*").instances[0].path)
    assert set(np.unique(mask.voxels)) == {0, 1}
    assert mask.grid.matches(image.grid, 0.01)
