"""Every loss keeps the laws of ``delineate.testing``; a new one is a line in ``SPECS``."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from delineate.losses.base import known_voxels
from delineate.losses.content import SiameseContentSpec
from delineate.losses.overlap import DiceSpec, FocalTverskySpec, GeneralisedDiceSpec, TverskySpec
from delineate.losses.pixelwise import CrossEntropySpec, FocalSpec
from delineate.losses.spec import (
    DICE_AND_CROSS_ENTROPY,
    DeepSupervisionSpec,
    RegionSpec,
    SumSpec,
    WeightedLoss,
)
from delineate.testing import check_loss
from delineate.testing.losses import LOSS_LAWS, TARGETS, built, perfect_logits, some_image, some_target

SPECS = {
    "cross entropy": CrossEntropySpec(),
    "weighted cross entropy": CrossEntropySpec(weights={"a": 3, "background": 0.5}),
    "focal": FocalSpec(),
    "dice": DiceSpec(),
    "dice over squares": DiceSpec(denominator="squares"),
    "dice of each sample": DiceSpec(over_batch=False),
    "weighted dice": DiceSpec(weights={"a": 3, "b": 5}),
    "generalised dice": GeneralisedDiceSpec(),
    "tversky": TverskySpec(),
    "focal tversky": FocalTverskySpec(),
    "focal tversky, summed": FocalTverskySpec(gamma=3, reduction="sum"),
    "dice + cross entropy": DICE_AND_CROSS_ENTROPY,
    "dice near a region": RegionSpec(loss=DiceSpec(), within=("a", "b"), box=True, dilate_voxels=4),
    "siamese content": SiameseContentSpec(weights="random", soft_labels=None),
    "siamese content, as prepared": SiameseContentSpec(weights="random", soft_labels=None, intensities="prepared"),
    "siamese content, trained": SiameseContentSpec(weights="random", soft_labels=None, trained=True, reduction="mean"),
}
# Their reference is never met exactly.
SOFT = {
    "soft cross entropy": CrossEntropySpec(soft_labels=(0.1, 0.9)),
    "soft dice": DiceSpec(soft_labels=(0.1, 0.9)),
    "soft dice over squares": DiceSpec(soft_labels=(0.1, 0.9), denominator="squares"),
    "soft generalised dice": GeneralisedDiceSpec(soft_labels=(0.1, 0.9)),
    "soft siamese content": SiameseContentSpec(weights="random"),
}


@pytest.fixture(params=[*SPECS.values(), *SOFT.values()], ids=[*SPECS, *SOFT])
def any_spec(request):
    return request.param


@pytest.fixture(params=TARGETS.values(), ids=TARGETS.keys())
def targets(request):
    return request.param


# A soft reference is never met exactly; without its region nothing counts; features are float32 on purpose, and
# distances between them do not add up row by row: their slope is checked beside their values.
NEEDS_HARD = {"perfection_is_the_minimum", "it_grows_with_every_wrong_row", "an_absent_target_is_judged_too"}
SKIPPED = {
    RegionSpec: {"an_absent_target_is_judged_too"},
    SiameseContentSpec: {"it_grows_with_every_wrong_row", "gradients_are_right"},
}


KEPT = [
    pytest.param(spec, law, id=f"{name}-{law.__name__}")
    for name, spec in (SPECS | SOFT).items()
    for law in LOSS_LAWS
    if law.__name__ not in SKIPPED.get(type(spec), set()) | (NEEDS_HARD if name in SOFT else set())
]


@pytest.mark.parametrize(("spec", "law"), KEPT)
def test_it_keeps(spec, law, targets) -> None:
    law(spec, targets)


def test_dice_with_the_background_keeps_them_for_exclusive_targets() -> None:
    check_loss(DiceSpec(include_background=True, weights={"background": 1, "a": 3, "b": 5}), modes=("exclusive",))


@pytest.mark.parametrize("name", [name for name in SPECS if "siamese" in name])
def test_a_distance_of_features_grows_from_its_beginning(name, targets) -> None:
    image, target = some_image(), some_target(targets)
    loss, logits = built(SPECS[name], targets), perfect_logits(target, targets, 3.0)
    values = [loss(logits, target, image).item()]
    for x in range(8):
        logits[:, :, x] *= -1
        values.append(loss(logits, target, image).item())
    assert values[0] < min(values[1:])


@pytest.mark.parametrize("weights", [None, (1.0, 3.0)])
def test_answers_at_several_sizes_are_weighed(any_spec, targets, weights) -> None:
    image, target = some_image(), some_target(targets)
    fine, coarse = perfect_logits(target, targets), torch.randn(2, 3, 4, 4)
    spec = DeepSupervisionSpec(loss=any_spec, weights=weights) if weights else any_spec
    loss, alone = built(spec, targets), built(any_spec, targets)
    share = weights[1] / sum(weights) if weights else 1 / 3
    small = alone(coarse, target[:, :, 1::2, 1::2], torch.nn.functional.avg_pool2d(image, 2))
    expected = (1 - share) * alone(fine, target, image) + share * small
    assert loss((fine, coarse), target, image).item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss(fine, target, image).item() == alone(fine, target, image).item()


def test_sums_add(any_spec, targets) -> None:
    image, target, logits = some_image(), some_target(targets), torch.randn(2, 3, 8, 8)
    terms = (WeightedLoss(weight=2.0, loss=any_spec), WeightedLoss(weight=0.5, loss=DiceSpec()))
    expected = 2 * built(any_spec, targets)(logits, target, image) + 0.5 * built(DiceSpec(), targets)(
        logits, target, image
    )
    assert built(SumSpec(terms=terms), targets)(logits, target, image).item() == pytest.approx(
        expected.item(), rel=1e-6
    )


class Upside(DiceSpec):
    """The wrong way round."""

    kind: Literal["upside"] = "upside"

    def build(self, targets):
        dice = super().build(targets)
        return lambda logits, target, image: 1 - dice(logits, target, image)


class Total(CrossEntropySpec):
    """A sum over voxels."""

    kind: Literal["total"] = "total"

    def build(self, targets):
        mean = super().build(targets)
        return lambda logits, target, image: mean(logits, target, image) * known_voxels(target).sum()


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (Upside(), r"perfection_is_the_minimum.*a perfect prediction costs 1"),
        (Total(), r"volumes_are_judged_like_slices.*a slice costs"),
    ],
    ids=["upside", "total"],
)
def test_a_loss_that_breaks_a_promise_is_told_which(loss, says) -> None:
    with pytest.raises(AssertionError, match=says):
        check_loss(loss)
