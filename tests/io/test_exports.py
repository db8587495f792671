"""Labels for other programs: DICOM-SEG read by highdicom, VTK read by VTK and ITK, and what comes beside them."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from itertools import permutations, product
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
import SimpleITK
import vtk
from highdicom.color import CIELabColor
from pydicom.sr.codedict import codes
from typer.testing import CliRunner
from vtk.util.numpy_support import vtk_to_numpy

from delineate.cli.app import app
from delineate.core.grid import Grid
from delineate.core.legend import Code, Coding, Legend
from delineate.core.targets import Targets
from delineate.core.volume import LabelVolume, Volume
from delineate.datasets.dataset import read_numbered
from delineate.errors import BadFormat, BadShape, DelineateError, GridMismatch, RecipeError
from delineate.io.exports import export_label
from delineate.io.formats import read_label, read_volume, write_label, write_volume

SHAPE = (7, 6, 5)
SPACING_MM = (0.7, 0.9, 2.5)
TARGETS = Targets({"liver": (1, 2), "tumour": (2,)}, mode="overlapping")
TO_LPS = np.array([-1.0, -1.0, 1.0])


def marked() -> np.ndarray:
    """An asymmetric label: no flip or swap of axes leaves it alike."""
    voxels = np.zeros(SHAPE, np.uint8)
    voxels[1:5, 1:4, 1:3] = 1
    voxels[2:4, 1:2, 1:2] = 2
    voxels[6, 0, 4] = 2
    return voxels


def grids(*, oblique: bool) -> Iterator[Grid]:
    """All 48 orientations of an anisotropic grid."""
    turn = np.array([[0.9, 0.43588989, 0], [-0.43588989, 0.9, 0], [0, 0, 1.0]]) if oblique else np.eye(3)
    for order, signs in product(permutations(range(3)), product((1, -1), repeat=3)):
        axes = np.zeros((3, 3))
        axes[list(order), range(3)] = signs
        affine = np.eye(4)
        affine[:3, :3] = turn @ axes * SPACING_MM
        affine[:3, 3] = (-31.5, 12.25, 88.0)
        yield Grid(SHAPE, affine)


def points(voxels: np.ndarray, world: np.ndarray) -> set[tuple[int, ...]]:
    """Value and millimetres (in tenths, RAS) of every voxel that is not 0; ``world`` is in the order of argwhere."""
    return {(int(v), *np.rint(10 * w).astype(int)) for v, w in zip(voxels[voxels > 0], world, strict=True)}


def expected(grid: Grid) -> set[tuple[int, ...]]:
    return points(marked(), grid.world(np.argwhere(marked()).astype(float)))


def image_points(image: SimpleITK.Image) -> set[tuple[int, ...]]:
    voxels = SimpleITK.GetArrayFromImage(image).transpose(2, 1, 0)
    lps = [image.TransformIndexToPhysicalPoint(i.tolist()) for i in np.argwhere(voxels)]
    return points(voxels, np.array(lps) * TO_LPS)


def test_legacy_vtk_keeps_every_voxel_in_its_place_in_48_orientations(tmp_path: Path) -> None:
    for grid in grids(oblique=False):
        export_label(tmp_path / "a.vtk", LabelVolume(marked(), grid), TARGETS)
        assert image_points(SimpleITK.ReadImage(str(tmp_path / "a.vtk"))) == expected(grid)
        reader = vtk.vtkStructuredPointsReader()
        reader.SetFileName(str(tmp_path / "a.vtk"))
        reader.Update()
        assert image_points(of_vtk(reader.GetOutput())) == expected(grid)


def test_xml_vtk_keeps_directions_too(tmp_path: Path) -> None:
    for oblique in (False, True):
        for grid in grids(oblique=oblique):
            export_label(tmp_path / "a.vti", LabelVolume(marked(), grid), TARGETS)
            reader = vtk.vtkXMLImageDataReader()
            reader.SetFileName(str(tmp_path / "a.vti"))
            reader.Update()
            assert image_points(of_vtk(reader.GetOutput())) == expected(grid)


def of_vtk(data: vtk.vtkImageData) -> SimpleITK.Image:
    x, y, z = data.GetDimensions()
    image = SimpleITK.GetImageFromArray(vtk_to_numpy(data.GetPointData().GetScalars()).reshape(z, y, x))
    image.SetOrigin(data.GetOrigin())
    image.SetSpacing(data.GetSpacing())
    matrix = data.GetDirectionMatrix()
    image.SetDirection([matrix.GetElement(i, j) for i in range(3) for j in range(3)])
    return image


@pytest.mark.parametrize("suffix", [".vtk", ".vti"])
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "f4"])
def test_scans_keep_their_type(suffix: str, dtype: str, tmp_path: Path) -> None:
    voxels = np.arange(np.prod(SHAPE)).astype(dtype).reshape(1, *SHAPE)
    write_volume(tmp_path / f"a{suffix}", Volume(voxels, Grid.of_spacing(SHAPE)))
    reader = vtk.vtkStructuredPointsReader() if suffix == ".vtk" else vtk.vtkXMLImageDataReader()
    reader.SetFileName(str(tmp_path / f"a{suffix}"))
    reader.Update()
    found = vtk_to_numpy(reader.GetOutput().GetPointData().GetScalars())
    assert sorted(found.tolist()) == sorted(voxels.ravel().tolist())
    with pytest.raises(BadShape, match="2 channels"):
        write_volume(tmp_path / f"a{suffix}", Volume(np.repeat(voxels, 2, 0), Grid.of_spacing(SHAPE)))


def test_what_vtk_cannot_say_comes_beside_it(tmp_path: Path) -> None:
    grid = list(grids(oblique=True))[17]
    files = export_label(tmp_path / "a.vtk", LabelVolume(marked(), grid), TARGETS, about={"weights_sha256": ["ab"]})
    assert [file.name for file in files] == ["a.vtk", "a.nii.gz", "a.json"]
    assert read_label(files[1]).grid.matches(grid, 1e-4)
    beside = json.loads(files[2].read_text(encoding="utf-8"))
    assert np.allclose(beside["affine_ras_mm"], grid.affine)
    assert beside["targets"] == {"liver": [1, 2], "tumour": [2]}
    voxel_ml = np.prod(SPACING_MM) / 1000
    assert beside["volume_ml"] == pytest.approx({"liver": 25 * voxel_ml, "tumour": 3 * voxel_ml})
    assert beside["weights_sha256"] == ["ab"]


def right_handed() -> Iterator[Grid]:
    return (grid for grid in grids(oblique=True) if np.linalg.det(grid.affine[:3, :3]) > 0)


def test_dicom_seg_lies_on_its_series_in_every_orientation(dicom, tmp_path: Path) -> None:
    for i, grid in enumerate(right_handed()):
        folder = dicom.write(f"s{i}", np.zeros(SHAPE, np.int16), grid)
        path = tmp_path / f"{i}.dcm"
        exclusive = Targets({"liver": (1,), "tumour": (2,)})
        export_label(path, LabelVolume(marked(), read_volume(folder).grid), exclusive, source=folder)
        back = read_label(path)
        assert back.grid.matches(grid, 1e-3)
        assert np.array_equal(back.voxels, marked())


@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP"])
@pytest.mark.parametrize("frames", ["one a file", "many"])
def test_another_library_reads_the_same_voxels_and_names(dicom, tmp_path: Path, kind: str, frames: str) -> None:
    grid = next(right_handed())
    write = dicom.write if frames == "one a file" else dicom.write_multiframe
    folder = write("a", np.zeros(SHAPE, np.int16), grid)
    targets = Targets({"liver": (1,), "something else": (2,)})
    path = tmp_path / "seg.dcm"
    coded = Coding(Code("91723000", "SCT", "Anatomical Structure"), Code("10200004", "SCT", "Liver"))
    export_label(path, LabelVolume(marked(), grid), targets, source=folder, kind=kind, legend=Legend({"liver": coded}))
    seg = highdicom.seg.segread(path)
    names = {s.SegmentLabel: s.SegmentedPropertyTypeCodeSequence[0].CodeMeaning for s in seg.SegmentSequence[-2:]}
    assert names == {"liver": "Liver", "something else": "Selected region"}
    # Empty frames are kept: as many as slices, for each target in BINARY.
    assert seg.NumberOfFrames == (2 if kind == "BINARY" else 1) * SHAPE[2]
    volume = seg.get_volume(combine_segments=True)
    index = np.argwhere(volume.array)
    world = (volume.affine @ np.c_[index, np.ones(len(index))].T)[:3].T * TO_LPS
    assert points(volume.array, world) == expected(grid)
    sources = {pydicom.dcmread(file).SOPInstanceUID for file in folder.iterdir()}
    referred = {i.ReferencedSOPInstanceUID for i in seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence}
    assert referred == sources


def test_a_target_has_its_colour_wherever_it_is_looked_at(dicom, tmp_path: Path) -> None:
    """Within what 16-bit CIELab and the text of a header round away."""
    grid = next(right_handed())
    folder = dicom.write("a", np.zeros(SHAPE, np.int16), grid)
    targets, legend = Targets({"liver": (1,), "tumour": (2,)}), Legend(colours={"tumour": "#C0392B"})
    label = LabelVolume(marked(), read_volume(folder).grid)
    for name in ("seg.dcm", "label.seg.nrrd"):
        export_label(tmp_path / name, label, targets, source=folder, legend=legend)
    expected = {"liver": (86, 180, 233), "tumour": (192, 57, 43)}
    seg = highdicom.seg.segread(tmp_path / "seg.dcm")
    shown = {
        segment.SegmentLabel: CIELabColor.from_dicom_value(segment.RecommendedDisplayCIELabValue).to_rgb()
        for segment in seg.SegmentSequence
    }
    header = nrrd_header(tmp_path / "label.seg.nrrd")
    for number, (name, colour) in enumerate(expected.items()):
        np.testing.assert_allclose(shown[name], colour, atol=1)
        assert header[f"Segment{number}_Name"] == name
        np.testing.assert_allclose(
            [255 * float(x) for x in header[f"Segment{number}_Color"].split()], colour, atol=0.01
        )


def nrrd_header(path: Path) -> dict[str, str]:
    """The key:=value lines."""
    text = path.read_bytes().split(b"\n\n")[0].decode()
    return dict(line.split(":=", 1) for line in text.splitlines() if ":=" in line)


def test_overlapping_targets_are_segments_of_their_own(dicom, tmp_path: Path) -> None:
    grid = next(right_handed())
    folder = dicom.write("a", np.zeros(SHAPE, np.int16), grid)
    export_label(tmp_path / "seg.dcm", LabelVolume(marked(), grid), TARGETS, source=folder)
    seg = highdicom.seg.segread(tmp_path / "seg.dcm")
    both = seg.get_volume().array
    assert both[..., 0].sum() == (marked() > 0).sum()
    assert both[..., 1].sum() == (marked() == 2).sum()
    with pytest.raises(RecipeError, match="overlap"):
        export_label(tmp_path / "map.dcm", LabelVolume(marked(), grid), TARGETS, source=folder, kind="LABELMAP")


@pytest.mark.parametrize(("first", "masks"), [((1,), 0.5), ((1, 2), 1.7)], ids=["apart", "overlapping"])
def test_many_targets_are_written_without_copies_of_their_masks(
    first: tuple[int, ...], masks: float, dicom, tmp_path: Path
) -> None:
    """Those that exclude each other without a mask each. ``masks``: how much of the memory of all they may take."""
    grid = Grid((512, 512, 2), np.diag([-1.0, -1, 3, 1]))
    folder, count = dicom.write("a", np.zeros(grid.shape, np.int16), grid), 24
    voxels = np.zeros(grid.shape, np.uint8, order="F")
    voxels[100:300, 200:400] = np.arange(200)[:, None, None] % (count + 1)
    targets = Targets({"t1": first} | {f"t{n}": (n,) for n in range(2, count + 1)}, "overlapping")
    tracemalloc.start()
    try:
        export_label(tmp_path / "seg.dcm", LabelVolume(voxels, grid), targets, source=folder)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < masks * count * voxels.size
    assert np.array_equal(read_numbered(tmp_path / "seg.dcm", targets, "a").voxels, voxels)


def test_a_segmentation_invents_nothing_about_the_patient(dicom, tmp_path: Path) -> None:
    grid = next(right_handed())
    folder = dicom.write("a", np.zeros(SHAPE, np.int16), grid)
    export_label(tmp_path / "seg.dcm", LabelVolume(marked(), grid), TARGETS, source=folder)
    seg, source = pydicom.dcmread(tmp_path / "seg.dcm"), pydicom.dcmread(next(folder.iterdir()))
    for tag in ("PatientName", "PatientID", "PatientBirthDate", "StudyInstanceUID", "FrameOfReferenceUID"):
        assert seg.get(tag) == source.get(tag)
    assert not seg.get("ContentCreatorName")


COPIED = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID",
    "AccessionNumber", "StudyInstanceUID", "FrameOfReferenceUID",
)  # fmt: skip


@pytest.mark.parametrize("value", [None, "?"], ids=["missing", "strange"])
@pytest.mark.parametrize("keyword", COPIED)
@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")  # about the strange values, when they are written here
def test_strange_headers_become_a_segmentation_or_a_code(keyword: str, value: str | None, dicom, tmp_path) -> None:
    grid = next(right_handed())
    folder = dicom.write("a", np.zeros(SHAPE, np.int16), grid)
    for path in folder.iterdir():
        header = pydicom.dcmread(path)
        del header[keyword]
        if value is not None:
            setattr(header, keyword, value)
        header.save_as(path)
    refused = nullcontext() if value is None and not keyword.endswith("UID") else suppress(DelineateError)
    with refused:
        export_label(tmp_path / "seg.dcm", LabelVolume(marked(), grid), TARGETS, source=folder)
        assert highdicom.seg.segread(tmp_path / "seg.dcm").number_of_segments == 2
        return
    assert not (tmp_path / "seg.dcm").exists()


def test_a_segmentation_wants_its_series_and_its_grid(dicom, tmp_path: Path) -> None:
    grid = next(right_handed())
    folder = dicom.write("a", np.zeros(SHAPE, np.int16), grid)
    label = LabelVolume(marked(), grid.crop((1, 0, 0), SHAPE))
    with pytest.raises(GridMismatch, match="predict on the series"):
        export_label(tmp_path / "seg.dcm", label, TARGETS, source=folder)
    with pytest.raises(BadFormat, match="give the DICOM series"):
        export_label(tmp_path / "seg.dcm", LabelVolume(marked(), grid), TARGETS)
    assert not (tmp_path / "seg.dcm").exists()


@pytest.mark.parametrize("file", ["seg.dcm", "drawn.rtstruct.dcm"])
def test_dicom_refuses_names_that_it_would_cut_or_split(file: str, dicom, tmp_path: Path) -> None:
    grid = next(right_handed())
    folder = dicom.write("a", np.zeros(SHAPE, np.int16), grid)
    for name in ("n" * 65, r"left\right"):
        with pytest.raises(BadFormat, match="cannot be a name in DICOM"):
            export_label(tmp_path / file, LabelVolume(marked(), grid), Targets({name: (1, 2)}), source=folder)
    assert not (tmp_path / file).exists()
    assert export_label(tmp_path / file, LabelVolume(marked(), grid), Targets({"n" * 64: (1, 2)}), source=folder)


@pytest.mark.parametrize("name", ["anterior", "Liver", "prostate", "tumour", "cyst", "brain"])
def test_no_code_is_guessed_from_a_name(name: str, dicom, tmp_path: Path) -> None:
    grid = next(right_handed())
    folder = dicom.write("a", np.zeros(SHAPE, np.int16), grid)
    export_label(tmp_path / "seg.dcm", LabelVolume(marked(), grid), Targets({name: (1, 2)}), source=folder)
    (segment,) = highdicom.seg.segread(tmp_path / "seg.dcm").SegmentSequence
    assert segment.SegmentLabel == name
    # Both are the dictionary's, and claim nothing of anatomy.
    assert segment.SegmentedPropertyCategoryCodeSequence[0] == codes.cid7150.SpatialAndRelationalConcept
    assert segment.SegmentedPropertyTypeCodeSequence[0] == codes.DCM.SelectedRegion


SEGMENTS = Targets({"left horn": (3,), "tumour, größer": (1, 2), "nowhere": (7,)})


@pytest.mark.parametrize("oblique", [False, True])
def test_a_slicer_segmentation_has_voxels_grid_and_segments(oblique: bool, tmp_path: Path) -> None:
    """By ITK's reader, and by the keys that 3D Slicer's reader looks for."""
    for grid in list(grids(oblique=oblique))[::5]:
        voxels = marked()
        voxels[5, 4, 3] = 3
        (path,) = export_label(tmp_path / "a.seg.nrrd", LabelVolume(voxels, grid), SEGMENTS)
        image = SimpleITK.ReadImage(str(path))
        wanted = np.where(voxels == 2, 1, voxels)
        assert image_points(image) == points(wanted, grid.world(np.argwhere(wanted).astype(float)))
        told = {key: image.GetMetaData(key) for key in image.GetMetaDataKeys()}
        assert told["Segmentation_ContainedRepresentationNames"] == "Binary labelmap|"
        assert told["Segmentation_MasterRepresentation"] == told["Segmentation_SourceRepresentation"]
        assert told["Segmentation_ReferenceImageExtentOffset"] == "0 0 0"
        read = SimpleITK.GetArrayFromImage(image).transpose(2, 1, 0)
        for i, (name, value) in enumerate({"left horn": 3, "tumour, größer": 1, "nowhere": 7}.items()):
            assert told[f"Segment{i}_Name"] == name
            assert (told[f"Segment{i}_LabelValue"], told[f"Segment{i}_Layer"]) == (str(value), "0")
            first_x, last_x, first_y, last_y, first_z, last_z = map(int, told[f"Segment{i}_Extent"].split())
            box = np.zeros(SHAPE, bool)
            box[first_x : last_x + 1, first_y : last_y + 1, first_z : last_z + 1] = True
            assert not (read == value)[~box].any()
            assert all(0 <= float(part) <= 1 for part in told[f"Segment{i}_Color"].split())
        assert len({told[f"Segment{i}_ID"] for i in range(3)}) == 3
        back = read_label(path)
        assert np.array_equal(back.voxels, wanted)
        assert back.grid.matches(grid, 1e-4)


def test_overlapping_targets_are_layers_of_a_slicer_segmentation(tmp_path: Path) -> None:
    """As 3D Slicer writes them: the layers are a list along the first axis."""
    grid = list(grids(oblique=True))[5]
    (path,) = export_label(tmp_path / "a.seg.nrrd", LabelVolume(marked(), grid), TARGETS)
    image = SimpleITK.ReadImage(str(path))
    assert image.GetMetaData("Segment0_Layer") == "0"
    assert image.GetMetaData("Segment1_Layer") == "1"
    assert b"kinds: list domain domain domain" in path.read_bytes()[:1000]
    layers = SimpleITK.GetArrayFromImage(image).transpose(3, 2, 1, 0)
    assert np.array_equal(layers[0] > 0, marked() > 0)
    assert np.array_equal(layers[1] > 0, marked() == 2)
    back = read_numbered(path, TARGETS, "a")
    assert np.array_equal(back.voxels, marked())
    assert back.grid.matches(grid, 1e-4)
    with pytest.raises(BadShape, match="2 layers"):
        read_label(path)
    with pytest.raises(BadFormat, match="names its segments"):
        write_label(path, LabelVolume(marked(), grid))


@pytest.mark.parametrize(
    "ending", [".nii.gz", ".nii", ".dseg.nii.gz", ".label.nii.gz", ".mha", ".mhd", ".nrrd", ".nhdr"]
)
def test_every_written_suffix_is_read_alike_by_itk(ending: str, tmp_path: Path) -> None:
    for grid in list(grids(oblique=False))[::7]:
        (path,) = export_label(tmp_path / f"a{ending}", LabelVolume(marked(), grid), TARGETS)
        image = SimpleITK.ReadImage(str(path))
        assert np.array_equal(SimpleITK.GetArrayFromImage(image).transpose(2, 1, 0), marked())
        index = np.argwhere(marked())
        world = np.array([image.TransformIndexToPhysicalPoint(i.tolist()) for i in index]) * TO_LPS
        assert np.allclose(world, grid.world(index.astype(float)), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "ending",
    [
        *(".nii.zip", ".zip", ".img", ".hdr", ".mgz", ".mgh.gz", ".nii.bz2", ".mha.gz", ".nrrd.gz", ".gii", ""),
        *(".seg.nhdr", ".seq.nrrd", ".seg.vtm", ".ome.tif", ".OME.tiff", ".dlabel.nii", ".dscalar.nii"),
    ],
)
def test_every_other_suffix_is_refused_before_anything_is_read(ending: str, tmp_path: Path) -> None:
    label = LabelVolume(marked(), next(grids(oblique=False)))
    with pytest.raises(BadFormat):
        export_label(tmp_path / f"a{ending}", label, TARGETS)
    with pytest.raises(BadFormat):
        write_volume(tmp_path / f"a{ending}", Volume(marked()[None], label.grid))
    # The scan to be converted is not there, which is not what is said.
    done = CliRunner().invoke(app, ["data", "convert", str(tmp_path / "no.nii"), str(tmp_path / f"a{ending}")])
    assert done.exit_code == 1
    assert isinstance(done.exception, BadFormat)
    assert not list(tmp_path.iterdir())


def test_the_real_mask_goes_there_and_back(real_data: Path, tmp_path: Path) -> None:
    study = next((real_data / "dicom" / "PGBM-001").iterdir())
    image, mask = next(study.glob("*T1post*")), read_label(next(study.glob("*Mask*")))
    placed = LabelVolume(mask.voxels, read_volume(image).grid)
    export_label(tmp_path / "seg.dcm", placed, Targets({"tumour": (1,)}), source=image)
    assert np.array_equal(read_label(tmp_path / "seg.dcm").voxels, mask.voxels)


@pytest.mark.parametrize("ending", [".mha", ".nii.gz", ".nrrd", ".vtk", ".vti"])
@pytest.mark.parametrize("values", [(0,), (0, -1, 3), range(300)], ids=["none", "negative", "many"])
def test_labels_that_no_targets_can_name_are_converted_by_their_values(tmp_path: Path, values, ending: str) -> None:
    voxels = np.resize(np.array(values, np.int16), (10, 8, 5))
    write_label(tmp_path / "a.mha", LabelVolume(voxels, Grid.of_spacing(voxels.shape)))
    done = CliRunner().invoke(
        app, ["data", "convert", "--label", str(tmp_path / "a.mha"), str(tmp_path / f"b{ending}")]
    )
    assert done.exit_code == 0, done.output
    if ending != ".vti":  # which nothing here reads
        assert np.array_equal(read_label(tmp_path / ("b.nii.gz" if ending == ".vtk" else f"b{ending}")).voxels, voxels)


def test_a_format_that_names_segments_asks_for_targets(tmp_path: Path) -> None:
    write_label(tmp_path / "a.mha", LabelVolume(np.zeros(SHAPE, np.uint8), Grid.of_spacing(SHAPE)))
    done = CliRunner().invoke(
        app, ["data", "convert", "--label", str(tmp_path / "a.mha"), str(tmp_path / "b.seg.nrrd")]
    )
    assert isinstance(done.exception, BadFormat)
    assert "--targets" in str(done.exception)


def test_whole_numbers_of_64_bits_are_written_to_legacy_vtk_with_32(tmp_path: Path) -> None:
    grid = Grid.of_spacing(SHAPE)
    for values in (np.array([-5, 2**31 - 1]), np.array([0, 2**32 - 1], np.uint64), np.array([7, 2**32 - 1])):
        write_volume(tmp_path / "a.vtk", Volume(np.resize(values, SHAPE)[None], grid))
        there = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(tmp_path / "a.vtk")))
        assert set(np.unique(there).tolist()) == set(values.tolist())
    with pytest.raises(BadFormat, match="from -1 to 2147483648 do not fit"):
        write_volume(tmp_path / "a.vtk", Volume(np.resize(np.array([-1, 2**31]), SHAPE)[None], grid))
