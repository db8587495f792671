"""The recipes of the prostate report do what it did: every number stands beside where the report has it."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
import torch

from delineate.core.grid import Grid
from delineate.networks.cost import count_parameters
from delineate.preprocessing.cache import PreparedSubject
from delineate.recipe import Recipe, load_recipe
from delineate.sampling.augmentation import AugmentationSpec
from delineate.sampling.batches import BatchSource
from delineate.sampling.samplers import Sampler
from delineate.sampling.tiles import TileGeometry, geometry_for

SCAN = (512, 512, 40)  # sec. 1: "like 512x512x40"
TRAINED_ON = 40  # of PROMISE12's 50; the report does not say


class Row(NamedTuple):
    """What the report says of one of its networks; parameters as Keras counts them."""

    parameters: int
    reads: tuple[int, int, int]
    stride: tuple[int, int, int]
    batch: int
    steps_an_epoch: int
    rate: float
    later: dict[int, float]


PAPER = {
    # Table 1; sec. 4.2: 256x256x16, batch 14, rate 0.001, "step decay per epoch equal 0.0001"; sec. 5.1: stride.
    "prostate_unet": Row(
        1_605_381, (256, 256, 16), (128, 128, 8), 14, 3, 1e-3, {0: 1, 2: 1, 3: 1 / 1.0001, 3000: 1 / 1.1}
    ),
    # Table 1 prints 41,253,023, which no network with one output has. Sec. 4.3: 256x256x13, rate 0.0001, "decay equal
    # 0.5 for each 50 epoch", batch 3 on each of two; sec. 5.2: stride 128x128, "for all slices".
    "prostate_deeplab": Row(
        41_255_953, (256, 256, 13), (128, 128, 1), 3, 14, 1e-4, {0: 1, 699: 1, 700: 0.5, 1400: 0.25}
    ),
    # Table 1 prints 22,692,289: two digits swapped. Sec. 4.4: rate 0.0001, decay 0.0001 (Keras': of each step), batch
    # 2 on each of four; sec. 5.3: 64x64x16, stride 32x32x8, and the layers of each block.
    "prostate_tiramisu": Row(
        22_962_289, (64, 64, 16), (32, 32, 8), 2, 20, 1e-4, {0: 1, 1: 1 / 1.0001, 10_000: 0.5}
    ),
    "prostate_tiramisu_p4a": Row(
        49_382_353, (64, 64, 16), (32, 32, 8), 2, 20, 1e-4, {0: 1, 1: 1 / 1.0001, 10_000: 0.5}
    ),
    "prostate_tiramisu_p3b": Row(
        23_487_169, (64, 64, 16), (32, 32, 8), 2, 20, 1e-4, {0: 1, 1: 1 / 1.0001, 10_000: 0.5}
    ),
}  # fmt: skip


def geometry_of(recipe: Recipe) -> TileGeometry:
    return geometry_for(recipe.tiles, SCAN, (0.4, 0.4, 3.6), recipe.network)


def a_scan(shape: tuple[int, int, int]) -> PreparedSubject:
    """Slices that grow brighter towards the head, with a prostate of 2×2×2 voxels in the middle."""
    image = np.random.default_rng(0).random((1, *shape), np.float32) + np.arange(shape[2], dtype=np.float32)
    target = np.zeros((1, *shape), np.uint8)
    target[(0, *(slice(n // 2 - 1, n // 2 + 1) for n in shape))] = 1
    counts = {0: target.size - 8, 1: 8}
    grid = Grid.of_spacing(shape, (0.4, 0.4, 3.6))
    return PreparedSubject("s", image.astype(np.float16), target, {1: np.argwhere(target[0])}, grid, counts)


@pytest.mark.parametrize("name", PAPER)
def test_parameters_head_and_input_are_the_report_s(name) -> None:
    recipe, row = load_recipe(name), PAPER[name]
    assert recipe.data.targets is not None
    targets = recipe.data.targets.targets()
    assert (targets.mode, targets.outputs) == ("overlapping", 1)  # "before sigmoid activation": one of them
    assert dict(targets.values) == {"prostate": (1,)}
    geometry = geometry_of(recipe)
    with torch.device("meta"):
        built = recipe.network.build(geometry.slices, targets.outputs)
    assert count_parameters(built)[1] == row.parameters
    assert geometry.input_shape == row.reads


@pytest.mark.parametrize("name", PAPER)
def test_sampling_loss_and_schedule_are_the_report_s(name) -> None:
    recipe, row = load_recipe(name), PAPER[name]
    training = recipe.training
    assert recipe.sampler.kind == "class_centred"  # sec. 4.1: "from background and prostate with equal probability"
    assert recipe.augmentation == AugmentationSpec(spatial=None, intensity=None)
    assert [step.kind for step in recipe.preprocessing] == ["reorient"]
    assert recipe.loss.model_dump() == {"kind": "cross_entropy", "weights": None, "soft_labels": None}
    # "weight decay … w equal 0.0001" is Keras' l2, whose gradient is 2·w: Adam's coupled decay of 2e-4.
    optimiser = training.optimiser
    assert (optimiser.kind, optimiser.learning_rate, optimiser.weight_decay) == ("adam", row.rate, 2e-4)
    sampler = Sampler(recipe.sampler, [a_scan((8, 8, 8))] * TRAINED_ON, geometry_of(recipe), 0)
    source = BatchSource(sampler, recipe.augmentation, training.batch_size)
    assert (training.batch_size, source.steps_an_epoch) == (row.batch, row.steps_an_epoch)
    for steps, multiple in row.later.items():
        assert training.schedule.multiple(0.0, steps, source.steps_an_epoch) == pytest.approx(multiple)
    assert (training.epochs, training.steps, training.minutes) == (1000, None, None)  # sec. 4.3
    assert (training.keep, training.ema, training.clip_norm) == ("last", 0, None)
    assert training.validation.held_out  # table 1: "Validation dice coefficient"


@pytest.mark.parametrize("name", PAPER)
def test_prediction_overlaps_by_half_and_averages(name) -> None:
    recipe, row = load_recipe(name), PAPER[name]
    assert (recipe.inference.overlap, recipe.inference.weights, recipe.inference.flips) == (0.5, "uniform", ())
    starts = np.array([tile.start for tile in geometry_of(recipe).tiles(SCAN, recipe.inference.overlap)])
    strides = [{b - a for a, b in pairwise(sorted(set(axis.tolist())))} for axis in starts.T]
    assert strides == [{stride} for stride in row.stride]


@pytest.mark.parametrize("name", ["prostate_deeplab", "prostate_tiramisu"])
def test_a_sub_volume_has_one_mean_and_one_deviation(name) -> None:
    """Sec. 4.1: "z-score normalized before feeding", for DeepLab all 13 slices together."""
    recipe = load_recipe(name, ["tiles.shape.0=32", "tiles.shape.1=32"])
    sampler = Sampler(recipe.sampler, [a_scan((40, 40, 30))], geometry_of(recipe), 0)
    source = BatchSource(sampler, recipe.augmentation, 4)
    image, _ = source.augmented(source.batch(0), seed=0)
    for one in image:
        assert float(one.mean()) == pytest.approx(0, abs=1e-5)
        assert float(one.std(unbiased=False)) == pytest.approx(1, abs=1e-5)
    slices = image.mean((2, 3)) if name == "prostate_deeplab" else image.mean((1, 2, 3))
    assert (slices.diff(dim=1) >= 0).all()
    assert (slices[:, -1] - slices[:, 0] > 1).all()


@pytest.mark.parametrize("name", PAPER)
def test_what_is_not_known_is_said(name) -> None:
    said = " ".join(load_recipe(name).deviates)
    for unknown in ("validates", "epoch", "GPUs", "evenly", "half precision", "epsilon"):
        assert unknown in said
