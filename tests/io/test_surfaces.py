"""Surfaces: closed, outwards, in the patient's millimetres and of the label's volume, by VTK's own readers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import vtk
from scipy.ndimage import binary_dilation, binary_erosion, label
from vtk.util.numpy_support import vtk_to_numpy

from delineate.core.grid import Grid
from delineate.core.legend import Legend
from delineate.errors import BadFormat
from delineate.io.surfaces import WRITERS, check_surface_format, surface_files, surface_of, write_surfaces

TO_LPS = np.array([-1.0, -1.0, 1.0])
X, Y, Z = np.meshgrid(np.arange(34), np.arange(30), np.arange(22), indexing="ij")
LEGEND = Legend(colours={"tumour": "#c0392b"})


def ball(
    radius: float, centre: tuple[float, ...] = (17, 15, 11), spacing_mm: tuple[float, ...] = (1, 1, 1)
) -> np.ndarray:
    squares = (((axis - at) * step) ** 2 for axis, at, step in zip((X, Y, Z), centre, spacing_mm, strict=True))
    return sum(squares) <= radius**2


def noise(share: float) -> np.ndarray:
    mask = np.zeros(X.shape, bool)
    mask[2:20, 2:20, 2:20] = np.random.default_rng(3).random((18, 18, 18)) < share
    return mask


MASKS = {
    "ball": (ball(10), (1, 1, 1)),
    "ball of thick slices": (ball(14, spacing_mm=(1, 1, 5)), (1, 1, 5)),
    "shell": (ball(10) & ~ball(5), (0.8, 0.8, 2)),
    "plate": ((abs(X - 16) < 10) & (abs(Y - 15) < 10) & (Z == 9), (1, 1, 3)),
    "rod": ((X == 9) & (Y == 9) & (Z > 2) & (Z < 18), (1, 1, 4)),
    "lesion": (ball(2), (1, 1, 1)),
    "two voxels at a corner": (((X == 4) & (Y == 4) & (Z == 4)) | ((X == 5) & (Y == 5) & (Z == 5)), (1, 1, 3)),
    "one voxel": ((X == 7) & (Y == 0) & (Z == 21), (0.5, 0.5, 6)),
    "organ and lesions": (ball(8) | ball(1.5, (3, 3, 3)) | ball(1, (30, 26, 18)), (0.9, 0.9, 2.5)),
    "scattered": (noise(0.008), (1, 1, 2)),
    "ragged": (noise(0.5), (1, 1, 2)),
}


def turned(spacing_mm: tuple[float, ...], *, mirrored: bool = False) -> Grid:
    """An oblique grid, whose axes go to the right or to the left."""
    angle = 0.4
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([-1 if mirrored else 1, 1, 1]) @ np.diag(spacing_mm)
    affine[:3, 3] = (-80, 20, 300)
    return Grid(X.shape, affine)


def poly(points: np.ndarray, triangles: np.ndarray) -> vtk.vtkPolyData:
    data, cells, places = vtk.vtkPolyData(), vtk.vtkCellArray(), vtk.vtkPoints()
    for point in points:
        places.InsertNextPoint(point)
    for triangle in triangles:
        cells.InsertNextCell(3, [int(corner) for corner in triangle])
    data.SetPoints(places)
    data.SetPolys(cells)
    return data


def open_edges(data: vtk.vtkPolyData) -> int:
    """Edges with fewer or more than two triangles."""
    edges = vtk.vtkFeatureEdges()
    edges.SetInputData(data)
    edges.FeatureEdgesOff()
    edges.ManifoldEdgesOff()
    edges.BoundaryEdgesOn()
    edges.NonManifoldEdgesOn()
    edges.Update()
    return edges.GetOutput().GetNumberOfCells()


def volume_mm3(data: vtk.vtkPolyData) -> float:
    """What VTK says of a closed surface; positive only if its triangles face outwards."""
    points, triangles = vtk_to_numpy(data.GetPoints().GetData()), vtk_to_numpy(data.GetPolys().GetConnectivityArray())
    a, b, c = (points[triangles[corner::3]].astype(float) - points[0] for corner in range(3))
    outwards = np.einsum("ij,ij->", a, np.cross(b, c)) / 6
    properties = vtk.vtkMassProperties()
    properties.SetInputData(data)
    properties.Update()
    assert properties.GetVolume() == pytest.approx(abs(outwards), rel=0.02, abs=0.01)
    return float(outwards)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_a_surface_is_closed_faces_outwards_and_encloses_the_label_s_volume(name: str, mirrored: bool) -> None:
    mask, spacing_mm = MASKS[name]
    grid = turned(spacing_mm, mirrored=mirrored)
    found = surface_of(mask, grid)
    data = poly(found.points_mm, found.triangles)
    assert open_edges(data) == 0
    wanted = mask.sum() * grid.voxel_ml
    points = found.points_mm - found.points_mm[0]
    a, b, c = (points[found.triangles[:, corner]] for corner in range(3))
    assert np.einsum("ij,ij->", a, np.cross(b, c)) / 6000 == pytest.approx(wanted, rel=0.01)
    assert found.volume_ml == pytest.approx(wanted, rel=0.01)


def test_every_piece_has_its_own_volume() -> None:
    """A lesion beside an organ is a hundredth of it: its loss would not show in the sum."""
    mask, spacing_mm = MASKS["organ and lesions"]
    grid = turned(spacing_mm)
    found = surface_of(mask, grid)
    parts = vtk.vtkPolyDataConnectivityFilter()
    parts.SetInputData(poly(found.points_mm, found.triangles))
    parts.SetExtractionModeToAllRegions()
    parts.ColorRegionsOn()
    parts.Update()
    region = vtk_to_numpy(parts.GetOutput().GetPointData().GetArray("RegionId"))
    places = vtk_to_numpy(parts.GetOutput().GetPoints().GetData())
    numbers, count = label(mask, np.ones((3, 3, 3)))
    assert len(np.unique(region)) == count == 3
    for number in range(count):
        index = np.linalg.solve(grid.affine[:3, :3], (places[region == number] * TO_LPS - grid.affine[:3, 3]).mean(0))
        voxels = np.count_nonzero(numbers == numbers[tuple(np.rint(index).astype(int))])
        own = found.triangles[np.isin(found.triangles[:, 0], np.flatnonzero(region == number))]
        enclosed_ml = volume_mm3(poly(found.points_mm, own)) / 1000
        assert enclosed_ml == pytest.approx(voxels * grid.voxel_ml, rel=0.01)


@pytest.mark.parametrize("name", MASKS)
def test_a_surface_differs_from_the_label_by_no_more_than_its_border(name: str) -> None:
    """Smoothing and decimation lose no piece, add none, and move nothing by as much as a voxel."""
    mask, spacing_mm = MASKS[name]
    grid = turned(spacing_mm)
    found = surface_of(mask, grid)
    index = (found.points_mm * TO_LPS - grid.affine[:3, 3]) @ np.linalg.inv(grid.affine[:3, :3]).T
    inside = enclosed(poly(index, found.triangles), mask.shape)
    around = np.ones((3, 3, 3))
    assert not (inside & ~binary_dilation(mask, around)).any()
    assert inside[binary_erosion(mask, around, border_value=1)].all()
    pieces, count = label(mask, around)
    assert len(np.unique(pieces[inside & mask])) == count


def enclosed(data: vtk.vtkPolyData, shape: tuple[int, ...]) -> np.ndarray:
    """Which voxels' centres a surface encloses, by VTK."""
    image, inside = vtk.vtkImageData(), vtk.vtkSelectEnclosedPoints()
    image.SetDimensions(*shape)
    inside.SetInputData(image)
    inside.SetSurfaceData(data)
    inside.SetTolerance(1e-6)
    inside.Update()
    chosen = vtk_to_numpy(inside.GetOutput().GetPointData().GetArray("SelectedPoints"))
    return chosen.reshape(shape, order="F") > 0


@pytest.mark.parametrize(("radius_mm", "thick_mm", "degrees"), [(10, 1, 4), (14, 5, 10)])
def test_a_round_body_is_smooth_and_has_few_triangles(radius_mm: float, thick_mm: float, degrees: float) -> None:
    """Its normals point away from its middle, more so than those of a surface with the slices' steps."""
    spacing_mm = (1, 1, thick_mm)
    found = surface_of(ball(radius_mm, spacing_mm=spacing_mm), Grid.of_spacing(X.shape, spacing_mm))
    away = found.points_mm * TO_LPS - np.multiply((17, 15, 11), spacing_mm)
    cosines = (found.normals * TO_LPS * away).sum(axis=1) / np.linalg.norm(away, axis=1)
    assert np.degrees(np.arccos(cosines.clip(-1, 1))).mean() < degrees
    assert len(found.triangles) < 4 * np.pi * radius_mm**2  # fewer than one for each face of a voxel that one sees


def test_nothing_has_an_empty_surface_in_every_format(tmp_path: Path) -> None:
    grid, mask = turned((1, 1, 1)), np.zeros(X.shape, bool)
    assert len(surface_of(mask, grid).triangles) == 0
    for format in WRITERS:
        files = surface_files(tmp_path / "case", ["liver"], format)
        write_surfaces(files, {"liver": mask}, grid)
        assert sum(found.GetNumberOfCells() for found in read(files["liver"])) == 0


READERS = {
    "stl": vtk.vtkSTLReader, "obj": vtk.vtkOBJReader, "vtp": vtk.vtkXMLPolyDataReader, "glb": vtk.vtkGLTFReader
}  # fmt: skip


def read(path: Path) -> list[vtk.vtkPolyData]:
    """The surfaces in a file."""
    reader = READERS[path.suffix[1:]]()
    reader.SetFileName(str(path))
    reader.Update()
    if path.suffix != ".glb":
        return [reader.GetOutput()]
    found, blocks = [], reader.GetOutput().NewIterator()
    while not blocks.IsDoneWithTraversal():
        found.append(blocks.GetCurrentDataObject())
        blocks.GoToNextItem()
    return found


@pytest.mark.parametrize("format", ["stl", "obj", "vtp"])
def test_other_readers_find_millimetres_volume_and_where_they_count_from(format: str, tmp_path: Path) -> None:
    grid = turned((0.9, 0.9, 2.5), mirrored=True)
    masks = {"liver": ball(9), "tumour": ball(2)}
    files = surface_files(tmp_path / "case", [*masks], format)
    write_surfaces(files, masks, grid, LEGEND)
    assert [str(path.relative_to(tmp_path)) for path in files.values()] == [
        f"case/liver.{format}", f"case/tumour.{format}"
    ]  # fmt: skip
    for name, mask in masks.items():
        (data,) = read(files[name])
        assert open_edges(data) == 0
        assert volume_mm3(data) == pytest.approx(1000 * mask.sum() * grid.voxel_ml, rel=0.01)
        middle = grid.world(np.argwhere(mask).astype(float)).mean(axis=0) * TO_LPS
        low, high = np.reshape(data.GetBounds(), (3, 2)).T
        np.testing.assert_allclose((low + high) / 2, middle, atol=0.6)
        if format == "stl":
            assert files[name].read_bytes()[:80].rstrip() == f"Delineate, SPACE=LPS, {name}".encode()
        if format == "obj":
            reader = vtk.vtkOBJReader()
            reader.SetFileName(str(files[name]))
            reader.Update()
            assert "SPACE=LPS" in reader.GetComment()
            assert f"\no {name}\n" in files[name].read_text(encoding="utf-8")
        if format == "vtp":
            said = data.GetFieldData()
            assert said.GetAbstractArray("SPACE").GetValue(0) == "LPS"
            assert said.GetAbstractArray("target").GetValue(0) == name
            colour = vtk_to_numpy(data.GetPointData().GetArray("colour"))
            assert np.unique(colour, axis=0).tolist() == [[*LEGEND.colours_of([*masks])[name]]]


def test_a_glb_holds_all_targets_with_names_and_colours_upright_and_in_metres(tmp_path: Path) -> None:
    grid = turned((0.9, 0.9, 2.5))
    masks = {"liver": ball(9), "größer": ball(2), "nothing": np.zeros(X.shape, bool)}
    files = surface_files(tmp_path / "case", [*masks], "glb")
    assert {*files.values()} == {tmp_path / "case.glb"}
    write_surfaces(files, masks, grid, Legend(colours={"liver": "#ff8000"}))
    surfaces = read(tmp_path / "case.glb")
    assert len(surfaces) == 2
    for data, mask in zip(surfaces, masks.values(), strict=False):
        assert volume_mm3(data) == pytest.approx(1e-6 * mask.sum() * grid.voxel_ml, rel=0.01)
        left, posterior, superior = grid.world(np.argwhere(mask).astype(float)).mean(axis=0) * TO_LPS / 1000
        low, high = np.reshape(data.GetBounds(), (3, 2)).T
        np.testing.assert_allclose((low + high) / 2, (left, superior, -posterior), atol=0.6e-3)
    content = (tmp_path / "case.glb").read_bytes()
    about = json.loads(content[20 : 20 + int.from_bytes(content[12:16], "little")])
    assert [node["name"] for node in about["nodes"]] == [*masks, "millimetres, LPS"]
    # glTF's colours are linear.
    shade = about["materials"][0]["pbrMetallicRoughness"]["baseColorFactor"]
    assert shade == pytest.approx([1, 0.2159, 0, 1], abs=1e-3)


def test_names_that_no_file_can_have_still_have_files_of_their_own() -> None:
    names = ["liver", "Liver", "../liver", "a/b", "..", "größer (2)", "x" * 300]
    files = surface_files(Path("out/case"), names, "stl")
    assert {path.parent for path in files.values()} == {Path("out/case")}
    assert len({path.name.casefold() for path in files.values()}) == len(names)
    assert files["größer (2)"].name == "größer (2).stl"
    assert max(len(path.name) for path in files.values()) < 100


def test_what_is_missing_or_unknown_is_said_with_its_fix(monkeypatch) -> None:
    with pytest.raises(BadFormat, match="did you mean 'stl'"):
        check_surface_format("stll")
    for module in [name for name in sys.modules if name.startswith("vtkmodules")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "vtkmodules", None)
    with pytest.raises(BadFormat, match=r"delineate\[surfaces\]"):
        check_surface_format("stl")
