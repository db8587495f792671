"""Recipes of the reports read simulated scans as their own: all targets are there, and so is every channel."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from delineate.datasets.dataset import load_label, load_scan
from delineate.datasets.phantoms.writing import write_phantoms
from delineate.io.formats import read_label
from delineate.recipe import load_recipe
from delineate.sampling.tiles import geometry_for
from delineate.training.options import Reporter, RunOptions
from delineate.training.preparation import inspected
from delineate.training.run import train

FITTING = [
    ("liver_tumour_lits", "liver-ct", "lits"),
    ("liver_tumour_a", "liver-tumour", "cases"),
    ("brain_3d_context", "brain-tumour", "msd"),
    ("brain_2d", "brain-tumour", "msd"),
    ("liver_volume", "liver-fat", "msd"),
    ("liver_fat_fraction", "liver-fat-fraction", "msd"),
    ("liver_volume", "ct-slice-liver", "msd"),
    ("liver_volume", "ct-slice-abdomen", "msd"),
    ("liver_volume", "ct-slice-thigh", "msd"),
    ("wmh_dice", "white-matter", "wmh2017"),
    ("prostate_unet", "prostate", "promise12"),
]
WITHIN = {("lits", "liver"): ("liver", "tumour")}
"""Targets that contain several parts."""


@pytest.mark.parametrize(("name", "kind", "layout"), FITTING)
def test_targets_have_their_true_volumes_and_channels_fit_the_network(
    name: str, kind: str, layout: str, tmp_path: Path
) -> None:
    written = write_phantoms(tmp_path, 3, kind, layout=layout, coarse=4)
    recipe, messages = load_recipe(name), Reporter()
    dataset, targets, inspection = inspected(recipe, recipe.data.open(tmp_path), None, RunOptions(), messages)
    assert messages.messages == []
    assert inspection.broken == ()
    with (tmp_path / "truth.csv").open(encoding="utf-8") as file:
        truth = {row["subject"]: row for row in csv.DictReader(file)}
    assert truth.keys() == {subject.id for subject in dataset.subjects}
    for target in targets.names:
        volumes = []
        for subject in dataset.subjects:
            label = load_label(subject, targets, load_scan(subject).grid)
            volumes.append(np.count_nonzero(targets.masks(label.voxels)[target]) * label.grid.voxel_ml)
        parts = WITHIN.get((layout, target), (target,))
        expected = [sum(float(truth[subject.id][f"{part}_ml"]) for part in parts) for subject in dataset.subjects]
        assert volumes == pytest.approx(expected, abs=0.01)
        assert sum(volumes) > 0, target
    scan = load_scan(dataset.subjects[0])
    assert dataset.channels == (recipe.data.channels or written.channels)
    assert scan.channels == len(dataset.channels)
    geometry = geometry_for(recipe.tiles, scan.grid.shape, scan.grid.spacing_mm, recipe.network)
    with torch.device("meta"):
        network = recipe.network.build(scan.channels * geometry.slices, targets.outputs)
        shape = geometry.to_network(np.zeros((scan.channels, *geometry.input_shape))).shape
        logits = network(torch.empty(2, *shape))
    assert logits.shape[1] == targets.outputs


def test_single_slices_are_trained_on_predicted_and_measured(tmp_path: Path) -> None:
    dataset = write_phantoms(tmp_path / "data", 3, "ct-slice-thigh", coarse=8)
    changes = ["network.widths=[4,8]", "tiles.neighbours=1", "training.folds=3", "training.steps=2"]
    shapes = ["preprocessing.1.spacing_mm=[12,12,null]", "preprocessing.2.shape=[48,48,null]", "tiles.shape=[48,48]"]
    recipe = load_recipe("liver_volume", changes + shapes)
    options = RunOptions(cache=tmp_path / "cache", device="cpu", compile="off")
    train(recipe, dataset, tmp_path / "run", options, Reporter())
    with (tmp_path / "run/evaluation/metrics.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["target"] for row in rows} == {"fat", "connective_tissue", "muscle"}
    subjects = {subject.id: subject for subject in dataset.subjects}
    for row in rows:
        subject = subjects[row["subject"]]
        predicted = read_label(tmp_path / f"run/predictions/{subject.id}.nii.gz")
        assert predicted.grid.shape == (32, 32, 1)
        assert predicted.grid.matches(load_scan(subject).grid)
