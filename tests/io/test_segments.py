"""Named segments and masks of one target, as other programs write them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from delineate.core.grid import Grid
from delineate.core.subject import Masks, Subject
from delineate.core.targets import Targets
from delineate.core.volume import LabelVolume, Volume
from delineate.datasets.dataset import load_label, read_numbered
from delineate.errors import BadFormat, BadLabelValue, GridMismatch, MissingFile, RecipeError, Truncated
from delineate.evaluation.pairs import Pair
from delineate.io.exports import export_label
from delineate.io.formats import name_of, read_label, write_label, write_volume
from delineate.io.segments import read_mask, segments_in

GRID = Grid.of_spacing((6, 5, 4), spacing_mm=(1, 1, 3))
NESTED = Targets({"liver": (1, 2), "tumour": (2,)}, mode="overlapping")


def nested() -> np.ndarray:
    voxels = np.zeros(GRID.shape, np.uint8)
    voxels[1:5, 1:4, 1:3] = 1
    voxels[2, 2, 1:3] = 2
    return voxels


def slicer(path: Path, voxels: np.ndarray, *lines: str, grid: Grid = GRID) -> Path:
    """A segmentation as 3D Slicer writes it: gzip, (L, X, Y, Z) or (X, Y, Z), its own keys among the others."""
    import gzip

    layered = voxels.ndim == 4
    x, y, z = grid.spacing_mm
    start = ",".join(str(v) for v in grid.affine[:3, 3] * (-1, -1, 1))
    header = (
        "NRRD0004\n# Complete NRRD file format specification at:\n# http://teem.sourceforge.net/nrrd/format.html\n"
        f"type: unsigned char\ndimension: {voxels.ndim}\nspace: left-posterior-superior\n"
        f"sizes: {' '.join(map(str, voxels.shape))}\n"
        f"space directions: {'none ' if layered else ''}({-x},0,0) (0,{-y},0) (0,0,{z})\n"
        f"kinds: {'list ' if layered else ''}domain domain domain\nencoding: gzip\nspace origin: ({start})\n"
        "Segmentation_ContainedRepresentationNames:=Binary labelmap|Closed surface|\n"
        "Segmentation_ConversionParameters:=Decimation factor|0.0|Desired reduction: of points&\n"
    )
    data = gzip.compress(voxels.tobytes(order="F"))
    path.write_bytes((header + "".join(f"{line}\n" for line in lines) + "\n").encode() + data)
    return path


def segment(i: int, name: str, value: int, layer: int) -> tuple[str, ...]:
    return (
        f"Segment{i}_ID:=Segment_{i + 1}",
        f"Segment{i}_Name:={name}",
        f"Segment{i}_LabelValue:={value}",
        f"Segment{i}_Layer:={layer}",
    )


def test_segments_are_read_by_name_whatever_their_numbers(tmp_path: Path) -> None:
    """Slicer numbers segments in the order in which they were made, which differs from scan to scan."""
    path = slicer(tmp_path / "a.seg.nrrd", nested(), *segment(0, "tumour", 2, 0), *segment(1, "liver rest", 1, 0))
    targets = Targets({"liver rest": (5,), "tumour": (7,)})
    label = read_numbered(path, targets, "a")
    assert np.array_equal(label.voxels, np.array([0, 5, 7])[nested()])
    assert label.grid.matches(GRID)
    assert np.array_equal(read_numbered(path, Targets({"tumour": (1,)}), "a").voxels, nested() == 2)
    assert name_of(path) == "a"


def test_a_file_whose_segments_have_other_names_is_read_by_its_values(tmp_path: Path) -> None:
    path = slicer(tmp_path / "a.seg.nrrd", nested(), *segment(0, "Segment_1", 1, 0), *segment(1, "Segment_2", 2, 0))
    assert np.array_equal(read_numbered(path, NESTED, "a").voxels, nested())
    assert np.array_equal(read_label(path).voxels, nested())
    with pytest.raises(MissingFile, match=r"no mask of segment_1.*did you mean 'Segment_1'"):
        read_numbered(path, Targets({"segment_1": (1,)}), "a")


def test_layers_of_new_and_of_old_versions(tmp_path: Path) -> None:
    layers = np.stack([nested() > 0, nested() == 2]).astype(np.uint8)
    new = slicer(tmp_path / "new.seg.nrrd", layers, *segment(0, "liver", 1, 0), *segment(1, "tumour", 1, 1))
    ids = ("Segment0_ID:=a", "Segment0_Name:=liver", "Segment1_ID:=b", "Segment1_Name:=tumour")
    for path in (new, slicer(tmp_path / "old.seg.nrrd", layers, *ids)):
        assert segments_in(path).names == ("liver", "tumour")
        assert np.array_equal(read_numbered(path, NESTED, "a").voxels, nested())


def test_a_segmentation_saved_for_a_part_of_the_scan_is_widened(tmp_path: Path) -> None:
    part = nested()[1:5, 1:4, 1:3]
    path = slicer(
        tmp_path / "a.seg.nrrd", part, *segment(0, "liver", 1, 0), grid=GRID.crop(start=(1, 1, 1), shape=part.shape)
    )
    write_volume(tmp_path / "ct.nii.gz", Volume(np.arange(120).reshape(1, *GRID.shape), GRID))
    subject = Subject("a", {"ct": tmp_path / "ct.nii.gz"}, path)
    assert np.array_equal(load_label(subject, Targets({"liver": (1,)}), GRID).voxels, nested() == 1)
    moved = GRID.crop(start=(2, 2, 2), shape=(3, 3, 3))
    with pytest.raises(GridMismatch):
        load_label(subject, Targets({"liver": (1,)}), moved)
    write_label(tmp_path / "whole.nii.gz", LabelVolume(nested(), GRID))
    whole = tmp_path / "whole.nii.gz"
    for pair in (Pair("a", whole, path), Pair("a", path, whole)):
        for read in pair.labels(Targets({"liver": (1,)})):
            assert read.grid.matches(GRID)
            assert np.array_equal(read.voxels == 1, nested() == 1)


@pytest.mark.parametrize(
    "lines",
    [
        segment(0, "liver", 1, 4),
        ("Segment0_ID:=a", "Segment0_Name:=liver", "Segment0_LabelValue:=-1", "Segment0_Layer:=0"),
        (*segment(0, "liver", 1, 0), *segment(1, "liver", 2, 0)),
    ],
    ids=["no such layer", "no such value", "one name twice"],
)
def test_a_segmentation_that_contradicts_itself_is_refused(lines: tuple[str, ...], tmp_path: Path) -> None:
    path = slicer(tmp_path / "a.seg.nrrd", nested(), *lines)
    with pytest.raises(BadFormat, match="liver"):
        read_numbered(path, Targets({"liver": (1,)}), "a")


@pytest.fixture
def masks(tmp_path: Path) -> Masks:
    for name, mask in NESTED.masks(nested()).items():
        write_label(tmp_path / f"{name}.nii.gz", LabelVolume(mask.astype(np.uint8) * 255, GRID))
    return Masks({name: tmp_path / f"{name}.nii.gz" for name in NESTED.names})


def test_masks_become_a_label_by_the_targets(masks: Masks) -> None:
    assert np.array_equal(read_numbered(masks, NESTED, "a").voxels, nested())
    masks.files["tumour"].write_bytes(b"not to be read")
    assert np.array_equal(read_numbered(masks, Targets({"liver": (3,)}), "a").voxels, 3 * (nested() > 0))


def broken_values(path: Path) -> None:
    write_label(path, LabelVolume(nested(), GRID))


def broken_everywhere(path: Path) -> None:
    write_label(path, LabelVolume(np.ones(GRID.shape, np.uint8), GRID))


def broken_grid(path: Path) -> None:
    write_label(path, LabelVolume(nested() // 2, GRID.crop((1, 0, 0), GRID.shape)))


def broken_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def broken_gone(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(
    ("damage", "error", "said"),
    [
        (broken_values, BadLabelValue, r"several values \(0, 1, 2\)"),
        (broken_everywhere, BadLabelValue, "no background"),
        (broken_grid, GridMismatch, "mask of tumour of 'a'"),
        (broken_short, Truncated, "tumour.nii.gz"),
        (broken_gone, MissingFile, "tumour.nii.gz"),
    ],
)
def test_a_broken_mask_is_named(masks: Masks, damage, error, said: str) -> None:
    damage(masks.files["tumour"])
    with pytest.raises(error, match=said):
        read_numbered(masks, NESTED, "a")


def test_targets_and_masks_name_the_same(masks: Masks) -> None:
    with pytest.raises(MissingFile, match="'a' has no mask of spleen; it has liver, tumour"):
        read_numbered(masks, Targets({"liver": (1,), "spleen": (2,)}), "a")
    with pytest.raises(RecipeError, match="liver, tumour"):
        load_label(Subject("a", {}, masks), None, None)


def test_an_empty_mask_marks_nothing(tmp_path: Path) -> None:
    write_label(tmp_path / "a.nii.gz", LabelVolume(np.zeros(GRID.shape, np.uint8), GRID))
    mask, _ = read_mask(tmp_path / "a.nii.gz")
    assert not mask.any()


def test_dicom_segments_are_read_by_name_and_may_overlap(dicom, tmp_path: Path) -> None:
    grid = Grid(GRID.shape, np.diag([-1.0, -1, 3, 1]))
    folder = dicom.write("ct", np.zeros(GRID.shape, np.int16), grid)
    scan = LabelVolume(nested(), grid)
    export_label(tmp_path / "seg.dcm", scan, NESTED, source=folder)
    assert segments_in(tmp_path / "seg.dcm").names == ("liver", "tumour")
    assert segments_in(folder) is None
    label = read_numbered(Masks(dict.fromkeys(NESTED.names, tmp_path / "seg.dcm")), NESTED, "a")
    assert np.array_equal(label.voxels, nested())
    assert label.grid.matches(grid, 1e-3)
    export_label(tmp_path / "map.dcm", scan, Targets({"rest": (1,), "tumour": (2,)}), source=folder, kind="LABELMAP")
    assert np.array_equal(
        read_numbered(tmp_path / "map.dcm", Targets({"tumour": (9,)}), "a").voxels, 9 * (nested() == 2)
    )
