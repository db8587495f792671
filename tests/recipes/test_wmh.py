"""The recipes of the white matter report (Mac, Moody & Khademi 2020) do what it says, in numbers copied from it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from delineate.core.grid import Grid
from delineate.core.subject import Subject
from delineate.core.targets import Targets
from delineate.core.volume import Volume
from delineate.datasets.dataset import Dataset
from delineate.losses.content import SiameseContent
from delineate.losses.spec import build_loss
from delineate.networks.cost import count_parameters
from delineate.recipe import Recipe, load_recipe
from delineate.sampling.augmentation import augment
from delineate.sampling.tiles import geometry_for
from delineate.training.preparation import assign_roles, new_split

# Sections 2.1 and 3.2, the same for every loss ("the same settings").
PAPER: dict[str, Any] = {
    "parameters": 10_900_289,
    "filters": [32, 64, 128, 256, 512],  # "doubling with each max pooling operation"
    "outputs": 1,  # "sigmoid as final output"
    "slope": 0.1,
    "input": (224, 224),
    "channels": 3,  # "concatenated with itself twice"
    "batch_size": 8,
    "steps": 100 * 100,
    "learning_rate": 0.001,
    "betas": (0.9, 0.999),
    "rotation": 30,
    "soft_labels": (0.1, 0.9),
}
# Keras-TensorFlow 2.0, whose momentum 0.99 is 0.01 in PyTorch.
KERAS = {"eps": 1e-3, "momentum": 0.01, "initialisation": "glorot_uniform", "vgg_input": "caffe"}

# Sections 2.2, 3.2.4 and 5.
LOSSES: dict[str, dict[str, Any]] = {
    "wmh_dice": {"kind": "dice", "denominator": "squares", "smooth": 1.0},
    "wmh_tversky": {"kind": "tversky", "fp_weight": 0.3, "fn_weight": 0.7},
    "wmh_gdl": {"kind": "generalised_dice"},
    "wmh_siamese": {"kind": "siamese_content", "weights": "imagenet", "reduction": "paper", "trained": False},
    "wmh_siamese_trained": {"kind": "siamese_content", "weights": "imagenet", "trained": True, "learning_rate": 1e-5},
}


@pytest.fixture(params=LOSSES)
def recipe(request: pytest.FixtureRequest) -> Recipe:
    return load_recipe(request.param)


def targets_of(recipe: Recipe) -> Targets:
    assert recipe.data.targets is not None
    return recipe.data.targets.targets()


def test_the_network_is_the_report_s(recipe: Recipe) -> None:
    targets = targets_of(recipe)
    assert not targets.exclusive, "a sigmoid"
    assert targets.outputs == PAPER["outputs"]
    with torch.device("meta"):
        network = recipe.network.build(1, targets.outputs)
        assert network(torch.empty(2, 1, *PAPER["input"])).shape == (2, 1, *PAPER["input"])
    assert count_parameters(network)[0] == PAPER["parameters"]
    first, *_ = convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert first.in_channels == PAPER["channels"]
    assert {m.kernel_size for m in convolutions[:-1]} == {(3, 3)}
    assert sorted({m.out_channels for m in convolutions[:-1]}) == PAPER["filters"]
    assert {m.negative_slope for m in network.modules() if isinstance(m, nn.LeakyReLU)} == {PAPER["slope"]}
    norms = {(m.eps, m.momentum) for m in network.modules() if isinstance(m, nn.BatchNorm2d)}
    assert norms == {(KERAS["eps"], KERAS["momentum"])}


def test_the_training_is_the_report_s(recipe: Recipe) -> None:
    training, adam = recipe.training, recipe.training.optimiser
    assert (training.batch_size, training.steps) == (PAPER["batch_size"], PAPER["steps"])
    assert (training.minutes, training.epochs) == (None, None)
    assert (adam.kind, adam.learning_rate, adam.weight_decay) == ("adam", PAPER["learning_rate"], 0)
    assert (adam.beta1, adam.beta2) == PAPER["betas"]
    assert {training.schedule.multiple(progress) for progress in (0, 0.5, 1)} == {1}
    assert (training.ema, training.clip_norm, training.keep) == (0, None, "last")
    assert (training.initialisation, training.norm_statistics) == (KERAS["initialisation"], "moving")
    assert recipe.start is None
    assert recipe.sampler.kind == "all"
    assert recipe.postprocessing == type(recipe.postprocessing)(), "the report only cites Li et al.'s"


def test_the_loss_is_the_report_s(recipe: Recipe) -> None:
    expected = LOSSES[recipe.name] | {"soft_labels": PAPER["soft_labels"]}
    assert {name: getattr(recipe.loss, name) for name in expected} == expected


def test_every_axial_slice_is_resized_over_the_volume_s_maximum(recipe: Recipe, rng: np.random.Generator) -> None:
    """A scan of the Amsterdam scanner's shape, from right to left and from head to feet."""
    grid = Grid((132, 256, 83), np.diag([-1.2, 0.98, -3.0, 1.0]))
    scan = Volume(rng.uniform(0, 900, (1, *grid.shape)).astype(np.float32), grid)
    scan.voxels[0, 60, 100, 40] = 5000
    prepared, undo = recipe.pipeline.apply(scan)
    assert prepared.grid.shape == (*PAPER["input"], 83)
    assert prepared.grid.orientation == "RAS"
    assert prepared.voxels[..., :10].max() < 0.2, "one maximum for the volume, not one a slice"
    assert 0 <= prepared.voxels.min() < 0.01
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(scan.voxels[:, ::-1, :, 82 - 7].copy() / 5000)[None], PAPER["input"], mode="bilinear"
    )
    np.testing.assert_allclose(prepared.voxels[..., 7], expected[0], atol=1e-6)
    assert undo(prepared.voxels).shape == scan.voxels.shape
    geometry = geometry_for(recipe.tiles, prepared.grid.shape, prepared.grid.spacing_mm, recipe.network)
    assert geometry.input_shape == (*PAPER["input"], 1)
    tiles = geometry.tiles(prepared.grid.shape, recipe.inference.overlap)
    assert [tile.start for tile in tiles] == [(0, 0, z) for z in range(83)]


def test_all_models_see_vgg_s_input(recipe: Recipe) -> None:
    """Keras' preprocessing for VGG19: 255 x, less the means of blue, green and red."""
    network = recipe.network.model_copy(update={"first_filters": 1}).build(1, 1).eval()
    seen: list[torch.Tensor] = []
    network.get_submodule("encoder.0.layers.0").register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    image = torch.rand(1, 1, 16, 16)
    network(image)
    expected = torch.cat([255 * image - mean for mean in (103.939, 116.779, 123.68)], dim=1)
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-4)
    assert recipe.network.model_dump()["vgg_input"] == KERAS["vgg_input"]


def test_rotation_is_the_only_augmentation_and_turns_pixels(recipe: Recipe) -> None:
    """A line through the centre turns by at most 30°, evenly drawn, whatever the spacing."""
    assert recipe.augmentation.intensity is None
    x, y = torch.meshgrid(torch.arange(224.0) - 111.5, torch.arange(224.0) - 111.5, indexing="ij")
    line = ((y.abs() < 3) & (x.abs() < 90)).float()[None, None].repeat(60, 1, 1, 1)
    turned, moved = augment(
        line,
        line.to(torch.uint8),
        recipe.augmentation,
        shape=(224, 224),
        spacing_mm=torch.tensor([[0.7, 1.1]] * 60),
        generator=torch.Generator().manual_seed(0),
        axes="xy",
    )
    assert (turned.sum((1, 2, 3)) / line[0].sum()).sub(1).abs().max() < 0.03, "neither scaled nor bent"
    assert ((turned > 0.5) == (moved == 1)).float().mean() > 0.99
    weight = turned / turned.sum((2, 3), keepdim=True)
    xx, yy, xy = ((weight * product).sum((1, 2, 3)) for product in (x * x, y * y, x * y))
    degrees = torch.rad2deg(0.5 * torch.atan2(2 * xy, xx - yy))
    assert 25 < degrees.max() <= PAPER["rotation"] + 0.5
    assert -PAPER["rotation"] - 0.5 <= degrees.min() < -25
    assert degrees.std() == pytest.approx(2 * PAPER["rotation"] / 12**0.5, rel=0.2)


def test_48_scans_are_trained_on_and_6_and_6_held_back_evenly_over_centres(recipe: Recipe) -> None:
    subjects = [
        Subject(f"{site}-{i}", scans={"FLAIR": Path(f"{site}-{i}.nii.gz")}, site=site)
        for site in ("Utrecht", "Singapore", "Amsterdam")
        for i in range(20)
    ]
    dataset = Dataset("WMH", Path(), "wmh2017", tuple(subjects), targets_of(recipe), "MR")
    roles = assign_roles(subjects, new_split(recipe.training, dataset, dataset), 0, recipe)
    parts = [Counter(s.site for s in part) for part in (roles.training, roles.validation, roles.held_out)]
    assert [sorted(part.values()) for part in parts] == [[16, 16, 16], [2, 2, 2], [2, 2, 2]]


@pytest.mark.parametrize("trained", [False, True])
def test_the_content_loss_sees_the_prepared_image(trained: bool) -> None:
    """Twice as bright is not the same to it, as it would be if each tile were stretched."""
    name = "wmh_siamese_trained" if trained else "wmh_siamese"
    recipe = load_recipe(name, ["loss.weights=random"])
    torch.manual_seed(0)
    loss = build_loss(recipe.loss, targets_of(recipe))
    assert isinstance(loss.loss, SiameseContent)
    assert bool(loss.loss.adversary) == trained
    image, target = torch.rand(1, 1, 32, 32) / 2, (torch.rand(1, 1, 32, 32) < 0.1).to(torch.uint8)
    dark, bright = (loss(torch.zeros(1, 1, 32, 32), target, image * gain) for gain in (1, 2))
    assert bright > 2 * dark


def test_metrics_are_the_challenge_s_and_the_density(recipe: Recipe) -> None:
    assert {"wmh2017", "density_percent"} <= set(recipe.metrics)
    assert 1 <= len(recipe.deviates) <= 6
