from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from delineate.compute import plan_compute
from delineate.inference import sliding
from delineate.inference.sliding import Abridged, Scores, Sliding
from delineate.sampling.tiles import TileGeometry

PLAN = plan_compute(device="cpu", precision="fp32", compile="off")
SLIDING = Sliding(PLAN, exclusive=False, outputs=2, overlap=0.5)


def volume_of(shape, channels=2):
    return np.random.default_rng(0).random((channels, *shape), dtype=np.float32)


def logits_of(x):
    """A network that answers with its input, as logits of probabilities."""
    return torch.logit(x.clamp(1e-4, 1 - 1e-4))


@pytest.mark.parametrize("weights", ["gaussian", "uniform", "nnunet", "monai"])
@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.75])
@pytest.mark.parametrize("shape", [(13, 17, 11), (5, 30, 4), (8, 8, 8)])
def test_the_identity_network_returns_the_volume(shape, overlap, weights) -> None:
    volume = volume_of(shape)
    sliding = replace(SLIDING, overlap=overlap, weights=weights)
    result = sliding.probabilities(logits_of, volume, TileGeometry((8, 8, 8)))
    np.testing.assert_allclose(result, volume, atol=2e-3)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slices_along_any_axis_return_the_volume(axis) -> None:
    volume, shape, margin = volume_of((9, 10, 11)), [8, 8, 8], [0, 0, 0]
    shape[axis], margin[axis] = 1, 1
    geometry = TileGeometry(tuple(shape), tuple(margin), slice_axis=axis)

    def middle_slice(x):  # channels are (C, slices)
        return logits_of(x.unflatten(1, (2, 3))[:, :, 1])

    np.testing.assert_allclose(SLIDING.probabilities(middle_slice, volume, geometry), volume, atol=2e-3)


def test_a_network_with_a_margin_returns_the_volume() -> None:
    volume = volume_of((20, 13, 9))
    geometry = TileGeometry((6, 6, 6), margin=(2, 1, 3))

    def valid(x):
        return logits_of(x[:, :, 2:-2, 1:-1, 3:-3])

    np.testing.assert_allclose(SLIDING.probabilities(valid, volume, geometry), volume, atol=2e-3)


def test_minicubes_with_context_return_the_volume() -> None:
    """Eight cubes of half the volume that read ten voxels around them: the seams show nothing."""
    rng = np.random.default_rng(5)
    volume = rng.random((1, 40, 48, 48), dtype=np.float32)
    geometry = TileGeometry((20, 24, 24), margin=(10, 10, 10))
    assert len(geometry.tiles(volume.shape[1:], 0.0)) == 8
    found = replace(SLIDING, outputs=1, overlap=0.0, weights="uniform").probabilities(
        lambda x: logits_of(x[..., 10:-10, 10:-10, 10:-10]), volume, geometry
    )
    np.testing.assert_allclose(found, volume, atol=1e-3)


def test_a_minicube_reads_its_real_neighbours_and_zeros_beyond_the_volume() -> None:
    """Cubes in the order 4·iz + 2·iy + ix answer for exactly their own region of the volume."""
    volume = np.random.default_rng(5).random((1, 48, 48, 40), dtype=np.float32)
    geometry = TileGeometry((24, 24, 20), margin=(10, 10, 10), outside="zero")
    padded = np.pad(volume, [(0, 0), *[(10, 10)] * 3])
    tiles = geometry.tiles(volume.shape[1:], 0.0)
    assert len(tiles) == 8
    for k, tile in enumerate(tiles):
        x, y, z = 24 * (k % 2), 24 * (k // 2 % 2), 20 * (k // 4)
        assert tile.start == (x, y, z)
        np.testing.assert_array_equal(
            geometry.read(volume, tile), padded[:, x : x + 44, y : y + 44, z : z + 40], strict=True
        )


def test_tiles_are_standardised_one_by_one() -> None:
    volume = np.random.default_rng(5).normal(7, 3, (2, 16, 16, 8)).astype(np.float32)
    seen = []

    def network(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return x[:, :1]

    replace(SLIDING, outputs=1, overlap=0.0).probabilities(network, volume, TileGeometry((8, 8, 8), standardise=True))
    tiles = torch.cat(seen)
    np.testing.assert_allclose(tiles.mean((2, 3, 4)), 0, atol=1e-5)
    np.testing.assert_allclose(tiles.std((2, 3, 4), unbiased=False), 1, atol=1e-4)


def test_slices_that_are_standardised_together_stay_as_bright_beside_each_other() -> None:
    """One mean and one deviation for all that is read, as a sub-volume of 13 slices."""
    volume = np.random.default_rng(5).normal(7, 3, (1, 16, 16, 8)).astype(np.float32) + np.arange(8, dtype=np.float32)
    seen = []

    def network(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return x[:, :1]

    geometry = TileGeometry((16, 16, 1), (0, 0, 2), 2, standardise="together")
    replace(SLIDING, outputs=1, overlap=0.0).probabilities(network, volume, geometry)
    tiles = torch.cat(seen)  # (8, 5, 16, 16)
    np.testing.assert_allclose(tiles.mean((1, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(tiles.std((1, 2, 3), unbiased=False), 1, atol=1e-4)
    slices = tiles.mean((2, 3))[3]
    assert (slices.diff() > 0.1).all()


def test_full_coverage_of_a_constant_is_that_constant() -> None:
    volume = np.full((2, 20, 20, 20), 0.27, dtype=np.float32)
    result = SLIDING.probabilities(logits_of, volume, TileGeometry((8, 8, 8)))
    np.testing.assert_allclose(result, 0.27, atol=1e-3)


def test_flips_average_and_turn_back() -> None:
    """A network that marks the first plane it is given marks both ends when x is mirrored too."""
    volume = volume_of((8, 8, 8), channels=1)

    def first_plane(x):
        y = torch.full((len(x), 2, *x.shape[2:]), -20.0)
        y[:, :, 0] = 20.0
        return y

    result = replace(SLIDING, flips=("x",)).probabilities(first_plane, volume, TileGeometry((8, 8, 8)))
    np.testing.assert_allclose(result[:, [0, -1]], 0.5, atol=1e-3)
    np.testing.assert_allclose(result[:, 1:-1], 0, atol=1e-3)


@pytest.mark.parametrize("shape", [(40, 9, 11), (9, 40, 11), (11, 9, 40)])
@pytest.mark.parametrize("finish", ["probabilities", "tile_logits"])
def test_the_budget_decides_where_probabilities_lie_and_how_tiles_advance_but_not_what_they_are(shape, finish) -> None:
    """With a budget of nothing, tiles advance along the longest axis: sums are added in another order."""
    volume, sliding = volume_of(shape), replace(SLIDING, average=finish)
    in_memory = sliding.probabilities(logits_of, volume, TileGeometry((8, 8, 8)))
    on_disk = replace(sliding, budget_bytes=0).probabilities(logits_of, volume, TileGeometry((8, 8, 8)))
    np.testing.assert_allclose(on_disk, in_memory, atol=1e-3)
    if shape[2] == 40:
        np.testing.assert_array_equal(on_disk, in_memory)


@pytest.mark.parametrize("slow", [0, 1, 2])
@pytest.mark.parametrize("budget_bytes", [0, 10**6])
def test_scores_are_read_as_they_were_written(slow: int, budget_bytes: int, rng) -> None:
    written = rng.random((3, 7, 6, 5)).astype(np.float16)
    scores = Scores(3, (7, 6, 5), slow, budget_bytes)
    along = np.moveaxis(written, slow + 1, -1)
    for first in range(0, scores.planes, 2):
        for k in range(3):
            scores.write(k, first, along[k, :, :, first : first + 2])
    assert len(scores) == 3
    np.testing.assert_array_equal(list(scores), written)
    assert scores[1].flags.f_contiguous


@pytest.mark.parametrize("axis", [None, 2])
def test_background_alone_is_computed_once_and_changes_no_bit(axis, monkeypatch) -> None:
    """Background is neither zero nor the same in all channels; a box in one corner is anything else."""
    volume = np.array([-0.7, 0.3], np.float32)[:, None, None, None] * np.ones((40, 40, 12), np.float32)
    volume[:, :9, :9, :5] = volume_of((9, 9, 5))
    geometry = TileGeometry((8, 8, 8) if axis is None else (8, 8, 1), slice_axis=axis)
    monkeypatch.setattr(sliding, "VOXELS_PER_BATCH", {"cpu": 3 * 8**3 if axis is None else 3 * 8**2})
    torch.manual_seed(0)
    network = (torch.nn.Conv3d if axis is None else torch.nn.Conv2d)(2, 2, 3, padding=1)
    runs = []

    def counted(x):
        runs.append(x)
        return network(x)

    found = SLIDING.probabilities(counted, volume, geometry)
    assert sum(bool((x == x[:1, :, :1, :1, :1] if axis is None else x == x[:1, :, :1, :1]).all()) for x in runs) <= 2
    fewer = len(runs)
    monkeypatch.setattr(sliding, "_only_value", lambda boxes: None)
    assert np.array_equal(found, SLIDING.probabilities(counted, volume, geometry))
    assert fewer < (len(runs) - fewer) / 2


def test_tiles_of_different_constants_are_told_apart(monkeypatch) -> None:
    """Zero and minus zero among them: a network may tell them apart, too."""
    values = np.array([0.2, 0.2, -0.0, 0.0, 0.9], np.float32)
    volume = np.repeat(values, 8)[None, None, None, :] * np.ones((1, 8, 8, 1), np.float32)
    alone = replace(SLIDING, outputs=1, overlap=0.0, weights="uniform")
    seen = []

    def network(x):
        seen.append(x.flatten()[0].item())
        return torch.logit(torch.where(torch.signbit(x), 0.5, x).clamp(1e-4, 1 - 1e-4))

    monkeypatch.setattr(sliding, "VOXELS_PER_BATCH", {"cpu": 8**3})
    found = alone.probabilities(network, volume, TileGeometry((8, 8, 8)))
    np.testing.assert_allclose(found[0, 0, 0, ::8], [0.2, 0.2, 0.5, 0.0, 0.9], atol=1e-3)
    assert len(seen) == 4


def test_softmax_where_targets_exclude_each_other() -> None:
    result = replace(SLIDING, exclusive=True).probabilities(
        lambda x: 9 * x, volume_of((9, 9, 9)), TileGeometry((8,) * 3)
    )
    np.testing.assert_allclose(result.astype(np.float32).sum(0), 1, atol=2e-3)


def test_progress_ends_complete() -> None:
    seen = []
    SLIDING.probabilities(logits_of, volume_of((20, 20, 9)), TileGeometry((8, 8, 8)), lambda *p: seen.append(p))
    assert seen[-1][0] == seen[-1][1] == len(TileGeometry((8, 8, 8)).tiles((20, 20, 9)))


def test_compiled_networks_meet_one_batch_size_only() -> None:
    sizes = set()

    def noting(x):
        sizes.add(len(x))
        return logits_of(x)

    volume = volume_of((40, 40, 40))
    sliding = replace(SLIDING, plan=replace(PLAN, compile=True))
    result = sliding.probabilities(noting, volume, TileGeometry((16, 16, 16)))
    assert len(sizes) == 1
    np.testing.assert_allclose(result, volume, atol=2e-3)


@pytest.mark.parametrize("exclusive", [True, False])
def test_logits_of_tiles_become_probabilities_once_they_are_averaged(exclusive) -> None:
    volume, geometry = volume_of((9, 4, 4)), TileGeometry((4, 4, 4))

    def ramp(x):  # tiles that overlap disagree
        return x * torch.arange(4.0).view(4, 1, 1) ** 2

    def found(average):
        sliding = replace(SLIDING, exclusive=exclusive, average=average)
        return torch.from_numpy(sliding.probabilities(ramp, volume, geometry).astype(np.float32))

    logits, probabilities = found("logits"), found("tile_logits")
    torch.testing.assert_close(probabilities, logits.softmax(0) if exclusive else logits.sigmoid(), atol=2e-3, rtol=0)
    assert (found("probabilities") - probabilities).abs().max() > 0.02


def test_a_trial_runs_the_network_for_a_while_and_counts_what_it_skips() -> None:
    """Everything else is done: each tile has an answer, and each volume a part of its own."""
    volume, geometry = volume_of((64, 64, 64)), TileGeometry((8, 8, 8))
    calls: list[int] = []

    def network(x):
        calls.append(len(x))
        return logits_of(x)

    mirrored = replace(SLIDING, flips=("x",))
    whole = mirrored.probabilities(network, volume, geometry)
    passes = len(calls)
    with Abridged(0.0) as abridged:
        for _ in range(2):
            calls.clear()
            found = mirrored.probabilities(network, volume, geometry)
            assert found.shape == whole.shape
            assert np.isfinite(found).all()
            # The first pass, which may compile, tells nothing of the others; the last batch may have another size.
            assert 2 <= len(calls) <= 4 < passes
    assert len(abridged.skipped) == 2 * (passes - len(calls))
    assert all(seconds > 0 for _, seconds in abridged.skipped)
    np.testing.assert_array_equal(mirrored.probabilities(network, volume, geometry), whole)
