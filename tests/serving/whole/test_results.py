"""What a server sends back is what ``delineate predict`` writes, whatever is sent, and whatever is asked for."""

from __future__ import annotations

import json
import shutil
import sys
import zipfile
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest
from pydicom import Dataset, dcmread

from delineate.bundle import Bundle
from delineate.compute import plan_compute
from delineate.core.grid import Grid
from delineate.core.volume import LabelVolume, Volume
from delineate.errors import BadFormat
from delineate.inference.predictor import Predictor
from delineate.io.formats import read_label, read_volume, write_volume
from delineate.io.rtstruct import read_structures
from delineate.reporting.overlays import picture_of_label
from delineate.serving import stages
from delineate.serving.formats import OUTPUTS
from delineate.serving.protocol import Options, Part

SHAPE = (12, 10, 8)


@pytest.fixture(scope="session")
def scans(tmp_path_factory: pytest.TempPathFactory, series_maker, scan) -> dict[str, Path]:
    """A scan in every format that can be sent, each with voxels of its own."""
    folder = tmp_path_factory.mktemp("scans")
    found = {suffix: scan(folder / f"a{n}.{suffix}", n) for n, suffix in enumerate(("nii.gz", "nii", "mha", "nrrd"))}
    voxels = np.random.default_rng(9).integers(0, 900, SHAPE).astype(np.int16)
    found["dicom"] = series_maker(folder).write("series", voxels, Grid.of_spacing(SHAPE, (0.9, 0.9, 2.5)))
    found["zip"] = folder / "packed.zip"
    with zipfile.ZipFile(found["zip"], "w") as archive:
        for file in found["dicom"].iterdir():
            archive.write(file, file.name)
    return found


def test_every_format_is_segmented_as_by_predict(server, bundles, scans, tmp_path) -> None:
    with server.client() as client:
        jobs = {name: client.submit(path, model="one") for name, path in scans.items()}
        for name, job in jobs.items():
            client.fetch(job, tmp_path / f"{name}.nii.gz")
    expected = {path.name: path for path in bundles.predicted("one", *(scans[n] for n in scans if n != "dicom"))}
    assert np.unique(read_label(expected["a0.nii.gz"]).voxels).tolist() == [0, 1, 2]
    for n, name in enumerate(("nii.gz", "nii", "mha", "nrrd")):
        assert (tmp_path / f"{name}.nii.gz").read_bytes() == expected[f"a{n}.nii.gz"].read_bytes()
    for name in ("dicom", "zip"):
        assert (tmp_path / f"{name}.nii.gz").read_bytes() == expected["packed.nii.gz"].read_bytes()


def test_every_format_asked_for_comes_as_predict_writes_it(server, bundles, scans, tmp_path) -> None:
    wanted = [name for name in OUTPUTS if not name.endswith(("dcm", "json"))]
    with server.client() as client:
        result = client.segment(scans["mha"], tmp_path / "a2.vtk", model="one", outputs=wanted)
    assert sorted(path.name for path in result.files) == sorted(f"a2.{name}" for name in (*wanted, "json"))
    for format in ("mha", "nrrd", "vtk", "vti", "seg.nrrd"):
        [expected] = bundles.predicted("one", scans["mha"], format=format)
        assert (tmp_path / expected.name).read_bytes() == expected.read_bytes()
        if format == "vtk":
            beside = json.loads(expected.with_suffix(".json").read_text(encoding="utf-8"))
            assert (tmp_path / "a2.nii.gz").read_bytes() == expected.with_suffix(".nii.gz").read_bytes()
    assert {name: result.about[name] for name in beside} == beside
    assert result.about["notice"] == "Not for diagnosis."
    assert result.about["computed"] == {"engines": ["torch"], "device": "cpu", "precision": "fp32", "threads": 1}
    bundle = Bundle.load(bundles.folders["one"])
    picture = picture_of_label(read_volume(scans["mha"]), read_label(tmp_path / "a2.nii.gz"), bundle.targets)
    assert (tmp_path / "a2.png").read_bytes() == picture


def test_surfaces_are_those_that_predict_writes(server, bundles, scan, tmp_path) -> None:
    path, names = scan(tmp_path / "a.nii.gz", 5), ["stl.zip", "obj.zip", "vtp.zip"]
    with server.client() as client:
        client.segment(path, tmp_path / "out/a.glb", model="one", outputs=names)
    for kind in ("stl", "obj", "vtp"):
        [label] = bundles.predicted("one", path, "--surfaces", kind)
        expected = {file.name: file.read_bytes() for file in (label.parent / "surfaces/a").iterdir()}
        with zipfile.ZipFile(tmp_path / f"out/a.{kind}.zip") as packed:
            assert {name: packed.read(name) for name in packed.namelist()} == expected
        assert set(expected) == {f"liver.{kind}", f"tumour.{kind}"}
    [label] = bundles.predicted("one", path, "--surfaces", "glb")
    assert (tmp_path / "out/a.glb").read_bytes() == (label.parent / "surfaces/a.glb").read_bytes()


def test_surfaces_without_what_draws_them_are_refused_before_anything_is_computed(
    scans, predictor, tmp_path, monkeypatch
) -> None:
    monkeypatch.setitem(sys.modules, "vtkmodules.vtkFiltersCore", None)
    with pytest.raises(BadFormat, match="surfaces need") as refused:
        staged(tmp_path / "job", scans["nii.gz"], "nii.gz", predictor, np.zeros(SHAPE, np.uint8), "stl.zip")
    assert "delineate[surfaces]" in refused.value.fix
    assert not (tmp_path / "job/out").exists()


def test_a_report_of_what_was_measured_comes_with_a_segmentation_in_dicom(server, bundles, scans, tmp_path) -> None:
    with server.client() as client:
        answer = client.segment(scans["dicom"], tmp_path / "series.dcm", model="one")
        client.segment(scans["dicom"], tmp_path / "again.sr.dcm", model="one")
    assert answer.seconds.keys() >= {"receive", "wait", "decode", "preprocess", "infer", "undo", "write"}
    assert {path.name for path in answer.files} == {"series.dcm", "series.sr.dcm", "series.json"}
    [expected] = bundles.predicted("one", scans["dicom"], format="dcm")
    for name in ("series", "again"):
        segmentation, report = dcmread(tmp_path / f"{name}.dcm"), dcmread(tmp_path / f"{name}.sr.dcm")
        assert same(read_label(tmp_path / f"{name}.dcm"), read_label(expected))
        assert lasting(segmentation) == lasting(dcmread(expected))
        assert lasting(report) == lasting(dcmread(expected.with_suffix(".sr.dcm")))
        [evidence] = report.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence
        [refers] = evidence.ReferencedSOPSequence
        assert refers.ReferencedSOPInstanceUID == segmentation.SOPInstanceUID


def lasting(data: Dataset) -> list[str]:
    """What a DICOM file says but for times and UIDs, many of which are made anew with each file."""
    return [str(element) for element in data.iterall() if element.VR not in ("DA", "TM", "DT", "UI", "SQ")]


def test_channels_and_a_quantity_are_taken_by_name(server, bundles, scan, tmp_path) -> None:
    files = {"FLAIR": scan(tmp_path / "in/p_flair.nii.gz", 1), "T1": scan(tmp_path / "in/p_t1.nii.gz", 2)}
    both = scan(tmp_path / "both.nii.gz", 3, channels=2)
    fat = np.random.default_rng(4).uniform(0, 12, (1, *SHAPE)).astype(np.float32)
    write_volume(tmp_path / "in/p_ff.nii.gz", Volume(fat, Grid.of_spacing(SHAPE, (1, 1, 3))))
    with server.client() as client:
        client.segment(files, tmp_path / "two.nii.gz", model="two")
        client.segment(both, tmp_path / "one.nii.gz", model="two")
        measured = client.segment(
            {**files, "fat_fraction": tmp_path / "in/p_ff.nii.gz"}, model="two", quantity="fat_fraction", margin_mm=1.0
        )
    images = ["--images", "T1=*_t1.nii.gz", "--images", "FLAIR=*_flair.nii.gz"]
    [expected] = bundles.predicted("two", tmp_path / "in", *images)
    assert (tmp_path / "two.nii.gz").read_bytes() == expected.read_bytes()
    [expected] = bundles.predicted("two", both)
    assert (tmp_path / "one.nii.gz").read_bytes() == expected.read_bytes()
    images += ["--images", "fat_fraction=*_ff.nii.gz", "--quantity", "fat_fraction", "--margin-mm", "1.0"]
    [expected] = bundles.predicted("two", tmp_path / "in", *images)
    rows = json.loads((expected.parent / "measurements.json").read_text(encoding="utf-8"))["measurements"]
    ours = measured.about["measurements"]
    assert {row["quantity"] for row in ours} == {"T1", "FLAIR", "fat_fraction"}
    for found, row in zip(ours, rows, strict=True):
        assert {**row, "subject": None, "made_from": None} == pytest.approx(
            {"subject": None, "made_from": None, **found}, abs=1e-4
        )


def same(a: LabelVolume, b: LabelVolume) -> bool:
    return np.array_equal(a.voxels, b.voxels) and np.array_equal(a.grid.affine, b.grid.affine)


# Geometry


def grids() -> list[Grid]:
    """All 48 orientations of an anisotropic, oblique grid."""
    turn = np.array([[0.9, 0.43588989, 0], [-0.43588989, 0.9, 0], [0, 0, 1.0]])
    found = []
    for order, signs in product(permutations(range(3)), product((1, -1), repeat=3)):
        axes = np.zeros((3, 3))
        axes[list(order), range(3)] = signs
        affine = np.eye(4)
        affine[:3, :3] = turn @ axes * (0.7, 0.9, 2.5)
        affine[:3, 3] = (-31.5, 12.25, 88.0)
        found.append(Grid(SHAPE, affine))
    return found


def staged(folder: Path, scan: Path, format: str, predictor: Predictor, marker: np.ndarray, *outputs: str) -> Path:
    """A job's stages, one after another; instead of what the network found, an asymmetric ``marker`` is written."""
    bundle = predictor.bundles[0]
    applied = stages.Applied(bundle.channels, bundle.targets)
    parts, options = (Part(format=format, size=scan.stat().st_size),), Options(outputs=outputs)
    folder.mkdir()
    shutil.copyfile(scan, folder / "in0")
    stages.decode(folder, parts, options, applied)
    about, _ = stages.segment(folder, predictor)
    np.save(folder / "decoded/label.npy", marker)
    stages.export(folder, parts, options, applied, about)
    return folder / "out"


@pytest.fixture(scope="module")
def predictor(bundles) -> Predictor:
    plan = plan_compute(device="cpu", precision="fp32", compile="off", threads=1)
    return Predictor([Bundle.load(bundles.folders["one"])], plan)


@pytest.fixture
def marker() -> np.ndarray:
    """No flip or swap of axes leaves it alike."""
    voxels = np.zeros(SHAPE, np.uint8)
    voxels[1:6, 1:4, 1:3] = 1
    voxels[2:4, 1:2, 1:2] = voxels[11, 0, 7] = 2
    return voxels


def test_the_grid_that_comes_back_is_the_scan_s_in_48_orientations(predictor, marker, tmp_path) -> None:
    voxels = np.random.default_rng(0).integers(0, 900, (1, *SHAPE)).astype(np.int16)
    for n, grid in enumerate(grids()):
        write_volume(tmp_path / f"{n}.nii.gz", Volume(voxels, grid))
        sent = read_volume(tmp_path / f"{n}.nii.gz").grid
        out = staged(tmp_path / str(n), tmp_path / f"{n}.nii.gz", "nii.gz", predictor, marker, "vti", "nii.gz")
        back = read_label(out / "label.nii.gz")
        assert same(back, LabelVolume(marker, sent))
        assert json.loads((out / "label.json").read_text(encoding="utf-8"))["affine_ras_mm"] == sent.affine.tolist()


def test_a_marker_keeps_its_place_in_dicom_seg_and_vtk(predictor, marker, series_maker, tmp_path) -> None:
    import SimpleITK

    for n, grid in enumerate([grid for grid in grids() if np.linalg.det(grid.affine[:3, :3]) > 0][::6]):
        voxels = np.random.default_rng(n).integers(0, 900, SHAPE).astype(np.int16)
        folder = series_maker(tmp_path).write(f"s{n}", voxels, grid)
        shutil.make_archive(str(tmp_path / f"s{n}"), "zip", folder)
        formats = ("dcm", "rtstruct.dcm", "vti", "nii.gz")
        out = staged(tmp_path / str(n), tmp_path / f"s{n}.zip", "dicom.zip", predictor, marker, *formats)
        truth = grid.world(np.argwhere(marker).astype(float))
        for name in ("label.dcm", "label.nii.gz"):
            back = read_label(out / name)
            found = back.grid.world(np.argwhere(back.voxels).astype(float))
            assert distance_mm(truth, found) < 0.35
        label = read_label(out / "label.nii.gz")
        expected = predictor.targets.masks(label.voxels)
        drawn = read_structures(out / "label.rtstruct.dcm", label.grid)
        assert all(np.array_equal(drawn[name], mask) for name, mask in expected.items())
    grid = Grid.of_spacing(SHAPE, (0.7, 0.9, 2.5))
    write_volume(tmp_path / "plain.nii.gz", Volume(voxels[None], grid))
    out = staged(tmp_path / "vtk", tmp_path / "plain.nii.gz", "nii.gz", predictor, marker, "vtk")
    image = SimpleITK.ReadImage(str(out / "label.vtk"))
    there = SimpleITK.GetArrayFromImage(image).transpose(2, 1, 0)
    assert sorted(np.unique(there)) == [0, 1, 2]
    lps = np.array([image.TransformIndexToPhysicalPoint(i.tolist()) for i in np.argwhere(there)])
    assert distance_mm(grid.world(np.argwhere(marker).astype(float)), lps * (-1, -1, 1)) < 0.35


def distance_mm(points: np.ndarray, others: np.ndarray) -> float:
    """How far a point is from the nearest of the others, at most, either way."""
    apart = np.linalg.norm(points[:, None] - others[None], axis=-1)
    return max(apart.min(0).max(), apart.min(1).max())
