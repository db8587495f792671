"""Scans on their way to training: files, preprocessing, a large cohort, simulation."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from measuring import Row, interleaved, process_of

from delineate.core.grid import Grid
from delineate.core.targets import Targets
from delineate.core.volume import LabelVolume, Volume
from delineate.datasets.inspection import inspect
from delineate.datasets.layouts import open_dataset
from delineate.datasets.phantoms.kinds import KINDS
from delineate.io.formats import read_volume, write_label, write_volume
from delineate.preprocessing.cache import prepare
from delineate.preprocessing.pipeline import Pipeline


def bench_files(quick: bool) -> list[Row]:
    import nibabel
    import SimpleITK

    shape = (64, 64, 10) if quick else (512, 512, 100)
    index = np.stack(np.meshgrid(*[np.linspace(-3, 3, n) for n in shape], indexing="ij"))
    noise = np.random.default_rng(0).normal(0, 12, shape)
    voxels = (900 * np.exp(-(index**2).sum(0) / 4) + noise).astype(np.int16)
    volume = Volume(voxels[None], Grid.of_spacing(shape, (0.8, 0.8, 2.5)))
    label = LabelVolume((voxels > 400).astype(np.uint8), volume.grid)
    with tempfile.TemporaryDirectory() as folder:
        scan, out = Path(folder) / "scan.nii.gz", Path(folder) / "out.nii.gz"
        write_volume(scan, volume)
        image = nibabel.Nifti1Image(voxels, volume.grid.affine)
        cases: dict[str, Callable[[], object]] = {
            "read: Delineate": lambda: read_volume(scan),
            "read: nibabel": lambda: np.asanyarray(nibabel.load(scan).dataobj),
            "read: SimpleITK": lambda: SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(scan))),
            "write: Delineate": lambda: write_volume(out, volume),
            "write: nibabel": lambda: nibabel.save(image, out),
            "write a label: Delineate": lambda: write_label(out, label),
        }
        seconds = interleaved(cases, 1 if quick else 5)
    return [{"case": name, "ms": 1000 * s} for name, s in seconds.items()]


def bench_prepare(quick: bool) -> list[Row]:
    """Reading, checking and preparing a 512×512×100 int16 .nii.gz: to RAS, 1 mm in plane, range 0 to 1."""
    from monai import transforms as monai

    shape = (48, 48, 10) if quick else (512, 512, 100)
    affine = np.diag([-0.7, -0.7, 3.0, 1.0])
    rng = np.random.default_rng(0)
    voxels = (rng.standard_normal((1, *shape)) * 30 + np.linspace(0, 400, shape[0])[:, None, None]).astype(np.int16)
    steps = [
        {"kind": "reorient", "to": "RAS"},
        {"kind": "resample", "spacing_mm": [1.0, 1.0, None]},
        {"kind": "normalise", "method": "minmax"},
    ]
    pipelines = [Pipeline.model_validate({"steps": steps[:n]}) for n in range(len(steps) + 1)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "scan.nii.gz")
        write_volume(path, Volume(voxels, Grid(shape, affine)))
        chain = monai.Compose(
            [
                monai.LoadImage(image_only=True, ensure_channel_first=True),
                monai.Orientation(axcodes="RAS", labels=None),
                monai.Spacing(pixdim=(1.0, 1.0, 3.0), mode="bilinear"),
                monai.ScaleIntensity(),
            ]
        )
        volume = read_volume(path)
        cases: dict[str, Callable[[], object]] = {
            "Delineate": lambda: pipelines[-1].apply(read_volume(path)),
            "MONAI: LoadImage, Orientation, Spacing, ScaleIntensity": lambda: chain(str(path)),
            "stage: read and check": lambda: read_volume(path),
            "stage: reorient": lambda: pipelines[1].apply(volume),
            "stage: and resample": lambda: pipelines[2].apply(volume),
            "stage: and normalise": lambda: pipelines[3].apply(volume),
        }
        seconds = interleaved(cases, 1 if quick else 5)
    slowest = seconds["MONAI: LoadImage, Orientation, Spacing, ScaleIntensity"]
    return [{"case": name, "ms": 1000 * s, "times faster": slowest / s} for name, s in seconds.items()]


def write_cohort(root: Path, subjects: int, shape: tuple[int, int, int]) -> None:
    """Many subjects as a Decathlon data set; eight scans are distinct, the others are links to them."""
    rng = np.random.default_rng(0)
    grid, label = Grid.of_spacing(shape, (1.0, 1.0, 4.0)), np.zeros(shape, np.uint8)
    label[tuple(slice(n // 3, n // 2) for n in shape)] = 1
    for i in range(subjects):
        scan, drawn = root / f"imagesTr/s{i:04}.nii.gz", root / f"labelsTr/s{i:04}.nii.gz"
        if i < 8:
            write_volume(scan, Volume(rng.integers(0, 900, (1, *shape), dtype=np.int16), grid))
            write_label(drawn, LabelVolume(label, grid))
        else:
            os.link(root / f"imagesTr/s{i % 8:04}.nii.gz", scan)
            os.link(root / f"labelsTr/s{i % 8:04}.nii.gz", drawn)
    pairs = ", ".join(
        f'{{"image": "imagesTr/s{i:04}.nii.gz", "label": "labelsTr/s{i:04}.nii.gz"}}' for i in range(subjects)
    )
    about = f'{{"modality": {{"0": "MRI"}}, "labels": {{"0": "background", "1": "organ"}}, "training": [{pairs}]}}'
    (root / "dataset.json").write_text(about, encoding="utf-8")


def inspect_cohort(root: str) -> None:
    start = time.perf_counter()
    inspection = inspect(open_dataset(root))
    assert not inspection.errors
    print(f"{time.perf_counter() - start:.2f} {len(inspection.rows)}")


def prepare_cohort(root: str, cache: str, stop_after: int) -> None:
    """Prepare the cohort, with a simulated power cut after ``stop_after`` subjects."""
    start = time.perf_counter()

    def progress(done: int, total: int) -> None:
        if done == stop_after:
            print(f"{time.perf_counter() - start:.2f} {done}", "0", sep="\n", flush=True)
            os._exit(0)

    pipeline = Pipeline.model_validate({"steps": [{"kind": "normalise", "method": "zscore"}]})
    made = prepare(open_dataset(root).subjects, pipeline, Targets({"organ": (1,)}), Path(cache), progress=progress)
    print(f"{time.perf_counter() - start:.2f} {len(made)}")


def bench_cohort(quick: bool) -> list[Row]:
    """Inspecting and preparing a thousand subjects of 160×160×24; preparing is killed at 400 and resumed."""
    subjects, shape = (16, (24, 24, 8)) if quick else (1000, (160, 160, 24))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root, cache = Path(folder, "scans"), Path(folder, "prepared")
        write_cohort(root, subjects, shape)
        half = subjects * 2 // 5
        works = {
            "inspected": f"inspect_cohort({str(root)!r})",
            "prepared, killed": f"prepare_cohort({str(root)!r}, {str(cache)!r}, {half})",
            "prepared, resumed": f"prepare_cohort({str(root)!r}, {str(cache)!r}, -1)",
            "already prepared": f"prepare_cohort({str(root)!r}, {str(cache)!r}, -1)",
        }
        if quick:
            del works["already prepared"]
        for name, work in works.items():
            printed, peak = process_of(f"import data_side; data_side.{work}")
            seconds, done = printed.split()
            rows.append({"case": f"{name}: {done} subjects", "s": float(seconds), "peak GB": peak or None})
    return rows


def bench_phantoms(quick: bool) -> list[Row]:
    """One simulated scan of each kind that has more than one slice, as few voxels tell little about many."""
    rows = []
    for kind in KINDS.values():
        if (quick and kind.name != "abdomen") or kind.scanners[0].shape[2] == 1:
            continue
        start = time.perf_counter()
        scan, _, _ = kind.simulate(0, 0)
        seconds = time.perf_counter() - start
        shape = "×".join(map(str, scan.grid.shape))
        standard = 256 * 256 * 40 / np.prod(scan.grid.shape)
        rows.append({"case": f"{kind.name}, {shape}", "s": seconds, "s for 256×256×40": seconds * standard})
    return rows
