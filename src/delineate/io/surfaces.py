"""Surfaces of targets, for 3D viewers and printers: STL, OBJ, VTP and GLB, in the patient's millimetres (LPS).

A surface is where the slightly blurred label takes one value, for each piece of the target the value that encloses the
piece's volume; it is then smoothed and decimated, and moved along its normals by what that changed. Surfaces are
closed, and their triangles run counter-clockwise as seen from outside.

STL, OBJ and VTP say ``SPACE=LPS``, as 3D Slicer's do, which assumes the same of files that say nothing. GLB counts in
metres with y upwards, so its root turns and scales millimetres to that.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from delineate.core.grid import Grid, box_around
from delineate.core.legend import PLAIN, RGB, Legend
from delineate.core.text import near, printable
from delineate.errors import BadFormat
from delineate.io.files import writing_beside
from delineate.io.voxels import LPS_TO_RAS

if TYPE_CHECKING:
    from vtkmodules.vtkCommonDataModel import vtkPolyData

SPACE = "SPACE=LPS"

_BLUR = 0.8
"""Standard deviation in voxels, along each axis."""
_MARGIN = 4  # voxels around a piece, beyond which blurring leaves nothing
_ITERATIONS, _PASS_BAND = 40, 0.01
"""Of Taubin's smoothing by a windowed sinc function, which moves points along the surface's mesh."""
_SHRUNK = 0.9
"""The share of its volume that a surface must keep when it is smoothed."""
_KEPT = 0.3
"""The share of triangles that decimation keeps."""
_FEW = 1000  # triangles, of which none is left out
_EXACT = 1e-3
"""By which share of it the volume that a surface encloses may differ from the label's."""
_LEVELS, _MOVES = 12, 20  # tried, until the volume is as exact


@dataclass(frozen=True, eq=False)
class Surface:
    """A closed surface: points (n, 3) in LPS millimetres, and triangles (m, 3) of their indices; none if empty."""

    points_mm: NDArray[np.float64]
    triangles: NDArray[np.int64]

    @property
    def volume_ml(self) -> float:
        """The volume that it encloses."""
        return _volume(self.points_mm, self.triangles) / 1000

    @property
    def normals(self) -> NDArray[np.float64]:
        """Unit vectors (n, 3) that point outwards at its points."""
        return _normals(self.points_mm, self.triangles)[0]


def check_surface_format(format: str) -> None:
    """Raise :class:`BadFormat` for an unknown format, or where the package that makes surfaces is not installed."""
    if format not in WRITERS:
        raise BadFormat(
            f"'{printable(format)}' is not a format of surfaces{near(format, WRITERS)}",
            fix=f"choose from {', '.join(WRITERS)}",
        )
    try:
        import vtkmodules.vtkFiltersCore  # noqa: F401 - whether it can be imported
    except ModuleNotFoundError as error:
        raise BadFormat(
            f"surfaces need '{error.name}', which is missing", fix="pip install 'delineate[surfaces]'"
        ) from error


def surface_files(place: Path, names: Sequence[str], format: str) -> dict[str, Path]:
    """The file of each target's surface: ``place/liver.stl``, or ``place.glb`` for all of them."""
    if format == "glb":
        return dict.fromkeys(names, place.with_name(f"{place.name}.glb"))
    files: dict[str, Path] = {}
    taken: set[str] = set()
    for number, name in enumerate(names, start=1):
        stem = re.sub(r"[^\w ()+.-]", "_", name).strip(" .")[:80] or "target"
        if stem.casefold() in taken:
            stem = f"{stem}_{number}"
        taken.add(stem.casefold())
        files[name] = place / f"{stem}.{format}"
    return files


def write_surfaces(
    files: Mapping[str, Path], masks: Mapping[str, NDArray[np.bool_]], grid: Grid, legend: Legend = PLAIN
) -> None:
    """Write the surface of each mask (X, Y, Z) to its file, by target name; a file may hold several.

    An empty mask has an empty surface. Raises :class:`OutputError`, and what :func:`check_surface_format` raises.
    """
    together: dict[Path, list[str]] = defaultdict(list)
    for name, path in files.items():
        together[path].append(name)
    colours = legend.colours_of([*masks])
    for path, names in together.items():
        format = path.suffix[1:]
        check_surface_format(format)
        content = WRITERS[format]({name: (surface_of(masks[name], grid), colours[name]) for name in names})
        with writing_beside(path) as beside:
            beside.write_bytes(content)


def surface_of(mask: NDArray[np.bool_], grid: Grid) -> Surface:
    """The surface of a mask (X, Y, Z), whose every piece encloses the volume of its voxels, within a thousandth.

    Voxels that touch, if only at corners, are one piece. Even a single voxel has its volume, as a small round body.
    """
    from scipy.ndimage import find_objects, label

    around = box_around(mask)
    if around is None:
        return Surface(np.empty((0, 3)), np.empty((0, 3), np.int64))
    cropped, start = mask[around], [axis.start for axis in around]
    pieces, _ = label(cropped, np.ones((3, 3, 3)))
    points, triangles, count = [], [], 0
    for number, box in enumerate(find_objects(pieces), start=1):
        inside = pieces[box] == number
        found = _piece(inside)
        index = found.points_mm + [begin + axis.start for begin, axis in zip(start, box, strict=True)]
        whole = _decimated(_smoothed(_placed(Surface(index, found.triangles), grid)))
        whole = _enclosing(whole, np.count_nonzero(inside) * grid.voxel_ml * 1000)
        points.append(whole.points_mm)
        triangles.append(whole.triangles + count)
        count += len(whole.points_mm)
    return Surface(np.concatenate(points), np.concatenate(triangles))


def _piece(mask: NDArray[np.bool_]) -> Surface:
    """The surface of one piece, its points as indices of voxels, at the level that encloses as much as its voxels.

    Nearly as much, for a few voxels: what a level encloses may jump where the surface passes a voxel's centre.
    """
    from scipy.ndimage import gaussian_filter

    wanted = int(np.count_nonzero(mask))
    field = gaussian_filter(np.pad(mask, _MARGIN).astype(np.float32), _BLUR)
    low, high = 0.0, float(field.max())
    level = min(0.5, high / 2)
    for _ in range(_LEVELS):
        found = _level_surface(field, level)
        enclosed = _volume(found.points_mm, found.triangles)
        if abs(enclosed - wanted) <= _EXACT * wanted:
            break
        low, high = (level, high) if enclosed > wanted else (low, level)
        level = (low + high) / 2
    return Surface(found.points_mm - _MARGIN, found.triangles)


def _level_surface(field: NDArray[np.float32], level: float) -> Surface:
    """Where a field (X, Y, Z) takes a value."""
    from vtkmodules.util.numpy_support import numpy_to_vtk
    from vtkmodules.vtkCommonDataModel import vtkImageData
    from vtkmodules.vtkFiltersCore import vtkFlyingEdges3D

    image, edges = vtkImageData(), vtkFlyingEdges3D()
    image.SetDimensions(*field.shape)
    image.GetPointData().SetScalars(numpy_to_vtk(field.ravel(order="F")))
    edges.SetInputData(image)
    edges.SetValue(0, level)
    edges.ComputeNormalsOff()
    edges.ComputeScalarsOff()
    edges.Update()
    return _from_vtk(edges.GetOutput())


def _placed(index: Surface, grid: Grid) -> Surface:
    """A surface in voxels, in LPS millimetres, its triangles still counter-clockwise from outside."""
    mirrored = np.linalg.det(grid.affine[:3, :3]) < 0  # RAS and LPS are turned, not mirrored
    return Surface(grid.world(index.points_mm) * LPS_TO_RAS, index.triangles[:, :: -1 if mirrored else 1])


def _smoothed(whole: Surface) -> Surface:
    """A surface without the steps between slices; the same one if it is so small that smoothing would shrink it."""
    from vtkmodules.vtkFiltersCore import vtkWindowedSincPolyDataFilter

    smoothing = vtkWindowedSincPolyDataFilter()
    smoothing.SetInputData(_to_vtk(whole))
    smoothing.SetNumberOfIterations(_ITERATIONS)
    smoothing.SetPassBand(_PASS_BAND)
    smoothing.NormalizeCoordinatesOn()
    smoothing.NonManifoldSmoothingOn()
    smoothing.Update()
    found = _from_vtk(smoothing.GetOutput())
    return found if found.volume_ml > _SHRUNK * whole.volume_ml else whole


def _decimated(whole: Surface) -> Surface:
    """A surface of fewer triangles; the same one if it would not stay closed."""
    from vtkmodules.vtkFiltersCore import vtkQuadricDecimation

    if len(whole.triangles) <= _FEW:
        return whole
    decimation = vtkQuadricDecimation()
    decimation.SetInputData(_to_vtk(whole))
    decimation.SetTargetReduction(1 - _KEPT)
    decimation.VolumePreservationOn()
    decimation.Update()
    found = _from_vtk(decimation.GetOutput())
    return found if _closed(found.triangles) else whole


def _enclosing(surface: Surface, wanted: float) -> Surface:
    """A surface moved along its normals until it encloses a volume (mm³), of which it already has most."""
    points, triangles = surface.points_mm, surface.triangles
    for _ in range(_MOVES):
        lacking = wanted - _volume(points, triangles)
        if abs(lacking) <= _EXACT * wanted:
            break
        normals, area = _normals(points, triangles)
        points = points + normals * (lacking / area)
    return Surface(points, triangles)


def _volume(points: NDArray[np.float64], triangles: NDArray[np.int64]) -> float:
    """What triangles enclose: the sum of their tetrahedra with one point, those that face it being negative."""
    if not len(triangles):
        return 0.0
    a, b, c = (points[triangles[:, corner]] - points[triangles[0, 0]] for corner in range(3))
    return float(np.einsum("ij,ij->", a, np.cross(b, c)) / 6)


def _normals(points: NDArray[np.float64], triangles: NDArray[np.int64]) -> tuple[NDArray[np.float64], float]:
    """Unit normals at the points, the mean of their triangles' by area; and the area of all."""
    a, b, c = (points[triangles[:, corner]] for corner in range(3))
    across = np.cross(b - a, c - a)
    normals = np.zeros_like(points)
    for corner in range(3):
        np.add.at(normals, triangles[:, corner], across)
    lengths = np.linalg.norm(normals, axis=1, keepdims=True)
    return normals / np.where(lengths > 0, lengths, 1), float(np.linalg.norm(across, axis=1).sum() / 2)


def _closed(triangles: NDArray[np.int64]) -> bool:
    """Whether each edge has two triangles, which run along it in opposite directions."""
    edges = np.concatenate([triangles[:, [0, 1]], triangles[:, [1, 2]], triangles[:, [2, 0]]])
    there, back = (np.sort(pair[:, 0] * (triangles.max() + 1) + pair[:, 1]) for pair in (edges, edges[:, ::-1]))
    return bool((np.diff(there) > 0).all() and np.array_equal(there, back))


def _from_vtk(data: vtkPolyData) -> Surface:
    from vtkmodules.util.numpy_support import vtk_to_numpy

    if not data.GetNumberOfPolys():
        return Surface(np.empty((0, 3)), np.empty((0, 3), np.int64))
    points = vtk_to_numpy(data.GetPoints().GetData()).astype(np.float64)
    triangles = vtk_to_numpy(data.GetPolys().GetConnectivityArray()).reshape(-1, 3).astype(np.int64)
    return Surface(points, triangles)


def _to_vtk(surface: Surface) -> vtkPolyData:
    from vtkmodules.util.numpy_support import numpy_to_vtk, numpy_to_vtkIdTypeArray
    from vtkmodules.vtkCommonCore import vtkPoints
    from vtkmodules.vtkCommonDataModel import vtkCellArray, vtkPolyData

    data, points, cells = vtkPolyData(), vtkPoints(), vtkCellArray()
    points.SetData(numpy_to_vtk(surface.points_mm, deep=True))
    cells.SetData(3, numpy_to_vtkIdTypeArray(surface.triangles.ravel(), deep=True))
    data.SetPoints(points)
    data.SetPolys(cells)
    return data


Coloured = Mapping[str, tuple[Surface, RGB]]
"""Surfaces with their colours, by name."""


def _stl(surfaces: Coloured) -> bytes:
    """Binary STL, which holds one surface, and no colour that readers agree on."""
    ((name, (surface, _)),) = surfaces.items()
    header = f"Delineate, {SPACE}, {name}".encode()[:80].ljust(80)
    a, b, c = (surface.points_mm[surface.triangles[:, corner]] for corner in range(3))
    across = np.cross(b - a, c - a)
    lengths = np.linalg.norm(across, axis=1, keepdims=True)
    facets = np.zeros(len(a), [("vectors", "<f4", (4, 3)), ("attributes", "<u2")])
    facets["vectors"] = np.stack([across / np.where(lengths > 0, lengths, 1), a, b, c], axis=1)
    return header + len(a).to_bytes(4, "little") + facets.tobytes()


def _obj(surfaces: Coloured) -> bytes:
    """Text; each point has a colour, which many readers use and the others skip."""
    lines, count = [f"# Delineate, {SPACE}"], 1
    for name, (surface, colour) in surfaces.items():
        shade = " ".join(f"{part / 255:.4f}" for part in colour)
        lines.append(f"o {' '.join(name.split())}")
        lines += [f"v {x:.4f} {y:.4f} {z:.4f} {shade}" for x, y, z in surface.points_mm.tolist()]
        lines += [f"f {a} {b} {c}" for a, b, c in (surface.triangles + count).tolist()]
        count += len(surface.points_mm)
    return ("\n".join(lines) + "\n").encode()


def _vtp(surfaces: Coloured) -> bytes:
    """VTK's XML, with the name beside the coordinate system, and the colour at each point."""
    from vtkmodules.util.numpy_support import numpy_to_vtk
    from vtkmodules.vtkCommonCore import vtkStringArray
    from vtkmodules.vtkIOXML import vtkXMLPolyDataWriter

    ((name, (surface, colour)),) = surfaces.items()
    data = _to_vtk(surface)
    for what, text in (("SPACE", SPACE.partition("=")[2]), ("target", name)):
        said = vtkStringArray()
        said.SetName(what)
        said.InsertNextValue(text)
        data.GetFieldData().AddArray(said)
    shades = numpy_to_vtk(np.tile(np.array(colour, np.uint8), (len(surface.points_mm), 1)), deep=True)
    shades.SetName("colour")
    data.GetPointData().SetScalars(shades)
    writer = vtkXMLPolyDataWriter()
    writer.SetInputData(data)
    writer.SetDataModeToBinary()
    writer.WriteToOutputStringOn()
    writer.Write()
    return writer.GetOutputString().encode()


_TO_METRES = [0.001, 0, 0, 0, 0, 0, -0.001, 0, 0, 0.001, 0, 0, 0, 0, 0, 1]
"""By columns: the patient's left stays x, the head is up (y), the back is away (-z)."""


def _glb(surfaces: Coloured) -> bytes:
    """glTF 2.0 in one file: a node with name, mesh and colour for each surface, below one that turns millimetres."""
    parts: list[bytes] = []
    views, accessors, meshes, materials, nodes = [], [], [], [], []

    def stored(values: NDArray, kind: str, target: int) -> int:
        views.append({"buffer": 0, "byteOffset": sum(map(len, parts)), "byteLength": values.nbytes, "target": target})
        parts.append(values.tobytes())
        components = {"f": 5126, "u": 5125}[values.dtype.kind]
        count = len(values) if kind == "VEC3" else values.size
        accessor = {"bufferView": len(views) - 1, "componentType": components, "count": count, "type": kind}
        if target == 34962:
            accessor |= {"min": values.min(axis=0).tolist(), "max": values.max(axis=0).tolist()}
        accessors.append(accessor)
        return len(accessors) - 1

    for name, (surface, colour) in surfaces.items():
        node: dict[str, object] = {"name": name}
        if len(surface.triangles):
            attributes = {
                "POSITION": stored(surface.points_mm.astype("<f4"), "VEC3", 34962),
                "NORMAL": stored(surface.normals.astype("<f4"), "VEC3", 34962),
            }
            indices = stored(surface.triangles.astype("<u4"), "SCALAR", 34963)
            shade = [((part / 255 + 0.055) / 1.055) ** 2.4 if part > 10 else part / 255 / 12.92 for part in colour]
            materials.append(
                {"name": name, "pbrMetallicRoughness": {"baseColorFactor": [*shade, 1.0], "metallicFactor": 0.0}}
            )
            primitive = {"attributes": attributes, "indices": indices, "material": len(materials) - 1}
            meshes.append({"name": name, "primitives": [primitive]})
            node["mesh"] = len(meshes) - 1
        nodes.append(node)
    root = {"name": "millimetres, LPS", "matrix": _TO_METRES, "children": list(range(len(nodes)))}
    content = b"".join(parts)
    lists = {"bufferViews": views, "accessors": accessors, "meshes": meshes, "materials": materials}
    about = {
        "asset": {"version": "2.0", "generator": f"Delineate, {SPACE}"},
        "scene": 0,
        "scenes": [{"nodes": [len(nodes)]}],
        "nodes": [*nodes, root],
        **({"buffers": [{"byteLength": len(content)}]} if content else {}),
        **{key: value for key, value in lists.items() if value},
    }
    text = json.dumps(about).encode()
    chunks = _chunk(b"JSON", text.ljust(-(-len(text) // 4) * 4)) + (_chunk(b"BIN\0", content) if content else b"")
    return b"glTF" + (2).to_bytes(4, "little") + (12 + len(chunks)).to_bytes(4, "little") + chunks


def _chunk(kind: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4, "little") + kind + content


WRITERS: Mapping[str, Callable[[Coloured], bytes]] = {"stl": _stl, "obj": _obj, "vtp": _vtp, "glb": _glb}
"""By suffix."""
