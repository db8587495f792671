"""RT Structure Sets: contours made by hand, filled as matplotlib fills them, on slices in every orientation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest
from matplotlib.path import Path as Polygon
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.tag import Tag
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, RTStructureSetStorage, generate_uid
from typer.testing import CliRunner

from delineate.bundle import Bundle
from delineate.cli.app import app
from delineate.core.grid import Grid
from delineate.core.legend import Code, Coding, Legend
from delineate.core.targets import Targets
from delineate.core.volume import LabelVolume
from delineate.datasets.dataset import read_numbered
from delineate.errors import BadFormat, BadGeometry, GridMismatch, MissingFile, TooLarge, Truncated
from delineate.io import rtstruct
from delineate.io.dicom_series import the_series
from delineate.io.exports import export_label
from delineate.io.formats import read_label, read_volume
from delineate.io.rtstruct import outlines, read_structures, referenced_series, structure_names, write_structures
from delineate.recipe import recipe_from
from delineate.sampling.tiles import TileGeometry

TO_LPS = np.array([-1.0, -1.0, 1.0])
TURN = np.array([[0.9, 0.43588989, 0], [-0.43588989, 0.9, 0], [0, 0, 1.0]])
SHAPE = (24, 20, 6)


def a_grid(axes: np.ndarray, spacing_mm: tuple[float, ...] = (0.7, 0.9, 2.5)) -> Grid:
    affine = np.eye(4)
    affine[:3, :3] = axes * spacing_mm
    affine[:3, 3] = (-31.5, 12.25, 88.0)
    return Grid(SHAPE, affine)


AXIAL = a_grid(np.diag([-1.0, -1, 1]))
GRIDS = {
    "axial": AXIAL,
    "coronal": a_grid(np.array([[-1.0, 0, 0], [0, 0, 1], [0, -1, 0]])),
    "sagittal": a_grid(np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])),
    "oblique": a_grid(TURN @ np.diag([-1.0, -1, 1])),
}

Contour = tuple[float, list[tuple[float, float]]]
"""A slice, and points (x, y) on it, both in voxels."""


def contour(points_mm: np.ndarray, kind: str = "CLOSED_PLANAR") -> Dataset:
    one = Dataset()
    one.ContourGeometricType, one.NumberOfContourPoints = kind, len(points_mm)
    one.ContourData = [f"{value:.8g}" for value in np.ravel(points_mm)]
    return one


def placed(drawn: Contour, grid: Grid, axis: int = 2) -> np.ndarray:
    """A contour's points in LPS millimetres."""
    k, points = drawn
    return grid.world(np.insert(np.array(points, float), axis, k, axis=1)) * TO_LPS


def structure_set(path: Path, structures: dict[str, list[Dataset]], series: str = "1.2.3") -> Path:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, RTStructureSetStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    whole, frame, study, drawn_on = Dataset(), Dataset(), Dataset(), Dataset()
    whole.file_meta = meta
    whole.SOPClassUID, whole.SOPInstanceUID, whole.Modality = RTStructureSetStorage, generate_uid(), "RTSTRUCT"
    drawn_on.SeriesInstanceUID = series
    study.RTReferencedSeriesSequence = [drawn_on]
    frame.RTReferencedStudySequence = [study]
    whole.ReferencedFrameOfReferenceSequence = [frame]
    whole.StructureSetROISequence, whole.ROIContourSequence = [], []
    for number, (name, contours) in enumerate(structures.items(), start=7):
        named, drawn = Dataset(), Dataset()
        named.ROINumber, named.ROIName = number, name.split("|")[0]
        drawn.ReferencedROINumber = number
        if contours:
            drawn.ContourSequence = contours
        whole.StructureSetROISequence.append(named)
        whole.ROIContourSequence.insert(0, drawn)  # in an order that means nothing
    whole.save_as(path, enforce_file_format=True)
    return path


def drawing(*contours: Contour, grid: Grid = AXIAL, kind: str = "CLOSED_PLANAR") -> list[Dataset]:
    return [contour(placed(one, grid), kind) for one in contours]


def star(rng: np.random.Generator, centre: tuple[float, float], radius: float, points: int = 17) -> list:
    angles = np.sort(rng.uniform(0, 2 * np.pi, points))
    lengths = rng.uniform(0.4, 1, points) * radius
    return [(centre[0] + r * np.cos(a), centre[1] + r * np.sin(a)) for r, a in zip(lengths, angles, strict=True)]


CENTRES = np.argwhere(np.ones(SHAPE[:2])).astype(float)


def filled(points: list[tuple[float, float]]) -> np.ndarray:
    """By matplotlib, whose rule for simple polygons is any other's."""
    closed = Polygon([*points, points[0]], closed=True)
    return closed.contains_points(CENTRES).reshape(SHAPE[:2])


@pytest.mark.parametrize("name", GRIDS)
def test_voxels_are_those_whose_centres_another_library_finds_inside(name: str, tmp_path: Path, rng) -> None:
    grid, expected, drawn = GRIDS[name], np.zeros(SHAPE, bool), []
    for k in range(1, 5):
        outer, hole, beside = star(rng, (9, 9), 9), star(rng, (9, 9), 3), star(rng, (20, 14), 5)
        expected[:, :, k] = filled(outer) ^ filled(hole) ^ filled(beside)
        drawn += [(k, outer), (k, hole), (k, beside)]
    path = structure_set(tmp_path / "a.dcm", {"organ": drawing(*drawn, grid=grid), "nothing": []})
    masks = read_structures(path, grid)
    assert list(masks) == ["organ", "nothing"]
    assert expected.sum() > 100
    np.testing.assert_array_equal(masks["organ"], expected)
    assert not masks["nothing"].any()


def square(low: float, high: float) -> list[tuple[float, float]]:
    return [(low, low), (high, low), (high, high), (low, high)]


def box(low: int, high: int) -> np.ndarray:
    plane = np.zeros(SHAPE[:2], bool)
    plane[low:high, low:high] = True
    return plane


@pytest.mark.parametrize("kind", ["CLOSED_PLANAR", "CLOSEDPLANAR_XOR"])
def test_holes_are_contours_within_contours_or_keyholes(kind: str, tmp_path: Path) -> None:
    ring = box(2, 15) & ~box(5, 10)
    nested = drawing((2, square(1.5, 14.5)), (2, square(4.5, 9.5)), kind=kind)
    keyhole = [*square(1.5, 14.5), (1.5, 1.5), *square(4.5, 9.5), (4.5, 4.5), (1.5, 1.5)]
    island = drawing((2, square(1.5, 14.5)), (2, square(4.5, 9.5)), (2, square(6.5, 7.5)), kind=kind)
    path = structure_set(
        tmp_path / "a.dcm", {"nested": nested, "keyhole": drawing((2, keyhole), kind=kind), "island": island}
    )
    masks = read_structures(path, AXIAL)
    np.testing.assert_array_equal(masks["nested"][:, :, 2], ring)
    np.testing.assert_array_equal(masks["keyhole"][:, :, 2], ring)
    np.testing.assert_array_equal(masks["island"][:, :, 2], ring | box(7, 8))
    assert all(mask.sum(axis=(0, 1)).nonzero()[0].tolist() == [2] for mask in masks.values())


def test_structures_side_by_side_through_centres_share_no_voxel_and_leave_none_out(tmp_path: Path) -> None:
    left, right = [(2, 2), (10, 2), (10, 10), (2, 10)], [(10, 2), (15, 2), (15, 10), (10, 10)]
    path = structure_set(tmp_path / "a.dcm", {"a": drawing((1, left)), "b": drawing((1, right))})
    masks = read_structures(path, AXIAL)
    assert not (masks["a"] & masks["b"]).any()
    assert (masks["a"] | masks["b"]).sum() == 13 * 8


def test_contours_between_slices_go_to_the_nearest_and_of_several_planes_the_nearest_counts(tmp_path: Path) -> None:
    drawn = drawing((0.6, square(1.5, 4.5)), (2.3, square(1.5, 9.5)), (1.9, square(4.5, 9.5)))
    mask = read_structures(structure_set(tmp_path / "a.dcm", {"a": drawn}), AXIAL)["a"]
    assert mask.sum(axis=(0, 1)).tolist() == [0, 9, 25, 0, 0, 0]


def test_contours_across_the_slices_are_drawn_in_their_own_plane(tmp_path: Path) -> None:
    """One sagittal outline on axial slices: parallel to the grid, only not to its slices."""
    drawn = [contour(placed((7, [(2.5, 0.5), (9.5, 0.5), (9.5, 3.5), (2.5, 3.5)]), AXIAL, axis=0))]
    mask = read_structures(structure_set(tmp_path / "a.dcm", {"a": drawn}), AXIAL)["a"]
    assert (mask.sum(), mask[7, 3:10, 1:4].sum()) == (21, 21)


def tilted() -> list[Dataset]:
    points = placed((2, square(1.5, 9.5)), AXIAL)
    points[:2] += [0.3, 0.3, 2.0]
    return [contour(points)]


def with_text(text: str) -> list[Dataset]:
    one = contour(placed((2, square(1.5, 4.5)), AXIAL))
    one[0x30060050] = RawDataElement(Tag(0x30060050), "DS", len(text), text.encode(), 0, False, True)
    return [one]


WRONG = {
    "tilted": (tilted, BadGeometry, "not parallel"),
    "every other slice": (
        lambda: drawing(*((k, square(1.5, 4.5)) for k in (0, 2, 4))), BadGeometry, "no two neighbouring"
    ),
    "above": (lambda: drawing((5.8, square(1.5, 4.5))), GridMismatch, "outside"),
    "beside": (lambda: drawing((2, square(41.5, 44.5))), GridMismatch, "outside"),
    "open": (lambda: drawing((2, square(1.5, 4.5)), kind="OPEN_PLANAR"), BadFormat, "encloses nothing"),
    "too few numbers": (lambda: with_text("1\\2\\3\\4"), Truncated, "4 coordinates"),
    "points left out": (lambda: with_text("1\\2\\3"), Truncated, "3 coordinates for 4 points"),
    "nan": (lambda: with_text("\\".join(["nan"] * 12)), BadGeometry, "not finite"),
    "words": (lambda: with_text("\\".join(["a"] * 12)), BadFormat, "could not convert"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_drawn_wrongly_is_refused_and_harms_no_other_structure(name: str, tmp_path: Path) -> None:
    make, error, text = WRONG[name]
    sound = drawing((2, square(1.5, 4.5)))
    path = structure_set(tmp_path / "a.dcm", {"sound": sound, "wrong": make()})
    with pytest.raises(error, match=text):
        read_structures(path, AXIAL)
    assert read_structures(path, AXIAL, ["sound"])["sound"].sum() == 9


def test_points_and_contours_of_two_points_enclose_nothing(tmp_path: Path) -> None:
    drawn = drawing((2, [(3, 3)]), kind="POINT") + drawing((2, [(3, 3), (5, 5)]))
    path = structure_set(tmp_path / "a.dcm", {"marker": drawn})
    assert not read_structures(path, AXIAL)["marker"].any()


def test_names_and_series_are_known_without_a_grid(tmp_path: Path) -> None:
    path = structure_set(tmp_path / "a.dcm", {"liver": [], "tumour": [], "liver|again": []}, series="1.2.840.9")
    assert structure_names(path) == ("liver", "tumour")
    assert referenced_series(path) == ("1.2.840.9",)
    with pytest.raises(BadFormat, match="several structures called 'liver'"):
        read_structures(path, AXIAL, ["liver"])
    with pytest.raises(MissingFile, match="did you mean 'tumour'"):
        read_structures(path, AXIAL, ["tumor"])
    assert list(read_structures(path, AXIAL, ["tumour"])) == ["tumour"]


def test_only_structure_sets_are_read(dicom, tmp_path: Path) -> None:
    scan = next(dicom.write("a", np.zeros(SHAPE, np.int16), AXIAL).iterdir())
    for read in (structure_names, referenced_series, lambda path: read_structures(path, AXIAL)):
        with pytest.raises(BadFormat, match="not a DICOM RT Structure Set"):
            read(scan)
        with pytest.raises(MissingFile):
            read(tmp_path / "lost.dcm")
        (tmp_path / "text.dcm").write_text("no DICOM", encoding="utf-8")
        with pytest.raises(BadFormat):
            read(tmp_path / "text.dcm")


def test_what_no_structure_set_holds_is_refused_before_it_fills_the_memory(tmp_path: Path, monkeypatch) -> None:
    path = structure_set(tmp_path / "a.dcm", {"a": drawing(*((k, square(1.5, 14.5)) for k in range(5)))})
    for limit, value in {"_MOST_BYTES": 1000, "_MOST_ITEMS": 9, "_MOST_TEXT": 20, "_MOST_CROSSINGS": 100}.items():
        with monkeypatch.context() as patch:
            patch.setattr(rtstruct, limit, value)
            with pytest.raises(TooLarge):
                read_structures(path, AXIAL)
    with pytest.raises(TooLarge, match="fewer structures"):
        read_structures(path, Grid.of_spacing((2000, 2000, 2000)))
    assert read_structures(path, AXIAL)["a"].sum() == 5 * 169
    packed = pydicom.dcmread(path)
    packed.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    packed.save_as(path)
    with pytest.raises(BadFormat, match="uncompressed"):
        read_structures(path, AXIAL)


def ragged(rng: np.random.Generator, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Pieces of any form: with holes, islands within them, corners that touch, and the border of the grid."""
    return rng.random(shape) < rng.uniform(0.2, 0.95)


def test_every_plane_is_outlined_so_that_another_library_fills_it_again(rng) -> None:
    """Each piece by one polygon, holes included; the polygons' areas are the pixels'."""
    for number in range(60):
        plane = ragged(rng, (int(rng.integers(1, 14)), int(rng.integers(1, 14)))) if number else np.ones((5, 7), bool)
        centres = np.argwhere(np.ones(plane.shape)).astype(float)
        found, area = np.zeros(plane.size, int), 0.0
        for polygon in outlines(plane):
            (x, y), (after_x, after_y) = polygon.T, np.roll(polygon, -1, axis=0).T
            area += (x * after_y - after_x * y).sum() / 2
            found += even_odd(polygon, centres)
        np.testing.assert_array_equal(found.reshape(plane.shape), plane)
        assert area == plane.sum()


def even_odd(polygon: np.ndarray, points: np.ndarray) -> np.ndarray:
    return Polygon([*polygon, polygon[0]], closed=True).contains_points(points)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("frames", ["one a file", "many"])
def test_what_is_written_is_read_exactly_in_every_orientation(
    name: str, frames: str, dicom, tmp_path: Path, rng
) -> None:
    write = dicom.write if frames == "one a file" else dicom.write_multiframe
    series = the_series(write("a", np.zeros(SHAPE, np.int16), GRIDS[name]))
    grid = read_volume(series.folder).grid
    masks = {"organ": ragged(rng), "tumour, größer": ragged(rng), "nothing": np.zeros(SHAPE, bool)}
    write_structures(tmp_path / "a.dcm", masks, grid, series)
    back = read_structures(tmp_path / "a.dcm", grid)
    assert list(back) == list(masks)
    for target, mask in masks.items():
        np.testing.assert_array_equal(back[target], mask)
    assert referenced_series(tmp_path / "a.dcm") == (series.uid,)


def test_structures_with_invisible_characters_in_their_names_are_labels(dicom, tmp_path: Path) -> None:
    folder = dicom.write("a", np.zeros(SHAPE, np.int16), AXIAL)
    mask = np.zeros(SHAPE, bool)
    mask[3:9, 4:8, 1:3] = True
    write_structures(folder / "drawn.dcm", {"left\u00adlobe": mask}, AXIAL, the_series(folder))
    assert structure_names(folder / "drawn.dcm") == (r"left\xadlobe",)
    targets = Targets({"left\u00adlobe": (7,)})
    assert np.array_equal(read_numbered(folder / "drawn.dcm", targets, "a", AXIAL).voxels, 7 * mask)


def test_other_programs_find_voxels_names_colours_codes_and_images(dicom, tmp_path: Path, rng) -> None:
    """By pydicom and matplotlib: each contour on the plane of the image that it names, in LPS millimetres."""
    folder = dicom.write("a", np.zeros(SHAPE, np.int16), GRIDS["oblique"])
    grid, voxels = read_volume(folder).grid, np.zeros(SHAPE, np.uint8)
    voxels[3:20, 4:16, 1:5], voxels[8:12, 8:12, 2:4], voxels[9:11, 9:11, 2] = 1, 0, 2
    targets = Targets({"liver": (1, 2), "tumour": (2,)}, mode="overlapping")
    liver = Coding(Code("91723000", "SCT", "Anatomical Structure"), Code("10200004", "SCT", "Liver"))
    legend = Legend({"liver": liver}, {"tumour": "#c0392b"})
    (path,) = export_label(
        tmp_path / "a.rtstruct.dcm", LabelVolume(voxels, grid), targets, source=folder, legend=legend
    )
    found = pydicom.dcmread(path)
    scans = {header.SOPInstanceUID: header for header in map(pydicom.dcmread, folder.iterdir())}
    assert [str(one.ROIName) for one in found.StructureSetROISequence] == ["liver", "tumour"]
    assert [list(one.ROIDisplayColor) for one in found.ROIContourSequence] == [[86, 180, 233], [192, 57, 43]]
    coded = found.RTROIObservationsSequence[0].RTROIIdentificationCodeSequence[0]
    assert (coded.CodeValue, coded.CodingSchemeDesignator, coded.CodeMeaning) == ("10200004", "SCT", "Liver")
    (frame,) = found.ReferencedFrameOfReferenceSequence
    (series,) = frame.RTReferencedStudySequence[0].RTReferencedSeriesSequence
    assert {image.ReferencedSOPInstanceUID for image in series.ContourImageSequence} == scans.keys()
    header = next(iter(scans.values()))
    for tag in ("PatientName", "PatientID", "StudyInstanceUID", "FrameOfReferenceUID"):
        assert found.get(tag) == header.get(tag)
    assert frame.FrameOfReferenceUID == header.FrameOfReferenceUID
    expected = targets.masks(voxels)
    for named, drawn in zip(found.StructureSetROISequence, found.ROIContourSequence, strict=True):
        filled = np.zeros(SHAPE, int)
        for one in drawn.ContourSequence:
            header = scans[one.ContourImageSequence[0].ReferencedSOPInstanceUID]
            across, down = np.array(header.ImageOrientationPatient, float).reshape(2, 3)
            offset = np.array(one.ContourData, float).reshape(-1, 3) - np.array(header.ImagePositionPatient, float)
            assert abs(offset @ np.cross(across, down)).max() < 1e-3
            row_mm, column_mm = map(float, header.PixelSpacing)
            pixels = np.column_stack([offset @ across / column_mm, offset @ down / row_mm])
            k = round(float((np.array(header.ImagePositionPatient) * TO_LPS - grid.affine[:3, 3])[2] / 2.5))
            filled[:, :, k] += even_odd(pixels, CENTRES).reshape(SHAPE[:2])
        np.testing.assert_array_equal(filled, expected[str(named.ROIName)])


def test_a_structure_set_wants_its_series_its_grid_and_names_that_fit(dicom, tmp_path: Path) -> None:
    folder = dicom.write("a", np.zeros(SHAPE, np.int16), AXIAL)
    label, path = LabelVolume(np.ones(SHAPE, np.uint8), AXIAL), tmp_path / "a.rtstruct.dcm"
    with pytest.raises(BadFormat, match="give the DICOM series"):
        export_label(path, label, Targets({"a": (1,)}))
    elsewhere = LabelVolume(label.voxels, AXIAL.crop((1, 0, 0), SHAPE))
    with pytest.raises(GridMismatch, match="predict on the series"):
        export_label(path, elsewhere, Targets({"a": (1,)}), source=folder)
    for name in ("a" * 65, "a\\b"):
        with pytest.raises(BadFormat, match="rename the target"):
            export_label(path, label, Targets({name: (1,)}), source=folder)
    assert not path.exists()


def test_predict_writes_them_for_dicom_scans(dicom, tmp_path: Path, rng) -> None:
    spec = {"kind": "unet", "dimensions": 3, "widths": [4, 8]}
    recipe = recipe_from({"name": "small", "tiles": {"kind": "patches", "shape": [8, 8, 4]}, "network": spec})
    targets = Targets({"liver": (1, 2), "tumour": (2,)}, "overlapping")
    made = Bundle(recipe, recipe.pipeline, targets, ("CT",), TileGeometry((8, 8, 4)), (0.7, 0.9, 2.5))
    made.save(tmp_path / "bundle", made.network().state_dict(), {})
    folder = dicom.write("a", rng.integers(0, 900, SHAPE).astype(np.int16), AXIAL)
    for format in ("nii.gz", "rtstruct.dcm"):
        words = ["predict", tmp_path / "bundle", folder, "-o", tmp_path / format, "--format", format]
        done = CliRunner().invoke(app, [*map(str, words), "--device", "cpu", "--compile", "off"])
        assert done.exit_code == 0, done.exception
    (label,) = (tmp_path / "nii.gz").glob("*.nii.gz")
    (structures,) = (tmp_path / "rtstruct.dcm").glob("*.dcm")
    assert structures.name == label.name.replace("nii.gz", "rtstruct.dcm")
    assert not (tmp_path / "rtstruct.dcm/targets.ctbl").exists()  # it holds names and colours itself
    found = read_label(label)
    masks = read_structures(structures, found.grid)
    for name, mask in targets.masks(found.voxels).items():
        np.testing.assert_array_equal(masks[name], mask)


@pytest.mark.parametrize("keyword", ["PatientName", "StudyDate", "AccessionNumber", "FrameOfReferenceUID"])
@pytest.mark.parametrize("value", [None, "?", "Ärztin^Zoë"], ids=["missing", "strange", "Latin"])
@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")  # about the strange values, when they are written here
def test_strange_headers_become_a_structure_set_or_a_code(keyword: str, value: str | None, dicom, tmp_path) -> None:
    folder = dicom.write("a", np.zeros(SHAPE, np.int16), AXIAL)
    for path in folder.iterdir():
        header = pydicom.dcmread(path)
        header.SpecificCharacterSet = "ISO_IR 100"
        del header[keyword]
        if value is not None:
            setattr(header, keyword, value)
        header.save_as(path)
    path, label = tmp_path / "a.rtstruct.dcm", LabelVolume(np.ones(SHAPE, np.uint8), AXIAL)
    if value is None and keyword == "FrameOfReferenceUID":
        with pytest.raises(BadFormat, match="missing or garbled"):
            export_label(path, label, Targets({"größer": (1,)}), source=folder)
        assert not path.exists()
        return
    export_label(path, label, Targets({"größer": (1,)}), source=folder)
    written = pydicom.dcmread(path)
    assert str(written.StructureSetROISequence[0].ROIName) == "größer"
    assert str(written[keyword].value or "") == (value or "")
