"""From training on real scans to a server's answer for unseen ones, opened by programs that are not ours."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from vtkmodules.util.numpy_support import vtk_to_numpy
from vtkmodules.vtkIOLegacy import vtkDataSetReader
from vtkmodules.vtkIOParallel import vtkPDataSetReader

from delineate import open_dataset, train
from delineate.io.formats import read_label


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, real_data: Path) -> tuple[Path, list[Path]]:
    """A bundle trained on a few real hippocampi, and scans of subjects that it has not seen."""
    folder, data = tmp_path_factory.mktemp("trained"), real_data / "hippocampus"
    subjects = open_dataset(data).subjects[:20]
    names = [subject.id for subject in subjects]
    parts = {"training": names[:12], "validation": names[12:14], "test": names[14:]}
    (folder / "split.json").write_text(json.dumps(parts), encoding="utf-8")
    train(
        "hippocampus", data, folder / "run", steps=30, split=folder / "split.json", evaluate=False,
        device="cpu", compile="off", threads=1,
    )  # fmt: skip
    return folder / "run" / "bundle", [next(iter(subject.scans.values())) for subject in subjects[14:]]


def test_unseen_hippocampi_come_back_as_predict_writes_them_and_open_elsewhere(
    trained, bundles, drivers, tmp_path
) -> None:
    bundle, scans = trained
    bundles.folders["hippocampus"] = bundle
    server = drivers.serve({"hippocampus": bundle})
    with server.client() as client:
        for scan in scans:
            client.segment(scan, tmp_path / f"{name_of(scan)}.vtk", outputs=("vtk", "nii.gz"))
    pictures = bundles.predicted("hippocampus", *scans, format="vtk")
    labels = bundles.predicted("hippocampus", *scans)
    for scan, picture, label in zip(sorted(scans), pictures, labels, strict=True):
        back = tmp_path / f"{name_of(scan)}.vtk"
        assert back.read_bytes() == picture.read_bytes()
        assert back.with_suffix(".nii.gz").read_bytes() == label.read_bytes()
        truth = read_label(label)
        assert np.unique(truth.voxels).tolist() == [0, 1, 2]
        for points_of in (by_simpleitk, by_vtk(vtkDataSetReader), by_vtk(vtkPDataSetReader)):
            for value in (1, 2):
                expected = truth.grid.world(np.argwhere(truth.voxels == value).astype(float)) * (-1, -1, 1)
                np.testing.assert_allclose(ordered(points_of(back, value)), ordered(expected), atol=1e-3)


def name_of(scan: Path) -> str:
    return scan.name.removesuffix(".nii.gz")


def ordered(points: np.ndarray) -> np.ndarray:
    """Points in an order that does not depend on how they were read."""
    rounded = np.round(points, 2)
    return points[np.lexsort(rounded.T)]


def by_simpleitk(path: Path, value: int) -> np.ndarray:
    """Where a label lies, in LPS millimetres; also how 3D Slicer reads the file."""
    image = SimpleITK.ReadImage(str(path))
    there = np.argwhere(SimpleITK.GetArrayFromImage(image).transpose(2, 1, 0) == value)
    return np.array([image.TransformIndexToPhysicalPoint(index.tolist()) for index in there])


def by_vtk(kind: type):
    """The same by VTK's reader of one file, or ParaView's of one or many."""

    def points_of(path: Path, value: int) -> np.ndarray:
        reader = kind()
        reader.SetFileName(str(path))
        reader.Update()
        image = reader.GetOutput()
        there = np.flatnonzero(vtk_to_numpy(image.GetPointData().GetScalars()) == value)
        return np.array([image.GetPoint(int(index)) for index in there])

    return points_of
