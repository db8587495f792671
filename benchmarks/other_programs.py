"""One label as three libraries read it back from the files that predict writes, for docs/images/other-programs.webp.

    python benchmarks/other_programs.py docs/images/other-programs.webp

The scan is simulated. Names and colours are those that each reader finds in its file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pydicom
import SimpleITK
import vtk
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from vtk.util.numpy_support import vtk_to_numpy

from delineate.core.grid import Grid
from delineate.core.legend import Legend
from delineate.core.targets import Targets
from delineate.core.volume import LabelVolume, Volume
from delineate.io.exports import export_label
from delineate.io.formats import read_volume
from delineate.io.surfaces import surface_files, write_surfaces

TARGETS = Targets({"liver": (1,), "tumour": (2,)})
LEGEND = Legend(colours={"liver": "#dd8265", "tumour": "#56b4e9"})
SIDE, DEPTH, SPACING_MM = 160, 40, (2.0, 2.0, 5.0)


def patient() -> tuple[Volume, LabelVolume]:
    """An organ of two lobes with tumours, and what a scanner makes of it."""
    grid = Grid((SIDE, SIDE, DEPTH), np.array([[-2.0, 0, 0, 160], [0, -2, 0, 160], [0, 0, 5, -100], [0, 0, 0, 1]]))
    x, y, z = (axis * step for axis, step in zip(np.indices(grid.shape), SPACING_MM, strict=True))

    def body(*centre_and_radii: float) -> np.ndarray:
        a, b, c, ra, rb, rc = centre_and_radii
        return ((x - a) / ra) ** 2 + ((y - b) / rb) ** 2 + ((z - c) / rc) ** 2 < 1

    voxels = np.zeros(grid.shape, np.uint8)
    trunk = body(160, 165, 100, 140, 105, 400)
    voxels[(body(115, 150, 105, 70, 68, 62) | body(185, 120, 118, 62, 38, 34)) & ~body(150, 215, 80, 60, 45, 90)] = 1
    for tumour in ((105, 140, 110, 17, 15, 16), (185, 115, 120, 11, 10, 12), (85, 180, 85, 8, 8, 9)):
        voxels[body(*tumour)] = 2
    rng = np.random.default_rng(1)
    values = np.select([voxels == 2, voxels == 1, trunk], [70, 110, 45], -1000) + rng.normal(0, 12, grid.shape)
    return Volume(values[None].astype(np.int16), grid), LabelVolume(voxels, grid)


def write_series(folder: Path, scan: Volume) -> None:
    study, uid = generate_uid(), generate_uid()
    folder.mkdir()
    for k in range(DEPTH):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        image = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
        image.SOPClassUID, image.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        image.StudyInstanceUID = image.FrameOfReferenceUID = study
        image.SeriesInstanceUID, image.SeriesNumber, image.Modality = uid, 1, "CT"
        image.ImageOrientationPatient, image.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [-160, -160, -100 + 5 * k]
        image.PixelSpacing, image.SliceThickness = [2, 2], 5
        image.Rows = image.Columns = SIDE
        image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
        image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 16, 15, 1
        image.PixelData = np.ascontiguousarray(scan.voxels[0, :, :, k].T).tobytes()
        image.save_as(folder / f"{k}.dcm", enforce_file_format=True)


def show_structures(axes: Axes, path: Path, folder: Path, k: int) -> list[Patch]:
    """By pydicom: the contours that name one image, on that image."""
    structures = pydicom.dcmread(path)
    images = {header.SOPInstanceUID: header for header in map(pydicom.dcmread, folder.iterdir())}
    shown = next(image for image in images.values() if image.ImagePositionPatient[2] == -100 + 5 * k)
    axes.imshow(shown.pixel_array, cmap="gray", vmin=-100, vmax=200)
    keys = []
    for named, drawn in zip(structures.StructureSetROISequence, structures.ROIContourSequence, strict=True):
        colour = np.array(drawn.ROIDisplayColor) / 255
        keys.append(Patch(color=colour, label=str(named.ROIName)))
        for contour in drawn.ContourSequence:
            if contour.ContourImageSequence[0].ReferencedSOPInstanceUID == shown.SOPInstanceUID:
                points = (np.array(contour.ContourData, float).reshape(-1, 3)[:, :2] + 160) / 2
                axes.fill(*points.T, fill=False, edgecolor=colour, linewidth=1.2)
    return keys


def show_segments(axes: Axes, path: Path, k: int) -> list[Patch]:
    """By SimpleITK: values, with the names and colours of the header."""
    image = SimpleITK.ReadImage(str(path))
    plane = SimpleITK.GetArrayFromImage(image)[k]
    keys, coloured = [], np.zeros((*plane.shape, 3))
    for number in range(len(TARGETS.names)):
        colour = [float(part) for part in image.GetMetaData(f"Segment{number}_Color").split()]
        coloured[plane == int(image.GetMetaData(f"Segment{number}_LabelValue"))] = colour
        keys.append(Patch(color=colour, label=image.GetMetaData(f"Segment{number}_Name")))
    axes.imshow(coloured)
    return keys


def show_surfaces(axes: Axes, path: Path) -> list[Patch]:
    """By VTK's importer: its own camera and light, the liver made transparent to show what lies within."""
    window, renderer, importer = vtk.vtkRenderWindow(), vtk.vtkRenderer(), vtk.vtkGLTFImporter()
    window.SetOffScreenRendering(1)
    window.SetSize(700, 700)
    window.AddRenderer(renderer)
    importer.SetFileName(str(path))
    importer.SetRenderWindow(window)
    importer.Update()
    keys = []
    content = path.read_bytes()
    about = json.loads(content[20 : 20 + int.from_bytes(content[12:16], "little")])
    named = {tuple(one["pbrMetallicRoughness"]["baseColorFactor"][:3]): one["name"] for one in about["materials"]}
    for actor in renderer.GetActors():
        linear = actor.GetProperty().GetColor()
        name = min(named.items(), key=lambda one: np.linalg.norm(np.subtract(one[0], linear)))[1]
        keys.insert(TARGETS.names.index(name), Patch(color=[part ** (1 / 2.2) for part in linear], label=name))
        actor.GetProperty().SetOpacity(0.6 if name == "liver" else 1)
    window.SetAlphaBitPlanes(1)
    window.SetMultiSamples(0)
    renderer.SetUseDepthPeeling(1)
    renderer.ResetCamera()
    renderer.GetActiveCamera().Zoom(1.1)
    window.Render()
    for light in renderer.GetLights():
        light.SetIntensity(3)
    window.Render()
    grabbed = vtk.vtkWindowToImageFilter()
    grabbed.SetInput(window)
    grabbed.Update()
    picture = vtk_to_numpy(grabbed.GetOutput().GetPointData().GetScalars()).reshape(700, 700, 3)
    axes.imshow(picture[::-1])
    return keys


def main() -> None:
    scan, label = patient()
    figure = Figure((12, 4.6), facecolor="black", layout="constrained")
    panels = figure.subplots(1, 3)
    k = int(np.count_nonzero(label.voxels == 2, axis=(0, 1)).argmax())
    with TemporaryDirectory() as made:
        folder = Path(made)
        write_series(folder / "series", scan)
        label = LabelVolume(label.voxels, read_volume(folder / "series").grid)
        for name in ("a.rtstruct.dcm", "a.seg.nrrd"):
            export_label(folder / name, label, TARGETS, source=folder / "series", legend=LEGEND)
        files = surface_files(folder / "a", TARGETS.names, "glb")
        write_surfaces(files, TARGETS.masks(label.voxels), label.grid, LEGEND)
        keys = {
            ".rtstruct.dcm, by pydicom": show_structures(panels[0], folder / "a.rtstruct.dcm", folder / "series", k),
            ".seg.nrrd, by SimpleITK": show_segments(panels[1], folder / "a.seg.nrrd", k),
            ".glb, by VTK": show_surfaces(panels[2], folder / "a.glb"),
        }
    for axes, (title, patches) in zip(panels, keys.items(), strict=True):
        axes.set_title(title, color="white", fontsize=11)
        axes.set_axis_off()
        axes.legend(handles=patches, loc="lower right", fontsize=9)
    figure.savefig(sys.argv[1], dpi=90, pil_kwargs={"quality": 82})


if __name__ == "__main__":
    main()
