"""The picture of a crop fitted on the composite image."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from delineate.core.grid import Grid
from delineate.core.subject import Subject
from delineate.core.volume import Volume
from delineate.io.formats import write_volume
from delineate.preprocessing.pipeline import Pipeline
from delineate.reporting.composite import composite_picture

YELLOW = (240, 228, 66)


def test_the_picture_frames_what_every_scan_needs(tmp_path: Path, rng: np.random.Generator) -> None:
    subjects, volumes = [], []
    for i, (start, stop) in enumerate(((6, 20), (10, 26))):
        voxels = np.zeros((1, 40, 30, 6), np.float32)
        voxels[:, start:stop, 5:25, 1:5] = 100
        volumes.append(Volume(voxels, Grid.of_spacing((40, 30, 6), (1, 1, 4))))
        write_volume(tmp_path / f"{i}.nii.gz", volumes[-1])
        subjects.append(Subject(str(i), {"MR": tmp_path / f"{i}.nii.gz"}))
    steps = [{"kind": "crop_composite", "threshold": 0.05}]
    fitted = Pipeline(steps=steps).fit(lambda: iter(volumes))
    picture = np.asarray(Image.open(io.BytesIO(composite_picture(fitted, subjects, ["MR"]) or b"")).convert("RGB"))
    near = (abs(picture.astype(int) - YELLOW) < 60).all(axis=2)
    rows, columns = np.flatnonzero(near.any(axis=1)), np.flatnonzero(near.any(axis=0))
    # 20 of 40 and 20 of 30 voxels: a square on the left half.
    assert columns[-1] < picture.shape[1] / 2
    assert abs((rows[-1] - rows[0]) / (columns[-1] - columns[0]) - 1) < 0.05


def test_without_such_a_crop_there_is_no_picture() -> None:
    assert composite_picture(Pipeline(steps=[{"kind": "reorient", "to": "RAS"}]), [], []) is None
