"""Labels beside DICOM series: pictures, which lie as the image shows; segments and contours of what they refer to."""

from __future__ import annotations

import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from delineate.core.grid import Grid
from delineate.core.subject import Masks
from delineate.core.targets import Targets
from delineate.datasets.dataset import load_label, load_scan, read_numbered
from delineate.datasets.inspection import inspect
from delineate.datasets.layouts import open_dataset
from delineate.datasets.repair import repair
from delineate.errors import (
    AmbiguousOrientation,
    BadFormat,
    BadGeometry,
    GridMismatch,
    MissingFile,
    SeveralSeries,
    TooLarge,
)
from delineate.io.dicom import frames_of
from delineate.io.dicom_seg import write_segmentation
from delineate.io.dicom_series import the_series
from delineate.io.formats import parts_of, read_header, read_label
from delineate.io.rtstruct import write_structures

SHAPE = (24, 20, 10)
ORGANS = Targets({"liver": (63,), "spleen": (252,)})


def organs(shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """One organ that looks different in every direction, and one that does not."""
    label = np.zeros(shape, np.uint8)
    label[3:11, 4:9, 1:4] = 63
    label[5:8, 9:12, 2:4] = 63
    label[14:18, 12:16, 6:8] = 252
    return label


def scan(label: np.ndarray, seed: int = 0) -> np.ndarray:
    """One organ is brighter than what surrounds it, the other darker."""
    rng = np.random.default_rng(seed)
    body = ndimage.gaussian_filter(rng.standard_normal(label.shape), 2)
    voxels = 300 + 40 * body + 90 * (label == 63) - 90 * (label == 252) + 5 * rng.standard_normal(label.shape)
    return voxels.astype(np.uint16)


def turned(label: np.ndarray, swap: bool, flip: tuple[bool, ...]) -> np.ndarray:
    reverse = label[tuple(slice(None, None, -1 if one else None) for one in flip)]
    return reverse.transpose(1, 0, 2) if swap else reverse


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("flip", list(product((False, True), repeat=3)))
def test_pictures_lie_where_their_borders_follow_the_image(
    swap, flip, tmp_path: Path, save_series, save_pictures
) -> None:
    save_series("ann/t1", scan(organs()))
    save_pictures("ann/Ground", turned(organs(), swap, flip))
    [subject] = open_dataset(tmp_path).subjects
    label = load_label(subject, ORGANS, load_scan(subject).grid)
    assert np.array_equal(label.voxels, organs())
    assert label.voxels.flags.f_contiguous


def test_a_real_tumour_drawn_as_pictures_lies_where_it_was_drawn(
    real_data: Path, tmp_path: Path, save_pictures
) -> None:
    study = open_dataset(real_data / "dicom" / "PGBM-001", images="*t1post*", labels="*mask*").subjects[0]
    drawn = load_label(study, None, None)
    shutil.copytree(study.scans["image"], tmp_path / "ann/dicom")
    save_pictures("ann/masks", 255 * drawn.voxels[::-1, :, ::-1])
    label = read_label(tmp_path / "ann/masks")
    assert np.array_equal(label.voxels, 255 * drawn.voxels)
    assert label.grid.matches(drawn.grid, 0.1)


def test_square_pictures_too(tmp_path: Path, save_series, save_pictures) -> None:
    label = organs((24, 24, 10))
    save_series("t1", scan(label))
    save_pictures("masks", turned(label, True, (True, False, True)))
    assert np.array_equal(read_label(tmp_path / "masks").voxels, label)


def test_pictures_called_like_files_of_the_series_are_their_slices(tmp_path: Path, save_series, save_pictures) -> None:
    """Whose names run in no order."""
    folder = save_series("ann/t1", scan(organs()))
    names = [frame.instance.path.stem for frame in frames_of(the_series(folder))]
    assert names != sorted(names)
    save_pictures("ann/Ground", turned(organs(), False, (True, False, False)), names)
    assert np.array_equal(read_label(tmp_path / "ann/Ground").voxels, organs())


def test_where_borders_tell_nothing_pictures_are_refused(tmp_path: Path, save_series, save_pictures) -> None:
    save_series("ann/t1", np.random.default_rng(0).integers(0, 999, SHAPE))
    save_pictures("ann/Ground", organs())
    with pytest.raises(AmbiguousOrientation, match=r"nothing tells how the pictures in .*Ground.* lie on series t1"):
        read_label(tmp_path / "ann/Ground")
    [problem] = inspect(open_dataset(tmp_path)).errors
    assert problem.code == "E_AMBIGUOUS_ORIENTATION"


def test_pictures_that_mark_nothing_need_no_evidence(tmp_path: Path, save_series, save_pictures) -> None:
    save_series("ann/t1", scan(organs()))
    save_pictures("ann/Ground", 0 * organs())
    assert not read_label(tmp_path / "ann/Ground").voxels.any()


def test_another_number_of_pictures_or_pixels_is_refused(tmp_path: Path, save_series, save_pictures) -> None:
    save_series("ann/t1", scan(organs()))
    save_pictures("ann/few", organs()[:, :, 1:])
    save_pictures("ann/small", organs()[1:])
    with pytest.raises(GridMismatch, match=r"few' holds 9 pictures.*'t1' \(MR.*10 slices"):
        read_label(tmp_path / "ann/few")
    with pytest.raises(GridMismatch, match=r"has 23 × 20 pixels, the slices of series t1 have 24 × 20"):
        read_label(tmp_path / "ann/small")


def test_pictures_without_a_series_are_refused(tmp_path: Path, save_pictures) -> None:
    folder = save_pictures("a/b/c/d/masks", organs())
    with pytest.raises(MissingFile, match="no DICOM series lies beside the pictures"):
        read_label(folder)


def test_a_huge_picture_is_refused_before_it_is_decoded(tmp_path: Path, save_series, save_pictures) -> None:
    from PIL import Image

    save_series("ann/t1", scan(organs()))
    folder = save_pictures("ann/Ground", organs())
    Image.new("L", (4096, 4096)).save(folder / "slice1.png")
    with pytest.raises(TooLarge):
        read_label(folder)


def test_a_folder_for_each_structure_names_the_targets(tmp_path: Path, save_series, save_pictures) -> None:
    """They were drawn together: the one that would fit either way lies as the other does."""
    save_series("ann/t1", scan(organs()))
    for name, values in ORGANS.values.items():
        save_pictures(f"ann/masks/{name}", 255 * turned(np.isin(organs(), values), False, (False, True, True)))
    dataset = open_dataset(tmp_path)
    assert dataset.targets == Targets({"liver": (1,), "spleen": (2,)})
    [subject] = dataset.subjects
    assert isinstance(subject.label, Masks)
    masks = dataset.targets.masks(load_label(subject, dataset.targets, load_scan(subject).grid).voxels)
    assert all(np.array_equal(masks[name], organs() == value) for name, (value,) in ORGANS.values.items())


def chaos(patient: str, save_series, save_pictures) -> None:
    """Two echoes of one series in two folders, whose labels are grey values; and another sequence with its own."""
    other = organs((20, 20, 8))
    for echo, seed in (("InPhase", 0), ("OutPhase", 1)):
        save_series(
            f"{patient}/T1DUAL/DICOM_anon/{echo}", scan(organs(), seed), series=f"{patient}dual", study=patient,
            SeriesDescription="t1_fl2d", PatientID=patient,
        )  # fmt: skip
    save_series(
        f"{patient}/T2SPIR/DICOM_anon", scan(other, 2), study=patient, SeriesDescription="t2_spir", SeriesNumber=2,
        PatientID=patient,
    )  # fmt: skip
    save_pictures(f"{patient}/T1DUAL/Ground", organs()[:, :, ::-1])
    save_pictures(f"{patient}/T2SPIR/Ground", other[:, ::-1])


def test_the_folders_of_chaos(tmp_path: Path, save_series, save_pictures) -> None:
    chaos("1", save_series, save_pictures)
    chaos("2", save_series, save_pictures)
    dual = {"in": {"folder": "InPhase"}, "out": {"folder": "OutPhase"}}
    dataset = open_dataset(tmp_path, images=dual, targets=ORGANS)
    assert [subject.id for subject in dataset.subjects] == ["1", "2"]
    assert dataset.layout == "dicom"
    assert not inspect(dataset).errors
    for subject in dataset.subjects:
        found = load_scan(subject)
        assert subject.channels == ("in", "out")
        assert np.array_equal(found.voxels[0], scan(organs(), 0))
        assert np.array_equal(load_label(subject, ORGANS, found.grid).voxels, organs())
    [spir, _] = open_dataset(tmp_path, images="*spir*", targets=ORGANS).subjects
    assert np.array_equal(load_label(spir, ORGANS, load_scan(spir).grid).voxels, organs((20, 20, 8)))
    [first, _] = open_dataset(tmp_path, images="*spir*", labels={"folder": "T1DUAL/Ground"}).subjects
    assert first.label is None, "it was drawn on a series that is no channel"
    with pytest.raises(SeveralSeries, match=r"label of '1' could be pictures in .*T1DUAL/Ground', pictures in"):
        open_dataset(tmp_path)


def test_a_repaired_copy_holds_the_label_as_it_lies(tmp_path: Path, save_series, save_pictures) -> None:
    save_series("data/ann/t1", scan(organs()))
    save_pictures("data/ann/Ground", organs()[::-1])
    repair(open_dataset(tmp_path / "data", targets=ORGANS), tmp_path / "copy")
    assert np.array_equal(read_label(tmp_path / "copy/ann/Ground.nii.gz").voxels, organs())


def test_what_a_stack_hangs_on_is_part_of_its_hash(tmp_path: Path, save_series, save_pictures) -> None:
    series = save_series("ann/t1", scan(organs()))
    folder = save_pictures("ann/Ground", organs())
    assert set(parts_of(folder)) == {*series.iterdir(), *folder.iterdir()}


def test_previews_are_no_label_and_pictures_elsewhere_are_reported(tmp_path: Path, save_series, save_pictures) -> None:
    for patient in ("ann", "bob"):
        folder = save_series(f"{patient}/t1", scan(organs()), study=patient, PatientID=patient)
        next(iter(save_pictures(f"previews_{patient}", organs()[:, :, :1]).iterdir())).rename(folder / "preview.png")
        (tmp_path / f"previews_{patient}").rmdir()
    save_pictures("masks", organs())
    dataset = open_dataset(tmp_path)
    assert [subject.label for subject in dataset.subjects] == [None, None]
    assert dataset.notes == ("1 folders of pictures belong to no single study: masks",)


def test_other_pictures_beside_a_label_do_not_matter(tmp_path: Path, save_series, save_pictures) -> None:
    from PIL import Image

    save_series("ann/t1", scan(organs()))
    save_pictures("ann/Ground", organs()[::-1])
    for path in save_pictures("ann/overlays", organs()).iterdir():
        Image.new("RGB", SHAPE[:2]).save(path)
    [subject] = open_dataset(tmp_path, targets=ORGANS).subjects
    assert np.array_equal(load_label(subject, ORGANS, None).voxels, organs())


def test_series_of_masks_in_a_folder_of_structures(tmp_path: Path, save_series) -> None:
    """As 3D-IRCADb has them: DICOM masks whose headers are copies of the scan's."""
    save_series("1/PATIENT_DICOM", scan(organs()), series="s", SeriesDescription="ct")
    for name, (value,) in ORGANS.values.items():
        save_series(f"1/MASKS_DICOM/{name}", 255 * (organs() == value), series="s", SeriesDescription="ct")
    dataset = open_dataset(tmp_path)
    [subject] = dataset.subjects
    assert (subject.id, subject.channels) == ("1", ("ct",))
    label = load_label(subject, dataset.targets, load_scan(subject).grid)
    assert np.array_equal(label.voxels, np.select([organs() == 63, organs() == 252], [1, 2]))


def grid_of(folder: Path) -> Grid:
    return read_header(folder).grid


@pytest.mark.parametrize("write", [write_segmentation, write_structures])
def test_segments_and_contours_are_the_label_of_the_series_that_they_refer_to(
    write, tmp_path: Path, save_series
) -> None:
    t1 = save_series("ann/t1", scan(organs()), SeriesNumber=1)
    t2 = save_series("ann/t2", scan(organs(), 1), SeriesNumber=2)
    grid = grid_of(t1)
    write(tmp_path / "ann/of_t1.dcm", {"liver": organs() == 63, "spleen": organs() == 252}, grid, the_series(t1))
    write(tmp_path / "ann/of_t2.dcm", {"liver": organs() == 252}, grid, the_series(t2))
    dataset = open_dataset(tmp_path, images="t1")
    assert dataset.targets == Targets({"liver": (1,), "spleen": (2,)})
    [subject] = dataset.subjects
    expected = np.select([organs() == 63, organs() == 252], [1, 2])
    assert np.array_equal(load_label(subject, dataset.targets, grid).voxels, expected)
    assert subject.label is not None
    alone = read_numbered(subject.label, dataset.targets, "ann")
    assert np.array_equal(alone.voxels, expected)
    assert alone.grid.matches(grid, 0.01)
    assert not inspect(dataset).errors
    with pytest.raises(SeveralSeries, match="label of 'ann' could be"):
        open_dataset(tmp_path)  # both are channels, and both labels have a liver
    [other] = open_dataset(tmp_path, images="t2").subjects
    assert other.label is not None
    assert np.array_equal(read_numbered(other.label, Targets({"liver": (5,)}), "ann").voxels, 5 * (organs() == 252))


def without_empty_slices(path: Path, **measures: float | None) -> None:
    """Many programs leave them out. ``measures`` are other pixel measures, or None for those that are left out, too."""
    from pydicom import dcmread

    seg = dcmread(path)
    size = seg.Rows * seg.Columns
    bits = np.unpackbits(np.frombuffer(seg.PixelData, np.uint8), bitorder="little")[: size * seg.NumberOfFrames]
    kept = [k for k, plane in enumerate(bits.reshape(-1, size)) if plane.any()]
    seg.PixelData = np.packbits(bits.reshape(-1, size)[kept].ravel(), bitorder="little").tobytes() + b"\0"
    seg.PixelData = seg.PixelData[: len(seg.PixelData) // 2 * 2]
    seg.PerFrameFunctionalGroupsSequence = [seg.PerFrameFunctionalGroupsSequence[k] for k in kept]
    seg.NumberOfFrames = len(kept)
    [said] = seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence
    for keyword, value in measures.items():
        if value is None:
            delattr(said, keyword)
        else:
            setattr(said, keyword, value)
    seg.save_as(path)


def test_segments_may_leave_empty_slices_out(tmp_path: Path, save_series) -> None:
    t1 = save_series("ann/t1", scan(organs()))
    write_segmentation(tmp_path / "ann/seg.dcm", {"liver": organs() == 63}, grid_of(t1), the_series(t1))
    without_empty_slices(tmp_path / "ann/seg.dcm")
    dataset = open_dataset(tmp_path)
    [subject] = dataset.subjects
    assert np.array_equal(load_label(subject, dataset.targets, grid_of(t1)).voxels, organs() == 63)


def marked(slices: list[int]) -> np.ndarray:
    mask = np.zeros(SHAPE, bool)
    mask[4:9, 5:11, slices] = True
    return mask


@pytest.mark.parametrize("slices", [[3], [3, 7], [3, 5, 9], [3, 4, 7]], ids=str)
def test_segments_that_do_not_say_how_far_apart_slices_are_lie_on_those_of_the_scan(
    slices: list[int], tmp_path: Path, save_series
) -> None:
    """Alone, a slice is as high as it is thick, and slices that are about as far apart lie side by side."""
    path, grid = tmp_path / "ann/seg.dcm", grid_of(t1 := save_series("ann/t1", scan(organs())))
    write_segmentation(path, {"liver": marked(slices)}, grid, the_series(t1))
    without_empty_slices(path, SpacingBetweenSlices=None)
    dataset = open_dataset(tmp_path)
    [subject] = dataset.subjects
    assert np.array_equal(load_label(subject, dataset.targets, grid).voxels, marked(slices))
    if slices in ([3], [3, 4, 7]):
        alone, part = read_label(path), marked(slices)[:, :, 3 : slices[-1] + 1]
        assert np.array_equal(alone.voxels, part)
        assert alone.grid.matches(grid.crop((0, 0, 3), part.shape), 0.01)
        assert alone.grid.spacing_mm == pytest.approx(grid.spacing_mm)
    else:
        with pytest.raises(BadGeometry, match="no two slices side by side"):
            read_label(path)


def test_a_segment_in_one_slice_without_a_thickness_has_no_volume(tmp_path: Path, save_series) -> None:
    t1 = save_series("ann/t1", scan(organs()))
    write_segmentation(tmp_path / "seg.dcm", {"liver": marked([3])}, grid_of(t1), the_series(t1))
    without_empty_slices(tmp_path / "seg.dcm", SpacingBetweenSlices=None, SliceThickness=0)
    with pytest.raises(BadGeometry, match="does not say how far apart"):
        read_label(tmp_path / "seg.dcm")


def test_slices_between_distant_segments_are_counted_before_they_are_made(tmp_path: Path, save_series) -> None:
    from pydicom import dcmread

    path, grid = tmp_path / "seg.dcm", grid_of(t1 := save_series("ann/t1", scan(organs())))
    write_segmentation(path, {"liver": marked([0, 1])}, grid, the_series(t1))
    without_empty_slices(path, SpacingBetweenSlices=0.01)
    seg = dcmread(path)
    first, second = (one.PlanePositionSequence[0] for one in seg.PerFrameFunctionalGroupsSequence)
    second.ImagePositionPatient = [*first.ImagePositionPatient[:2], first.ImagePositionPatient[2] + 1000]
    seg.save_as(path)
    with pytest.raises(TooLarge, match="100001 voxels"):
        read_label(path)


def test_segmentations_of_different_structures_are_one_label(tmp_path: Path, save_series) -> None:
    t1 = save_series("ann/t1", scan(organs()))
    for name, (value,) in ORGANS.values.items():
        write_segmentation(tmp_path / f"ann/{name}.dcm", {name: organs() == value}, grid_of(t1), the_series(t1))
    dataset = open_dataset(tmp_path)
    [subject] = dataset.subjects
    label = load_label(subject, dataset.targets, grid_of(t1))
    assert np.array_equal(label.voxels, np.select([organs() == 63, organs() == 252], [1, 2]))


def test_voxels_count_before_contours_unless_a_rule_picks_these(tmp_path: Path, save_series) -> None:
    t1 = save_series("ann/t1", scan(organs()))
    write_segmentation(tmp_path / "ann/seg.dcm", {"liver": organs() == 63}, grid_of(t1), the_series(t1))
    write_structures(tmp_path / "ann/drawn.dcm", {"spleen": organs() == 252}, grid_of(t1), the_series(t1))
    assert open_dataset(tmp_path).targets == Targets({"liver": (1,)})
    assert open_dataset(tmp_path, images="t1", labels={"modality": "RTSTRUCT"}).targets == Targets({"spleen": (1,)})


def test_contours_without_their_series_or_names_say_so(tmp_path: Path, save_series) -> None:
    t1 = save_series("ann/t1", scan(organs()))
    path = tmp_path / "elsewhere/deep/down/drawn.dcm"
    write_structures(path, {"spleen": organs() == 252}, grid_of(t1), the_series(t1))
    with pytest.raises(BadFormat, match="names but no values"):
        read_label(path)
    (tmp_path / "ann").rename(tmp_path.parent / f"{tmp_path.name}-moved")
    with pytest.raises(MissingFile, match="does not lie beside it"):
        read_numbered(Masks({"spleen": path}), Targets({"spleen": (1,)}), "ann")


@pytest.mark.parametrize("write", [write_segmentation, write_structures])
def test_a_damaged_label_is_a_problem_of_its_subject_alone(write, tmp_path: Path, save_series) -> None:
    from pydicom import dcmread

    for patient in ("ann", "bob"):
        t1 = save_series(f"{patient}/t1", scan(organs()), study=patient, PatientID=patient)
        write(tmp_path / patient / "label.dcm", {"liver": organs() == 63}, grid_of(t1), the_series(t1))
    damaged = dcmread(tmp_path / "bob/label.dcm")
    if write is write_segmentation:
        del damaged.SegmentSequence
    else:
        damaged.ROIContourSequence[0].ContourSequence[0].ContourData = [1, 2]
    damaged.save_as(tmp_path / "bob/label.dcm")
    assert inspect(open_dataset(tmp_path)).broken == ("bob",)
