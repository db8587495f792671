"""The recipes of the brain tumour report do what it did: every number stands beside where the report has it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from delineate.core.grid import Grid
from delineate.core.volume import Volume
from delineate.networks.cost import count_parameters
from delineate.preprocessing.cache import PreparedSubject
from delineate.recipe import Recipe, load_recipe
from delineate.sampling.augmentation import AugmentationSpec
from delineate.sampling.batches import BatchSource
from delineate.sampling.samplers import Sampler
from delineate.sampling.tiles import TileGeometry, geometry_for

VOLUME = (192, 192, 160)  # sec. 2.2.3: (160, 192, 192), z first
CHANNELS = 4  # sec. 1.2: FLAIR, T1, T1ce, T2
OUTPUTS = 4  # sec. 2.2.2: one for each class, the background too


class Row(NamedTuple):
    """What the report says of one of its networks."""

    parameters: int
    tile: tuple[int, int, int]
    reads: tuple[int, int, int]
    tiles_a_scan: int
    batch: int
    steps_a_scan: int


PAPER = {
    # Sec. 2.2.2: Buda's network with four inputs and outputs; slices of the cropped scan, 160 in all.
    "brain_2d": Row(7_763_428, (192, 192, 1), (192, 192, 1), 160, 8, 20),
    # Sec. 2.2.3: "a batch of 8 minicubes", "1 image = 4 batches @ 2 minicubes", "the original (80, 96, 96)".
    "brain_3d": Row(5_430_212, (96, 96, 80), (96, 96, 80), 8, 2, 4),
    # Sec. 2.2.3: "extending the minicubes by 20 pixels along each axis … to (100, 116, 116)".
    "brain_3d_context": Row(5_430_212, (96, 96, 80), (116, 116, 100), 8, 2, 4),
    # Abstract: "a (yet smaller) 3D model".
    "brain_3d_small": Row(210_682, (96, 96, 80), (96, 96, 80), 8, 2, 4),
}
DICE = {
    "kind": "dice",
    "smooth": 1.0,  # eq. 1
    "over_batch": False,  # sec. 2.2.3: "for each predicted minicube"
    "include_background": True,
    "denominator": "sums",  # eq. 1
    "weights": {"background": 1, "edema": 3, "non_enhancing": 5, "enhancing": 7},  # its code
    "soft_labels": None,
}
FOCAL_TVERSKY = {
    "kind": "focal_tversky",
    "fp_weight": 0.3,  # α, β and γ are not stated: `deviates`
    "fn_weight": 0.7,
    "gamma": 4 / 3,
    "smooth": 1.0,
    "over_batch": False,
    "include_background": True,
    "weights": None,
    "soft_labels": None,
    "reduction": "sum",  # eq. 6
}
LOSSES = {  # sec. 2.3
    "": DICE,
    "_cross_entropy": {"kind": "cross_entropy", "weights": None, "soft_labels": None},
    "_focal_tversky": FOCAL_TVERSKY,
}
NAMES = [network + loss for network in PAPER for loss in LOSSES]


def geometry_of(recipe: Recipe) -> TileGeometry:
    return geometry_for(recipe.tiles, VOLUME, (1, 1, 1), recipe.network)


def scans(count: int) -> list[PreparedSubject]:
    """Prepared scans of the report's size, which take no memory."""
    image, target = (
        np.broadcast_to(np.zeros((), dtype), (n, *VOLUME)) for dtype, n in ((np.float16, 4), (np.uint8, 1))
    )
    grid = Grid.of_spacing(VOLUME, (1, 1, 1))
    return [PreparedSubject(f"s{i}", image, target, {}, grid, {0: int(np.prod(VOLUME))}) for i in range(count)]


@pytest.mark.parametrize("network", PAPER)
def test_network_head_and_input_are_the_report_s(network) -> None:
    recipe, row = load_recipe(network), PAPER[network]
    assert recipe.data.targets is not None
    targets = recipe.data.targets.targets()
    assert (targets.mode, targets.outputs) == ("exclusive", OUTPUTS)
    assert dict(targets.values) == {"edema": (1,), "non_enhancing": (2,), "enhancing": (3,)}  # sec. 1.2: 0 to 3
    with torch.device("meta"):
        built = recipe.network.build(CHANNELS, targets.outputs)
    assert count_parameters(built)[0] == row.parameters
    geometry = geometry_of(recipe)
    assert (geometry.shape, geometry.input_shape) == (row.tile, row.reads)
    assert geometry.outside == ("edge" if network == "brain_2d" else "zero")  # sec. 1.1: "zero-padding at image edges"
    assert geometry.standardise is False  # sec. 2.1: "without any further preprocessing"


@pytest.mark.parametrize("network", PAPER)
def test_an_image_s_tiles_follow_each_other_once_and_without_overlap(network) -> None:
    """Sec. 2.2.3: "a new image is sampled once every four learning steps"."""
    recipe, row = load_recipe(network), PAPER[network]
    sampler = Sampler(recipe.sampler, scans(3), geometry_of(recipe), 0)
    source = BatchSource(sampler, recipe.augmentation, recipe.training.batch_size)
    assert recipe.training.batch_size == row.batch
    assert source.steps_an_epoch == 3 * row.steps_a_scan
    tiles = geometry_of(recipe).tiles(VOLUME, 0.0)
    assert len(tiles) == row.tiles_a_scan
    seen = []
    for step in range(source.steps_an_epoch):
        drawn = [sampler.draw(j) for j in source.samples(step)]
        assert len({d.subject for d in drawn}) == 1
        seen.append((drawn[0].subject, [d.tile for d in drawn]))
    for first in range(0, len(seen), row.steps_a_scan):
        of_one = seen[first : first + row.steps_a_scan]
        assert len({subject for subject, _ in of_one}) == 1
        assert [tile for _, some in of_one for tile in some] == tiles
    predicted = geometry_of(recipe).tiles(VOLUME, recipe.inference.overlap)
    assert predicted == tiles


@pytest.mark.parametrize("name", NAMES)
def test_every_network_has_every_loss(name) -> None:
    network = name.removesuffix("_cross_entropy").removesuffix("_focal_tversky")
    recipe, base = load_recipe(name), load_recipe(network)
    assert recipe.loss.model_dump() == LOSSES[name.removeprefix(network)]
    rest = {"name", "description", "deviates", "loss"}
    assert recipe.model_dump(exclude=rest) == base.model_dump(exclude=rest)


@pytest.mark.parametrize("name", NAMES)
def test_schedule_augmentation_and_preprocessing_are_the_report_s(name) -> None:
    recipe = load_recipe(name)
    assert recipe.augmentation == AugmentationSpec(spatial=None, intensity=None)  # sec. 2.1: only considered
    assert [step.kind for step in recipe.preprocessing] == ["reorient", "crop_composite", "crop_or_pad", "reorient"]
    training = recipe.training
    # Not stated, and said so in `deviates`: Adam at 1e-4, ten epochs. No selection of weights, no averaging.
    assert (training.optimiser.kind, training.optimiser.learning_rate) == ("adam", 1e-4)
    assert (training.epochs, training.steps, training.minutes) == (10, None, None)
    assert [training.schedule.multiple(p, steps=int(1e4 * p)) for p in (0, 0.5, 1)] == [1, 1, 1]
    assert (training.keep, training.ema, training.clip_norm) == ("last", 0, None)
    assert training.validation.subjects == 0
    said = " ".join(recipe.deviates)
    for unknown in ("optimiser", "split", "half precision"):
        assert unknown in said
    assert ("γ" in said) == name.endswith("focal_tversky")


def test_the_volume_is_the_report_s_crop_of_the_scan_and_exactly_undone() -> None:
    """155 slices of 240×240, cropped to [19:211] in the plane (z, y, x), three empty slices before and two after."""
    rng = np.random.default_rng(0)
    scan = np.zeros((1, 240, 240, 155), np.float32, order="F")
    brain = np.s_[:, 19:211, 19:211, :]
    scan[brain] = rng.integers(1, 1000, scan[brain].shape)
    grid = Grid(scan.shape[1:], np.diag([1.0, 1.0, 1.0, 1.0]))
    pipeline = load_recipe("brain_3d_context").pipeline.fit(lambda: [Volume(scan, grid)])
    prepared, undo = pipeline.apply(Volume(scan, grid))
    assert prepared.voxels.shape == (1, *VOLUME)
    np.testing.assert_array_equal(prepared.voxels[..., 3:158], scan[brain])  # not normalised
    assert not prepared.voxels[..., :3].any()
    assert not prepared.voxels[..., 158:].any()
    np.testing.assert_array_equal(undo(prepared.voxels), scan)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_losses_are_the_report_s_formulas(loss) -> None:
    """Written down once more with numpy: eqs. 1 (mean over classes, weighted), 2, and 4 to 6."""
    recipe = load_recipe("brain_3d" + loss)
    assert recipe.data.targets is not None
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 4, 6, 5, 4))
    target = rng.integers(0, 4, (2, 1, 6, 5, 4)).astype(np.uint8)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    y = (target == np.arange(4).reshape(1, 4, 1, 1, 1)).astype(float)
    space = (2, 3, 4)
    both, excess, missed = (a.sum(space) for a in (p * y, p * (1 - y), (1 - p) * y))
    wanted: dict[str, Any] = {
        "": np.average(1 - (2 * both + 1) / (p.sum(space) + y.sum(space) + 1), axis=1, weights=[1, 3, 5, 7]).mean(),
        "_cross_entropy": -np.log((p * y).sum(1)).mean(),
        "_focal_tversky": ((1 - (both + 1) / (both + 0.3 * excess + 0.7 * missed + 1)) ** (3 / 4)).sum(1).mean(),
    }
    build = recipe.loss.build(recipe.data.targets.targets())
    found = build(torch.from_numpy(logits), torch.from_numpy(target), torch.empty(0))
    assert float(found) == pytest.approx(wanted[loss], rel=1e-9)
