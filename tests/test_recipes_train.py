"""Every packaged recipe trains two steps on simulated scans of its shape and predicts one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from delineate.compute import plan_compute
from delineate.core.grid import Grid
from delineate.core.targets import Targets
from delineate.core.volume import LabelVolume, Volume
from delineate.datasets.layouts import open_dataset
from delineate.inference.predictor import Predictor
from delineate.io.formats import write_label, write_volume
from delineate.recipe import load_recipe, packaged_recipes, recipe_from
from delineate.training.options import Reporter, RunOptions
from delineate.training.run import train

CHANNELS = {name: 2 for name in packaged_recipes() if name.startswith("bra")}
OVERLAPPING = {name for name in packaged_recipes() if name.startswith(("liver_tumour_", "prostate_", "wmh_"))}
SPACING_MM = {"wmh": (0.9, 0.9, 6.0), "sarcoma": (1.0, 1.0, 3.3), "demo": (3.5, 3.5, 7.0), "generic_2.5d": (1, 1, 6)}


def pre_trained(values, folder):
    """A bundle of two targets, one of them the lesion, as the arms of the transfer study begin with."""
    from delineate.bundle import Bundle
    from delineate.sampling.tiles import TileGeometry

    recipe = recipe_from({**values, "start": None})
    targets = Targets({"organ": (1, 2), "lesion": (2,)}, "overlapping")
    bundle = Bundle(recipe, recipe.pipeline, targets, ("c0",), TileGeometry((40, 40, 1), slice_axis=2), (1.0, 1.0, 1.0))
    bundle.save(folder / "pre_trained", bundle.network().state_dict(), {})
    return folder / "pre_trained"


@pytest.mark.parametrize("name", packaged_recipes())
def test_it_trains_two_steps_and_predicts(name, narrow, tmp_path, rng) -> None:
    channels, shape = CHANNELS.get(name, 1), (36, 40, 14)
    grid = Grid.of_spacing(shape, SPACING_MM.get(name, (1.0, 1.0, 1.0)))
    label = np.zeros(shape, dtype=np.uint8)
    label[12:20, 14:26, 5:10] = 1
    for i in range(3):
        for c in range(channels):
            scan = (label * 2 + rng.standard_normal(shape)).astype(np.float32)
            write_volume(tmp_path / f"data/s{i}_c{c}.nii.gz", Volume(scan[None], grid))
        write_label(tmp_path / f"data/s{i}_label.nii.gz", LabelVolume(label, grid))
    values = load_recipe(name).as_dict()
    values["data"] = {}
    # DeepLab's pooled branch normalises over the batch alone.
    batch_size = 2 if name == "prostate_deeplab" else 1
    values["training"] |= {"minutes": None, "steps": 2, "batch_size": batch_size, "folds": 3, "test_last": 0}
    values["network"] = narrow(values["network"])
    if values["start"] is not None:
        values["start"]["weights"] = str(pre_trained(values, tmp_path))
    if values["loss"]["kind"] == "siamese_content":
        values["loss"]["weights"] = "random"
    elif values["loss"].get("weights"):
        values["loss"]["weights"] = {"background": 1.0, "lesion": 3.0}
    for sized in (values["tiles"], *values["preprocessing"]):
        if sized.get("shape"):
            sized["shape"] = [n and min(n, 64) for n in sized["shape"]]
    values["training"]["validation"]["subjects"] = 0
    values["postprocessing"]["largest_component"] = []
    targets = Targets({"lesion": (1,)}, "overlapping" if name in OVERLAPPING else "exclusive")
    images = {f"c{c}": f"*_c{c}.nii.gz" for c in range(channels)}
    dataset = open_dataset(tmp_path / "data", images=images, labels="*_label.nii.gz", targets=targets)
    options = RunOptions(cache=tmp_path / "cache", device="cpu", compile="off", evaluate=False)
    result = train(recipe_from(values), dataset, tmp_path / "run", options, Reporter())
    assert result.steps == 2

    from delineate.bundle import Bundle

    bundle = Bundle.load(tmp_path / "run/bundle")
    scan = Volume(rng.standard_normal((channels, 33, 41, 9)).astype(np.float32), replace(grid, shape=(33, 41, 9)))
    plan = plan_compute(device="cpu", compile="off")
    assert Predictor([bundle], plan).predict(scan).label.grid is scan.grid
