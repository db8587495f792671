from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from delineate.bundle import Bundle, Fingerprint, Provenance, Range, save_weights
from delineate.compute import plan_compute
from delineate.core.grid import Grid
from delineate.core.targets import Targets
from delineate.core.volume import Volume
from delineate.errors import BundleError
from delineate.inference.predictor import Predictor
from delineate.io.sealed import replace_file
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
        fingerprint=Fingerprint(3, {"contrast of T1": Range(1.5, 2.25, 3.0)}),
        provenance=Provenance(layout="cases", fold=1, versions={"python": "3.11"}),
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


def test_new_weights_leave_the_rest_as_it_is(saved) -> None:
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    save_weights(saved, small_bundle().network().state_dict(), {"step": 9})
    after = {p.name: p.read_bytes() for p in saved.iterdir()}
    assert {name for name in after if after[name] != before[name]} == {"weights.safetensors", "bundle.json"}
    assert Bundle.load(saved).metadata == {"step": "9"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bundle.json", "{", "no JSON"),
        ("bundle.json", json.dumps({"format": 99}), "format 99"),
        ("recipe.yaml", None, "recipe.yaml' is missing"),
    ],
)
def test_a_damaged_bundle_says_so(saved, name, content, message) -> None:
    if content is None:
        (saved / name).unlink()
    else:
        (saved / name).write_text(content)
    with pytest.raises(BundleError, match=message):
        Bundle.load(saved)


def test_weights_that_do_not_fit_are_refused_before_there_is_a_network(saved) -> None:
    weights = small_bundle().network().state_dict()
    bias = weights["head.bias"]
    wrong = {
        "more than their 1 tensors": {"head.bias": bias},
        "head.bias is missing, not 3 of F32": {k: v for k, v in weights.items() if k != "head.bias"} | {"b": bias},
        "head.bias is 2 of F32, not 3 of F32": {**weights, "head.bias": bias[:2]},
        "head.bias is 3 of F64, not 3 of F32": {**weights, "head.bias": bias.double()},
        "extra is 3 of F32, not missing": {**weights, "extra": bias},
    }
    for message, tensors in wrong.items():
        save_weights(saved, tensors, {})
        with pytest.raises(BundleError, match=f"do not fit .*{message}"):
            Bundle.load(saved)
    (saved / "weights.safetensors").write_bytes(b"\x80\x04.")  # a pickle
    with pytest.raises(BundleError, match="not what was saved"):
        Bundle.load(saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_neither_written_nor_read(saved, value) -> None:
    weights = small_bundle().network().state_dict()
    sound = {name: tensor.clone() for name, tensor in weights.items()}
    weights["head.weight"].view(-1)[5] = value
    with pytest.raises(BundleError, match=r"'head.weight' is not finite.*learning rate"):
        save_weights(saved, weights, {})
    assert Bundle.load(saved).metadata == {"step": "7"}
    # Put there by another program, with its digest.
    sound["head.weight"] = weights["head.weight"]
    from safetensors.torch import save_file

    replace_file(saved, "weights.safetensors", lambda path: save_file(sound, path))
    with pytest.raises(BundleError, match="'head.weight' is not finite"):
        Bundle.load(saved)


def test_an_answer_that_is_not_finite_is_refused(saved, scan) -> None:
    """Weights may be finite and what they make of a scan not."""
    weights = small_bundle().network().state_dict()
    weights["head.weight"].fill_(3e38)
    save_weights(saved, weights, {})
    with pytest.raises(BundleError, match="answer is not finite"):
        Predictor([Bundle.load(saved)], PLAN).predict(scan)


def test_weights_that_were_replaced_meanwhile_are_not_mixed_up(saved) -> None:
    bundle = Bundle.load(saved)
    save_weights(saved, small_bundle().network().state_dict(), {})
    with pytest.raises(BundleError, match="open it again"):
        bundle.trained_network()


def test_a_bundle_without_weights_says_that_there_are_none_yet(tmp_path) -> None:
    small_bundle().begin(tmp_path)
    with pytest.raises(BundleError, match="no weights yet.*train"):
        Bundle.load(tmp_path).trained_network()


def test_whole_slices_take_each_volume_s_size() -> None:
    bundle = small_bundle(
        tiles={"kind": "slices", "axis": "z"}, network={"kind": "unet", "dimensions": 2, "widths": [4, 8]}
    )
    assert bundle.geometry_of((31, 20, 9)).shape == (32, 20, 1)
    assert small_bundle().geometry_of((31, 20, 9)).shape == (8, 8, 4)
