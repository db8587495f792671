from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from delineate.core.grid import Grid
from delineate.sampling.augmentation import AugmentationSpec, SpatialSpec
from delineate.sampling.batches import BatchSource
from delineate.sampling.samplers import RandomTiles, Sampler
from delineate.sampling.tiles import TileGeometry

NOTHING = AugmentationSpec(spatial=None, intensity=None)


def source(subjects, augmentation=NOTHING, geometry=TileGeometry((8, 8, 8)), **kwargs) -> BatchSource:  # noqa: B008
    return BatchSource(Sampler(RandomTiles(), subjects, geometry, 1), augmentation, 2, **kwargs)


def test_processes_share_the_samples_without_overlap(subjects) -> None:
    world = [source(subjects, rank=rank, world=3) for rank in range(3)]
    seen = [j for i in range(4) for part in world for j in part.samples(i)]
    assert sorted(seen) == list(range(24))


@pytest.mark.parametrize("world", [1, 2])
def test_an_epoch_takes_every_item_of_a_pass(subjects, world) -> None:
    """Of five subjects, two a step: the last step is filled from the next pass, and no step more is an epoch's."""
    parts = [source(subjects, rank=rank, world=world) for rank in range(world)]
    steps = parts[0].steps_an_epoch
    assert steps == {1: 3, 2: 2}[world]
    for count, all_taken in ((steps, True), (steps - 1, False)):
        taken = [parts[0].sampler.draw(j).subject for i in range(count) for part in parts for j in part.samples(i)]
        assert (set(taken) == set(range(5))) == all_taken


def test_without_augmentation_a_batch_is_what_lies_in_the_volume(subjects) -> None:
    part = source(subjects)
    batch = part.batch(3)
    image, target = part.augmented(batch, seed=0)
    for sample, j in enumerate(part.samples(3)):
        index, tile, _ = part.sampler.draw(j)
        torch.testing.assert_close(
            image[sample], torch.from_numpy(part.geometry.read(subjects[index].image, tile)).float()
        )
        assert (target[sample].numpy() == part.geometry.read(subjects[index].target, tile)).all()


@pytest.mark.parametrize(
    ("geometry", "image_shape", "target_shape"),
    [
        (TileGeometry((8, 8, 6)), (2, 1, 8, 8, 6), (2, 1, 8, 8, 6)),
        (TileGeometry((8, 8, 6), margin=(1, 2, 1)), (2, 1, 10, 12, 8), (2, 1, 8, 8, 6)),
        (TileGeometry((8, 8, 1), margin=(0, 0, 2), slice_axis=2), (2, 5, 8, 8), (2, 1, 8, 8)),
        (TileGeometry((8, 1, 6), margin=(0, 1, 0), slice_axis=1), (2, 3, 8, 6), (2, 1, 8, 6)),
    ],
)
def test_shapes_in_the_network_s_layout(subjects, geometry, image_shape, target_shape) -> None:
    part = source(subjects, AugmentationSpec(), geometry)
    image, target = part.augmented(part.batch(0), seed=0)
    assert (image.shape, target.shape) == (image_shape, target_shape)


def test_augmentation_depends_on_seed_process_and_step_alone(subjects) -> None:
    part, other = source(subjects, AugmentationSpec()), source(subjects, AugmentationSpec())
    other.augmented(other.batch(1), seed=5)
    again, first = other.augmented(other.batch(2), seed=5), part.augmented(part.batch(2), seed=5)
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    assert not torch.equal(first[0], part.augmented(part.batch(2), seed=6)[0])


@pytest.mark.parametrize("geometry", [TileGeometry((8, 8, 8)), TileGeometry((8, 1, 6), margin=(0, 1, 0), slice_axis=1)])
def test_each_sample_is_varied_in_its_own_millimetres(subjects, geometry) -> None:
    """As if all other subjects had its spacing, too."""
    spec = AugmentationSpec(spatial=SpatialSpec(probability=1, elastic_mm=2), intensity=None)

    def spaced(*spacings_mm: tuple[float, float, float]) -> BatchSource:
        grids = [Grid.of_spacing(s.grid.shape, mm) for s, mm in zip(subjects, spacings_mm, strict=True)]
        return source([replace(s, grid=grid) for s, grid in zip(subjects, grids, strict=True)], spec, geometry)

    fine, thick = (1.0, 1.0, 1.0), (0.8, 1.0, 5.0)
    mixed, alike = spaced(fine, thick, fine, thick, fine), [spaced(*[mm] * 5) for mm in (fine, thick)]
    for i in range(4):
        found, as_fine, as_thick = (part.augmented(part.batch(i), seed=0) for part in (mixed, *alike))
        assert not torch.allclose(as_fine[0], as_thick[0])
        for place, j in enumerate(mixed.samples(i)):
            expected = (as_fine, as_thick)[mixed.sampler.draw(j).subject % 2]
            torch.testing.assert_close(found[0][place], expected[0][place])
            torch.testing.assert_close(found[1][place], expected[1][place])
