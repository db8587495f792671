"""Metrics by name: the challenges' definitions by hand and by their own steps, invariances, shifted masks."""

from __future__ import annotations

from math import inf, isnan

import numpy as np
import pytest
import SimpleITK
from scipy import ndimage

from delineate.core.grid import Grid, permute_axes
from delineate.errors import RecipeError
from delineate.metrics.catalogue import METRICS, SETS, formatted, metric_names
from delineate.metrics.comparison import Comparison

SPACING = (0.9, 1.1, 5.0)
PROMISE12_METRICS = ("dice", "assd_mm", "hd95_mm", "volume_error_percent")


def blobs(rng: np.random.Generator, shape: tuple[int, int, int] = (40, 36, 10), share: float = 0.04) -> np.ndarray:
    noise = ndimage.gaussian_filter(rng.standard_normal(shape), (2, 2, 0.7))
    return noise > np.quantile(noise, 1 - share)


def measured(reference: np.ndarray, prediction: np.ndarray, spacing_mm=(1.0, 1.0, 1.0), known=None) -> dict[str, float]:
    comparison = Comparison.of(reference, prediction, Grid.of_spacing(reference.shape, spacing_mm), known)
    return {name: metric.of(comparison) for name, metric in METRICS.items()}


def box(shape: tuple[int, ...], *slices: slice) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[slices] = True
    return mask


def test_a_shifted_cube_with_spacing_2_1_1() -> None:
    shape, spacing = (20, 20, 20), (2.0, 1.0, 1.0)
    reference, prediction = box(shape, *np.s_[4:8, 4:8, 4:8]), box(shape, *np.s_[6:10, 4:8, 4:8])
    found = measured(reference, prediction, spacing)
    assert found["dice"] == found["precision"] == found["recall"] == 0.5
    assert found["jaccard"] == pytest.approx(1 / 3)
    assert found["voe_percent"] == pytest.approx(200 / 3)
    assert found["hd_mm"] == found["hd95_mm"] == 4  # two voxels of 2 mm
    assert found["volume_ml"] == found["reference_volume_ml"] == 0.128
    assert found["avd_percent"] == 0
    assert found["specificity"] == pytest.approx((8000 - 96) / (8000 - 64))
    assert found["density_percent"] == pytest.approx(100 * 64 / 8000)


def test_one_voxel_shifted_by_each_axis() -> None:
    shape, spacing = (9, 9, 9), (2.0, 1.0, 0.5)
    for axis, step in enumerate(spacing):
        index = [4, 4, 4]
        reference = box(shape, *(slice(i, i + 1) for i in index))
        index[axis] += 3
        found = measured(reference, box(shape, *(slice(i, i + 1) for i in index)), spacing)
        for name in ("hd_mm", "hd95_mm", "assd_mm", "msd_mm", "rms_mm", "hd95_outline_mm"):
            assert found[name] == 3 * step
        assert found["surface_dice_1mm"] == (1.0 if 3 * step <= 1 else 0.0)


def test_mean_and_rms_distance_by_hand() -> None:
    reference, prediction = box((12, 2, 2), *np.s_[0:1, :1, :1]), box((12, 2, 2), *np.s_[0:5, :1, :1])
    # A line of voxels is all surface: 0 from the reference, 0, 1, 2, 3, 4 from the prediction.
    found = measured(reference, prediction, (2.0, 1.0, 1.0))
    assert found["assd_mm"] == pytest.approx(2 * 10 / 6)
    assert found["msd_mm"] == pytest.approx((0 + 2 * 10 / 5) / 2)
    assert found["rms_mm"] == pytest.approx(2 * np.sqrt(30 / 6))
    assert found["surface_dice_1mm"] == pytest.approx(2 / 6)


def test_surface_dice_is_known_at_any_tolerance() -> None:
    reference, prediction = box((12, 2, 2), *np.s_[0:1, :1, :1]), box((12, 2, 2), *np.s_[0:5, :1, :1])
    comparison = Comparison.of(reference, prediction, Grid.of_spacing(reference.shape, (2.0, 1.0, 1.0)))
    for tolerance, within in (("0", 2), ("2", 3), ("3.9", 3), ("4.0", 4), ("100", 6)):
        [name] = metric_names(f"surface_dice_{tolerance}mm")
        assert METRICS[name].of(comparison) == pytest.approx(within / 6)
    assert metric_names("surface_dice_4.0mm,surface_dice_4mm") == ("surface_dice_4mm",)
    with pytest.raises(RecipeError, match="no metric 'surface_dice_mm'"):
        metric_names("surface_dice_mm")


def challenge_script(reference: np.ndarray, prediction: np.ndarray, spacing_mm: tuple[float, ...]) -> tuple:
    """The steps of the WMH 2017 challenge's evaluation, with its own library."""
    truth, said = (SimpleITK.GetImageFromArray(m.transpose().astype(np.uint8)) for m in (reference, prediction))
    for image in (truth, said):
        image.SetSpacing(spacing_mm)

    def outline(image: SimpleITK.Image) -> np.ndarray:
        eroded = SimpleITK.BinaryErode(image, (1, 1, 0))
        index = np.argwhere(SimpleITK.GetArrayFromImage(image - eroded))[:, ::-1]
        return np.array([image.TransformIndexToPhysicalPoint(i.tolist()) for i in index])

    a, b = outline(truth), outline(said)
    distance = np.linalg.norm(a[:, None] - b[None], axis=2)
    hd95 = max(np.percentile(distance.min(1), 95), np.percentile(distance.min(0), 95))

    def components(image: SimpleITK.Image) -> np.ndarray:
        return SimpleITK.GetArrayFromImage(SimpleITK.ConnectedComponent(image, True)).transpose()

    def found(labels: np.ndarray, other: np.ndarray) -> float:
        return len(np.unique(labels[other & (labels > 0)])) / labels.max()

    recall, precision = found(components(truth), prediction), found(components(said), reference)
    f1 = 0.0 if recall + precision == 0 else 2 * recall * precision / (recall + precision)
    dice = 2 * (reference & prediction).sum() / (reference.sum() + prediction.sum())
    avd = 100 * abs(float(reference.sum()) - float(prediction.sum())) / float(reference.sum())
    return dice, hd95, avd, recall, f1


@pytest.mark.parametrize("seed", range(5))
def test_wmh2017_is_the_challenges_own(seed: int) -> None:
    rng = np.random.default_rng(seed)
    reference, prediction = blobs(rng), blobs(rng, share=0.06)
    prediction |= reference & (rng.random(reference.shape) < 0.7)
    found = measured(reference, prediction, SPACING)
    expected = challenge_script(reference, prediction, SPACING)
    assert [found[name] for name in SETS["wmh2017"].metrics] == pytest.approx(expected, abs=1e-9)


def test_wmh2017_by_hand() -> None:
    shape = (20, 20, 4)
    reference = box(shape, *np.s_[2:5, 2:5, 1:2]) | box(shape, *np.s_[12:14, 12:14, 2:3])
    prediction = box(shape, *np.s_[2:5, 3:6, 1:2]) | box(shape, *np.s_[18:19, 2:3, 0:1])
    found = measured(reference, prediction, (1.0, 1.0, 6.0))
    # 6 of 9 and 4, 9 and 1 voxels are shared; one of two lesions is found, one of two predicted is real.
    assert found["dice"] == pytest.approx(2 * 6 / (13 + 10))
    assert found["avd_percent"] == pytest.approx(100 * 3 / 13)
    assert (found["lesion_recall"], found["lesion_f1"]) == (0.5, 0.5)


def test_other_pathology_is_left_out_of_both() -> None:
    shape = (20, 20, 4)
    reference, prediction = box(shape, *np.s_[2:5, 2:5, 1:2]), box(shape, *np.s_[2:9, 2:5, 1:2])
    known = ~box(shape, *np.s_[5:9, 2:5, 1:2])
    found = measured(reference, prediction, known=known)
    assert [found[name] for name in SETS["wmh2017"].metrics] == [1, 0, 0, 1, 1]


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "RAI", "SAR", "IPL"])
def test_apex_is_at_the_feet_and_base_at_the_head_in_any_orientation(orientation: str) -> None:
    grid = Grid.of_spacing((10, 10, 12))
    reference, prediction = box(grid.shape, *np.s_[2:8, 2:8, 0:9]), box(grid.shape, *np.s_[2:8, 2:8, 3:11])
    order, flip = grid.axes_to(orientation)
    comparison = Comparison.of(
        permute_axes(reference, order, flip), permute_axes(prediction, order, flip), grid.permute(order, flip)
    )
    assert METRICS["apex_dice"].of(comparison) == 0  # slices 0–2 and below
    assert METRICS["base_dice"].of(comparison) == pytest.approx(2 * 3 / (3 + 5))  # slices 6–8, and what lies above
    assert METRICS["base_volume_error_percent"].of(comparison) == pytest.approx(100 * 2 / 3)


@pytest.mark.parametrize("extent", range(12))
@pytest.mark.parametrize("orientation", ["RAS", "IRA"])
def test_thirds_divide_the_reference_and_none_is_empty(extent: int, orientation: str) -> None:
    grid = Grid.of_spacing((6, 6, 14))
    reference = box(grid.shape, *np.s_[1:5, 1:5, 2 : 2 + extent])
    order, flip = grid.axes_to(orientation)
    turned = permute_axes(reference, order, flip)
    comparison = Comparison.of(turned, turned, grid.permute(order, flip))
    apex, base = (comparison.part(part) for part in ("apex", "base"))
    if extent < 3:
        assert apex is base is None
        values = [METRICS[f"{part}_{name}"].of(comparison) for part in ("apex", "base") for name in PROMISE12_METRICS]
        assert all(isnan(value) for value in values), "counted as undefined: neither right nor infinitely wrong"
        return
    assert apex is not None
    assert base is not None
    slices = [part.reference.sum() // 16 for part in (apex, base)]
    assert slices[0] == slices[1] == extent // 3
    assert extent - sum(slices) >= 1
    assert METRICS["apex_dice"].of(comparison) == 1


def test_every_metric_defines_the_empty_cases() -> None:
    some, none = box((6, 6, 6), *np.s_[1:3, 1:3, 1:4]), np.zeros((6, 6, 6), bool)
    both, missed, invented = measured(none, none), measured(some, none), measured(none, some)
    for name in ("dice", "jaccard", "surface_dice_1mm", "surface_dice_area_1mm", "lesion_f1"):
        assert (both[name], missed[name], invented[name]) == (1, 0, 0)
    for name in ("hd_mm", "hd95_mm", "hd95_area_mm", "assd_mm", "rms_mm", "hd95_outline_mm"):
        assert (both[name], missed[name], invented[name]) == (0, inf, inf)
    assert isnan(both["volume_error_percent"])
    assert isnan(invented["avd_percent"])
    assert missed["avd_percent"] == 100


def test_names_and_sets_join_each_once() -> None:
    assert metric_names("wmh2017, dice,hd_mm") == (*SETS["wmh2017"].metrics, "hd_mm")
    with pytest.raises(RecipeError, match=r"no metric 'dicee'; did you mean 'dice'\?; sets are standard"):
        metric_names("dicee")
    assert all(name in METRICS for chosen in SETS.values() for name in chosen.metrics)


def test_numbers_as_tables_show_them() -> None:
    assert [formatted("hd95_mm", v) for v in (1.234, -0.5, -0.001, float("nan"), inf)] == [
        "1.23", "−0.50", "0.00", "–", "∞",
    ]  # fmt: skip
