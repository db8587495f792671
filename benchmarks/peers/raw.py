"""The same scans for all: data sets in nnU-Net's raw layout, which Delineate and MONAI's script read, too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

from delineate.core.grid import Grid
from delineate.core.volume import LabelVolume, Volume
from delineate.datasets.dataset import Dataset, load_label, load_scan
from delineate.datasets.layouts import open_dataset
from delineate.datasets.splits import make_split, save_split
from delineate.io.formats import write_label, write_volume

NUMBERS = {"hippocampus": 4, "prostate": 5, "sarcoma": 6, "brats": 7}
"""nnU-Net calls data sets by number."""

FEW, SMALL = 6, 72
"""Subjects, and voxels along each axis, of a run that only checks that all works."""


def folder_name(name: str) -> str:
    return f"Dataset{NUMBERS[name]:03}_{name}"


def write_raw(source: Path, out: Path, *, few: bool) -> None:
    """Write the labelled subjects of ``source`` to ``out``, with five folds in ``split.json``.

    ``fold_0.json`` has the training and the held-out subjects of fold 0, for the others. ``few``: a few small ones.
    """
    beside = out.with_name(f"{out.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    dataset = open_dataset(source)
    subjects = dataset.subjects[:FEW] if few else dataset.subjects
    assert dataset.targets is not None
    for subject in subjects:
        scan = load_scan(subject, dataset.channels)
        label = load_label(subject, dataset.targets, scan.grid)
        scan, voxels, grid = small(scan, label.voxels) if few else (scan, label.voxels, scan.grid)
        for channel in range(len(dataset.channels)):
            one = Volume(scan.voxels[channel : channel + 1], grid)
            write_volume(beside / "imagesTr" / f"{subject.id}_{channel:04}.nii.gz", one)
        write_label(beside / "labelsTr" / f"{subject.id}.nii.gz", LabelVolume(voxels, grid))
    (beside / "dataset.json").write_text(json.dumps(described(dataset, len(subjects)), indent=1), encoding="utf-8")
    if (source / "sites.csv").exists() and not few:
        shutil.copy(source / "sites.csv", beside)
    split = make_split(open_dataset(beside).subjects, folds=5, seed=0)
    save_split(beside / "split.json", split)
    fold = {"training": split.training_of(0), "held_out": split.held_out(0)}
    (beside / "fold_0.json").write_text(json.dumps(fold), encoding="utf-8")
    beside.rename(out)


def small(scan: Volume, label: np.ndarray) -> tuple[Volume, np.ndarray, Grid]:
    """The middle of a scan, around its label."""
    centre = np.argwhere(label).mean(axis=0)
    first = [int(np.clip(c - SMALL / 2, 0, max(0, n - SMALL))) for c, n in zip(centre, label.shape, strict=True)]
    inner = tuple(slice(f, f + SMALL) for f in first)
    cut = np.ascontiguousarray(label[inner])
    grid = Grid(cut.shape, scan.grid.affine)
    return Volume(np.ascontiguousarray(scan.voxels[(slice(None), *inner)]), grid), cut, grid


def described(dataset: Dataset, count: int) -> dict[str, object]:
    assert dataset.targets is not None
    labels = {name: values[0] for name, values in dataset.targets.values.items()}
    return {
        "channel_names": {str(number): name for number, name in enumerate(dataset.channels)},
        "labels": {"background": 0, **labels},
        "numTraining": count,
        "file_ending": ".nii.gz",
    }


def link_scans(raw: Path, names: list[str], out: Path) -> None:
    """A folder with the scans of some subjects, as nnU-Net wants them to predict."""
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        for file in sorted((raw / "imagesTr").glob(f"{name}_[0-9][0-9][0-9][0-9].nii.gz")):
            to = out / file.name
            if not to.exists():
                to.symlink_to(file)


def write_moved(raw: Path, out: Path) -> None:
    """Predictions to evaluate: each reference, moved by a voxel along two axes, with a hole."""
    import nibabel

    beside = out.with_name(f"{out.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    for file in sorted((raw / "labelsTr").glob("*.nii.gz")):
        image = nibabel.load(file)
        voxels = np.roll(np.asarray(image.dataobj), (1, 1), axis=(0, 1))
        marked = np.argwhere(voxels)
        x, y, z = marked[len(marked) // 2]
        voxels[x : x + 3, y : y + 3, z : z + 3] = 0
        nibabel.save(nibabel.Nifti1Image(voxels.astype(np.uint8), image.affine, image.header), beside / file.name)
    beside.rename(out)
