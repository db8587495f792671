"""Values against an independent implementation, and the distinguishing cases."""

from __future__ import annotations

import math

import pytest
import torch

from delineate.core.targets import Targets
from delineate.errors import RecipeError
from delineate.losses.content import SiameseContentSpec
from delineate.losses.overlap import DiceSpec, FocalTverskySpec, GeneralisedDiceSpec, TverskySpec
from delineate.losses.pixelwise import CrossEntropySpec, FocalSpec
from delineate.losses.spec import DeepSupervisionSpec, RegionSpec, SumSpec, WeightedLoss, build_loss
from delineate.pretrained.vgg import VGG19Features

ONE = Targets({"organ": (1,)})
OVERLAPPING = Targets({"liver": (1,), "tumour": (2,)}, "overlapping")
TARGETS = Targets({"edema": (1,), "core": (2,)})
IMAGE = torch.zeros(2, 1, 6, 6, 6)


@pytest.fixture
def case():
    torch.manual_seed(0)
    return torch.randn(2, 3, 6, 6, 6), torch.randint(0, 3, (2, 1, 6, 6, 6), dtype=torch.uint8)


@pytest.mark.parametrize("over_batch", [True, False])
def test_dice_equals_monai_s(case, over_batch) -> None:
    from monai.losses import DiceLoss

    logits, target = case
    oracle = DiceLoss(
        include_background=False, to_onehot_y=True, softmax=True, batch=over_batch, smooth_nr=1.0, smooth_dr=1.0
    )
    ours = DiceSpec(smooth=1.0, over_batch=over_batch).build(TARGETS)
    torch.testing.assert_close(ours(logits, target, IMAGE), oracle(logits, target.long()), rtol=1e-5, atol=1e-6)


def test_squared_dice_equals_monai_s(case) -> None:
    from monai.losses import DiceLoss

    logits, target = case
    oracle = DiceLoss(
        include_background=False,
        to_onehot_y=True,
        softmax=True,
        batch=True,
        squared_pred=True,
        smooth_nr=1.0,
        smooth_dr=1.0,
    )
    ours = DiceSpec(denominator="squares").build(TARGETS)
    torch.testing.assert_close(ours(logits, target, IMAGE), oracle(logits, target.long()), rtol=1e-5, atol=1e-6)


def dice_by_formula(p: torch.Tensor, y: torch.Tensor, squares: bool) -> float:
    power = 2 if squares else 1
    return float(1 - (2 * (p * y).sum() + 1) / ((p**power).sum() + (y**power).sum() + 1))


@pytest.mark.parametrize("squares", [True, False])
def test_soft_dice_by_its_formula(squares) -> None:
    """2Σpy / (Σp² + Σy²) of Milletari et al., or with plain sums, 1 above and below, y being 0.1 and 0.9."""
    torch.manual_seed(0)
    logits, target = torch.randn(2, 1, 7, 5), torch.randint(0, 2, (2, 1, 7, 5), dtype=torch.uint8)
    spec = DiceSpec(denominator="squares" if squares else "sums", soft_labels=(0.1, 0.9))
    expected = dice_by_formula(logits.sigmoid(), 0.1 + 0.8 * target, squares)
    assert value(spec, logits, target, Targets({"lesion": (1,)}, "overlapping")) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("squares", "floods"), [(True, False), (False, True)])
def test_with_soft_labels_and_plain_sums_everything_marked_beats_the_right_mask(squares, floods) -> None:
    """A target that fills 1 % of the voxels: over squares the labels themselves are best; Tversky has plain sums."""
    target = torch.zeros(1, 1, 40, 40, dtype=torch.uint8)
    target[..., :4, :4] = 1
    one = Targets({"lesion": (1,)}, "overlapping")
    sure = (target.float() * 2 - 1) * 20
    spec = DiceSpec(denominator="squares" if squares else "sums", soft_labels=(0.1, 0.9))
    right, soft, everything = (value(spec, x, target, one) for x in (sure, sure * math.log(9) / 20, sure.abs()))
    assert (everything < right) == floods
    if squares:
        assert soft == pytest.approx(0, abs=1e-6)
        assert everything > 0.7
    tversky = TverskySpec(soft_labels=(0.1, 0.9))
    assert value(tversky, sure.abs(), target, one) < value(tversky, sure, target, one)


def test_cross_entropy_equals_torch_s(case) -> None:
    logits, target = case
    target[:, :, 0] = 255
    expected = torch.nn.functional.cross_entropy(logits, target[:, 0].long(), ignore_index=255)
    torch.testing.assert_close(CrossEntropySpec().build(TARGETS)(logits, target, IMAGE), expected)


def test_dice_over_the_batch_forgives_an_empty_sample() -> None:
    """One sample without the target and a few stray voxels: alone it loses nearly all, pooled very little."""
    target = torch.zeros(2, 1, 10, 10, dtype=torch.uint8)
    target[0, 0, :6] = 1
    logits = torch.stack([1 - target[:, 0].float(), target[:, 0].float()], 1) * 40 - 20
    logits[1, 1, 0, :6], logits[1, 0, 0, :6] = 20, -20
    pooled, alone = (DiceSpec(over_batch=b).build(TARGETS)(logits, target, logits).item() for b in (True, False))
    assert alone > 0.4
    assert pooled < 0.06


def test_terms_of_a_sum_are_weighted(case) -> None:
    dice, entropy = DiceSpec().build(TARGETS), CrossEntropySpec().build(TARGETS)
    spec = SumSpec(terms=(WeightedLoss(weight=2, loss=DiceSpec()), WeightedLoss(weight=0.25, loss=CrossEntropySpec())))
    expected = 2 * dice(*case, IMAGE) + 0.25 * entropy(*case, IMAGE)
    torch.testing.assert_close(spec.build(TARGETS)(*case, IMAGE), expected)


def test_deep_supervision_is_the_outermost_loss_or_refused() -> None:
    """Within another loss there is one output, and its weights would be without effect."""
    deep = DeepSupervisionSpec(loss=DiceSpec(), weights=(0.8, 0.2))
    build_loss(deep, TARGETS)
    for outer in (
        SumSpec(terms=(WeightedLoss(loss=deep),)),
        RegionSpec(loss=deep, within=("core",)),
        DeepSupervisionSpec(loss=SumSpec(terms=(WeightedLoss(loss=deep),))),
    ):
        with pytest.raises(RecipeError, match=r"deep_supervision lies within.* the outermost loss"):
            build_loss(outer, TARGETS)


# ---- against MONAI ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fp", "fn"), [(0.3, 0.7), (0.9, 0.1)])
def test_tversky_equals_monai_s(case, fp, fn) -> None:
    from monai.losses import TverskyLoss

    logits, target = case
    oracle = TverskyLoss(
        include_background=False,
        to_onehot_y=True,
        softmax=True,
        alpha=fp,
        beta=fn,
        smooth_nr=1,
        smooth_dr=1,
        batch=True,
    )
    ours = TverskySpec(fp_weight=fp, fn_weight=fn).build(TARGETS)
    torch.testing.assert_close(ours(logits, target, IMAGE), oracle(logits, target.long()))


@pytest.mark.parametrize("over_batch", [True, False])
def test_generalised_dice_equals_monai_s(case, over_batch) -> None:
    """MONAI smooths by 1e-5 where ours needs none: the weights are of the order of 1e-5 themselves."""
    from monai.losses import GeneralizedDiceLoss

    logits, target = case
    oracle = GeneralizedDiceLoss(to_onehot_y=True, softmax=True, batch=over_batch, smooth_nr=0, smooth_dr=0)
    ours = GeneralisedDiceSpec(over_batch=over_batch).build(TARGETS)
    torch.testing.assert_close(ours(logits, target, IMAGE), oracle(logits, target.long()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("focusing", [0.0, 0.5, 2.0])
def test_focal_equals_monai_s(case, focusing) -> None:
    """MONAI averages over classes too, of which all but one are zero: a factor of their number."""
    from monai.losses import FocalLoss

    logits, target = case
    oracle = FocalLoss(to_onehot_y=True, use_softmax=True, gamma=focusing)
    ours = FocalSpec(focusing=focusing).build(TARGETS)
    torch.testing.assert_close(ours(logits, target, IMAGE), 3 * oracle(logits, target.long()), rtol=1e-5, atol=1e-6)


def test_overlapping_focal_equals_monai_s() -> None:
    from monai.losses import FocalLoss

    torch.manual_seed(0)
    logits, target = torch.randn(2, 2, 5, 5), torch.randint(0, 2, (2, 2, 5, 5), dtype=torch.uint8)
    ours = FocalSpec().build(OVERLAPPING)
    torch.testing.assert_close(ours(logits, target, logits), FocalLoss(gamma=2)(logits, target.float()))


# ---- against torch -----------------------------------------------------------------------------------------------


def test_weighted_cross_entropy_equals_torch_s(case) -> None:
    logits, target = case
    target[:, :, 0] = 255
    ours = CrossEntropySpec(weights={"background": 0.5, "core": 4}).build(TARGETS)
    expected = torch.nn.functional.cross_entropy(
        logits, target[:, 0].long(), weight=torch.tensor([0.5, 1.0, 4.0]), ignore_index=255
    )
    torch.testing.assert_close(ours(logits, target, IMAGE), expected)


@pytest.mark.parametrize("soft", [(0.1, 0.9), (0.0, 0.9), (0.1, 0.8)])
def test_soft_binary_cross_entropy_equals_torch_s(soft) -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(2, 2, 5, 5), torch.randint(0, 2, (2, 2, 5, 5), dtype=torch.uint8)
    ours = CrossEntropySpec(soft_labels=soft).build(OVERLAPPING)
    labels = soft[0] + (soft[1] - soft[0]) * target.float()
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
    torch.testing.assert_close(ours(logits, target, logits), expected)


def test_soft_cross_entropy_equals_torch_s(case) -> None:
    logits, target = case
    ours = CrossEntropySpec(soft_labels=(0.1, 0.8)).build(TARGETS)
    smooth = torch.nn.functional.one_hot(target[:, 0].long(), 3).movedim(-1, 1) * 0.7 + 0.1
    torch.testing.assert_close(ours(logits, target, IMAGE), torch.nn.functional.cross_entropy(logits, smooth))


# ---- the distinguishing case of every weight ----------------------------------------------------------------------


@pytest.fixture
def quarters():
    """One target in the left half; predictions that miss a quarter, and that exceed by one."""
    target = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    target[..., :4] = 1
    truth = target[:, 0].bool()
    missed, excess = truth.clone(), truth.clone()
    missed[..., :2] = False
    excess[..., 4:6] = True
    return target, as_logits(missed), as_logits(excess), as_logits(truth)


def as_logits(mask: torch.Tensor, sureness: float = 6.0) -> torch.Tensor:
    signed = (mask.float() * 2 - 1) * sureness
    return torch.stack([-signed, signed], 1)


def value(spec, logits, target, targets=None) -> float:
    return build_loss(spec, targets or ONE)(logits, target, torch.rand(len(target), 1, *target.shape[2:])).item()


@pytest.mark.parametrize("kind", [TverskySpec, FocalTverskySpec])
def test_a_high_fn_weight_punishes_what_is_missed(quarters, kind) -> None:
    target, missed, excess, _ = quarters
    assert value(kind(fp_weight=0.1, fn_weight=0.9), missed, target) > value(
        kind(fp_weight=0.9, fn_weight=0.1), missed, target
    )
    assert value(kind(fp_weight=0.1, fn_weight=0.9), excess, target) < value(
        kind(fp_weight=0.9, fn_weight=0.1), excess, target
    )


def test_tversky_by_hand(quarters) -> None:
    """Overlap 16, missed 16: 1 - 17 / (16 + 0.7 · 16 + 1)."""
    target, missed, _, _ = quarters
    hard = missed * 10
    assert value(TverskySpec(fp_weight=0.3, fn_weight=0.7), hard, target) == pytest.approx(1 - 17 / 28.2, rel=1e-5)
    focal = FocalTverskySpec(fp_weight=0.3, fn_weight=0.7, gamma=2)
    assert value(focal, hard, target) == pytest.approx((1 - 17 / 28.2) ** 0.5, rel=1e-5)


def test_gamma_lifts_small_errors(quarters) -> None:
    target, missed, _, _ = quarters
    assert value(FocalTverskySpec(gamma=3), missed, target) > value(FocalTverskySpec(gamma=1), missed, target)


def test_focal_tversky_s_sum_counts_every_class(case) -> None:
    total, mean = (FocalTverskySpec(reduction=r).build(TARGETS)(*case, IMAGE).item() for r in ("sum", "mean"))
    assert total == pytest.approx(2 * mean)


def test_perfect_focal_tversky_has_a_gradient_that_is_finite() -> None:
    target = torch.zeros(1, 1, 4, 4, dtype=torch.uint8)
    logits = (as_logits(target[:, 0].bool()) * 100).requires_grad_()
    FocalTverskySpec(gamma=3).build(ONE)(logits, target, logits).backward()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("kind", [CrossEntropySpec, FocalSpec, DiceSpec])
def test_a_class_s_weight_makes_its_errors_dearer(kind) -> None:
    """Class "core" is missed, "edema" is right."""
    target = torch.zeros(1, 1, 6, 6, dtype=torch.uint8)
    target[:, :, :2], target[:, :, 2:4] = 1, 2
    seen = target.clone()
    seen[:, :, 2:4] = 0
    logits = torch.nn.functional.one_hot(seen[:, 0].long(), 3).movedim(-1, 1).float() * 8
    dear, cheap = ({"core": w} for w in (5.0, 0.2))
    assert value(kind(weights=dear), logits, target, TARGETS) > value(kind(weights=cheap), logits, target, TARGETS)


def test_the_background_s_weight_makes_excess_dearer(quarters) -> None:
    target, _, excess, _ = quarters
    dear, cheap = (CrossEntropySpec(weights={"background": w}) for w in (4.0, 0.5))
    assert value(dear, excess, target) > value(cheap, excess, target)


def test_the_background_counts_only_if_included(quarters) -> None:
    target, _, excess, _ = quarters
    assert value(DiceSpec(include_background=True), excess, target) != pytest.approx(value(DiceSpec(), excess, target))


def test_focusing_forgives_what_is_nearly_right() -> None:
    target = torch.ones(1, 1, 4, 4, dtype=torch.uint8)
    unsure, sure = (as_logits(target[:, 0].bool(), s) for s in (0.2, 2.0))
    ratios = [value(FocalSpec(focusing=f), sure, target) / value(FocalSpec(focusing=f), unsure, target) for f in (0, 3)]
    assert ratios[1] < ratios[0] / 10


def test_squared_volumes_make_a_small_target_matter() -> None:
    """A missed target of 4 voxels beside a perfect one of 400: nearly nothing in a plain overlap of all voxels."""
    target = torch.zeros(1, 1, 40, 40, dtype=torch.uint8)
    target[:, :, :10], target[:, :, 20:22, :2] = 1, 2
    seen = target.clone()
    seen[seen == 2] = 0
    logits = torch.nn.functional.one_hot(seen[:, 0].long(), 3).movedim(-1, 1).float() * 20
    assert value(GeneralisedDiceSpec(), logits, target, TARGETS) > 0.5


def test_soft_labels_ask_for_less_than_certainty(quarters) -> None:
    target, _, _, truth = quarters
    spec = CrossEntropySpec(soft_labels=(0.1, 0.9))
    moderate = as_logits(target[:, 0].bool(), 0.5 * math.log(9))  # probabilities 0.1 and 0.9
    assert value(spec, moderate, target) < value(spec, truth, target)
    assert value(CrossEntropySpec(), moderate, target) > value(CrossEntropySpec(), truth, target)


def test_a_weight_for_an_unknown_target_is_refused() -> None:
    with pytest.raises(RecipeError, match="'tumor'"):
        CrossEntropySpec(weights={"tumor": 2}).build(ONE)


@pytest.mark.parametrize(
    ("spec", "targets", "said"),
    [
        (DiceSpec(weights={"background": 2}), ONE, "not included; add include_background: true"),
        (DiceSpec(weights={"background": 2}), OVERLAPPING, "no background in common"),
        (TverskySpec(include_background=True), OVERLAPPING, "no background in common"),
        (FocalTverskySpec(weights={"organ": 0}), ONE, "all weights are 0"),
        (CrossEntropySpec(weights={"background": 0, "organ": 0}), ONE, "all weights are 0"),
    ],
)
def test_settings_of_classes_that_do_not_count_are_refused(spec, targets, said) -> None:
    with pytest.raises(RecipeError, match=said):
        build_loss(spec, targets)


# ---- regions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["exclusive", "overlapping"])
def test_outside_the_region_nothing_counts(mode) -> None:
    targets = Targets({"liver": (1,), "tumour": (2,)}, mode)
    target = torch.zeros(1, 1 if mode == "exclusive" else 2, 8, 8, dtype=torch.uint8)
    target[:, 0, 2:5, 2:5] = 1
    logits = torch.randn(1, targets.outputs, 8, 8, requires_grad=True)
    spec = RegionSpec(loss=CrossEntropySpec(), within=("liver",))
    build_loss(spec, targets)(logits, target, logits).backward()
    touched = logits.grad.abs().sum((0, 1)) > 0
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[2:5, 2:5] = True
    torch.testing.assert_close(touched, inside)


def test_a_region_s_box_and_margin() -> None:
    """A diagonal pair of voxels: their box is a square, widened by one on each side."""
    target = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    target[0, 0, 3, 3] = target[0, 0, 4, 5] = 1
    logits = torch.randn(2, 2, 8, 8, requires_grad=True)
    spec = RegionSpec(loss=CrossEntropySpec(), within=("organ",), box=True, dilate_voxels=1)
    build_loss(spec, ONE)(logits, target, logits).backward()
    touched = logits.grad.abs().sum(1) > 0
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[2:6, 2:7] = True
    torch.testing.assert_close(touched[0], inside)
    assert not touched[1].any()  # this sample lacks the region


def test_a_region_may_restrict_one_of_several_overlapping_targets() -> None:
    """A tumour counts within the liver alone, the liver everywhere, and the mean is over the voxels that count."""
    targets = Targets({"liver": (1, 2), "tumour": (2,)}, "overlapping")
    target = torch.zeros(1, 2, 8, 8, dtype=torch.uint8)
    target[0, 0, 2:5, 2:5] = 1
    target[0, 1, 3, 3] = 1
    logits = torch.randn(1, 2, 8, 8, requires_grad=True)
    loss = build_loss(RegionSpec(loss=CrossEntropySpec(), within=("liver",), only=("tumour",)), targets)
    value = loss(logits, target, logits)
    value.backward()
    touched = logits.grad[0] != 0
    assert touched[0].all()
    assert touched[1].nonzero().tolist() == [[x, y] for x in range(2, 5) for y in range(2, 5)]
    terms = torch.nn.functional.binary_cross_entropy_with_logits(logits, target.float(), reduction="none")
    torch.testing.assert_close(value, (terms[0, 0].sum() + terms[0, 1, 2:5, 2:5].sum()) / (64 + 9))
    with pytest.raises(RecipeError, match="for overlapping targets"):
        build_loss(RegionSpec(loss=DiceSpec(), within=("organ",), only=("organ",)), ONE)
    with pytest.raises(RecipeError, match="region 'lung' is not a target"):
        build_loss(RegionSpec(loss=DiceSpec(), within=("liver",), only=("lung",)), targets)


def test_an_unknown_region_is_refused() -> None:
    with pytest.raises(RecipeError, match="region 'lung' is not a target"):
        build_loss(RegionSpec(loss=DiceSpec(), within=("lung",)), ONE)


# ---- Siamese content -------------------------------------------------------------------------------------------------


@pytest.fixture
def content_case():
    torch.manual_seed(0)
    return torch.randn(2, 2, 16, 16), torch.randint(0, 2, (2, 1, 16, 16), dtype=torch.uint8), torch.rand(2, 1, 16, 16)


def content(**fields):
    torch.manual_seed(5)
    return SiameseContentSpec(weights="random", **fields).build(ONE)


def test_content_loss_by_its_formula(content_case) -> None:
    """One vector of both layers, of which the first has twice the length of the second."""
    logits, target, image = content_case
    loss = content()
    shown = (image - image.amin((2, 3), True)) / (image.amax((2, 3), True) - image.amin((2, 3), True))
    predicted = loss.vgg((shown * logits.softmax(1)[:, 1:]).expand(-1, 3, -1, -1))
    true = loss.vgg((shown * (0.1 + 0.8 * target)).expand(-1, 3, -1, -1))
    layers = [((p - t) ** 2).mean() for p, t in zip(predicted, true, strict=True)]
    assert predicted[0].numel() == 2 * predicted[1].numel()
    torch.testing.assert_close(loss(logits, target, image), (2 * layers[0] + layers[1]) / 3)
    torch.testing.assert_close(content(reduction="mean")(logits, target, image), (layers[0] + layers[1]) / 2)
    length = (predicted[0].numel() + predicted[1].numel()) / 2
    torch.testing.assert_close(
        content(reduction="sum")(logits, target, image), (2 * layers[0] + layers[1]) / 3 * length
    )


def test_content_loss_of_volumes_over_their_maximum(content_case) -> None:
    """f(x · y), masked from 0 to 1, three equal channels, then VGG's preprocessing: ℓ = Σ(f(xy) − f(xy′))² / L."""
    logits, target, image = content_case
    image = image * 0.4  # a slice that holds neither the volume's darkest nor its brightest voxel
    loss = content(intensities="prepared")
    weights = loss.vgg.state_dict()

    def f(masked: torch.Tensor) -> torch.Tensor:
        """Of one image (16, 16)."""
        mean, sd = (torch.tensor(x).view(3, 1, 1) for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
        x, layers = ((torch.stack([masked] * 3) - mean) / sd)[None], []
        for pair in ((0, 2), (5, 7)):
            for i in pair:
                x = torch.nn.functional.conv2d(
                    x, weights[f"features.{i}.weight"], weights[f"features.{i}.bias"], padding=1
                )
                x = x.clamp_min(0)
            x = torch.nn.functional.max_pool2d(x, 2)
            layers.append(x.flatten())
        return torch.cat(layers)

    distances = []
    for x, y, p in zip(image[:, 0], 0.1 + 0.8 * target[:, 0], logits.softmax(1)[:, 1], strict=True):
        squared = (f(x * y) - f(x * p)) ** 2
        distances.append(squared.sum() / len(squared))
    torch.testing.assert_close(loss(logits, target, image), torch.stack(distances).mean())
    assert loss(logits, target, image) < 0.5 * content()(logits, target, image), "stretched to 0…1, it counts for more"


def test_the_paper_s_vector_has_its_length() -> None:
    with torch.device("meta"):
        first, second = VGG19Features("torchvision")(torch.empty(1, 3, 224, 224))
    assert first.numel() + second.numel() == 1_204_224


def test_content_of_any_number_of_pools_is_one_vector(content_case) -> None:
    """Each pool adds its squares to the distance, and its length to the vector."""
    logits, target, image = (torch.nn.functional.interpolate(x, scale_factor=4) for x in content_case)
    for pools in (1, 2, 3, 4, 5):
        loss = content(pools=pools, intensities="prepared")
        predicted = loss.vgg((image * logits.softmax(1)[:, 1:]).expand(-1, 3, -1, -1))
        true = loss.vgg((image * (0.1 + 0.8 * target)).expand(-1, 3, -1, -1))
        assert [layer.shape[1:] for layer in predicted] == [
            (channels, 64 >> level, 64 >> level)
            for level, channels in enumerate((64, 128, 256, 512, 512)[:pools], start=1)
        ]
        squares = sum(((p - t) ** 2).flatten(1).sum(1) for p, t in zip(predicted, true, strict=True))
        torch.testing.assert_close(loss(logits, target, image), (squares / sum(p[0].numel() for p in predicted)).mean())
    with pytest.raises(RecipeError, match="halves images 5 times; got 16×16 pixels"):
        content(pools=5)(*content_case)


def test_content_looks_at_the_image_under_the_mask(content_case) -> None:
    """Masks that differ only where the image is black are the same to it."""
    logits, target, image = content_case
    image[..., :8] = 0
    other = logits.clone()
    other[..., :8] *= -1
    loss = content()
    torch.testing.assert_close(loss(logits, target, image), loss(other, target, image))


def test_only_a_trained_content_loss_has_an_adversary(content_case) -> None:
    fixed, game = content(), content(trained=True)
    assert fixed.adversary == []
    assert sum(p.numel() for p in game.adversary) == 260_160
    game(*content_case).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in game.adversary)


def test_content_s_slope(content_case) -> None:
    logits, target, image = content_case
    logits, loss = logits.double().requires_grad_(), content(reduction="sum").double()
    assert torch.autograd.gradcheck(lambda x: loss(x, target, image), logits, fast_mode=True)


def test_content_takes_the_middle_of_a_larger_image(content_case) -> None:
    """Networks of valid convolutions, and neighbouring slices as channels."""
    logits, target, image = content_case
    larger = torch.rand(2, 3, 20, 20)
    larger[:, 1:2] = torch.nn.functional.pad(image, (2, 2, 2, 2))
    torch.testing.assert_close(content()(logits, target, larger), content()(logits, target, image))
