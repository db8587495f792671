"""3D Slicer's segmentations: ours by Slicer's own Python reader, and files that Slicer wrote by ours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import slicerio

from delineate.core.grid import Grid
from delineate.core.legend import Legend
from delineate.core.targets import Targets
from delineate.core.volume import LabelVolume
from delineate.datasets.dataset import numbered_targets, read_numbered
from delineate.io.exports import export_label
from delineate.io.segments import segments_in
from delineate.io.voxels import LPS_TO_RAS

NESTED = Targets({"liver": (1, 2), "tumour": (2,), "kidney": (4,)}, mode="overlapping")


def grid_and_label() -> tuple[Grid, np.ndarray]:
    affine = np.diag([-0.7, 0.9, 2.5, 1]) @ np.array([[0, 1, 0, 3], [1, 0, 0, -4], [0, 0, 1, 5], [0, 0, 0, 1.0]])
    voxels = np.zeros((7, 6, 5), np.uint8)
    voxels[1:5, 1:4, 1:3], voxels[2:4, 1:2, 1:2], voxels[6, 0, 4] = 1, 2, 4
    return Grid(voxels.shape, affine), voxels


def ras(lps: np.ndarray) -> np.ndarray:
    return np.diag([*LPS_TO_RAS, 1]) @ lps


def mask_of(segmentation: dict, segment: dict) -> np.ndarray:
    voxels = segmentation["voxels"]
    layer = voxels[segment["layer"]] if voxels.ndim == 4 else voxels
    return layer == segment["labelValue"]


@pytest.mark.parametrize("targets", [NESTED, Targets({"liver": (1, 2), "kidney": (4,)})], ids=["layers", "one layer"])
def test_slicer_s_reader_finds_our_segments(targets: Targets, tmp_path: Path) -> None:
    grid, voxels = grid_and_label()
    legend = Legend(colours={"kidney": "#C0392B"})
    (path,) = export_label(tmp_path / "a.seg.nrrd", LabelVolume(voxels, grid), targets, legend=legend)
    found = slicerio.read_segmentation(str(path))
    np.testing.assert_allclose(ras(found["ijkToLPS"]), grid.affine, atol=1e-9)
    named = {segment["name"]: segment for segment in found["segments"]}
    assert list(named) == list(targets.names)
    for name, mask in targets.masks(voxels).items():
        assert np.array_equal(mask_of(found, named[name]), mask)
    assert found["voxels"].ndim == (4 if targets is NESTED else 3)
    assert np.rint(np.array(named["kidney"]["color"]) * 255).tolist() == [0xC0, 0x39, 0x2B]
    assert found["masterRepresentation"] == "Binary labelmap"


def test_what_slicer_s_writer_saves_is_read_by_name(tmp_path: Path) -> None:
    grid, voxels = grid_and_label()
    (path,) = export_label(tmp_path / "a.seg.nrrd", LabelVolume(voxels, grid), NESTED)
    slicerio.write_segmentation(str(tmp_path / "b.seg.nrrd"), slicerio.read_segmentation(str(path)))
    label = read_numbered(tmp_path / "b.seg.nrrd", NESTED, "b")
    assert np.array_equal(label.voxels, voxels)
    assert label.grid.matches(grid)


@pytest.mark.parametrize("name", ["Segmentation.seg.nrrd", "SegmentationOverlapping.seg.nrrd"])
def test_files_of_slicer_itself_are_read_as_its_reader_reads_them(name: str) -> None:
    path = Path(slicerio.__file__).parent / "data" / name
    known = slicerio.read_segmentation(str(path))
    assert segments_in(path).names == tuple(segment["name"] for segment in known["segments"])
    for segment in known["segments"]:
        label = read_numbered(path, numbered_targets([segment["name"]]), name)
        assert np.array_equal(label.voxels > 0, mask_of(known, segment))
        np.testing.assert_allclose(label.grid.affine, ras(known["ijkToLPS"]), atol=1e-9)
