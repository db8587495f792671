from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from delineate.bundle import Bundle, save_weights
from delineate.compute import plan_compute
from delineate.core.grid import Grid
from delineate.core.targets import Targets
from delineate.core.volume import Volume
from delineate.errors import BundleError
from delineate.inference.predictor import Predictor
from delineate.recipe import recipe_from
from delineate.sampling.tiles import TileGeometry

PLAN = plan_compute(device="cpu", precision="fp32", compile="off")


def small_bundle(**recipe) -> Bundle:
    values = {
        "name": "small",
        "preprocessing": [
            {"kind": "reorient", "to": "RAS"},
            {"kind": "resample", "spacing_mm": [1.5, 1.5, None]},
            {"kind": "normalise", "method": "zscore"},
        ],
        "tiles": {"kind": "patches", "shape": [8, 8, 4]},
        "network": {"kind": "unet", "dimensions": 3, "widths": [4, 8]},
    }
    made = recipe_from(values | recipe)
    return Bundle(
        recipe=made,
        pipeline=made.pipeline,
        targets=Targets({"liver": (1,), "tumour": (2,)}),
        channels=("T1",),
        geometry=TileGeometry((8, 8, 4)),
        spacing_mm=(1.5, 1.5, 5.0),
        fingerprint={"subjects": 3},
        provenance={"seed": 0},
    )


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    bundle = small_bundle()
    bundle.save(tmp_path / "bundle", bundle.network().state_dict(), {"step": 7})
    return tmp_path / "bundle"


@pytest.fixture
def scan(rng) -> Volume:
    """Oblique, left-posterior-superior, anisotropic."""
    affine = np.array([[-1.1, 0.1, 0, 20], [0.1, -1.0, 0.2, 30], [0, 0.1, 5, -40], [0, 0, 0, 1]])
    return Volume(rng.standard_normal((1, 17, 13, 7)).astype(np.float32), Grid((17, 13, 7), affine))


def test_a_bundle_reads_back_as_it_was_saved(saved) -> None:
    loaded = Bundle.load(saved)
    assert (loaded.recipe, loaded.targets, loaded.geometry) == (
        small_bundle().recipe,
        small_bundle().targets,
        TileGeometry((8, 8, 4)),
    )
    assert loaded.metadata == {"step": "7"}
    assert loaded.channels == ("T1",)


def test_there_is_no_pickle_in_it(saved) -> None:
    assert {p.suffix for p in saved.iterdir()} == {".yaml", ".json", ".safetensors"}


def test_predictions_lie_on_the_scan_s_own_grid(saved, scan) -> None:
    label = Predictor([Bundle.load(saved)], PLAN).predict(scan).label
    assert label.grid is scan.grid
    assert label.voxels.shape == scan.grid.shape
    assert set(np.unique(label.voxels)) <= {0, 1, 2}


def test_an_ensemble_of_one_bundle_twice_is_that_bundle(saved, scan) -> None:
    bundle = Bundle.load(saved)
    once, twice = (Predictor([bundle] * n, PLAN).predict(scan).label.voxels for n in (1, 2))
    assert once.any()
    assert (once == twice).mean() > 0.999  # a mean of halves may round a tie


def test_an_ensemble_averages_probabilities(saved, scan, tmp_path) -> None:
    """A member that is sure of background everywhere wins over one that is not sure of anything."""
    weights = small_bundle().network().state_dict()
    weights["head.weight"] *= 0
    weights["head.bias"] = torch.tensor([30.0, 0, 0])
    sure = tmp_path / "sure"
    small_bundle().save(sure, weights, {})
    label = Predictor([Bundle.load(saved), Bundle.load(sure)], PLAN).predict(scan).label
    assert not label.voxels.any()


def test_bundles_that_differ_in_targets_are_no_ensemble(saved) -> None:
    from dataclasses import replace

    bundle = Bundle.load(saved)
    with pytest.raises(BundleError, match="same targets"):
        Predictor([bundle, replace(bundle, targets=Targets({"spleen": (1,)}))], PLAN)


def test_a_scan_with_other_channels_is_refused(saved, scan) -> None:
    two = Volume(np.concatenate([scan.voxels] * 2), scan.grid)
    with pytest.raises(BundleError, match="has 2 channels, the bundle wants 1: T1"):
        Predictor([Bundle.load(saved)], PLAN).predict(two)


def test_weights_are_replaced_in_one_rename(saved) -> None:
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    save_weights(saved, small_bundle().network().state_dict(), {"step": 9})
    after = {p.name: p.read_bytes() for p in saved.iterdir()}
    assert {name for name in after if after[name] != before[name]} == {"weights.safetensors"}
    assert Bundle.load(saved).metadata == {"step": "9"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bundle.json", "{", "damaged"),
        ("bundle.json", json.dumps({"format": 99}), "format 99"),
        ("recipe.yaml", None, "recipe.yaml is missing"),
    ],
)
def test_a_damaged_bundle_says_so(saved, name, content, message) -> None:
    if content is None:
        (saved / name).unlink()
    else:
        (saved / name).write_text(content)
    with pytest.raises(BundleError, match=message):
        Bundle.load(saved)


def test_weights_that_do_not_fit_are_refused(saved) -> None:
    save_weights(saved, {"head.bias": torch.zeros(3)}, {})
    with pytest.raises(BundleError, match="do not fit"):
        Bundle.load(saved).trained_network()
    (saved / "weights.safetensors").write_bytes(b"\x80\x04.")  # a pickle
    with pytest.raises(BundleError, match="cannot be read"):
        Bundle.load(saved).trained_network()


def test_whole_slices_take_each_volume_s_size() -> None:
    bundle = small_bundle(
        tiles={"kind": "slices", "axis": "z"}, network={"kind": "unet", "dimensions": 2, "widths": [4, 8]}
    )
    assert bundle.geometry_of((31, 20, 9)).shape == (32, 20, 1)
    assert small_bundle().geometry_of((31, 20, 9)).shape == (8, 8, 4)
