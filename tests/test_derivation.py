from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import yaml

from delineate.compute import convolution_gflops, plan_compute
from delineate.core.targets import Targets
from delineate.datasets.examination import SubjectRow
from delineate.datasets.inspection import inspect
from delineate.datasets.layouts import open_dataset
from delineate.datasets.measuring import Intensity, Piece
from delineate.derivation import (
    AIR,
    LEAST_LABELS,
    LEAST_STEPS,
    AutoSpec,
    DataSummary,
    derive_recipe,
    step_seconds,
    summarise,
)
from delineate.errors import RecipeError
from delineate.recipe import recipe_from, to_yaml
from delineate.sampling.tiles import geometry_for

TARGETS = Targets({"lesion": (1,)}, ignore=(2,))


def summary(shape=(35, 50, 36), spacing=(1.0, 1.0, 1.0), **changes) -> DataSummary:
    values = {
        "shapes": np.array([shape] * 3, dtype=float),
        "spacings_mm": np.array([spacing] * 3, dtype=float),
        "foreground_share": 1.0,
        "nonzero_share": 0.95,
        "lowest": 0.0,
        "far_maximum": 2.0,
        "target_share": 0.05,
        "modality": "MR",
        "subjects": 3,
    }
    return DataSummary(**(values | changes))


def derived(data, device="cpu", memory_bytes=16 * 2**30, **budget):
    return derive_recipe(data, TARGETS, device=device, memory_bytes=memory_bytes, **(budget or {"minutes": 10}))


@pytest.mark.parametrize(
    ("data", "kind", "dimensions"),
    [
        (summary(), "patches", 3),
        (summary((180, 180, 60), (1.0, 1.0, 3.3)), "patches", 3),
        (summary((256, 256, 20), (0.9, 0.9, 6.5)), "slices", 2),
        (summary((20, 256, 256), (7.0, 0.9, 0.9)), "slices", 2),
        (summary((240, 240, 155)), "patches", 3),
        (summary((512, 512, 300), (0.8, 0.8, 1.5)), "patches", 3),
        (summary((9, 9, 9)), "patches", 3),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_network_takes_the_tiles(data, kind, dimensions, device) -> None:
    recipe, _ = derived(data, device)
    assert recipe.tiles.kind == kind
    assert recipe.network.dimensions == dimensions
    spacing = np.median(data.spacings_mm, axis=0)
    geometry = geometry_for(recipe.tiles, data.shapes[0].astype(int), spacing, recipe.network)
    asked = [n for n in recipe.tiles.shape if n]
    assert [n for n in geometry.shape if n > 1] == [n for n in asked if n > 1]  # nothing had to be padded
    recipe.network.build(1, 2)


def test_thick_slices_are_never_interpolated_across() -> None:
    recipe, reasons = derived(summary((256, 256, 20), (0.9, 0.9, 6.5)))
    assert recipe.preprocessing[1].spacing_mm == (0.9, 0.9, None)
    assert "in plane only" in reasons["preprocessing.1.kind"]
    assert recipe.augmentation.spatial.rotate_degrees == (0, 0, 20)


def test_less_memory_means_smaller_tiles() -> None:
    large, small = (derived(summary((240, 240, 155)), memory_bytes=m)[0] for m in (16 * 2**30, 2**28))
    assert np.prod(small.tiles.shape) < np.prod(large.tiles.shape)


def test_ct_is_normalised_over_the_cohort_and_mr_by_scan() -> None:
    ct, mr = derived(summary(modality="", lowest=-1024))[0], derived(summary(modality="", lowest=-20))[0]
    assert derived(summary(lowest=-1024))[0] == derived(summary())[0], "MR, as somebody has said"
    assert derived(summary(modality="CT"))[0].preprocessing == ct.preprocessing
    assert [s.scope for s in ct.preprocessing[2:]] == ["cohort", "cohort"]
    assert [s.scope for s in mr.preprocessing[2:]] == ["patient", "patient"]


def test_resampled_mr_scans_are_not_taken_for_ct(real_data) -> None:
    """Those of one site reach below −700 in a few voxels; simulated CTs hold air."""
    resampled = open_dataset(real_data / "wmh/Tabriz")
    some = replace(resampled, subjects=tuple(s for s in resampled.subjects if "ms10" in s.id)[:3])
    rows = inspect(some).rows
    assert min(intensity.min for row in rows for intensity in row.intensities.values()) < -700
    assert summarise(rows, Targets({"lesion": (1,)})).lowest > AIR / 5


@pytest.mark.parametrize(
    ("extents", "times"),
    [
        ({}, 1.0),
        ({"organ": (40, 40, 40)}, 1.0),  # a tile holds it as it is
        ({"organ": (90, 20, 20)}, None),
        ({"organ": (400, 400, 400)}, 2.0),  # no more than twice
        ({"organ": (400, 400, 400), "lesion": (16, 30, 30)}, 16 / 12),  # which would vanish
        ({"organ": (20, 20, 400)}, 1.0),  # along thick slices, which stay
    ],
)
def test_voxels_are_longer_where_a_tile_holds_no_target(extents, times) -> None:
    extents_mm = {name: np.array([mm] * 5, dtype=float) for name, mm in extents.items()}
    recipe, reasons = derived(summary((240, 240, 60), (1.0, 1.0, 3.0), extents_mm=extents_mm))
    across, _, thick = recipe.preprocessing[1].spacing_mm
    assert thick is None
    if times is not None:
        assert across == pytest.approx(times, abs=1e-3)
    else:
        assert 1.1 <= across < 2
        assert recipe.tiles.shape[0] * across == pytest.approx(90, rel=0.15)
    assert ("as long" in reasons["preprocessing.1.kind"]) == (across > 1)


def test_what_is_one_piece_in_many_labels_keeps_its_largest() -> None:
    for labels, kept in ((LEAST_LABELS, ("lesion",)), (LEAST_LABELS - 1, ())):
        recipe, reasons = derived(summary(labels_in_one_piece={"lesion": labels}))
        assert recipe.postprocessing.largest_component == kept
        assert ("postprocessing.largest_component" in reasons) == bool(kept)


def test_a_target_of_several_pieces_in_any_label_is_not_one_piece() -> None:
    def one(**shares: float) -> SubjectRow:
        intensity = Intensity(0, 0, 1, 2, 3, 1, 1, 0.9)
        return SubjectRow(
            "a", "", "a", (9, 9, 9), (1, 1, 1), "RAS", ("MR",), "int16", {"MR": intensity}, (9, 9, 9),
            {0: 700, 1: 29}, {}, (3, 3, 3), {}, {name: Piece(share, (3, 3, 3)) for name, share in shares.items()},
        )  # fmt: skip

    rows = [one(organ=1.0, lesion=1.0), one(organ=0.995, lesion=0.8), one(organ=1.0)]
    assert summarise(rows, Targets({"organ": (1,), "lesion": (2,)})).labels_in_one_piece == {"organ": 3}


def test_ignored_voxels_are_no_target_s() -> None:
    intensity = Intensity(0, 0, 1, 2, 3, 1, 1, 0.9)
    row = SubjectRow(
        "a", "", "a", (10, 10, 10), (1, 1, 1), "RAS", ("MR",), "int16", {"MR": intensity}, (9, 9, 9),
        {0: 700, 1: 100, 255: 200}, {}, (3, 3, 3), {}, {},
    )  # fmt: skip
    assert summarise([row], Targets({"organ": (1,)}, ignore=(255,))).target_share == pytest.approx(0.1)


def test_rare_targets_are_sampled_more_and_whole_volumes_at_random() -> None:
    rare = derived(summary((240, 240, 155), target_share=0.001))[0].sampler
    whole = derived(summary())[0].sampler
    assert (rare.kind, whole.kind) == ("class_balanced", "random")
    assert rare.foreground_fraction > 0.5


def test_the_file_with_reasons_reproduces_the_recipe() -> None:
    recipe, reasons = derived(summary((256, 256, 20), (0.9, 0.9, 6.5)), steps=5)
    text = to_yaml(recipe.as_dict(), reasons)
    assert all(reason in text for reason in reasons.values())
    assert recipe_from(yaml.safe_load(text)) == recipe


@pytest.mark.parametrize("data", [summary(), summary((240, 240, 155)), summary((256, 256, 20), (0.9, 0.9, 6.5))])
@pytest.mark.parametrize("minutes", [0.75, 10])
def test_the_minutes_pay_for_enough_steps_at_the_machines_rate(data, minutes) -> None:
    """A training step of what would be derived for an hour takes seconds at this rate."""
    rate = 60.0
    recipe, reasons = derived(data, minutes=minutes, gflops=rate)
    assert 60 * minutes / step_seconds(recipe, TARGETS, rate) >= LEAST_STEPS
    usual, _ = derived(data, minutes=minutes)
    if 60 * minutes / step_seconds(usual, TARGETS, rate) >= LEAST_STEPS:
        assert recipe == usual
    else:
        assert "so that" in reasons["network.widths"]
        assert step_seconds(recipe, TARGETS, rate) < step_seconds(usual, TARGETS, rate)


def test_a_fast_machine_and_a_budget_of_steps_keep_the_usual_network() -> None:
    data = summary((240, 240, 155))
    assert derived(data, minutes=0.75, gflops=1e6)[0] == derived(data, minutes=0.75)[0]
    assert derived(data, steps=5, gflops=1.0)[0] == derived(data, steps=5)[0]
    slow = derived(data, minutes=0.75, gflops=60.0)[0]
    assert slow.network.widths[0] < derived(data, minutes=0.75)[0].network.widths[0]


@pytest.mark.parametrize("data", [summary((240, 240, 155)), summary((256, 256, 20), (0.9, 0.9, 6.5))])
def test_wider_networks_and_smaller_tiles_are_multiples_of_the_usual(data) -> None:
    usual, _ = derived(data)
    wide, narrow = (derived(data, auto=AutoSpec(widths=share), steps=5)[0].network.widths for share in (1.5, 0.5))
    assert [w / u for w, u in zip(wide, usual.network.widths, strict=True)][:3] == [1.5] * 3
    assert [w / u for w, u in zip(narrow, usual.network.widths, strict=True)][:3] == [0.5] * 3
    tiles = derived(data, auto=AutoSpec(voxels=0.5), steps=5)[0]
    voxels = [np.prod(recipe.tiles.shape) * recipe.training.batch_size for recipe in (tiles, usual)]
    assert 0.3 < voxels[0] / voxels[1] < 0.7


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (1.0, 1.0, 3.3), (7.0, 0.9, 0.9)])
def test_coarser_voxels_show_more_and_thick_slices_stay(spacing) -> None:
    data = summary((240, 240, 155), spacing)
    usual, coarse = (derived(data, auto=AutoSpec(spacing=share), steps=5)[0] for share in (1, 1.5))
    before, after = (recipe.preprocessing[1].spacing_mm for recipe in (usual, coarse))
    assert [None if b is None else round(1.5 * b, 3) for b in before] == list(after)
    assert coarse.tiles.kind == usual.tiles.kind
    sees = [np.prod(r.tiles.shape) * np.prod([s for s in r.preprocessing[1].spacing_mm if s]) for r in (usual, coarse)]
    assert sees[1] > sees[0]


def test_changes_to_auto_are_told_from_those_to_the_recipe() -> None:
    changes = ["auto.widths=1.5", "training.batch_size=4", "auto.voxels=2"]
    assert AutoSpec.of_changes(changes) == (AutoSpec(widths=1.5, voxels=2), ["training.batch_size=4"])
    for wrong in ("auto.width=2", "auto.widths=0", "auto.widths=wide", "auto=2"):
        with pytest.raises(RecipeError, match="width" if "." in wrong else "auto"):
            AutoSpec.of_changes([wrong])


def test_the_machines_rate_is_a_number() -> None:
    assert 0.1 < convolution_gflops(plan_compute(device="cpu", precision="fp32", threads=1)) < 1e6
