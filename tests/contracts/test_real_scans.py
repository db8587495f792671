"""Real scans of every data set: inspected without errors, predicted on exactly their own grid."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from delineate.bundle import Bundle
from delineate.compute import plan_compute
from delineate.core.targets import Targets
from delineate.datasets.inspection import inspect
from delineate.datasets.layouts import open_dataset
from delineate.inference.batch import find_subjects, predict_subjects
from delineate.inference.predictor import Predictor
from delineate.io.formats import read_header
from delineate.recipe import recipe_from
from delineate.sampling.tiles import TileGeometry

SETS = {
    "hippocampus": ("msd", 209),
    "sarcoma": ("nnunet", 11),
    "wmh": ("wmh2017", 14),
    "brats": ("brats", 5),
    "prostate": ("promise12", 22),
}


@pytest.fixture(params=SETS)
def dataset(request, real_data: Path):
    return open_dataset(real_data / request.param)


def test_it_is_recognised_and_has_no_errors(dataset) -> None:
    assert (dataset.layout, len(dataset.subjects)) == SETS[dataset.root.name]
    assert not inspect(dataset).errors


def test_predictions_have_the_scan_s_shape_and_affine(dataset, tmp_path) -> None:
    values = {
        "name": "untrained",
        "preprocessing": [
            {"kind": "reorient", "to": "RAS"},
            {"kind": "resample", "spacing_mm": [4.0, 4.0, None]},
            {"kind": "normalise", "method": "zscore"},
        ],
        "tiles": {"kind": "patches", "shape": [32, 32, 8]},
        "inference": {"overlap": 0.0},
        "network": {"kind": "unet", "dimensions": 3, "widths": [4, 4]},
    }
    recipe = recipe_from(values)
    bundle = Bundle(
        recipe, recipe.pipeline, Targets({"a": (1,)}), dataset.channels, TileGeometry((32, 32, 8)), (4, 4, 1)
    )
    torch.manual_seed(0)
    bundle.save(tmp_path / "bundle", bundle.network().state_dict(), {})
    predictor = Predictor([Bundle.load(tmp_path / "bundle")], plan_compute(device="cpu", compile="off"))
    # One subject of each site: scanners write their headers each in their own way.
    chosen = list({s.site: s for s in find_subjects([dataset.root], dataset.channels)}.values())
    for outcome in predict_subjects(predictor, chosen, tmp_path / "out"):
        assert outcome.error is None
        assert outcome.path is not None
        scan = read_header(next(iter(outcome.subject.scans.values()))).grid
        label = read_header(outcome.path).grid
        assert label.shape == scan.shape
        np.testing.assert_array_equal(label.affine, scan.affine)
