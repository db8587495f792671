"""The recipes of the liver report (Lindgren, Lundin & Wallin 2020) do what it says, in numbers copied from it."""

from __future__ import annotations

from itertools import chain, combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from delineate.core.grid import Grid
from delineate.core.volume import Volume
from delineate.recipe import load_recipe
from delineate.sampling.augmentation import augment, context_voxels
from delineate.sampling.tiles import geometry_for

DOCUMENTED = (Path(__file__).parents[2] / "docs/recipes.md").read_text(encoding="utf-8")

# Section 3.4 and figure 1.
PAPER = {
    "loss": "cross_entropy",
    "optimiser": "adam",
    "learning_rate": 1e-4,
    "beta1": 0.9,
    "beta2": 0.999,
    "batch_size": 1,
    "dropout": 0.5,
    "steps": 100_000,
    "folds": 10,
}
STEPS_ALONE, FOLDS_ALONE = 75_000, 5
ELASTIC_POINTS, ELASTIC_SIGMA = 8, 8  # 64 points, "the strength of the elastic deformations"

# Section 3.1, mm in plane and between slices: Philips 1.5 T, then GE 3 T.
SCANNERS = {
    "liver_volume": ((2.0, 5.0, 55), (1.5, 5.0, 28)),
    "liver_fat_fraction": ((1.95, 6.0, 34), (1.72, 10.0, 25)),
}
NEIGHBOURS = {"liver_volume": 1, "liver_fat_fraction": 4}  # section 3.2.1

OPTIONS = {
    "E": "augmentation.spatial={probability: 1, rotate_degrees: [0, 0, 0], scale: [1, 1], elastic_voxels: 8, "
    "elastic_points: 8}",
    "V": "tiles.neighbours=",  # so many
    "T": "network={kind: vgg_unet}",
    "R": "network.short_skips=encoder",
}

# Of each combination but for E, which has no parameters; V with one neighbour and with four.
PARAMETERS = {
    "": (31_030_658, 31_030_658),
    "V": (31_031_810, 31_035_266),
    "R": (31_729_026, 31_729_026),
    "VR": (31_730_306, 31_734_146),
    "T": (22_927_432, 22_927_432),
    "VT": (22_927_438, 22_927_456),
    "TR": (23_363_016, 23_363_016),
    "VTR": (23_363_022, 23_363_040),
}

both = pytest.mark.parametrize("name", SCANNERS)


def changes(name: str, options: str) -> list[str]:
    of_recipe = OPTIONS | {"V": f"{OPTIONS['V']}{NEIGHBOURS[name]}"}
    return [change for key, change in of_recipe.items() if key in options]


@both
def test_the_base_is_the_report_s(name: str) -> None:
    recipe = load_recipe(name)
    training, network = recipe.training, recipe.network
    assert {
        "loss": recipe.loss.kind,
        "optimiser": training.optimiser.kind,
        "learning_rate": training.optimiser.learning_rate,
        "beta1": training.optimiser.beta1,
        "beta2": training.optimiser.beta2,
        "batch_size": training.batch_size,
        "dropout": network.dropout,
        "steps": training.steps,
        "folds": training.folds,
    } == PAPER
    assert (training.optimiser.weight_decay, training.ema, training.clip_norm) == (0, 0, None)
    assert (training.schedule.kind, training.schedule.warmup) == ("constant", 0)
    assert (recipe.augmentation.spatial, recipe.augmentation.intensity) == (None, None)
    assert (training.keep, training.initialisation, training.epochs, training.minutes) == (
        "best",
        "default",
        None,
        None,
    )
    assert recipe.sampler.kind == "all"
    assert (recipe.tiles.shape, recipe.tiles.axis, recipe.tiles.neighbours) == ((256, 256), "z", 0)
    with torch.device("meta"):
        logits = network.build(1, 2)(torch.empty(1, 1, 256, 256))
    assert logits.shape == (1, 2, 256, 256)  # background and liver: a softmax


@both
@pytest.mark.parametrize(
    "options", ["".join(chosen) for chosen in chain.from_iterable(combinations(OPTIONS, n) for n in range(5))]
)
def test_every_combination_has_its_parameters(name: str, options: str) -> None:
    recipe = load_recipe(name, changes(name, options))
    geometry = geometry_for(recipe.tiles, (256, 256, 30), (1.5, 1.5, 5.0), recipe.network)
    assert geometry.input_shape[:2] == (256, 256)
    with torch.device("meta"):
        network = recipe.network.build(geometry.slices, 2)
    found = sum(p.numel() for p in network.parameters())
    assert found == PARAMETERS[options.replace("E", "")][name == "liver_fat_fraction"]
    assert (recipe.augmentation.spatial is not None) == ("E" in options)


@both
def test_what_the_report_does_not_say_is_listed(name: str) -> None:
    recipe = load_recipe(name)
    said = " ".join(recipe.deviates)
    spacing = min(scanner[0] for scanner in SCANNERS[name])
    assert f"{spacing:g} mm is the finer" in said
    assert recipe.preprocessing[1].spacing_mm == (spacing, spacing, None)
    assert "selected on validation subjects" in said
    assert "initialised" in said


def test_there_are_sixteen_combinations_and_each_option_is_documented() -> None:
    assert 2 * len(PARAMETERS) == 16
    assert all(change in DOCUMENTED for name in SCANNERS for change in changes(name, "EVTR"))


@both
def test_elastic_deformation_is_nothing_else_and_in_pixels(name: str) -> None:
    spec = load_recipe(name, changes(name, "E")).augmentation
    spatial = spec.spatial
    assert spatial is not None
    assert (spatial.elastic_points, spatial.elastic_voxels) == (ELASTIC_POINTS, ELASTIC_SIGMA)
    # A ramp shows where each pixel came from: at the control points, 8 pixels from where it was.
    context = context_voxels(spec, (256, 256, 1), slice_axis=2)[0]
    ramp = torch.arange(256.0 + 2 * context).repeat(256 + 2 * context, 1)
    image = torch.stack([ramp.T, ramp]).repeat(12, 1, 1, 1)
    moved, _ = augment(
        image,
        torch.zeros(12, 1, *image.shape[2:], dtype=torch.uint8),
        spec,
        shape=(256, 256),
        spacing_mm=torch.tensor([[3.0, 0.5]] * 12),  # of no matter
        generator=torch.Generator().manual_seed(0),
        axes="xy",
    )
    place = torch.arange(256.0) + context
    shift = torch.stack([moved[:, 0] - place[:, None], moved[:, 1] - place], dim=1)  # (N, 2, 256, 256)
    inner = shift[:, :, 36:220:36, 36:220:36]  # six points within, about 255 / 7 apart
    assert inner.std(dim=(0, 2, 3)).tolist() == pytest.approx([8, 8], rel=0.15)
    assert inner.mean(dim=(0, 2, 3)).abs().max() < 2, "neither scaled nor turned"
    between = shift[:, :, 18:220:36, 36:220:36]
    ends = (shift[:, :, 0:200:36, 36:220:36] + shift[:, :, 36:236:36, 36:220:36]) / 2
    assert (between - ends).abs().mean() < 0.6, "and linear between them"


@both
def test_both_scanners_come_to_one_spacing_in_plane_alone(name: str) -> None:
    recipe, found = load_recipe(name), []
    for in_plane, between, slices in SCANNERS[name]:
        grid = Grid.of_spacing((180, 150, slices), (in_plane, in_plane, between))
        scan = Volume(np.random.default_rng(0).random((1, *grid.shape), dtype=np.float32), grid)
        prepared, undo = recipe.pipeline.apply(scan)
        assert prepared.grid.shape == (256, 256, slices)
        assert prepared.grid.spacing_mm[2] == between
        assert undo.scores(prepared.voxels[0], 0.0).shape == grid.shape
        found.append(prepared.grid.spacing_mm[:2])
    assert np.ptp(found) < 0.01 * np.min(found)
    assert np.mean(found) == pytest.approx(min(scanner[0] for scanner in SCANNERS[name]), rel=0.01)


@pytest.mark.parametrize("scope", ["slice", "patient", "cohort"])
def test_an_intensity_step_is_added_by_one_change(scope: str) -> None:
    clipped = "preprocessing.3={kind: clip_percentiles, lower: 0.5, upper: 99.5}"
    scaled = f"preprocessing.4={{kind: normalise, method: minmax, scope: {scope}}}"
    recipe = load_recipe("liver_volume", [clipped, scaled])
    rng = np.random.default_rng(0)
    scans = [
        Volume(rng.random((1, 40, 40, 6)).astype(np.float32) + k, Grid.of_spacing((40, 40, 6), (2, 2, 5)))
        for k in (0, 2)
    ]
    prepared = [recipe.pipeline.fit(lambda: scans).apply(scan)[0].voxels for scan in scans]
    slices, patients = [p[0, ..., z] for p in prepared for z in range(6)], prepared
    parts = {"slice": slices, "patient": patients, "cohort": [np.concatenate(patients)]}[scope]
    assert all((part.min(), part.max()) == (0, pytest.approx(1)) for part in parts)


@pytest.mark.parametrize("axis", ["x", "y", "z"])
def test_any_axis_can_be_sliced(axis: str) -> None:
    recipe = load_recipe("liver_volume", [f"tiles.axis={axis}", "tiles.neighbours=1"])
    geometry = geometry_for(recipe.tiles, (256, 256, 30), (1.5, 1.5, 5.0), recipe.network)
    assert geometry.slice_axis == "xyz".index(axis)
    assert geometry.to_network(np.zeros((1, *geometry.input_shape))).shape == (3, 256, 256)


def test_each_option_alone_was_tried_for_fewer_steps() -> None:
    recipe = load_recipe("liver_volume", [f"training.steps={STEPS_ALONE}", f"training.folds={FOLDS_ALONE}"])
    assert f"`training.steps={STEPS_ALONE}`" in DOCUMENTED
    assert (recipe.training.steps, recipe.training.folds) == (75_000, 5)
