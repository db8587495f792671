"""A small data set on disk: balls in noise, quick to learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from delineate.core.grid import Grid
from delineate.core.targets import Targets
from delineate.core.volume import LabelVolume, Volume
from delineate.datasets.dataset import Dataset
from delineate.datasets.layouts import open_dataset
from delineate.io.formats import write_label, write_volume
from delineate.recipe import Recipe, recipe_from


@pytest.fixture(scope="session")
def balls(tmp_path_factory) -> Dataset:
    """Six scans of 16 × 16 × 12 voxels, each with a bright ball, in slightly different places."""
    return written_balls(tmp_path_factory.mktemp("balls"), 6)


@pytest.fixture(scope="session")
def twelve_balls(tmp_path_factory) -> Dataset:
    """Twelve such scans."""
    return written_balls(tmp_path_factory.mktemp("balls"), 12)


def written_balls(root: Path, n: int) -> Dataset:
    rng = np.random.default_rng(0)
    index = np.stack(np.meshgrid(*[np.arange(s) for s in (16, 16, 12)], indexing="ij"))
    grid = Grid.of_spacing((16, 16, 12), (1, 1, 1.5))
    for i in range(n):
        centre = rng.uniform(5, 10, 3) * (1, 1, 0.7)
        ball = ((index - centre.reshape(3, 1, 1, 1)) ** 2 * np.array([1, 1, 2.25]).reshape(3, 1, 1, 1)).sum(0) < 16
        voxels = (ball * 3 + rng.standard_normal(ball.shape)).astype(np.float32)
        write_volume(root / f"case{i}_image.nii.gz", Volume(voxels[None], grid))
        write_label(root / f"case{i}_label.nii.gz", LabelVolume(ball.astype(np.uint8), grid))
    return open_dataset(root, images="*_image.nii.gz", labels="*_label.nii.gz", targets=Targets({"ball": (1,)}))


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    """Two minutes' worth of nothing: a tiny network for a few steps."""
    return recipe_from(
        {
            "name": "tiny",
            "preprocessing": [{"kind": "normalise", "method": "zscore"}],
            "tiles": {"kind": "patches", "shape": [16, 16, 12]},
            "network": {"kind": "unet", "dimensions": 3, "widths": [8, 8], "dropout": 0.1},
            "training": {
                "steps": 12,
                "optimiser": {"learning_rate": 0.01},
                "validation": {"times": 3, "loss_every": 5},
                "folds": 3,
            },
        }
    )
