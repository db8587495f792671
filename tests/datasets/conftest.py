"""Small data sets on disk, written by the tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from delineate.core.grid import Grid
from delineate.core.volume import LabelVolume, Volume
from delineate.io.formats import write_label, write_volume

SHAPE = (6, 5, 4)

Save = Callable[..., Path]


@pytest.fixture
def save_scan(tmp_path: Path) -> Save:
    """``save_scan("a/b.nii.gz")`` writes a scan there, another for each name, on a common grid."""

    def save(path: str, voxels: NDArray | None = None, grid: Grid | None = None) -> Path:
        grid = grid or Grid.of_spacing(SHAPE if voxels is None else voxels.shape[-3:])
        if voxels is None:
            voxels = np.random.default_rng(sum(path.encode())).integers(1, 1000, grid.shape).astype(np.int16)
        write_volume(tmp_path / path, Volume(voxels if voxels.ndim == 4 else voxels[None], grid))
        return tmp_path / path

    return save


@pytest.fixture
def save_label(tmp_path: Path) -> Save:
    """``save_label("a/b.nii.gz")`` writes a label with values 0 and 1 there."""

    def save(path: str, voxels: NDArray | None = None, grid: Grid | None = None) -> Path:
        if voxels is None:
            voxels = np.zeros(grid.shape if grid else SHAPE, dtype=np.uint8)
            voxels[2:4, 2:4, 1:3] = 1
        write_label(tmp_path / path, LabelVolume(voxels, grid or Grid.of_spacing(voxels.shape)))
        return tmp_path / path

    return save


@pytest.fixture
def msd(tmp_path: Path, save_scan: Save, save_label: Save) -> Callable[..., Path]:
    """``msd("a", "b")`` makes a Decathlon data set of these subjects; further keys go to its dataset.json."""

    def make(*subjects: str, **about: Any) -> Path:
        for subject in subjects:
            save_scan(f"imagesTr/{subject}.nii.gz")
            save_label(f"labelsTr/{subject}.nii.gz")
        pairs = [{"image": f"./imagesTr/{s}.nii.gz", "label": f"./labelsTr/{s}.nii.gz"} for s in subjects]
        contents = {"modality": {"0": "MRI"}, "labels": {"0": "background", "1": "organ"}, "training": pairs, **about}
        (tmp_path / "dataset.json").write_text(json.dumps(contents), encoding="utf-8")
        return tmp_path

    return make
