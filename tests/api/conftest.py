"""A place as a user has it: a data set, a run with its bundle, a scan and its label."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import delineate
from delineate.core.grid import Grid
from delineate.core.volume import LabelVolume, Volume

RECIPE = """
name: tiny
preprocessing:
  - {kind: normalise, method: zscore}
tiles: {kind: patches, shape: [16, 16, 12]}
network: {kind: unet, dimensions: 3, widths: [4, 4]}
training:
  steps: 2
  folds: 2
  validation: {times: 1, loss_every: null}
"""


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    """``scans/`` (four balls in noise), ``tiny.yaml``, ``run/``, ``scan.nii.gz`` and ``reference.nii.gz``."""
    place: Path = tmp_path_factory.mktemp("place")
    (place / "tiny.yaml").write_text(RECIPE, encoding="utf-8")
    _write_balls(place / "scans", 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        delineate.train("tiny.yaml", "scans", "run", cache="prepared", device="cpu", compile="off")
        delineate.write("scan.nii.gz", delineate.read("scans/imagesTr/case0.nii.gz"))
        delineate.write("reference.nii.gz", delineate.read("scans/labelsTr/case0.nii.gz", label=True))
    return place


@pytest.fixture
def here(place, monkeypatch) -> Path:
    """The place, as the working folder."""
    monkeypatch.chdir(place)
    return place


def _write_balls(root: Path, n: int) -> None:
    rng = np.random.default_rng(0)
    index = np.stack(np.meshgrid(*[np.arange(s) for s in (16, 16, 12)], indexing="ij"))
    grid = Grid.of_spacing((16, 16, 12), (1, 1, 1.5))
    for i in range(n):
        centre = (rng.uniform(5, 10, 3) * (1, 1, 0.7)).reshape(3, 1, 1, 1)
        ball = ((index - centre) ** 2 * np.array([1, 1, 2.25]).reshape(3, 1, 1, 1)).sum(0) < 16
        voxels = (ball * 3 + rng.standard_normal(ball.shape)).astype(np.float32)
        delineate.write(root / "imagesTr" / f"case{i}.nii.gz", Volume(voxels[None], grid))
        delineate.write(root / "labelsTr" / f"case{i}.nii.gz", LabelVolume(ball.astype(np.uint8), grid))
    about = {
        "name": "balls",
        "modality": {"0": "image"},
        "labels": {"0": "background", "1": "ball"},
        "training": [{"image": f"./imagesTr/case{i}.nii.gz", "label": f"./labelsTr/case{i}.nii.gz"} for i in range(n)],
        "test": [],
    }
    (root / "dataset.json").write_text(json.dumps(about), encoding="utf-8")
